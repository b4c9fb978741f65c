"""What the sections of a recipe are made of: frozen dataclasses that pydantic checks, and their bounded types.

Each section stands beside the code that it configures; `recipe.py` puts them together.
"""

from typing import Annotated, Literal, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

T = TypeVar("T")

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Precision = Literal["fp32", "bf16"]
Range = tuple[PositiveFloat, PositiveFloat]
Colour = tuple[float, float, float]


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
    timeout_s: PositiveFloat = 1800
    """Of ranks: how long one waits for the others before it gives up."""
