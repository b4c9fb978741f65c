"""`distill bench data`: how fast images become batches, stage by stage, and what bounds it."""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import DEFAULT_CROP_PCT, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from distill_cli.data import image_cache, open_train
from distill_cli.data.batch import Batch
from distill_cli.data.batches import Batches, Rows
from distill_cli.data.config import TENSORS
from distill_cli.data.image_cache import ImageCache
from distill_cli.data.images import Encoded
from distill_cli.data.loader import load
from distill_cli.data.orders import TrainingOrder
from distill_cli.data.sources import Source
from distill_cli.data.tensors import Given, decoded
from distill_cli.data.views import View, check_decoder, check_view, resolve_view, stored_view, train_transform
from distill_cli.distributed import World
from distill_cli.ensemble import open_stores
from distill_cli.errors import DistillError, UsageError
from distill_cli.experiment import training_order
from distill_cli.recipe import Recipe
from distill_cli.replay import check_data
from distill_cli.report import Report
from distill_cli.sparse import SparseLogits
from distill_cli.store.reader import Store
from distill_cli.training_batches import by_step

T = TypeVar("T")

STAGES = ("read", "decode", "augment", "rows", "collate", "copy")
"""All but the last are a worker's; rows are those of a store, where there is one."""

SECONDS = 4.0
"""Of timing each part, where no batches are given."""
WORTH = 1.05
"""A change that is advised gives so many times the images."""
VIEWS_PER_READ = 4
MODEL = {
    "input_size": (3, 224, 224),
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "interpolation": "bicubic",
    "crop_pct": DEFAULT_CROP_PCT,
}
"""The input of a model where none is named: what timm takes for one."""


@dataclass(frozen=True)
class Stage:
    name: str
    ms: float
    """An input, in one process."""
    images_per_s: float
    share: float | None
    """Of a worker's time, in percent; None of what the main process does."""


@dataclass(frozen=True)
class Summary:
    data: str
    view: dict[str, Any]
    batch_size: int
    workers: int
    stages: tuple[Stage, ...]
    worker_images_per_s: float
    """Of one process that does all stages of a worker."""
    images_per_s: float
    """Of the loader, with all its workers."""
    bottleneck: str
    advice: str


@dataclass(frozen=True)
class _Opened:
    source: Source
    store: Store | None
    view: View
    batches: Batches


@dataclass(frozen=True)
class _Clock:
    """How long to time."""

    batches: int | None
    seconds: float

    def numbers(self, start: int = 0) -> Iterator[int]:
        """Numbers from `start` on, while there is time: one at least."""
        end = time.perf_counter() + self.seconds
        for number in itertools.count(start):
            over = time.perf_counter() > end if self.batches is None else number - start == self.batches
            if number > start and over:
                return
            yield number


def bench_data(
    recipe: Recipe,
    world: World,
    report: Report | None = None,
    batches: int | None = None,
    seconds: float | None = None,
) -> Summary:
    """Time the training images of `recipe.data` on their way to the device, by the views of a store or of the recipe.

    Args:
        batches: that are timed in each part; else as many as there are in `seconds`.

    Raises:
        UsageError, MismatchError, DamagedError: data, store and recipe do not fit.
        DistillError: an image cannot be decoded, and is not to be skipped, or none can.
    """
    report = report or Report()
    if (batches is not None and batches < 1) or (seconds is not None and not 0 < seconds < math.inf):
        raise UsageError("--batches, --seconds: give more than 0")
    clock = _Clock(batches, SECONDS if seconds is None else seconds)
    opened = _open(recipe, world, report)
    report.stage("timing the stages in one process")
    with _one_thread():
        ms = _stages(opened, world, clock)
    report.stage(f"timing the loader with {world.workers} workers")
    loaded = _loaded(opened.batches, world.workers, world, clock)
    of_worker = sum(ms.values()) - ms["copy"]
    stages = tuple(
        Stage(
            name,
            round(value, 4),
            round(1000 / max(value, 1e-6), 1),
            None if name == "copy" else round(100 * value / of_worker, 1),
        )
        for name, value in ms.items()
    )
    report.stage("trying what would be faster")
    return Summary(
        data=recipe.data.path or "",
        view=opened.view.table,
        batch_size=opened.batches.order.images_per_step,  # type: ignore[attr-defined]
        workers=world.workers,
        stages=stages,
        worker_images_per_s=round(1000 / of_worker, 1),
        images_per_s=round(loaded, 1),
        bottleneck=_bottleneck(stages, of_worker, loaded, world.workers),
        advice=_advice(opened, loaded, world, clock),
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """As a worker has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _open(recipe: Recipe, world: World, report: Report) -> _Opened:
    report.stage("opening the data")
    source = open_train(recipe.data, report)
    store = open_stores(recipe.store)
    if store is None:
        size = recipe.data.image_size or recipe.student.img_size or MODEL["input_size"][-1]  # type: ignore[index]
        view = resolve_view(recipe.data, {**MODEL, "input_size": (3, size, size)})
    else:
        check_data(store, source)
        view = stored_view(recipe.data, store.plan.transform, f"store {store}")
    check_decoder(view, world.device, store)
    order = training_order(recipe, source, store, view, world)
    source = image_cache.cached(source, recipe.data, "train", view, world, report)
    return _Opened(source, store, view, by_step(recipe, source, train_transform(view), order, store))


class _Times:
    """Seconds, by stage."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(STAGES, 0.0)

    def of(self, stage: str, call: Callable[[], T]) -> T:
        start = time.perf_counter()
        try:
            return call()
        finally:
            self.spent[stage] += time.perf_counter() - start


class _Timed:
    """A source that is timed."""

    def __init__(self, source: Source, times: _Times) -> None:
        self.source, self.times = source, times

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def content(self, sample_id: int) -> bytes:
        return self.times.of("read", lambda: self.source.content(sample_id))

    def decode(self, sample_id: int, content: bytes) -> Image.Image:
        return self.times.of("decode", lambda: self.source.decode(sample_id, content))

    def encoded(self, sample_id: int, content: bytes) -> Encoded | None:
        found = self.source.encoded(sample_id, content)
        return found and _TimedEncoded(found.content, found.name, self.times)

    def read(self, sample_id: int) -> Image.Image:
        if isinstance(self.source, ImageCache):
            return self.times.of("read", lambda: self.source.read(sample_id))
        return self.decode(sample_id, self.content(sample_id))


@dataclass(frozen=True)
class _TimedEncoded(Encoded):
    times: _Times

    def decoded(self, by: int = 1) -> Image.Image:
        return self.times.of("decode", lambda: super(_TimedEncoded, self).decoded(by))


class _TimedRows:
    """The rows of a store, which are read for many batches at once."""

    def __init__(self, rows: Rows, times: _Times) -> None:
        self.rows, self.times, self.count = rows, times, 0

    def __call__(self, view: int, sample_ids: NDArray[np.int64]) -> SparseLogits:
        self.count += len(sample_ids)
        return self.times.of("rows", lambda: self.rows(view, sample_ids))


def _stages(opened: _Opened, world: World, clock: _Clock) -> dict[str, float]:
    """Milliseconds an input of each stage, done one after the other in this process; the first batch is not counted.

    Raises:
        DistillError: no image could be decoded.
    """
    times, inputs = _Times(), 0
    rows = opened.batches.rows and _TimedRows(opened.batches.rows, times)
    batches = replace(opened.batches, source=_Timed(opened.source, times), rows=rows)  # type: ignore[arg-type]
    batch = _one(batches, 0, opened, world, times)
    first = dict(times.spent)
    for number in clock.numbers(1):
        batch = _one(batches, number, opened, world, times)
        inputs += len(batch)
    if not inputs:
        raise DistillError(f"{batch.skipped[0]}; no image of its batch could be decoded")
    ms = {name: 1000 * max(0.0, times.spent[name] - first[name]) / inputs for name in STAGES}
    if rows is None:
        del ms["rows"]
    else:
        ms["rows"] = 1000 * times.spent["rows"] / rows.count
    return ms


def _one(batches: Batches, number: int, opened: _Opened, world: World, times: _Times) -> Batch:
    """One batch; what is neither read nor decoded nor a row is augmentation."""
    before, start = sum(times.spent.values()), time.perf_counter()
    loaded = batches.draw(number)
    times.spent["augment"] += time.perf_counter() - start - (sum(times.spent.values()) - before)
    if opened.view.decode in TENSORS and not batches.transform.on_gpu:
        seconds = _decoding(opened.source, loaded.batch.sample_ids)
        times.spent["decode"] += seconds
        times.spent["augment"] -= seconds
    sent = times.of("collate", lambda: ForkingPickler.dumps(loaded))

    def arrived() -> Batch:
        batch = ForkingPickler.loads(sent).to(world.device).finished(batches.transform)
        _wait_for(world.device)
        return batch  # type: ignore[no-any-return]

    return times.of("copy", arrived)


def _decoding(source: Source, sample_ids: NDArray[np.int64]) -> float:
    """Seconds of decoding these images to tensors, each alone as in their view."""
    images = [(i, source.content(i)) for i in sample_ids.tolist()]
    given = [Given.of(source.encoded(i, content) or source.decode(i, content)) for i, content in images]
    start = time.perf_counter()
    for one in given:
        decoded([one], torch.device("cpu"))
    return time.perf_counter() - start


def _loaded(batches: Batches, workers: int, world: World, clock: _Clock) -> float:
    """Inputs a second of the loader; the batches that pay for its start are not counted."""
    loading = load(batches, itertools.count(), workers, world.device)
    try:
        for _ in range(2 * workers or 1):
            next(loading)
        start, inputs = time.perf_counter(), 0
        for _ in clock.numbers():
            inputs += len(next(loading))
        _wait_for(world.device)
        return inputs / (time.perf_counter() - start)
    finally:
        loading.close()  # type: ignore[attr-defined]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bottleneck(stages: tuple[Stage, ...], of_worker: float, loaded: float, workers: int) -> str:
    gives = {0: "one process gives", 1: "1 worker gives"}.get(workers, f"{workers} workers give")
    copy = next(stage for stage in stages if stage.name == "copy")
    if copy.ms * max(1, workers) > of_worker:
        return f"copy: the main process is slower than its workers; {gives} {loaded:.0f} images/s"
    most = max((stage for stage in stages if stage.share is not None), key=lambda stage: stage.ms)
    return f"{most.name}: {most.share:.0f} % of a worker's time; {gives} {loaded:.0f} images/s"


def _advice(opened: _Opened, loaded: float, world: World, clock: _Clock) -> str:
    """What was tried and gave most, if anything did."""
    cores = len(os.sched_getaffinity(0))
    tried = dict[str, float]()
    if world.workers < cores:
        tried[f"--workers {cores}"] = _loaded(opened.batches, cores, world, clock)
    for name, batches in _alternatives(opened):
        tried[name] = _loaded(batches, world.workers, world, clock)
    best = max(tried, key=tried.__getitem__, default="")
    if best and tried[best] >= WORTH * loaded:
        anew = " (of a store that is written anew)" if opened.store and best.startswith("data.") else ""
        return f"{best}{anew}: {tried[best]:.0f} instead of {loaded:.0f} images/s here"
    return f"nothing that was tried gives more ({', '.join(tried) or 'there is nothing to try'})"


def _alternatives(opened: _Opened) -> Iterator[tuple[str, Batches]]:
    """Other ways to the same batches, or nearly."""
    view, batches = opened.view, opened.batches
    for name, other in (("resize", "torch"), ("decode", "reduced")):
        try:
            changed = replace(view, **{name: other})  # type: ignore[arg-type]
            check_view(changed)
        except UsageError:
            continue
        cached = name == "decode" and isinstance(opened.source, ImageCache)
        if changed != view and view.decode not in TENSORS and not cached:
            yield f"data.{name}={other}", replace(batches, transform=train_transform(changed))
    views = opened.store.views if opened.store else VIEWS_PER_READ
    order = batches.order
    assert isinstance(order, TrainingOrder)
    if batches.views_per_read == 1 and views >= VIEWS_PER_READ <= order.batch_size:
        several = replace(order, views_per_read=VIEWS_PER_READ)
        yield f"--views-per-read {VIEWS_PER_READ}", replace(batches, order=several, views_per_read=VIEWS_PER_READ)
