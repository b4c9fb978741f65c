"""`distill store import tinyvit`: files that TinyViT saved become a store."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_cli.capture import shards_of
from distill_cli.data import open_train
from distill_cli.data.sources import Source, check_classes, fingerprint
from distill_cli.data.sources import num_classes as classes_of
from distill_cli.data.views import IMPORTED
from distill_cli.errors import DamagedError, MismatchError, UsageError
from distill_cli.files import sha256
from distill_cli.locks import locked
from distill_cli.recipe import Recipe
from distill_cli.report import Report
from distill_cli.store import tinyvit
from distill_cli.store.derived import begin, complete, finish, one_behind_the_other
from distill_cli.store.manifest import Manifest
from distill_cli.store.plan import Generation, Plan, store_id
from distill_cli.store.rows import RowFormat
from distill_cli.store.tinyvit import Epoch
from distill_cli.store.writer import StoreWriter
from distill_cli.tinyvit_keys import Names, open_names, some

BITS = RowFormat(1, 1).bits


@dataclass
class Found:
    """What was remarkable about the files."""

    missing: int = 0
    """Samples of an epoch without a record: they have no row."""
    duplicates: int = 0
    """Records that a later one of the same key replaces."""
    negative_tails: int = 0
    """Rows whose probabilities add up to more than 1: their tail is set to nothing."""


@dataclass(frozen=True)
class Imported:
    status: str
    """`done` or `already_done`."""
    store: str
    rows: int
    views: int
    shards: int
    bytes: int
    bytes_per_row: float
    epochs: list[int]
    gaps: list[int]
    """Epochs that are missing between the first and the last."""
    missing: int | None
    """None where the store was done already."""
    duplicates: int | None
    negative_tails: int | None
    top1: float | None
    top5: float | None
    wall_s: float
    store_id: str


def import_tinyvit(
    folder: Path,
    recipe: Recipe,
    out: Path,
    teacher: str = "tinyvit",
    num_classes: int | None = None,
    keys: str = "auto",
    report: Report | None = None,
) -> Imported:
    """Write a store of the saved logits below `folder`; epochs become views, ascending.

    Consecutive epochs share a plan, whose `first_view` is the first epoch. What is drawn in them is TinyViT's affair:
    the rows keep their seeds, for `export_tinyvit`, and cannot be replayed here.

    Args:
        recipe: `data`, and of `store` codec, bits, order and shard_rows.
        keys: how samples are named: `index`, `stem`, or `auto`, which takes decimal numbers as indices.

    Raises:
        UsageError: there is nothing to import, or the number of classes is not known, or keys are ambiguous.
        MismatchError: keys that the data does not have; or other classes; or `out` is another store.
        DamagedError: a file is cut short, or has values that no teacher gives.
        BusyError: another process works on `out`.
    """
    report, start = report or Report(), time.monotonic()
    report.stage("opening the data")
    source = open_train(recipe.data, report)
    epochs = tinyvit.epochs(folder)
    classes = _classes(folder, source, num_classes, epochs[0].k)
    names = open_names(source, keys, epochs[0])
    digest = _read_all(folder, epochs, names, report)
    teaches = {"name": teacher, "weights_sha256": digest, "num_classes": classes, "classes": _listed(source.classes)}
    plans = [_plan(run, teaches, source, recipe, names.kind) for run in _runs(epochs)]
    generations = one_behind_the_other(plans)
    numbers = [epoch.number for epoch in epochs]
    gaps = sorted(set(range(numbers[0], numbers[-1])) - set(numbers))
    manifests = complete(out, generations)
    if manifests is not None:
        report.stage(f"{out}: complete already, {sum(manifest.rows for manifest in manifests)} rows")
        return _summary("already_done", out, generations, manifests, numbers, gaps, None, start)
    found = Found()
    rows = sum(plan.rows for plan in plans)
    with locked(out):
        writers = begin(out, generations, source.labels)
        report.stage(f"writing {rows} rows to {out}")
        with report.progress("import", rows, unit="rows") as progress:
            for epoch, (writer, view) in zip(epochs, _views(writers), strict=True):
                for count in _write_view(epoch, names, writer, view, found, report):
                    progress.advance(count)
        manifests = finish(writers)
    if gaps:
        report.warn(f"{folder}: has no epoch {some(gaps)} between {numbers[0]} and {numbers[-1]}")
    if found.missing:
        report.warn(f"{out}: {found.missing} of {rows} samples had no record and have no rows")
    if found.negative_tails:
        report.stage(f"{out}: {found.negative_tails} rows add up to more than 1, by rounding; their tails are nothing")
    return _summary("done", out, generations, manifests, numbers, gaps, found, start)


def _read_all(folder: Path, epochs: Sequence[Epoch], names: Names, report: Report) -> str:
    """Read every file once before anything is written: the sha256 over all of them.

    Raises:
        DamagedError, MismatchError: a file is cut short, or has keys of other data.
    """
    files = [file for epoch in epochs for file in epoch.ranks]
    report.stage(f"reading {len(files)} pairs of files of {len(epochs)} epochs in {folder}")
    lines = []
    with report.progress("read", len(files), unit="files") as progress:
        for file in files:
            for path, digest in zip((file.keys_path, file.values_path), file.sha256(), strict=True):
                lines.append(f"{path.relative_to(folder).as_posix()} {digest}\n")
            names.ids(file)
            progress.advance(1)
    return sha256("".join(lines))


def _write_view(
    epoch: Epoch, names: Names, writer: StoreWriter, view: int, found: Found, report: Report
) -> Iterator[int]:
    """Write the shards of one epoch; gives the places of each."""
    records, files = _index(epoch, names, found, report)
    plan = writer.plan
    for shard in range(plan.shards):
        wanted = plan.dealing.sample_ids(shard)
        ids = wanted[records[wanted] >= 0]
        taken = _take(epoch, files, records[ids])
        wrong = tinyvit.wrong_record(taken, plan.num_classes)
        if wrong is not None:
            at, reason = wrong
            raise DamagedError(
                f"{epoch.folder}: the record of sample {ids[at]} {reason}; give the right --num-classes, or save this "
                "epoch again"
            )
        rows, correction, negative = tinyvit.to_rows(taken, ids, plan.num_classes)
        found.missing += len(wanted) - len(ids)
        found.negative_tails += negative
        if not writer.is_there(view, shard):
            extra: dict[str, NDArray[Any]] = {"seed": taken["seed"]}
            if plan.codec == "exact":
                extra["correction"] = correction
            writer.write(view, shard, rows, np.zeros(0, np.uint32), extra=extra)
        yield len(wanted)


def _index(epoch: Epoch, names: Names, found: Found, report: Report) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The number of each sample's record among those of all ranks, -1 where it has none, and where each rank's begin.

    Of several records of a sample the last counts: that of the highest rank, and there the one that stands last.
    """
    records = np.full(names.samples, -1, np.int64)
    starts = [0]
    for file in epoch.ranks:
        ids = names.ids(file)
        samples, from_behind = np.unique(ids[::-1], return_index=True)
        again = records[samples]
        replaced = again[again >= 0]
        found.duplicates += len(ids) - len(samples) + len(replaced)
        if len(replaced):
            others = np.unique(np.searchsorted(np.array(starts), replaced, side="right") - 1)
            before = ", ".join(f"rank{epoch.ranks[rank].rank}" for rank in others)
            report.warn(
                f"{epoch.folder}: {len(replaced)} keys of rank{file.rank} are also in {before}; the higher rank "
                "counts; a few pad the last batch, many are files of an earlier run, which should go"
            )
        records[samples] = starts[-1] + len(ids) - 1 - from_behind
        starts.append(starts[-1] + len(ids))
    return records, np.array(starts)


def _take(epoch: Epoch, starts: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[Any]:
    """Records by their number among those of all ranks."""
    taken = np.zeros(len(numbers), tinyvit.record_dtype(epoch.k))
    rank = np.searchsorted(starts, numbers, side="right") - 1
    for place in np.unique(rank):
        here = rank == place
        taken[here] = epoch.ranks[place].records[numbers[here] - starts[place]]
    return taken


def _views(writers: Sequence[StoreWriter]) -> Iterator[tuple[StoreWriter, int]]:
    return ((writer, view) for writer in writers for view in range(writer.plan.views))


def _runs(epochs: Sequence[Epoch]) -> list[list[Epoch]]:
    """Epochs that follow each other without a gap."""
    found: list[list[Epoch]] = []
    for epoch in epochs:
        if found and epoch.number == found[-1][-1].number + 1:
            found[-1].append(epoch)
        else:
            found.append([epoch])
    return found


def _plan(run: Sequence[Epoch], teacher: dict[str, Any], source: Source, recipe: Recipe, keys: str) -> Plan:
    store = recipe.store
    return Plan(
        teacher=teacher,
        data=fingerprint(source),
        transform={"augment": IMPORTED},
        samples=len(source),
        views=len(run),
        first_view=run[0].number,
        top_k=run[0].k,
        **shards_of(recipe, source),
        seed=0,
        precision="fp16",
        codec=store.codec,
        bits=(store.bits or BITS) if store.codec == "compact" else None,
        lineage={"command": "import tinyvit", "keys": keys},
    )


def _classes(folder: Path, source: Source, asked: int | None, k: int) -> int:
    """
    Raises:
        UsageError, MismatchError: how many classes there are is not known, or disagrees.
    """
    classes = asked or classes_of(source)
    if classes is None:
        raise UsageError(f"{folder}: nothing says how many classes its teacher has; give --num-classes")
    check_classes(source, f"--num-classes {classes}" if asked else f"{folder}", classes, None)
    if not k <= classes <= 2**16:
        raise MismatchError(
            f"{folder}: keeps {k} classes of a row, of {classes}; give the teacher's own --num-classes, at most {2**16}"
        )
    return classes


def _listed(classes: tuple[str, ...] | None) -> list[str] | None:
    return None if classes is None else list(classes)


def _summary(
    status: str,
    out: Path,
    generations: Sequence[Generation],
    manifests: Sequence[Manifest],
    numbers: list[int],
    gaps: list[int],
    found: Found | None,
    start: float,
) -> Imported:
    rows, size = sum(manifest.rows for manifest in manifests), sum(manifest.bytes for manifest in manifests)
    return Imported(
        status=status,
        store=str(out),
        rows=rows,
        views=len(numbers),
        shards=sum(len(manifest.shards) for manifest in manifests),
        bytes=size,
        bytes_per_row=round(size / max(1, rows), 1),
        epochs=numbers,
        gaps=gaps,
        missing=None if found is None else found.missing,
        duplicates=None if found is None else found.duplicates,
        negative_tails=None if found is None else found.negative_tails,
        top1=_mean([(manifest.top1, manifest.rows) for manifest in manifests]),
        top5=_mean([(manifest.top5, manifest.rows) for manifest in manifests]),
        wall_s=round(time.monotonic() - start, 2),
        store_id=store_id([generation.plan for generation in generations]),
    )


def _mean(parts: Sequence[tuple[float | None, int]]) -> float | None:
    known = [(value, rows) for value, rows in parts if value is not None]
    rows = sum(rows for _, rows in known)
    return round(sum(value * rows for value, rows in known) / rows, 3) if rows else None
