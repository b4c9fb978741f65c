"""`distill store trim`: fewer classes, fewer views or another codec, without asking the teacher again."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_cli.errors import MismatchError, UsageError
from distill_cli.locks import locked
from distill_cli.report import Report
from distill_cli.store.derived import begin, complete, finish, one_behind_the_other
from distill_cli.store.manifest import Manifest
from distill_cli.store.plan import CODECS, Generation, Plan, store_id
from distill_cli.store.reader import Store
from distill_cli.store.rows import RowFormat
from distill_cli.store.rows import trim as trim_rows
from distill_cli.store.writer import Hits, StoreWriter, has_top5

BITS = RowFormat(1, 1).bits
"""Where `--codec compact` is given alone."""


@dataclass(frozen=True)
class Trimmed:
    status: str
    """`done` or `already_done`."""
    store: str
    rows: int
    views: int
    shards: int
    bytes_before: int
    """Of the source's views, all of them."""
    bytes: int
    bytes_per_row: float
    wall_s: float
    store_id: str


def trim(
    source: Store,
    out: Path,
    top_k: int | None = None,
    views: int | None = None,
    codec: str | None = None,
    bits: int | None = None,
    report: Report | None = None,
) -> Trimmed:
    """Write a store of the first `top_k` classes of each row, in the first `views` views, by another codec.

    What is not given stays. The mass of classes that go is added to the tail, in float64:

        log_tail' = log(exp(log_tail) + sum_{j >= k} p_j)

    Which samples were skipped, the checksums of inputs and the teacher's own accuracy stay too; top5 is not known of
    rows of fewer than five classes.

    Raises:
        UsageError: there is nothing to trim, or more is asked than there is, or `out` is something else.
        MismatchError: `out` is another store, or the classes of a sampled store are to be trimmed.
        DamagedError: a shard of the source is missing or damaged.
        BusyError: another process works on `out`.
    """
    report, start = report or Report(), time.monotonic()
    _check_asked(source, top_k, views, codec, bits)
    plans = [
        trimmed_plan(source, generation, top_k, views, codec, bits)
        for generation in source.generations
        if views is None or generation.offset < views
    ]
    generations = one_behind_the_other(plans)
    manifests = complete(out, generations)
    if manifests is not None:
        report.stage(f"{out}: complete already, {sum(manifest.rows for manifest in manifests)} rows")
        return _summary("already_done", source, out, generations, manifests, start)
    rows = sum(plan.rows for plan in plans)
    with locked(out):
        writers = begin(out, generations)
        report.stage(f"trimming {source} to {out}: {rows} rows")
        with report.progress("trim", rows, unit="rows") as progress:
            for writer in writers:
                for view, shard in writer.plan.every_shard():
                    if not writer.is_there(view, shard):
                        _trim_shard(source, writer, view, shard)
                    progress.advance(len(writer.plan.dealing.places(shard)))
        manifests = finish(writers)
    summary = _summary("done", source, out, generations, manifests, start)
    report.stage(f"{out}: {summary.bytes_before} bytes before, {summary.bytes} now")
    return summary


def trimmed_plan(
    source: Store, generation: Generation, top_k: int | None, views: int | None, codec: str | None, bits: int | None
) -> Plan:
    """The plan of what is left of one generation, whose `lineage` says what it was.

    A row trimmed to k is the one that `keep_mass` gives between min(min_k, k) and k classes: the plan stays true.
    """
    plan = generation.plan
    k = plan.top_k if top_k is None else min(top_k, plan.top_k)
    codec = codec or plan.codec
    return replace(
        plan,
        views=plan.views if views is None else min(plan.views, views - generation.offset),
        top_k=k,
        min_k=min(plan.min_k, max(k, 1)),
        codec=codec,
        bits=(bits or plan.bits or BITS) if codec == "compact" else None,
        lineage={
            "command": "trim",
            "store": source.id,
            "plan": plan.sha256,
            "top_k": plan.top_k,
            "views": plan.views,
            "codec": plan.codec,
            "bits": plan.bits,
            "lineage": plan.lineage,
        },
    )


def _trim_shard(source: Store, writer: StoreWriter, view: int, shard: int) -> None:
    plan, view_there = writer.plan, writer.generation.offset + view
    opened = source.shard(view_there, shard)
    rows = source.rows(view_there, source.ids(view_there, shard))
    was = source.generation_of(view_there)[0].plan
    if plan.top_k < was.top_k:
        rows = trim_rows(rows, plan.top_k)
    hits: Hits = (opened.header.top1, opened.header.top5 if has_top5(plan) else None)
    extra: dict[str, NDArray[Any]] = {name: np.asarray(array) for name, array in opened.extra.items()}
    if "correction" in extra:
        # Of the very values of `log_prob`, which another codec does not keep.
        extra["correction"] = extra["correction"][:, : plan.top_k]
        if plan.codec != "exact":
            del extra["correction"]
    writer.write(view, shard, rows, opened.probe_crc, hits, extra)


def _check_asked(source: Store, top_k: int | None, views: int | None, codec: str | None, bits: int | None) -> None:
    """
    Raises:
        UsageError, MismatchError: see `trim`.
    """
    plans = [generation.plan for generation in source.generations]
    if (top_k, views, codec, bits) == (None,) * 4:
        raise UsageError(f"store {source}: nothing to trim; give --top-k, --views, --codec or --bits")
    most = max(plan.top_k for plan in plans)
    if top_k is not None and source.sampled:
        raise MismatchError(
            f"store {source}: --top-k {top_k} asked, its rows hold draws that stand for the whole tail, and without "
            "some of them they are biased; leave it out, or write a store with a smaller --top-k or --sample"
        )
    if top_k is not None and not 1 <= top_k <= most:
        raise UsageError(f"--top-k {top_k}: store {source} keeps {most} classes of a row; give 1 to {most}")
    if views is not None and not 1 <= views <= source.views:
        raise UsageError(f"--views {views}: store {source} has {source.views}; give 1 to {source.views}")
    if codec is not None and codec not in CODECS:
        raise UsageError(f"--codec {codec}: no such codec; there are {', '.join(CODECS)}")
    compact = codec == "compact" or (codec is None and all(plan.codec == "compact" for plan in plans))
    if bits is not None and not (compact and 4 <= bits <= 12):
        raise UsageError(f"--bits {bits}: is of --codec compact, 4 to 12")


def _summary(
    status: str,
    source: Store,
    out: Path,
    generations: Sequence[Generation],
    manifests: Sequence[Manifest],
    start: float,
) -> Trimmed:
    rows, size = sum(manifest.rows for manifest in manifests), sum(manifest.bytes for manifest in manifests)
    plans = [generation.plan for generation in generations]
    return Trimmed(
        status=status,
        store=str(out),
        rows=rows,
        views=sum(plan.views for plan in plans),
        shards=sum(len(manifest.shards) for manifest in manifests),
        bytes_before=sum(manifest.bytes for manifest in source.manifests),
        bytes=size,
        bytes_per_row=round(size / max(1, rows), 1),
        wall_s=round(time.monotonic() - start, 2),
        store_id=store_id(plans),
    )
