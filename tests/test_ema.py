import pytest
import timm
import torch
from torch import Tensor, nn

from distill_cli.ema import build_ema
from distill_cli.optim import TrainConfig


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def walk(model: nn.Module, steps: int) -> list[dict[str, Tensor]]:
    """A training; gives the state after each step."""
    optimizer, states = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in range(steps):
        images = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
        states.append({name: value.double().clone() for name, value in model.state_dict().items()})
    return states


@pytest.mark.parametrize("warmup", [False, True])
def test_it_is_the_float64_loop_of_its_formula(warmup: bool) -> None:
    decay = 0.9
    states = walk(make_model(), 40)
    expected = states[0]
    for step, state in enumerate(states[1:], 2):
        weight = min(decay, 1 - step ** (-2 / 3)) if warmup else decay
        expected = {name: weight * expected[name] + (1 - weight) * value for name, value in state.items()}
    model = make_model()
    ema = build_ema(model, TrainConfig(ema_decay=decay, ema_warmup=warmup))
    assert ema is not None
    for step, state in enumerate(states, 1):
        model.load_state_dict(state)
        ema.update(model, step)
    found = ema.module.state_dict()
    for name, value in expected.items():
        if name.endswith("num_batches_tracked"):
            assert found[name] == len(states)
        else:
            torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6)
    assert "1.running_var" in expected


def test_after_the_first_step_it_is_the_student() -> None:
    model = make_model()
    ema = build_ema(model, TrainConfig(ema_decay=0.999))
    assert ema is not None
    walk(model, 1)
    ema.update(model, 1)
    assert all(torch.equal(ema.module.state_dict()[name], value) for name, value in model.state_dict().items())


def test_it_is_never_trained_and_stays_apart() -> None:
    model = make_model()
    ema = build_ema(model, TrainConfig(ema_decay=0.5))
    assert ema is not None
    assert not any(parameter.requires_grad for parameter in ema.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    before = {name: value.clone() for name, value in ema.module.state_dict().items()}
    walk(model, 2)
    assert all(torch.equal(ema.module.state_dict()[name], value) for name, value in before.items())


def test_without_a_decay_there_is_none() -> None:
    assert build_ema(make_model(), TrainConfig()) is None


@pytest.mark.parametrize("name", ["levit_128s", "tiny_vit_5m_224"])
def test_attention_biases_that_a_model_keeps_for_evaluation_are_forgotten_between_two(name: str) -> None:
    """What `_validate` relies on: after `train().eval()` the model evaluates by the weights it has now."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3)
    ema = build_ema(model, TrainConfig(ema_decay=0.5))
    assert ema is not None
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        ema.module.train().eval()(images)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("attention_biases"):
                parameter.normal_()
    ema.update(model, 2)
    with torch.inference_mode():
        stale = ema.module(images)
        fresh = ema.module.train().eval()(images)
    other = timm.create_model(name, num_classes=3).eval()
    other.load_state_dict(ema.module.state_dict())
    with torch.inference_mode():
        assert torch.equal(fresh, other(images))
    assert not torch.equal(stale, fresh)
