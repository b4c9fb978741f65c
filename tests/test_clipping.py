import copy

import pytest
import timm
import torch
from timm.utils import adaptive_clip_grad
from torch import Tensor, nn

from distill_cli.clipping import clip_gradients
from distill_cli.objectives import Setting
from distill_cli.objectives.supervised import Supervised, SupervisedConfig
from distill_cli.optim import TrainConfig


def trained(name: str = "deit_tiny_distilled_patch16_224", scale: float = 100.0) -> nn.Module:
    """A small student after a backward pass; one parameter has no gradient."""
    torch.manual_seed(0)
    arguments = {"img_size": 28, "patch_size": 7, "embed_dim": 48, "depth": 1, "num_heads": 3} if "deit" in name else {}
    student = timm.create_model(name, num_classes=4, **arguments)
    student.register_parameter("unused", nn.Parameter(torch.ones(3)))
    (scale * student(torch.randn(2, 3, 28, 28) if arguments else torch.randn(2, 3, 64, 64))).square().mean().backward()
    return student


def clip(student: nn.Module, mode: str, bound: float) -> Tensor:
    config = TrainConfig(lr=1e-3, clip_mode=mode, clip_grad=bound)  # type: ignore[arg-type]
    return clip_gradients(Supervised(student, SupervisedConfig(), Setting(28)), config)


def gradients(student: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def norm(values: dict[str, Tensor]) -> float:
    return float(torch.cat([value.double().flatten() for value in values.values()]).norm())


def test_norm_is_torchs_bit_for_bit() -> None:
    student = trained()
    expected = copy.deepcopy(student)
    for mine, theirs in zip(student.parameters(), expected.parameters(), strict=True):
        theirs.grad = None if mine.grad is None else mine.grad.clone()
    told = clip(student, "norm", 0.5)
    assert torch.equal(told, nn.utils.clip_grad_norm_(expected.parameters(), 0.5))
    found = gradients(student)
    assert all(torch.equal(found[name], value) for name, value in gradients(expected).items())
    assert norm(found) == pytest.approx(0.5, rel=1e-4)


def test_value_bounds_every_component() -> None:
    student = trained()
    before = gradients(student)
    clip(student, "value", 0.01)
    for name, gradient in gradients(student).items():
        assert torch.equal(gradient, before[name].clamp(-0.01, 0.01))


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "levit_128s", "test_byobnet", "tiny_vit_5m_224"])
def test_agc_is_timms_on_all_but_the_classifiers(name: str) -> None:
    student = trained() if "deit" in name else trained_at_its_size(name)
    heads = {f"{head}." for head in classifiers(student)}
    before = gradients(student)
    expected = {n: nn.Parameter(p.detach().clone()) for n, p in student.named_parameters() if p.grad is not None}
    for key, parameter in expected.items():
        parameter.grad = before[key].clone()
    adaptive_clip_grad([p for key, p in expected.items() if not key.startswith(tuple(heads))], 0.01)
    clip(student, "agc", 0.01)
    found = gradients(student)
    assert all(torch.equal(found[key], parameter.grad) for key, parameter in expected.items())
    changed = {key for key in found if not torch.equal(found[key], before[key])}
    assert changed
    assert not [key for key in changed if key.startswith(tuple(heads))]


def classifiers(student: nn.Module) -> tuple[str, ...]:
    """The modules of the heads, as timm names them."""
    named = student.pretrained_cfg["classifier"]
    names = (named,) if isinstance(named, str) else named
    return tuple(name.removesuffix(".linear") for name in names)


def trained_at_its_size(name: str) -> nn.Module:
    torch.manual_seed(0)
    student = timm.create_model(name, num_classes=4)
    size = 64 if "byob" in name else 224
    (100 * student(torch.randn(2, 3, size, size))).square().mean().backward()
    return student


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_the_norm_is_that_before_clipping(mode: str) -> None:
    student = trained()
    expected = norm(gradients(student))
    assert float(clip(student, mode, 0.01)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_zero_does_not_clip(mode: str) -> None:
    student = trained()
    before = gradients(student)
    clip(student, mode, 0)
    assert all(torch.equal(value, before[name]) for name, value in gradients(student).items())
