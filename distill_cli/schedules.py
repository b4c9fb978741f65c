"""Learning rate schedules: functions of the step alone, so that a run that goes on needs nothing of its past."""

import math
from collections.abc import Callable

from torch.optim import Optimizer

from distill_cli.optim import TrainConfig


def learning_rate(step: int, total: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """The learning rate of a step: linear from `warmup_lr` to `lr` over the warm-up, then by `config.schedule`.

    Neither end is above `lr`. The values are those of timm's schedulers of these names, counted in steps; `linear`,
    which timm lacks, is that of TinyViT's code.

    Args:
        step: from 0; `total` is the one after the last.
    """
    assert config.lr is not None
    assert config.warmup_epochs is not None
    warmup = round(config.warmup_epochs * steps_per_epoch)
    first, last = min(config.warmup_lr, config.lr), min(config.min_lr, config.lr)
    if step < warmup:
        return first + (config.lr - first) * step / warmup
    if config.schedule == "constant":
        return config.lr
    start = warmup if config.warmup_prefix or config.schedule in ("linear", "wsd") else 0
    if config.schedule == "step":
        return config.lr * config.decay_rate ** ((step - start) // max(1, round(config.decay_epochs * steps_per_epoch)))
    left = max(1, total - start)
    return last + (config.lr - last) * _SHAPES[config.schedule](step - start, left, config)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Give each group its share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def cosine(step: int, total: int, _: TrainConfig) -> float:
    """Half a cosine from 1 to 0. Paper: Loshchilov and Hutter 2016, arXiv:1608.03983, eq. 5, without restarts."""
    return (1 + math.cos(math.pi * step / total)) / 2


def linear(step: int, total: int, _: TrainConfig) -> float:
    return 1 - step / total


def wsd(step: int, total: int, config: TrainConfig) -> float:
    """1, then over the last `decay_share` of the steps 1 - sqrt(progress).

    Paper: Hägele et al. 2024, arXiv:2405.18392, eq. 2, for the form; Hu et al. 2024, arXiv:2404.06395, for the name.
    """
    decay = max(1, round(config.decay_share * total))
    return 1 - math.sqrt(max(0, step - (total - decay)) / decay)


_SHAPES: dict[str, Callable[[int, int, TrainConfig], float]] = {"cosine": cosine, "linear": linear, "wsd": wsd}
"""By name: (step, steps in all, config) -> share of the way from `min_lr` to `lr`."""
