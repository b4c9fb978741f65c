"""What the sections of a recipe are made of: frozen dataclasses that pydantic checks, and their bounded types.

Each section stands beside the code that it configures; `recipe.py` puts them together.
"""

import re
from typing import Annotated, Literal, TypeVar, dataclass_transform

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

T = TypeVar("T")

_UNITS = {"s": 1, "min": 60, "h": 3600}


def seconds_of(text: str) -> float:
    """`90s`, `15min` or `2h` in seconds.

    Raises:
        ValueError: it is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|min|h)", text)
    if match is None or float(match[1]) == 0:
        raise ValueError("give steps, or a time such as 90s, 15min or 2h")
    return float(match[1]) * _UNITS[match[2]]


def _time(text: str) -> str:
    seconds_of(text)
    return text


Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Precision = Literal["fp32", "bf16"]
Range = tuple[PositiveFloat, PositiveFloat]
Colour = tuple[float, float, float]
Time = Annotated[str, AfterValidator(_time)]
"""Such as `90s`, `15min`, `2h`."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def section(cls: type[T]) -> type[T]:
    """A recipe section: frozen, keyword-only, unknown keys and wrong values refused."""
    checked: type[T] = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))(cls)  # type: ignore
    return checked


@section
class RuntimeConfig:
    """How this machine runs the work; no part of what the work is, so never compared."""

    device: str = "auto"
    """`auto` (CUDA where it is), `cpu`, `cuda` or `cuda:N`."""
    workers: Natural | None = None
    """Loader processes per rank; 0 loads in the main process. By default all cores beside a GPU and a quarter of
    them beside a model on the CPU, at least 1 and at most 8."""
    threads: Positive | None = None
    """torch's threads where the model is on the CPU; by default OMP_NUM_THREADS, else the cores that the loader
    leaves. More threads than free cores wait for each other: measured 15 times slower."""
    resume: Literal["auto", "never", "must"] = "auto"
    """`--resume`: go on where a run is under way; `never`: refuse it; `must`: refuse to begin one."""
    compile: bool | Literal["cuda-graphs"] = False
    """`--compile`: of `train`, the student by torch.compile; `cuda-graphs`: and a step of it as CUDA graphs."""
    channels_last: bool | Literal["auto"] = "auto"
    """Of `train`: how the student's convolutions lie in memory; `auto`: so on CUDA, where it has more than one."""
    fsdp: bool = False
    """Of `train` on several ranks: weights, gradients and optimiser in parts, one on each rank."""
    timeout_s: PositiveFloat = 1800
    """Of ranks: how long one waits for the others before it gives up."""
