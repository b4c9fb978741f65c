"""Each schedule against timm's own, step by step, and against closed forms where timm has none."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm import scheduler
from torch import nn

from distill_cli.optim import TrainConfig
from distill_cli.schedules import learning_rate, set_learning_rate

LR, FIRST, LAST = 1e-3, 1e-6, 1e-5
EPOCH = 10
"""Steps of one."""
WARMUPS = [0, 1, 7, 40]


def rates(total: int, warmup: int, steps_per_epoch: int = 1, **changes: object) -> list[float]:
    """Of every step, and of the one after the last."""
    config = TrainConfig(lr=LR, warmup_lr=FIRST, min_lr=LAST, warmup_epochs=warmup, **changes)  # type: ignore[arg-type]
    return [learning_rate(step, total, steps_per_epoch, config) for step in range(total + 1)]


def timms(kind: str, total: int, **arguments: object) -> list[float]:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=LR)
    timm_s = getattr(scheduler, kind)(optimizer, t_in_epochs=False, warmup_lr_init=FIRST, **arguments)
    return [timm_s._get_values(step, on_epoch=False)[0] for step in range(total + 1)]


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("warmup", WARMUPS)
def test_cosine_is_timms(warmup: int, prefix: bool) -> None:
    total = 97
    length = total - warmup if prefix else total
    expected = timms("CosineLRScheduler", total, t_initial=length, lr_min=LAST, warmup_t=warmup, warmup_prefix=prefix)
    assert rates(total, warmup, warmup_prefix=prefix) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize("decay_epochs", [0.5, 1, 2.4])
def test_step_is_timms(warmup: int, prefix: bool, decay_epochs: float) -> None:
    arguments = {"decay_t": round(decay_epochs * EPOCH), "decay_rate": 0.3, "warmup_t": warmup * EPOCH}
    expected = timms("StepLRScheduler", 500, warmup_prefix=prefix, **arguments)
    found = rates(500, warmup, EPOCH, schedule="step", decay_epochs=decay_epochs, decay_rate=0.3, warmup_prefix=prefix)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize("share", [0.01, 0.25, 1])
def test_wsd_is_timms(warmup: int, share: float) -> None:
    if not hasattr(scheduler, "WSDLRScheduler"):
        pytest.skip("this timm is older than its WSD")
    total = 97
    left = total - warmup
    expected = timms(
        "WSDLRScheduler", total, t_initial=left, decay_t=max(1, round(share * left)), lr_min=LAST, warmup_t=warmup
    )
    assert rates(total, warmup, schedule="wsd", decay_share=share) == pytest.approx(expected, rel=1e-12)


def test_wsd_is_flat_and_then_falls_by_a_square_root() -> None:
    found = rates(110, 10, schedule="wsd", decay_share=0.2)
    assert set(found[10:91]) == {LR}
    assert found[95] == pytest.approx(LAST + (LR - LAST) * (1 - math.sqrt(5 / 20)))
    assert found[110] == LAST


def test_linear_falls_by_the_same_each_step() -> None:
    found = rates(60, 10, schedule="linear")
    assert found[10:] == pytest.approx([LR + (LAST - LR) * step / 50 for step in range(51)])


def test_constant_stays_after_the_warm_up() -> None:
    found = rates(60, 10, schedule="constant")
    assert found[:11] == pytest.approx([FIRST + (LR - FIRST) * step / 10 for step in range(11)])
    assert set(found[10:]) == {LR}


def test_a_warm_up_is_counted_in_epochs() -> None:
    found = rates(60, 2, EPOCH)
    assert found[20] == LR
    assert found[19] == pytest.approx(FIRST + (LR - FIRST) * 19 / 20)


SCHEDULES = ["cosine", "linear", "step", "wsd", "constant"]


@given(st.sampled_from(SCHEDULES), st.integers(1, 300), st.booleans(), st.data())
def test_rates_rise_in_the_warm_up_and_never_after_it(
    schedule: str, total: int, prefix: bool, data: st.DataObject
) -> None:
    warmup = data.draw(st.integers(0, total))
    found = rates(total, warmup, schedule=schedule, warmup_prefix=prefix)
    assert all(0 < rate <= LR for rate in found)
    assert found[:warmup] == sorted(found[:warmup])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)


@given(st.sampled_from(SCHEDULES), st.floats(1e-7, 1), st.integers(0, 20))
def test_no_step_is_above_the_peak(schedule: str, lr: float, warmup: int) -> None:
    config = TrainConfig(lr=lr, warmup_epochs=warmup, schedule=schedule)  # type: ignore[arg-type]
    assert max(learning_rate(step, 20, 1, config) for step in range(21)) <= lr * (1 + 1e-9)


def test_each_group_gets_its_share() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr_scale": scale} for scale in (0.25, 1.0)]
    optimizer = torch.optim.SGD(groups, lr=9)
    set_learning_rate(optimizer, 0.4)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.4]
