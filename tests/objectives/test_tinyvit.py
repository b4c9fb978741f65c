import math

import pytest
import torch
from dense import Example, examples
from hypothesis import given
from small import SETTING, make_batch, make_student
from torch import Tensor

from distill_cli.objectives import build
from distill_cli.objectives.logits import soft_loss
from distill_cli.objectives.ramps import Ramp
from distill_cli.objectives.tinyvit import TinyViTConfig
from distill_cli.sparse import SparseLogits, top_k


def soft_cross_entropy(logits: Tensor, rows: SparseLogits, temperature: float = 1.0) -> Tensor:
    return soft_loss(logits, rows, TinyViTConfig(), temperature)


@given(examples())
def test_it_is_the_dense_soft_cross_entropy(example: Example) -> None:
    ours = soft_cross_entropy(example.logits, example.rows, example.temperature)
    example.assert_same(ours, example.temperature**2 * example.cross_entropy.mean())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_a_uniform_student_costs_log_c(temperature: float) -> None:
    loss = soft_cross_entropy(torch.zeros(3, 20), top_k(torch.randn(3, 20), 5), temperature)
    assert loss.item() == pytest.approx(temperature**2 * math.log(20), rel=1e-6)


def test_a_certain_teacher_makes_it_the_cross_entropy_with_its_class() -> None:
    logits = torch.randn(4, 8)
    certain = SparseLogits(torch.tensor([[1], [7], [0], [1]]), torch.zeros(4, 1), torch.full((4,), -math.inf))
    expected = torch.nn.functional.cross_entropy(logits, certain.top1)
    torch.testing.assert_close(soft_cross_entropy(logits, certain), expected)


def test_all_classes_kept_need_no_tail() -> None:
    logits, teacher = torch.randn(4, 8), torch.randn(4, 8)
    expected = -(teacher.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(soft_cross_entropy(logits, top_k(teacher, 8)), expected)


def test_the_gradient_at_temperature_one_is_student_minus_teacher() -> None:
    logits, teacher = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    soft_cross_entropy(logits, top_k(teacher, 8)).backward()
    torch.testing.assert_close(logits.grad, (logits.softmax(-1) - teacher.softmax(-1)).detach() / 4)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_half_precision_logits_are_taken_in_float32_before_the_temperature(temperature: float) -> None:
    logits, rows = (3 * torch.randn(16, 50)).bfloat16(), top_k(torch.randn(16, 50), 10)
    ours = soft_cross_entropy(logits, rows, temperature)
    torch.testing.assert_close(ours, soft_cross_entropy(logits.float(), rows, temperature), rtol=1e-6, atol=0)


def test_it_is_a_mean_over_the_batch_however_it_is_split() -> None:
    logits, teacher = torch.randn(8, 20, dtype=torch.float64), torch.randn(8, 20)
    parts = [soft_cross_entropy(logits[i : i + 2], top_k(teacher[i : i + 2], 5), 2.0) for i in range(0, 8, 2)]
    torch.testing.assert_close(torch.stack(parts).mean(), soft_cross_entropy(logits, top_k(teacher, 5), 2.0))


def test_the_label_term_is_added_by_its_weight_at_each_progress() -> None:
    batch, student = make_batch(), make_student()
    config = TinyViTConfig(label_weight=Ramp(start=0, end=2), label_smoothing=0.1)
    objective = build(config, student, SETTING).eval()
    alone = build(TinyViTConfig(), student, SETTING).eval()(batch).total
    label = torch.nn.functional.cross_entropy(student(batch.images), batch.labels, label_smoothing=0.1)
    for progress in (0.0, 0.5, 1.0):
        objective.go_to(progress)
        torch.testing.assert_close(objective(batch).total, alone + 2 * progress * label)
    assert objective.needs == {"labels", "logits"}
