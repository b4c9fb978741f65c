"""`distill train`: train a student, from labels, from a store, or from both."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distill_cli.checkpoint import FOLDER, RECIPE, RESULT, checkpoints, load_checkpoint, save_checkpoint
from distill_cli.data import absolute
from distill_cli.data.loader import Batch, Batches, load
from distill_cli.data.views import train_transform
from distill_cli.distributed import Signals, World, stopped
from distill_cli.errors import DistillError, MismatchError
from distill_cli.experiment import Experiment, open_experiment
from distill_cli.files import (
    canonical_json,
    check_ours,
    free_bytes,
    remove_temporaries,
    write_atomic,
    write_json,
)
from distill_cli.history import History, Window, last_validation
from distill_cli.locks import locked
from distill_cli.metrics import VALIDATION, Accuracy, autocast, every_image, measure_accuracy
from distill_cli.objectives import Losses
from distill_cli.optim import build_optimizer, learning_rate
from distill_cli.pictures import colours, grid
from distill_cli.randomness import derive
from distill_cli.recipe import Recipe, differences, flat, to_toml, update
from distill_cli.recipe import load as load_recipe
from distill_cli.replay import SparseRows, prove_replay
from distill_cli.report import Report
from distill_cli.students.build import parameters_in_millions
from distill_cli.students.weights import STUDENT, save_student
from distill_cli.trackers import check_installed, open_trackers

BILL_STEPS = 4
"""Steps that a dry run times."""
PICTURES = 16
"""Inputs of the first step that are kept as a picture."""


@dataclass(frozen=True)
class Summary:
    status: str
    """`done` or `already_done`."""
    run: str
    steps: int
    epochs: int
    top1: float | None
    """On the validation images after the last step, in percent; None where there are none."""
    top5: float | None
    images_per_s: float
    """Of the training steps."""
    wall_s: float
    """Over all attempts."""
    nll: float | None
    ece: float | None
    parameters_m: float
    """Millions, of the student."""
    skipped: int


@dataclass(frozen=True)
class Bill:
    """What `--dry-run` says the run will cost."""

    recipe: Recipe
    origins: dict[str, str]
    steps: int
    epochs: int
    parameters_m: float
    images_per_s: float
    hours: float
    checkpoint_bytes: int
    free_bytes: int


def train(recipe: Recipe, out: Path, world: World, report: Report | None = None) -> Summary:
    """Train `recipe.student` by `recipe.objective` into the run directory `out`, or go on where it stopped.

    Raises:
        UsageError, MismatchError, DamagedError: recipe, data, store, student and `out` do not fit.
        DistillError: an image cannot be decoded, or the loss is not finite.
        BusyError: another process works there.
        Stopped: a signal came; a checkpoint was saved.
    """
    report = report or Report()
    check_ours(out, (RECIPE, RESULT, FOLDER), "run")
    check_installed(recipe.train.trackers)
    setup = open_experiment(recipe, world, report)
    done = _finished(setup, out)
    if done is not None:
        report.stage(f"{out}: finished already")
        return done
    with locked(out) if world.is_main else nullcontext():
        if world.is_main:
            remove_temporaries(out)
            write_atomic(out / RECIPE, to_toml(_with_absolute_paths(setup.recipe)))
        return _run(setup, out, world, report)


def bill(recipe: Recipe, out: Path, world: World, report: Report | None = None) -> Bill:
    """What the run would cost, from a few steps of the real thing; writes nothing.

    Raises:
        as `train`.
    """
    report = report or Report()
    check_ours(out, (RECIPE, RESULT, FOLDER), "run")
    check_installed(recipe.train.trackers)
    setup = open_experiment(recipe, world, report)
    _finished(setup, out)
    optimizer = build_optimizer(setup.objective, setup.recipe.train)
    report.stage("timing a few steps")
    start = images = 0.0
    for number, batch in enumerate(_training_batches(setup, 0, min(BILL_STEPS, setup.steps), world)):
        _step(setup.objective, optimizer, batch, number, setup, world)
        # The first step pays for the loader's start, and is not timed unless it is the only one.
        images += len(batch) if start else 0
        start = start or time.monotonic()
    images_per_s = images / max(time.monotonic() - start, 1e-3)
    tensors = [*setup.objective.state_dict().values()]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return Bill(
        recipe=setup.recipe,
        origins=setup.origins,
        steps=setup.steps,
        epochs=setup.epochs,
        parameters_m=parameters_in_millions(setup.objective.student),
        images_per_s=round(images_per_s, 1),
        hours=round(setup.steps * setup.order.images_per_step / images_per_s / 3600, 4) if images_per_s else 0.0,
        checkpoint_bytes=3 * weights,
        free_bytes=free_bytes(out),
    )


def _run(setup: Experiment, out: Path, world: World, report: Report) -> Summary:
    """The training loop: from the newest checkpoint, or from the start, to the last step and the result."""
    config, objective, order = setup.recipe.train, setup.objective, setup.order
    optimizer = build_optimizer(objective, config)
    done = _resume(setup, out, optimizer, report)
    if setup.store is not None:
        report.stage("proving that the views replay to the pixels that the teacher saw")
        assert setup.taught is not None
        prove_replay(setup.store, setup.source, train_transform(setup.taught))
    world.barrier()
    model = world.wrap(objective)
    batches = _training_batches(setup, done.step, setup.steps, world)
    window = Window(out, world.device)
    report.stage(f"{setup.steps} steps, {order.steps_per_epoch} an epoch, from step {done.step}")
    images = order.images_per_step
    with (
        _history(setup, out, done.step, world, report) as history,
        Signals() as signals,
        report.progress("train", setup.steps * images, done.step * images) as progress,
    ):
        while True:
            if setup.validates_at(done.step) and done.step not in history.validated:
                accuracy = _validate(setup, world, signals)
                if world.is_main:
                    write_json(out / VALIDATION, {"step": done.step, "classes": setup.names, **asdict(accuracy)})
                history.log(done.step, {"epoch": done.step / order.steps_per_epoch, **_numbers(accuracy)}, "val")
                report.stage(f"step {done.step}: top1 {accuracy.top1:.2f}, nll {accuracy.nll:.4f}")
            if done.step == setup.steps:
                break
            began = time.monotonic()
            batch = next(batches)
            waited = time.monotonic() - began
            if done.step == 0:
                seen = colours(batch.images[:PICTURES], setup.view.mean, setup.view.std)
                history.image(0, "inputs", grid(seen))
            losses, grad_norm = _step(model, optimizer, batch, done.step, setup, world)
            done.add(len(batch) * world.size, len(batch.skipped), time.monotonic() - began)
            window.add(done.step, losses, grad_norm, len(batch) * world.size, waited)
            progress.advance(images, window.note)
            if done.step % config.log_every == 0 or done.step == setup.steps:
                epoch = round((done.step - 1) / order.steps_per_epoch, 4)
                lr = optimizer.param_groups[0]["lr"]
                history.log(done.step, {"epoch": epoch, "lr": lr, **window.flush()}, "train")
            stop = world.agree(signals.received)
            if stop or setup.saves_at(done.step):
                window.check()
                if world.is_main:
                    save_checkpoint(out, done.step, objective, optimizer, done.state(setup))
            if stop:
                raise stopped(stop, f"{out}: saved at step {done.step} of {setup.steps}; the same command goes on")
    return _finish(setup, out, done, world, report)


def _history(setup: Experiment, out: Path, step: int, world: World, report: Report) -> History:
    """The run's metrics from a step on, with the trackers that the recipe names."""
    settings = {path: value for path, value in flat(setup.recipe).items() if value is not None}
    names = setup.recipe.train.trackers
    trackers = open_trackers(names, out, step, settings, report.warn) if world.is_main else []
    return History(out, step, trackers, write=world.is_main)


def _step(
    model: nn.Module, optimizer: Optimizer, batch: Batch, step: int, setup: Experiment, world: World
) -> tuple[Losses, Tensor]:
    """One optimiser step; what it draws depends on (seed, step, rank) alone."""
    config = setup.recipe.train
    assert config.warmup_epochs is not None
    warmup = round(config.warmup_epochs * setup.order.steps_per_epoch)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, setup.steps, warmup, config)
    torch.manual_seed(derive("step", config.seed, step, world.rank))
    model.train()
    with autocast(world.device, config.precision):
        losses: Losses = model(batch)
    optimizer.zero_grad(set_to_none=True)
    losses.total.backward()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad or math.inf)
    optimizer.step()
    setup.objective.after_step(step)
    return losses, grad_norm


@dataclass
class _Done:
    """What is behind a run, over all attempts."""

    step: int = 0
    images: int = 0
    skipped: int = 0
    train_s: float = 0.0
    """In steps; `wall_s` counts the rest too."""
    wall_s: float = 0.0
    _began: float = field(default_factory=time.monotonic)

    def add(self, images: int, skipped: int, seconds: float) -> None:
        """Count one step."""
        self.step += 1
        self.images += images
        self.skipped += skipped
        self.train_s += seconds

    def wall_s_now(self) -> float:
        return self.wall_s + time.monotonic() - self._began

    def state(self, setup: Experiment) -> dict[str, Any]:
        """For a checkpoint."""
        counts = {"images": self.images, "skipped": self.skipped, "train_s": self.train_s}
        return {**counts, "wall_s": self.wall_s_now(), "identity": setup.identity}


def _resume(setup: Experiment, out: Path, optimizer: Optimizer, report: Report) -> _Done:
    """Load the newest checkpoint, where there is one."""
    saved = checkpoints(out)
    if not saved:
        return _Done()
    state = load_checkpoint(saved[-1], setup.objective, optimizer)
    _check_identity(out, state.pop("identity"), setup)
    report.stage(f"going on from {saved[-1].name}")
    return _Done(**state)


def _training_batches(setup: Experiment, start: int, stop: int, world: World) -> Iterator[Batch]:
    batches = Batches(
        setup.source,
        setup.transform,
        setup.order,
        seed=setup.recipe.train.seed,
        drawn=setup.store.drawn if setup.store else None,
        rows=SparseRows(setup.store) if setup.store else None,
        views_per_read=setup.recipe.train.views_per_read,
        skip_unreadable=setup.recipe.data.skip_unreadable,
    )
    for batch in load(batches, range(start, stop), world.workers, world.device):
        if len(batch) == 0:
            raise DistillError(f"{batch.skipped[0]}; no image of its batch could be decoded")
        yield batch


def _validate(setup: Experiment, world: World, signals: Signals) -> Accuracy:
    """The student's accuracy on all validation images, in fp32 as `distill eval` has it."""
    assert setup.val is not None
    config = setup.recipe
    loaded = every_image(setup.val, setup.view, config.eval.batch_size, config.data.skip_unreadable, world)
    student = setup.objective.student.eval()
    with Report(quiet=True).progress("", 0) as progress:
        return measure_accuracy(student, _until(signals, loaded, world), setup.classes, world, "fp32", progress)


def _until(signals: Signals, batches: Iterator[Batch], world: World) -> Iterator[Batch]:
    """Break off a validation on a signal: its checkpoint is saved, and the next attempt begins with it."""
    for batch in batches:
        if signals.received and world.size == 1:
            raise stopped(signals.received, "while validating, after saving; the same command goes on")
        yield batch


def _finish(setup: Experiment, out: Path, done: _Done, world: World, report: Report) -> Summary:
    """Write the student and, last, the result."""
    final = last_validation(out) or {}
    summary = Summary(
        status="done",
        run=str(out),
        steps=setup.steps,
        epochs=setup.epochs,
        top1=final.get("top1"),
        top5=final.get("top5"),
        images_per_s=round(done.images / max(done.train_s, 1e-9), 1),
        wall_s=round(done.wall_s_now(), 2),
        nll=final.get("nll"),
        ece=final.get("ece"),
        parameters_m=parameters_in_millions(setup.objective.student),
        skipped=done.skipped,
    )
    if world.is_main:
        save_student(out / STUDENT, setup.objective.student, setup.card(summary.top1, summary.top5))
        write_json(out / RESULT, {**asdict(summary), "identity": setup.identity})
    report.stage(f"{out}: finished")
    return summary


def _numbers(accuracy: Accuracy) -> dict[str, float]:
    return {name: getattr(accuracy, name) for name in ("top1", "top5", "nll", "ece", "images")}


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """So that `eval RUN` finds the data from any folder."""
    data, store = recipe.data, recipe.store.path
    places = {f"data.{key}": getattr(data, key) for key in ("path", "val", "root")}
    settled = {key: absolute(place) for key, place in places.items() if place}
    if store and "://" not in store:
        settled["store.path"] = str(Path(store).resolve())
    return update(recipe, settled)


def _finished(setup: Experiment, out: Path) -> Summary | None:
    """The summary of a finished run; None where there is none, or it is under way.

    Raises:
        MismatchError: the directory holds a run of another recipe; the fields are named.
    """
    if not (out / RECIPE).exists():
        return None
    there = load_recipe(str(out / RECIPE)).recipe
    differing = differences(there, setup.recipe)
    if differing:
        shown = "; ".join(differing[:5]) + (f"; and {len(differing) - 5} more" if len(differing) > 5 else "")
        raise MismatchError(f"{out}: holds a run of another recipe ({shown}: there, asked); choose another --out")
    if not (out / RESULT).exists():
        return None
    result = json.loads((out / RESULT).read_text())
    _check_identity(out, result.pop("identity"), setup)
    return Summary(**{**result, "status": "already_done", "run": str(out)})


def _check_identity(out: Path, there: dict[str, Any], setup: Experiment) -> None:
    for what, value in setup.identity.items():
        if there[what] != value:
            raise MismatchError(
                f"{out}: began with another {what} ({_short(there[what])} there, {_short(value)} asked); "
                "choose another --out"
            )


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else canonical_json(value)[:60]
