"""`distill quickstart`: a teacher, its store, a distilled student and the same student from labels, on real images.

Every step is one of the other commands with a shipped recipe, and is printed so that it can be copied.
"""

import json
import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_cli.files import check_ours, write_json
from distill_cli.report import Report

if TYPE_CHECKING:
    from distill_cli.distributed import World

RESULT = "quickstart.json"
TEACHER, STUDENT = "quickstart-teacher", "quickstart-student"


@dataclass(frozen=True)
class Step:
    """One command: what is run and what is printed come from the same fields."""

    name: str
    command: str
    """`train`, `teacher-logits` or `eval`."""
    out: Path
    """Of `eval`: the run that is evaluated."""
    recipe: str | None = None
    flags: Mapping[str, tuple[str, Any]] | None = None
    """Recipe path -> (flag, value)."""

    @property
    def shell(self) -> str:
        """The step as a line for a shell."""
        words = ["distill", self.command, *(["--recipe", self.recipe] if self.recipe else [])]
        for flag, value in (self.flags or {}).values():
            words += [flag, str(value)]
        words += [str(self.out)] if self.command == "eval" else ["--out", str(self.out)]
        return shlex.join(words)

    def run(self, world: "World", report: Report) -> Any:
        """Run the step in this process; gives its command's summary."""
        from distill_cli.evaluate import evaluate
        from distill_cli.recipe import load
        from distill_cli.teacher_logits import teacher_logits
        from distill_cli.train import train

        recipe = load(self.recipe, (), self.flags).recipe
        if self.command == "eval":
            return evaluate(recipe, str(self.out), world, report)
        return (train if self.command == "train" else teacher_logits)(recipe, self.out, world, report)


@dataclass(frozen=True)
class Row:
    """One model of the comparison."""

    model: str
    top1: float
    """Percent."""
    parameters_m: float
    """Millions."""
    wall_s: float
    """Of its training."""
    images_per_s: float


@dataclass(frozen=True)
class Summary:
    status: str
    """`done` or `already_done`."""
    out: str
    rows: tuple[Row, ...]
    gain: float
    """Points of top1 that distillation adds to the student."""
    store_bytes: int
    store_rows: int
    store_wall_s: float
    wall_s: float
    commands: tuple[str, ...]


def quickstart(out: Path, seed: int, world: "World", report: Report | None = None) -> Summary:
    """Run the steps that are not done yet, and compare the three models.

    Args:
        out: everything is written below it.
        seed: of the views, the order and the weights.

    Raises:
        what the commands raise.
    """
    report = report or Report()
    start = time.monotonic()
    summaries = {}
    for step in steps(out, seed):
        report.stage(f"\n$ {step.shell}")
        summaries[step.name] = step.run(world, report)
    store = summaries["store"]
    models = {"teacher": "teacher", "student, from labels": "scratch", "student, distilled": "distilled"}
    rows = tuple(
        Row(
            label,
            summaries[f"eval {name}"].top1,
            summaries[f"eval {name}"].parameters_m,
            summaries[name].wall_s,
            summaries[name].images_per_s,
        )
        for label, name in models.items()
    )
    summary = Summary(
        status="done",
        out=str(out),
        rows=rows,
        gain=round(rows[2].top1 - rows[1].top1, 3),
        store_bytes=store.bytes,
        store_rows=store.rows,
        store_wall_s=store.wall_s,
        wall_s=round(time.monotonic() - start, 1),
        commands=tuple(step.shell for step in steps(out, seed)),
    )
    write_json(out / RESULT, {**asdict(summary), "seed": seed})
    return summary


def finished(out: Path, seed: int) -> Summary | None:
    """The result of an earlier quickstart of the same seed, if it came to its end; needs no torch.

    Raises:
        UsageError: `out` holds something else.
    """
    check_ours(out, (RESULT, "teacher"), "quickstart")
    if not (out / RESULT).is_file():
        return None
    values = json.loads((out / RESULT).read_text())
    if values.pop("seed") != seed:
        return None
    rows = tuple(Row(**row) for row in values["rows"])
    return Summary(**{**values, "rows": rows, "commands": tuple(values["commands"]), "status": "already_done"})


def steps(out: Path, seed: int) -> Iterator[Step]:
    """The commands of the quickstart, in order."""
    teacher, store, distilled, scratch = (out / name for name in ("teacher", "store", "distilled", "scratch"))
    train_seed = {"train.seed": ("--seed", seed)} if seed else {}
    store_seed = {"store.seed": ("--seed", seed)} if seed else {}
    use_teacher = {"teacher.name": ("--teacher", str(teacher))}
    use_store = {"store.path": ("--store", str(store))}
    from_labels = {"objective.name": ("--objective", "supervised")}
    yield Step("teacher", "train", teacher, TEACHER, train_seed)
    yield Step("store", "teacher-logits", store, STUDENT, {**use_teacher, **store_seed})
    yield Step("distilled", "train", distilled, STUDENT, {**use_store, **train_seed})
    yield Step("scratch", "train", scratch, STUDENT, {**from_labels, **train_seed})
    yield Step("eval teacher", "eval", teacher)
    yield Step("eval distilled", "eval", distilled, None, use_store)
    yield Step("eval scratch", "eval", scratch)
