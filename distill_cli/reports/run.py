"""What lies in a run's directory, finished or under way."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_cli.checkpoint import RECIPE, RESULT
from distill_cli.errors import DamagedError, UsageError
from distill_cli.history import IMAGES, read_metrics
from distill_cli.metrics import VALIDATION, Accuracy
from distill_cli.recipe import Recipe, load
from distill_cli.students.weights import STUDENT, Card, read_card


@dataclass(frozen=True)
class Validation:
    """The newest validation."""

    step: int
    classes: tuple[str, ...] | None
    accuracy: Accuracy


@dataclass(frozen=True)
class Run:
    path: Path
    recipe: Recipe
    """With nothing left open."""
    train: list[dict[str, Any]]
    """The training lines of metrics.jsonl."""
    val: list[dict[str, Any]]
    """Its validation lines."""
    validation: Validation | None
    result: dict[str, Any] | None
    """None while it is under way."""
    card: Card | None
    inputs: Path | None
    """A picture of what the student saw first."""

    @property
    def finished(self) -> bool:
        return self.result is not None and self.card is not None

    @property
    def step(self) -> int:
        """The last one that is known of."""
        return max([0, *(line["step"] for line in (*self.train[-1:], *self.val[-1:]))])

    @property
    def reached(self) -> dict[str, Any]:
        """`top1`, `top5`, `nll`, `ece` of the student: of the result, or of the newest validation; of an average of
        the weights, where the run has one."""
        last = self.val[-1] if self.val else {}
        newest = {name: last.get(f"ema_{name}", last.get(name)) for name in ("top1", "top5", "nll", "ece")}
        return newest | (self.result or {})

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Their names, where they have any."""
        known = self.card.classes if self.card else None
        return known or (self.validation.classes if self.validation else None)


def read_run(path: Path) -> Run:
    """
    Raises:
        UsageError: there is no run.
        DamagedError: one of its files is not what `train` writes.
    """
    if not path.is_dir():
        raise UsageError(f"{path}: no such run directory; give one that distill train writes")
    if not (path / RECIPE).is_file():
        raise UsageError(f"{path}: is not a run, as it has no {RECIPE}; give a directory that distill train writes")
    lines = read_metrics(path)
    weights, result = path / STUDENT, path / RESULT
    pictures = sorted((path / IMAGES).glob("inputs-*.png"))
    return Run(
        path=path,
        recipe=load(str(path / RECIPE)).recipe,
        train=[line for line in lines if "loss" in line],
        val=[line for line in lines if "top1" in line],
        validation=_validation(path / VALIDATION),
        result=_json(result) if result.is_file() else None,
        card=read_card(weights) if weights.is_file() else None,
        inputs=pictures[0] if pictures else None,
    )


def _validation(path: Path) -> Validation | None:
    if not path.is_file():
        return None
    values = _json(path)
    try:
        step, classes = int(values.pop("step")), values.pop("classes")
        values["per_class"] = tuple(values["per_class"])
        values["calibration"] = tuple((int(n), float(right), float(sure)) for n, right, sure in values["calibration"])
        return Validation(step, classes and tuple(map(str, classes)), Accuracy(**values))
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{path}: is not what distill train writes ({error}); delete it") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: is not JSON ({error}); restore it from a copy") from error
    if not isinstance(values, dict):
        raise DamagedError(f"{path}: is not what distill train writes; restore it from a copy")
    return values
