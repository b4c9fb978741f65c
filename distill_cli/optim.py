"""How a student is optimised: groups, learning rate by step, clipping."""

import math
from collections.abc import Iterable
from typing import Literal

from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim import Optimizer

from distill_cli.config import Fraction, NonNegative, Positive, PositiveFloat, Precision, Seed, section
from distill_cli.objectives import Objective

BASE_LR, BASE_BATCH = 5e-4, 512
"""DeiT and TinyViT alike: lr = 5e-4 x global batch / 512."""


@section
class TrainConfig:
    epochs: Positive = 300
    steps: Positive | None = None
    """Optimiser steps in all; wins over `epochs`."""
    batch_size: Positive = 256
    """Global, over all ranks. What does not fill an epoch's last batch waits for another epoch's shuffle."""
    views_per_read: Positive = 1
    """`--views-per-read`: views that a sample is seen by each time it is decoded, all in one step: N times less
    reading, decoding and seeking for as many inputs. `batch_size` counts inputs, and divides by it."""
    lr: PositiveFloat | None = None
    """Peak learning rate, as it is; by default 5e-4 x batch_size / 512."""
    min_lr: NonNegative = 1e-5
    """At the last step, by a cosine."""
    warmup_lr: NonNegative = 1e-6
    """At the first step, rising linearly."""
    warmup_epochs: NonNegative | None = None
    """By default a twentieth of the epochs."""
    weight_decay: NonNegative = 0.05
    """Not on biases, norms, tokens, positions and attention biases."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    clip_grad: NonNegative = 5.0
    """Largest norm of the gradient over all parameters; 0 does not clip."""
    precision: Precision = "fp32"
    seed: Seed = 0
    log_every: Positive = 20
    """Steps between lines of metrics.jsonl."""
    save_every: Positive | None = None
    """Steps between checkpoints; by default one an epoch."""
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Who is told beside metrics.jsonl and TensorBoard; each is an extra, and offline by default."""


def default_lr(batch_size: int) -> float:
    return BASE_LR * batch_size / BASE_BATCH


def learning_rate(step: int, total: int, warmup: int, config: TrainConfig) -> float:
    """The learning rate of a step: linear from `warmup_lr` to `lr` over `warmup` steps, then a cosine to `min_lr`.

    Neither end is above `lr`.
    """
    assert config.lr is not None
    first, last = min(config.warmup_lr, config.lr), min(config.min_lr, config.lr)
    if step < warmup:
        return first + (config.lr - first) * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return last + (config.lr - last) * (1 + math.cos(math.pi * progress)) / 2


def build_optimizer(objective: Objective, config: TrainConfig) -> Optimizer:
    """AdamW over everything of the objective that is trained, in two groups: with and without weight decay."""
    exempt = {f"student.{name}" for name in _names_without_decay(objective.student)}
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim <= 1 or name in exempt else decay).append(parameter)
    groups = [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return create_optimizer_v2(groups, opt="adamw", lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0.0)


def _names_without_decay(student: nn.Module) -> Iterable[str]:
    """What timm's models say of themselves: tokens and positions by name, attention biases by a part of their name."""
    names = set(getattr(student, "no_weight_decay", set)())
    parts = {"attention_biases", "relative_position_bias_table"}
    parts |= set(getattr(student, "no_weight_decay_keywords", set)())
    return names | {name for name, _ in student.named_parameters() if any(part in name for part in parts)}
