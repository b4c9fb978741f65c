"""`distill train`: train a student, from labels, from a store, or from both."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill_cli.accumulate import backward
from distill_cli.checkpoint import FOLDER, RECIPE, RESULT, checkpoint_path, checkpoint_tensors, snapshot
from distill_cli.clipping import clip_gradients
from distill_cli.data import image_cache
from distill_cli.data.batch import Batch
from distill_cli.data.loader import Loader
from distill_cli.data.views import train_transform
from distill_cli.distributed import Signals, World, stopped
from distill_cli.divergence import Guard, check_finite
from distill_cli.engine import compile_forward
from distill_cli.experiment import Experiment, class_names, open_experiment
from distill_cli.files import check_ours, free_bytes, remove_temporaries, write_json
from distill_cli.history import History, Window, last_validation
from distill_cli.locks import locked
from distill_cli.metrics import VALIDATION, Accuracy, every_image, measure_accuracy
from distill_cli.objectives import Losses
from distill_cli.pictures import colours, grid
from distill_cli.randomness import derive
from distill_cli.recipe import Recipe, flat
from distill_cli.replay import prove_replay
from distill_cli.report import Report
from distill_cli.run import LOG, begin, check_identity, finished
from distill_cli.saver import Due, Saver, newest
from distill_cli.schedules import set_learning_rate
from distill_cli.sharding import in_step
from distill_cli.students.build import freeze_batch_norm, parameters_in_millions
from distill_cli.students.weights import BEST, PLAIN, STUDENT, Card, save_student
from distill_cli.trackers import check_installed, open_trackers
from distill_cli.training_batches import training_batches

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
    """Of `student.safetensors` on the validation images after the last step, in percent; None where there are none."""
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
    plain_top1: float | None = None
    """Of `student-plain.safetensors`, the weights that an EMA averages."""


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
    cache_bytes: int | None
    """What `--cache` will take besides; the hours are without it."""
    cache_free_bytes: int | None


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
    result = finished(out, setup)
    if result is not None:
        report.stage(f"{out}: finished already")
        return Summary(**{**result, "status": "already_done", "run": str(out)})
    with locked(out) if world.is_main else nullcontext():
        if world.is_main:
            remove_temporaries(out)
            begin(out, setup)
        with report.logged(out / LOG) if world.is_main else nullcontext():
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
    finished(out, setup)
    report.stage("timing a few steps")
    model = _wrapped(setup, world)
    guard = Guard(setup.optimizer, world)
    start = images = 0.0
    for number, batch in enumerate(training_batches(setup, 0, min(BILL_STEPS, setup.steps), world)):
        seen = _images(batch, setup, world)
        _step(model, batch, seen, number, setup, world, guard)
        # The first step pays for the loader's start, and is not timed unless it is the only one.
        images += seen if start else 0
        start = start or time.monotonic()
    images_per_s = images / max(time.monotonic() - start, 1e-3)
    tensors = checkpoint_tensors(setup.objective, setup.optimizer, setup.ema).values()
    return Bill(
        recipe=setup.recipe,
        origins=setup.origins,
        steps=setup.steps,
        epochs=setup.epochs,
        parameters_m=parameters_in_millions(setup.objective.student),
        images_per_s=round(images_per_s, 1),
        hours=round(setup.steps * setup.order.images_per_step / images_per_s / 3600, 4) if images_per_s else 0.0,
        checkpoint_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        free_bytes=free_bytes(out),
        **image_cache.bill(recipe.data, (setup.source, "train", setup.drawn_from), (setup.validation, "val", None)),
    )


def _run(setup: Experiment, out: Path, world: World, report: Report) -> Summary:
    """The training loop: from the newest checkpoint, or from the start, to the last step and the result."""
    setup = _with_caches(setup, world, report)
    config, objective, order = setup.recipe.train, setup.objective, setup.order
    done = _resume(setup, out, report)
    if setup.store is not None:
        report.stage("proving that the views replay to the pixels that the teacher saw")
        assert setup.taught is not None
        prove_replay(setup.store, setup.source, train_transform(setup.taught))
    world.barrier()
    model = _wrapped(setup, world)
    batches = training_batches(setup, done.step, setup.steps, world)
    window, guard, due = Window(world), Guard(setup.optimizer, world), Due(config.save_every)
    report.stage(f"{setup.steps} steps, {order.steps_per_epoch} an epoch, from step {done.step}")
    images = order.images_per_step
    with (
        Signals() as signals,
        _history(setup, out, done.step, world, report) as history,
        Saver(out, config.keep, report.warn) as saver,
        closing(_validation(setup, world)) as validation,
        report.progress("train", setup.steps * images, done.step * images) as progress,
    ):
        while True:
            saver.best = history.best
            if setup.validates_at(done.step) and done.step not in history.validated:
                numbers, accuracy = _validate(setup, done.step, validation, world, signals, saver)
                # On a full disk a checkpoint that is still being written would take the room of what follows.
                saver.join()
                if history.is_best(numbers):
                    _deliver(out / BEST, setup, numbers, world)
                if world.is_main:
                    names = class_names(setup.source, setup.store)
                    write_json(out / VALIDATION, {"step": done.step, "classes": names, **asdict(accuracy)})
                history.log(done.step, {"epoch": done.step / order.steps_per_epoch, **numbers}, "val")
                shown = (f"{name} {value:.4g}" for name, value in numbers.items() if name.endswith(("top1", "nll")))
                report.stage(f"step {done.step}: {', '.join(shown)}")
            if done.step == setup.steps:
                break
            began = time.monotonic()
            batch = next(batches)
            waited = time.monotonic() - began
            if done.step == 0:
                history.image(0, "inputs", grid(colours(batch.images[:PICTURES], setup.view.mean, setup.view.std)))
            seen = _images(batch, setup, world)
            losses, grad_norm = _step(model, batch, seen, done.step, setup, world, guard)
            skipped = world.count(len(batch.skipped)) if setup.recipe.data.skip_unreadable else 0
            done.add(seen, skipped, time.monotonic() - began)
            window.add(done.step, losses, grad_norm, seen, waited, len(batch) / seen)
            progress.advance(images, window.note)
            # Clocks differ, and what follows a save is work of all ranks.
            stop, saves = divmod(world.agree(2 * signals.received + due.at(done.step)), 2)
            saves = saves or stop or setup.ends_at(done.step)
            logs = done.step % config.log_every == 0 or done.step == setup.steps
            if saves or logs or guard.refused:
                check_finite(window, setup, saver, world)
            if logs:
                epoch = round((done.step - 1) / order.steps_per_epoch, 4)
                lr = setup.learning_rate(done.step - 1)
                history.log(done.step, {"epoch": epoch, "lr": lr, **window.flush()}, "train")
            if saves:
                if world.is_main or setup.sharded:
                    taken = snapshot(done.step, objective, setup.optimizer, done.state(setup), setup.ema)
                if world.is_main:
                    saver.save(taken)
                due.saved()
            if stop:
                saver.wait()
                raise stopped(stop, f"{out}: saved at step {done.step} of {setup.steps}; the same command goes on")
        saver.wait()
    return _finish(setup, out, done, world, report)


def _wrapped(setup: Experiment, world: World) -> nn.Module:
    """The objective as it is called: its student compiled where that is asked for, and its ranks in step."""
    for student in (setup.objective.student, setup.ema and setup.ema.module):
        if student is not None:
            compile_forward(student, setup.recipe.runtime)
    return world.wrap(setup.objective)


def _with_caches(setup: Experiment, world: World, report: Report) -> Experiment:
    """The same with its images read from `data.cache`, where there is one."""
    config, val = setup.recipe.data, setup.validation
    source = image_cache.cached(setup.source, config, "train", setup.drawn_from, world, report)
    if val is not None:
        val = image_cache.cached(val, config, "val", None, world, report)
    return replace(setup, source=source, val=val)


def _history(setup: Experiment, out: Path, step: int, world: World, report: Report) -> History:
    """The run's metrics from a step on, with the trackers that the recipe names."""
    settings = {path: value for path, value in flat(setup.recipe).items() if value is not None}
    names = setup.recipe.train.trackers
    trackers = open_trackers(names, out, step, settings, report.warn) if world.is_main else []
    return History(out, step, trackers, write=world.is_main)


def _images(batch: Batch, setup: Experiment, world: World) -> int:
    """Of a step, over all ranks: their slices differ where they do not divide it, or some of it cannot be read."""
    same = setup.order.samples_per_step % world.size == 0 and not setup.recipe.data.skip_unreadable
    return len(batch) * world.size if same else world.count(len(batch))


def _step(
    model: nn.Module, batch: Batch, images: int, step: int, setup: Experiment, world: World, guard: Guard
) -> tuple[Losses, Tensor]:
    """One optimiser step; what it draws depends on (seed, step, rank) alone.

    Args:
        images: of the step, over all ranks.
    """
    config, objective = setup.recipe.train, setup.objective
    set_learning_rate(setup.optimizer, setup.learning_rate(step))
    torch.manual_seed(derive("step", config.seed, step, world.rank))
    model.train()
    if config.freeze_bn:
        freeze_batch_norm(objective.student)
    objective.go_to(step / setup.steps)
    setup.optimizer.zero_grad(set_to_none=True)
    weight = len(batch) * world.size / images
    losses = backward(model, batch, config.accumulate, world, config.precision, weight)
    grad_norm = clip_gradients(objective, config)
    if not guard.grants(losses, grad_norm):
        return losses, grad_norm
    setup.optimizer.step()
    objective.after_step(step)
    if setup.ema is not None:
        setup.ema.update(objective.student, step + 1)
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


def _resume(setup: Experiment, out: Path, report: Report) -> _Done:
    """Load the newest checkpoint that is whole, where there is one."""
    resume = setup.recipe.runtime.resume
    state = newest(out, resume, setup.objective, setup.optimizer, setup.ema, report.warn)
    if state is None:
        return _Done()
    check_identity(out, state.pop("identity"), setup)
    report.stage(f"going on from {checkpoint_path(out, state['step']).stem}")
    return _Done(**state)


def _validation(setup: Experiment, world: World) -> Loader:
    """The validation images, for all validations of a run; where there are none it is never begun."""
    config, source = setup.recipe, setup.source if setup.validation is None else setup.validation
    return every_image(source, setup.view, config.eval.batch_size, config.data.skip_unreadable, world)


def _validate(
    setup: Experiment, step: int, validation: Loader, world: World, signals: Signals, saver: Saver
) -> tuple[dict[str, float], Accuracy]:
    """Accuracy on all validation images, in fp32 as `distill eval` has it; that of the average as `ema_…`.

    Returns:
        The numbers of both, and all that is known of the student that `student.safetensors` would be.
    """
    assert setup.val is not None
    size = setup.recipe.eval.batch_size
    fewest, most = -(-(len(setup.val) // world.size) // size), -(-len(setup.val) // (world.size * size))
    blank = torch.zeros(1, 3, setup.view.image_size, setup.view.image_size, device=world.device)
    models: list[tuple[str, nn.Module, Callable[[Tensor], Tensor]]]
    models = [("", setup.objective.student, setup.objective.evaluated)]
    if setup.ema is not None:
        models.append(("ema_", setup.ema.module, setup.ema.module))
    diverged = f"{saver.run}: the student's output is not finite after step {step}; lower --lr, in another --out"
    numbers: dict[str, float] = {}
    for prefix, student, model in models:
        # LeViT and TinyViT keep their attention biases in evaluation; up to timm 1.0.22 only train() drops them.
        student.train().eval()
        world.take_statistics(student)
        batches = _until(signals, validation, world, fewest, saver)
        if setup.sharded:
            batches = in_step(batches, most, partial(model, blank))
        with Report(quiet=True).progress("", 0) as progress:
            accuracy = measure_accuracy(model, batches, setup.classes, world, "fp32", progress, diverged)
        numbers |= {prefix + name: getattr(accuracy, name) for name in ("top1", "top5", "nll", "ece", "images")}
    return numbers, accuracy


def _until(signals: Signals, batches: Iterable[Batch], world: World, common: int, saver: Saver) -> Iterator[Batch]:
    """Break off a validation on a signal: its checkpoint is saved, and the next attempt begins with it.

    Args:
        common: batches that every rank has, in which all can ask each other.
    """
    for number, batch in enumerate(batches):
        if number < common and (stop := world.agree(signals.received)):
            saver.wait()
            raise stopped(stop, f"{saver.run}: while validating, after saving; the same command goes on")
        yield batch


def _finish(setup: Experiment, out: Path, done: _Done, world: World, report: Report) -> Summary:
    """Write the student, which is the average where there is one, and, last, the result."""
    final = last_validation(out) or {}
    ema, kind = setup.ema, "" if setup.ema is None else "ema_"
    summary = Summary(
        status="done",
        run=str(out),
        steps=setup.steps,
        epochs=setup.epochs,
        top1=final.get(f"{kind}top1"),
        top5=final.get(f"{kind}top5"),
        images_per_s=round(done.images / max(done.train_s, 1e-9), 1),
        wall_s=round(done.wall_s_now(), 2),
        nll=final.get(f"{kind}nll"),
        ece=final.get(f"{kind}ece"),
        parameters_m=parameters_in_millions(setup.objective.student),
        skipped=done.skipped,
        plain_top1=final.get("top1") if ema else None,
    )
    if ema is not None:
        card = setup.card(final.get("top1"), final.get("top5"))
        _save(out / PLAIN, setup.objective.student, card, setup, world)
    _deliver(out / STUDENT, setup, final, world)
    if world.is_main:
        write_json(out / RESULT, {**asdict(summary), "identity": setup.identity})
    report.stage(f"{out}: finished")
    return summary


def _deliver(path: Path, setup: Experiment, numbers: Mapping[str, Any], world: World) -> None:
    """Save the student, which is the average where there is one, with what it reached."""
    kind, student = ("", setup.objective.student) if setup.ema is None else ("ema_", setup.ema.module)
    card = setup.card(numbers.get(f"{kind}top1"), numbers.get(f"{kind}top5"), setup.recipe.train.ema_decay or None)
    _save(path, student, card, setup, world)


def _save(path: Path, student: nn.Module, card: Card, setup: Experiment, world: World) -> None:
    if world.is_main or setup.sharded:
        save_student(path, student, card, write=world.is_main)
