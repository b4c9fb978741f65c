import math
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from dense import Example, examples
from hypothesis import given
from pydantic import ValidationError
from small import SETTING, make_batch, make_plain, make_student
from torch import Tensor

from distill_cli.errors import UsageError
from distill_cli.objectives.deit import DeiT, DeiTConfig, hard_distillation
from distill_cli.objectives.logits import soft_loss
from distill_cli.sparse import SparseLogits, top_k

SOFT = DeiTConfig(distillation="soft")


def soft_distillation(logits: Tensor, rows: SparseLogits, temperature: float) -> Tensor:
    return soft_loss(logits, rows, SOFT, temperature)


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
    settings = {"distillation": "soft", "temperature": temperature}
    logits, batch = torch.randn(8, 5), make_batch()
    batchmean, numel = (
        DeiT(make_student(), DeiTConfig(reduction=name, **settings), SETTING).distillation(logits, batch)
        for name in ("batchmean", "numel")
    )
    torch.testing.assert_close(batchmean, 5 * numel)


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
    student, batch = make_student(), make_batch()
    rows = batch.teacher
    assert rows is not None
    token_logits = torch.randn(8, 5)
    hard, soft = (DeiT(student, DeiTConfig(distillation=name, temperature=3.0), SETTING) for name in ("hard", "soft"))
    assert torch.equal(hard.distillation(token_logits, batch), hard_distillation(token_logits, rows))
    assert torch.equal(soft.distillation(token_logits, batch), soft_distillation(token_logits, rows, 3.0))


OWN_HEAD = [
    ("levit_128s", {}, 224),
    ("pit_ti_distilled_224", {}, 224),
    ("efficientformer_l1", {}, 224),
    ("efficientformerv2_s0", {}, 224),
    ("repvit_m0_9", {}, 32),
    ("swiftformer_xs", {}, 32),
    ("efficientvim_m1_dist", {}, 64),
    ("iformer_m_distilled", {}, 64),
]


@pytest.mark.parametrize(("name", "arguments", "size"), OWN_HEAD)
def test_a_student_with_a_distillation_head_of_timm_s_trains_that(name: str, arguments: Any, size: int) -> None:
    student = timm.create_model(name, num_classes=5, **arguments)
    keys = student.state_dict().keys()
    objective = DeiT(student, DeiTConfig(), replace(SETTING, image_size=size)).train()
    batch = replace(make_batch(2), images=torch.randn(2, 3, size, size))
    objective(batch).total.backward()
    heads = {name: each.grad is not None for name, each in student.named_parameters() if "_dist" in name}
    assert heads
    assert all(heads.values())
    assert student.state_dict().keys() == keys
    with pytest.raises(UsageError, match=r"^objective.second_head: \w+ has a distillation head of its own; leave it"):
        DeiT(student, DeiTConfig(second_head="average"), SETTING)


def test_a_student_without_a_head_is_refused_where_it_shall_not_have_a_second() -> None:
    line = r'^objective.second_head: VisionTransformer has no distillation head; give "average" or "drop", .*deit-tiny'
    with pytest.raises(UsageError, match=line):
        DeiT(make_plain(), DeiTConfig(second_head=False), SETTING)


@pytest.mark.parametrize("name", ["levit_256d", "pit_ti_224", "iformer_t", "volo_d1_224"])
def test_a_student_whose_logits_are_not_one_linear_layer_s_is_refused(name: str) -> None:
    """LeViT's and iFormer's have a BatchNorm, PiT's pooling knows its token, VOLO adds a second classifier's."""
    student = timm.create_model(name, num_classes=5)
    with pytest.raises(UsageError, match=r"^objective deit: \w+ has no distillation head, and no single .*tinyvit$"):
        DeiT(student, DeiTConfig(), replace(SETTING, image_size=224))


@pytest.mark.parametrize("how", ["average", "drop"])
def test_a_second_head_learns_from_the_teacher_and_the_first_from_the_labels(how: str) -> None:
    batch = make_batch()
    assert batch.teacher is not None
    objective = DeiT(make_plain(), DeiTConfig(alpha=0.3, second_head=how, label_smoothing=0), SETTING).train()
    features = objective.student.forward_head(objective.student.forward_features(batch.images), pre_logits=True)
    first, second = objective.student.head(features), objective.student.head_dist(features)
    expected = 0.7 * F.cross_entropy(first, batch.labels) + 0.3 * F.cross_entropy(second, batch.teacher.top1)
    torch.testing.assert_close(objective(batch).total, expected)


@pytest.mark.parametrize("settings", [{"tail": "bucket"}, {"divergence": "jsd"}, {"standardise": True}])
def test_what_the_soft_part_has_is_refused_for_the_hard_one(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f'{next(iter(settings))} is of distillation = "soft"; give that too'):
        DeiTConfig(**settings)


def test_the_reduction_by_classes_is_of_kl_alone() -> None:
    with pytest.raises(ValidationError, match="reduction numel is of divergence kl"):
        DeiTConfig(distillation="soft", reduction="numel", divergence="jsd")
