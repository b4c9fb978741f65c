"""Settings of an objective that change with the progress of a run: weights and temperatures."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from distill_cli.config import Fraction, NonNegative, PositiveFloat, section


@section
class Ramp:
    """From one value to another as a run goes on: `{ start = 0, end = 1, until = 0.1 }` is a warm-up over a tenth."""

    start: NonNegative
    end: NonNegative
    shape: Literal["linear", "cosine"] = "linear"
    since: Fraction = 0.0
    """Progress, 0 to 1, up to which it is `start` …"""
    until: Annotated[float, Field(gt=0, le=1)] = 1.0
    """… and from which on it is `end`."""


@section
class PositiveRamp(Ramp):
    """The same, of what is never 0."""

    start: PositiveFloat
    end: PositiveFloat


Weight = NonNegative | Ramp
Temperature = PositiveFloat | PositiveRamp


def at(setting: float | Ramp, progress: Tensor) -> float | Tensor:
    """The value of a setting; of a constant the constant itself.

        start + (end - start) s(x),    s(x) = x or (1 - cos pi x) / 2,   x = (progress - since) / (until - since)

    Args:
        progress: of the run, 0 to 1, no dimensions; what a ramp gives lies on its device, and nobody waits for it.
    """
    if not isinstance(setting, Ramp):
        return setting
    share = ((progress - setting.since) / max(setting.until - setting.since, 1e-9)).clamp(0, 1)
    if setting.shape == "cosine":
        share = (1 - torch.cos(math.pi * share)) / 2
    return setting.start + (setting.end - setting.start) * share


def is_one(setting: float | Ramp) -> bool:
    """Whether it is 1 all along."""
    return setting == 1 or (isinstance(setting, Ramp) and setting.start == setting.end == 1)
