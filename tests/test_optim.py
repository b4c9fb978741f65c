import itertools

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distill_cli.objectives.supervised import Supervised, SupervisedConfig
from distill_cli.optim import TrainConfig, build_optimizer, default_lr, learning_rate

CONFIG = TrainConfig(lr=1e-3, warmup_lr=1e-6, min_lr=1e-5)


def groups(student: nn.Module) -> tuple[set[str], set[str]]:
    """Names of the student's parameters with and without weight decay."""
    objective = Supervised(student, SupervisedConfig())
    optimizer = build_optimizer(objective, TrainConfig(lr=1e-3, weight_decay=0.05))
    named = {id(parameter): name.removeprefix("student.") for name, parameter in objective.named_parameters()}
    names: dict[float, set[str]] = {0.05: set(), 0.0: set()}
    for group in optimizer.param_groups:
        names[group["weight_decay"]] |= {named[id(parameter)] for parameter in group["params"]}
    return names[0.05], names[0.0]


def test_the_learning_rate_starts_peaks_and_ends_where_it_is_told_to() -> None:
    assert learning_rate(0, 100, 10, CONFIG) == 1e-6
    assert learning_rate(10, 100, 10, CONFIG) == 1e-3
    assert learning_rate(55, 100, 10, CONFIG) == pytest.approx((1e-3 + 1e-5) / 2)
    assert learning_rate(100, 100, 10, CONFIG) == pytest.approx(1e-5)


@given(total=st.integers(1, 500), data=st.data())
def test_the_learning_rate_rises_in_the_warmup_and_falls_after_it(total: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, total))
    rates = [learning_rate(step, total, warmup, CONFIG) for step in range(total)]
    assert all(before < after for before, after in itertools.pairwise(rates[: warmup + 1]))
    assert all(before > after for before, after in itertools.pairwise(rates[warmup:]))
    assert all(0 < rate <= 1e-3 for rate in rates)


@given(lr=st.floats(1e-6, 1), warmup=st.integers(0, 20))
def test_no_step_is_above_the_peak(lr: float, warmup: int) -> None:
    config = TrainConfig(lr=lr)
    assert max(learning_rate(step, 20, warmup, config) for step in range(21)) <= lr * (1 + 1e-9)


def test_without_warmup_the_first_step_has_the_peak() -> None:
    assert learning_rate(0, 50, 0, CONFIG) == 1e-3


def test_the_default_rate_grows_with_the_batch() -> None:
    assert [default_lr(512), default_lr(1024)] == [5e-4, 1e-3]


def test_tinyvit_decays_no_norm_bias_or_attention_bias() -> None:
    decayed, exempt = groups(timm.create_model("tiny_vit_5m_224", num_classes=10))
    assert not [name for name in decayed if "norm" in name or "bias" in name or ".bn." in name]
    assert [name for name in exempt if name.endswith("attention_biases")]
    assert "head.fc.weight" in decayed
    assert "stages.1.blocks.0.attn.qkv.weight" in decayed


def test_deit_decays_no_norm_bias_token_or_position() -> None:
    student = timm.create_model("deit_tiny_distilled_patch16_224", depth=1, embed_dim=48, num_heads=3)
    decayed, exempt = groups(student)
    assert {"cls_token", "dist_token", "pos_embed", "norm.weight", "blocks.0.attn.qkv.bias"} <= exempt
    assert decayed == {
        "patch_embed.proj.weight", "head.weight", "head_dist.weight", "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight",
    }  # fmt: skip


class Speaking(nn.Module):
    """Parameters of two dims, one of which it exempts by a part of its name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.attention_biases, self.my_gate = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))

    def no_weight_decay_keywords(self) -> set[str]:
        return {"gate"}


def test_attention_biases_and_what_a_student_exempts_itself_are_not_decayed() -> None:
    assert groups(Speaking()) == ({"weight"}, {"attention_biases", "my_gate"})


@pytest.mark.parametrize("name", ["tiny_vit_5m_224", "deit_tiny_distilled_patch16_224", "levit_128s", "resnet18"])
def test_every_trained_parameter_is_in_exactly_one_group(name: str) -> None:
    with torch.device("meta"):
        student = timm.create_model(name)
    objective = Supervised(student, SupervisedConfig())
    next(student.parameters()).requires_grad_(False)
    grouped = [id(p) for group in build_optimizer(objective, CONFIG).param_groups for p in group["params"]]
    trained = [id(parameter) for parameter in objective.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trained)


@given(lr=st.floats(1e-6, 1), decay=st.floats(0, 1), beta=st.floats(0, 0.99))
def test_the_optimizer_has_the_settings_of_the_recipe(lr: float, decay: float, beta: float) -> None:
    config = TrainConfig(lr=lr, weight_decay=decay, betas=(beta, 0.5), eps=1e-6)
    optimizer = build_optimizer(Supervised(nn.Linear(2, 2), SupervisedConfig()), config)
    for group, weight_decay in zip(optimizer.param_groups, (decay, 0.0), strict=True):
        assert (group["lr"], group["weight_decay"]) == (lr, weight_decay)
        assert (tuple(group["betas"]), group["eps"]) == ((beta, 0.5), 1e-6)
