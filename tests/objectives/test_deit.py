import math

import pytest
import timm
import torch
import torch.nn.functional as F
from dense import Example, examples
from hypothesis import given
from small import SETTING, make_batch, make_student

from distill_cli.errors import UsageError
from distill_cli.objectives.deit import DeiT, DeiTConfig, hard_distillation, soft_distillation
from distill_cli.sparse import SparseLogits, top_k


@given(examples())
def test_soft_distillation_is_the_dense_kl(example: Example) -> None:
    ours = soft_distillation(example.logits, example.rows, example.temperature)
    example.assert_same(ours, example.temperature**2 * example.kl.mean())


@given(examples())
def test_hard_distillation_is_the_cross_entropy_with_the_first_class(example: Example) -> None:
    ours = hard_distillation(example.logits, example.rows).double()
    dense = -example.logits.log_softmax(-1)[range(len(example.logits)), example.rows.class_id[:, 0]].mean()
    torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_two_reductions_differ_by_the_number_of_classes(temperature: float) -> None:
    logits, rows = torch.randn(6, 32), top_k(torch.randn(6, 32), 5)
    batchmean, numel = (soft_distillation(logits, rows, temperature, name) for name in ("batchmean", "numel"))
    assert batchmean.item() == 32 * numel.item()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_student_that_is_the_teacher_costs_nothing(temperature: float) -> None:
    logits = torch.randn(6, 32)
    assert soft_distillation(logits, top_k(logits, 32), temperature).abs() < 1e-5


def test_a_uniform_student_costs_log_c_less_the_entropy() -> None:
    teacher = torch.randn(6, 32)
    entropy = torch.special.entr(teacher.softmax(-1)).sum(-1).mean().item()
    loss = soft_distillation(torch.zeros(6, 32), top_k(teacher, 32), 1.0)
    assert loss.item() == pytest.approx(math.log(32) - entropy, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_half_precision_logits_are_taken_in_float32_before_the_temperature(temperature: float) -> None:
    logits, rows = (3 * torch.randn(16, 50)).bfloat16(), top_k(torch.randn(16, 50), 10)
    ours = soft_distillation(logits, rows, temperature)
    torch.testing.assert_close(ours, soft_distillation(logits.float(), rows, temperature), rtol=1e-5, atol=0)


def test_it_is_a_mean_over_the_batch_however_it_is_split() -> None:
    logits, teacher = torch.randn(8, 20, dtype=torch.float64), torch.randn(8, 20)
    parts = [soft_distillation(logits[i : i + 4], top_k(teacher[i : i + 4], 5), 2.0) for i in (0, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), soft_distillation(logits, top_k(teacher, 5), 2.0))


def test_the_total_weighs_labels_on_the_class_token_and_teacher_on_the_other() -> None:
    objective = DeiT(make_student(), DeiTConfig(alpha=0.3, label_smoothing=0.2), SETTING).train()
    batch = make_batch()
    assert batch.teacher is not None
    class_logits, token_logits = objective.student(batch.images)
    label = F.cross_entropy(class_logits, batch.labels, label_smoothing=0.2)
    expected = 0.7 * label + 0.3 * F.cross_entropy(token_logits, batch.teacher.class_id[:, 0])
    torch.testing.assert_close(objective(batch).total, expected)


@pytest.mark.parametrize(("alpha", "still"), [(0.0, "head_dist"), (1.0, "head")])
def test_each_head_learns_from_its_own_part(alpha: float, still: str) -> None:
    objective = DeiT(make_student(), DeiTConfig(alpha=alpha), SETTING).train()
    objective(make_batch()).total.backward()
    moved = {name for name in ("head", "head_dist") if objective.student.get_submodule(name).weight.grad.any()}
    assert moved == {"head", "head_dist"} - {still}


def test_only_the_label_part_is_smoothed() -> None:
    student = make_student()
    plain, smooth = (
        DeiT(student, DeiTConfig(label_smoothing=value), SETTING).train()(make_batch()).parts for value in (0.0, 0.5)
    )
    assert torch.equal(plain["distill"], smooth["distill"])
    assert not torch.equal(plain["label"], smooth["label"])


def test_the_temperature_is_of_the_soft_part_alone() -> None:
    student, rows = make_student(), SparseLogits(*vars(make_batch().teacher).values())
    token_logits = torch.randn(8, 5)
    hard, soft = (DeiT(student, DeiTConfig(distillation=name, temperature=3.0), SETTING) for name in ("hard", "soft"))
    assert torch.equal(hard.distillation(token_logits, rows), hard_distillation(token_logits, rows))
    assert torch.equal(soft.distillation(token_logits, rows), soft_distillation(token_logits, rows, 3.0))


def test_a_student_without_a_token_is_refused() -> None:
    with pytest.raises(UsageError, match=r"ResNet has no distillation token; .*deit-tiny.*--objective tinyvit"):
        DeiT(timm.create_model("resnet18", layers=[1, 1, 1, 1], channels=[8, 8, 8, 8]), DeiTConfig(), SETTING)
