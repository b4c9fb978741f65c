"""`distill eval`: how good a model is on labelled images, and how near to its teacher on the rows of a store."""

import itertools
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_cli.checkpoint import RECIPE
from distill_cli.data import image_cache, open_train, open_val
from distill_cli.data.batch import Batch
from distill_cli.data.batches import Batches
from distill_cli.data.loader import Loader, load
from distill_cli.data.orders import ListingOrder
from distill_cli.data.sources import Source, check_classes
from distill_cli.data.views import (
    SEEN,
    DataConfig,
    View,
    check_decoder,
    read_view,
    resolve_view,
    student_view,
    train_transform,
)
from distill_cli.distributed import World
from distill_cli.ensemble import open_stores
from distill_cli.errors import GateError, MismatchError, UsageError
from distill_cli.metrics import Accuracy, every_image, measure_accuracy, measure_agreement
from distill_cli.recipe import Recipe, update
from distill_cli.recipe import load as load_recipe
from distill_cli.replay import SparseRows, check_data, prove_replay, stored_partners
from distill_cli.report import Report
from distill_cli.store.reader import Store
from distill_cli.students.build import check_forward, constructor_arguments, parameters_in_millions
from distill_cli.teachers import Frozen, TeacherConfig, check_classifier, load_frozen

BILL_BATCHES = 4


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What was measured; accuracies in percent, None where the data has no labels or no store was given."""

    model: str
    data: str
    split: str
    top1: float | None = None
    top5: float | None = None
    images: int = 0
    nll: float | None = None
    ece: float | None = None
    agreement: float | None = None
    """Share of the store's rows (view 0) with the teacher's class, in percent."""
    kl: float | None = None
    """KL(teacher || student) on these rows, in nats."""
    rows: int | None = None
    images_per_s: float
    wall_s: float
    parameters_m: float
    """Millions."""
    skipped: int = 0
    per_class: dict[str, float | None] | None = None
    calibration: tuple[tuple[int, float, float], ...] | None = None
    """By bin of confidence: images, accuracy, mean confidence, both 0 to 1."""


@dataclass(frozen=True)
class Bill:
    """What `--dry-run` says the evaluation will take."""

    recipe: Recipe
    origins: dict[str, str]
    images: int
    rows: int
    parameters_m: float
    images_per_s: float
    hours: float
    cache_bytes: int | None
    """What `--cache` will take; the hours are without it."""
    cache_free_bytes: int | None


@dataclass(frozen=True)
class Evaluation:
    """Model and data, opened and checked."""

    recipe: Recipe
    origins: dict[str, str]
    frozen: Frozen
    view: View
    source: Source
    split: str
    store: Store | None
    stored: Source | None
    """The images of the store."""
    stored_split: str
    """`train` or `val`, where there is a store."""


def evaluate(recipe: Recipe, run: str | None, world: World, report: Report | None = None) -> Summary:
    """Evaluate a run, or the weights of `recipe.eval` in `recipe.student`, on the validation images.

    A model with a distillation token is evaluated by the mean of its two heads, as timm has it.

    Args:
        run: a finished run directory; its recipe says where the data is, unless `recipe.data.path` does.

    Raises:
        UsageError, MismatchError, DamagedError: model, data and store do not fit, or are not there.
    """
    report = report or Report()
    start = time.monotonic()
    opened = _with_caches(open_evaluation(recipe, run, world, report), world, report)
    ready = time.monotonic()
    accuracy = agreement = None
    if opened.source.labels is not None:
        report.stage(f"evaluating on the {opened.split} split, {len(opened.source)} images")
        with closing(_batches(opened, world)) as batches, report.progress("eval", len(opened.source)) as progress:
            accuracy = measure_accuracy(
                opened.frozen.model,
                batches,
                opened.frozen.num_classes,
                world,
                opened.recipe.eval.precision,
                progress,
            )
    if opened.store is not None:
        report.stage(f"comparing with the rows of {opened.store}")
        stored = stored_batches(opened, opened.store, opened.store.sample_ids, world)
        with report.progress("agreement", len(opened.store.sample_ids)) as progress:
            agreement = measure_agreement(
                opened.frozen.model,
                stored,
                world,
                opened.recipe.eval.precision,
                progress,
                sampled=any(store.sampled for store in opened.store.stores),
            )
    end = time.monotonic()
    seen = (accuracy.images if accuracy else 0) + (agreement.rows if agreement else 0)
    return Summary(
        model=run or opened.frozen.name,
        data=opened.recipe.data.val or opened.recipe.data.path or "",
        split=opened.split,
        images_per_s=round(seen / (end - ready), 1),
        wall_s=round(end - start, 2),
        parameters_m=parameters_in_millions(opened.frozen.model),
        **(_fields(accuracy, opened) if accuracy else {}),
        **(asdict(agreement) if agreement else {}),
    )


def bill(recipe: Recipe, run: str | None, world: World, report: Report | None = None) -> Bill:
    """What the evaluation would take, from a few batches of the real thing; writes nothing."""
    report = report or Report()
    opened = open_evaluation(recipe, run, world, report)
    model, silent = opened.frozen.model, Report(quiet=True)
    report.stage("timing a few batches")
    start = time.monotonic()
    images = 0
    with closing(_batches(opened, world)) as batches, silent.progress("", 0) as progress:
        for batch in itertools.islice(batches, BILL_BATCHES):
            images += len(batch)
            if batch.labels.min() >= 0:
                measure_accuracy(
                    model, [batch], opened.frozen.num_classes, world, opened.recipe.eval.precision, progress
                )
    images_per_s = images / (time.monotonic() - start)
    rows = 0 if opened.store is None else len(opened.store.sample_ids)
    return Bill(
        recipe=opened.recipe,
        origins=opened.origins,
        images=len(opened.source),
        rows=rows,
        parameters_m=parameters_in_millions(model),
        images_per_s=round(images_per_s, 1),
        hours=round((len(opened.source) + rows) / images_per_s / 3600, 4),
        **image_cache.bill(opened.recipe.data, *_parts(opened)),
    )


def check_gate(summary: Summary, fail_below: float | None) -> None:
    """
    Raises:
        GateError: top1 is below `fail_below`, or was not measured.
    """
    if fail_below is not None and (summary.top1 is None or summary.top1 < fail_below):
        raise GateError(f"{summary.model}: top1 {summary.top1} is below --fail-below {fail_below}")


def open_evaluation(recipe: Recipe, run: str | None, world: World, report: Report) -> Evaluation:
    """Open model, data and store, and check them against each other.

    Raises:
        as `evaluate`.
    """
    frozen = _load(recipe, run, report)
    check_classifier(frozen, run or f"--model {recipe.student.name}")
    origins: dict[str, str] = {}
    if run is not None and recipe.data.path is None and recipe.data.val is None:
        there = load_recipe(str(Path(run) / RECIPE)).recipe.data
        settled = {f"data.{name}": getattr(there, name) for name in ("path", "val", "root", "labelled")}
        recipe, origins = update(recipe, settled), dict.fromkeys(settled, "run")
    source, split = open_val(recipe.data, report), "val"
    if source is None:
        source, split = open_train(recipe.data, report), "train"
    store = open_stores(recipe.store)
    if source.labels is None and store is None:
        raise UsageError(
            f"--data {recipe.data.path}: has no labels to evaluate against; give labelled images, or a --store"
        )
    check_classes(source, f"model {frozen.name}", frozen.num_classes, frozen.classes)
    evaluated = replace(recipe.data, augment="none", resize=None, decode=None)
    view = resolve_view(evaluated, frozen.input(recipe.data.image_size))
    stored, stored_split = (None, "") if store is None else _stored_images(recipe, frozen, store)
    if store is not None:
        check_decoder(read_view(store.plan.transform, f"store {store}"), world.device, store)
    frozen.model.to(world.device)
    check_forward(frozen.model, frozen.name, view.image_size)
    settled = {
        f"data.{name}": getattr(view, name) for name in ("image_size", "mean", "std", "interpolation", "crop_pct")
    }
    origins |= dict.fromkeys(settled, "model")
    return Evaluation(update(recipe, settled), origins, frozen, view, source, split, store, stored, stored_split)


def _load(recipe: Recipe, run: str | None, report: Report) -> Frozen:
    report.stage("loading the model")
    if run is not None:
        if recipe.student.name is not None or recipe.eval.weights is not None:
            raise UsageError(f"{run}: is a run, which has a model and weights of its own; give either it or --model")
        if not Path(run).is_dir():
            raise UsageError(f"{run}: no such run directory; give one, or --model NAME --weights FILE")
        return load_frozen(TeacherConfig(name=run))
    student = recipe.student
    if student.name is None:
        raise UsageError("nothing to evaluate: give a run directory, or --model NAME --weights FILE")
    return load_frozen(
        TeacherConfig(
            name=student.name,
            weights=recipe.eval.weights,
            pretrained=student.pretrained,
            kwargs=constructor_arguments(student, student.img_size or recipe.data.image_size) or None,
        ),
        flag="--model",
    )


def _stored_images(recipe: Recipe, frozen: Frozen, store: Store) -> tuple[Source, str]:
    """The images that a store was written from, and their split: training, or validation of the same data.

    Raises:
        MismatchError: it is neither, or the model has other classes than the store.
    """
    if store.num_classes != frozen.num_classes:
        raise MismatchError(
            f"store {store}: has {store.num_classes} classes, the model {frozen.num_classes}; "
            "give a store of the same classes"
        )
    refusal: MismatchError | None = None
    for split, source in (("train", open_train(recipe.data)), ("val", open_val(recipe.data))):
        try:
            if source is not None:
                check_data(store, source)
                return source, split
        except MismatchError as error:
            refusal = refusal or error
    raise refusal or MismatchError(f"store {store}: is not of the data {recipe.data.path}")


def _parts(opened: Evaluation) -> tuple[tuple[Source | None, str, View | None], tuple[Source | None, str, View | None]]:
    """What is read: source, part of the cache, view."""
    taught = None if opened.store is None else _taught(opened.store)
    evaluated = None if opened.source.labels is None else opened.source
    return (evaluated, "val", None), (opened.stored, "train", taught)


def _with_caches(opened: Evaluation, world: World, report: Report) -> Evaluation:
    """The same with its images read from `data.cache`, where there is one."""
    source, stored = (
        None if part is None else image_cache.cached(part, opened.recipe.data, name, view, world, report)
        for part, name, view in _parts(opened)
    )
    return replace(opened, source=source or opened.source, stored=stored)


def _taught(store: Store) -> View:
    return read_view(store.plan.transform, f"store {store}")


def _batches(opened: Evaluation, world: World) -> Loader:
    config = opened.recipe
    return every_image(opened.source, opened.view, config.eval.batch_size, config.data.skip_unreadable, world)


def stored_batches(opened: Evaluation, store: Store, sample_ids: NDArray[np.int64], world: World) -> Iterator[Batch]:
    """Rows of view 0 with what the teacher saw, at the size and in the colours of the model."""
    assert opened.stored is not None
    taught = _taught(store)
    prove_replay(store, opened.stored, train_transform(taught))
    own = student_view(DataConfig(), taught, {name: getattr(opened.view, name) for name in SEEN})
    transform = train_transform(taught, own)
    partners = stored_partners(store, taught)
    order = ListingOrder(sample_ids, opened.recipe.eval.batch_size, world.rank, world.size, partners)
    batches = Batches(opened.stored, transform, order, drawn=store.drawn, rows=SparseRows(store), partners=partners)
    return load(batches, range(order.batches), world.workers, world.device)


def _fields(accuracy: Accuracy, opened: Evaluation) -> dict[str, Any]:
    names = opened.frozen.classes or opened.source.classes or map(str, range(opened.frozen.num_classes))
    return {**asdict(accuracy), "per_class": dict(zip(names, accuracy.per_class, strict=True))}
