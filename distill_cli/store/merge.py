"""`distill store merge`: one store of shards, or of views, that were captured apart."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distill_cli.errors import DamagedError, MismatchError, UsageError
from distill_cli.files import fsync_directory, write_atomic
from distill_cli.locks import locked
from distill_cli.report import Report
from distill_cli.store.derived import begin, complete, finish, one_behind_the_other
from distill_cli.store.manifest import Manifest, read_manifest
from distill_cli.store.place import ADVICE, Folder
from distill_cli.store.plan import Generation, Plan, read_generations, store_id
from distill_cli.store.shard import check_rows, open_shard
from distill_cli.store.writer import check_payload

AGREE = ("teacher.", "data.", "samples: ", "transform.")
"""What all plans of a store have in common."""


@dataclass(frozen=True)
class Merged:
    status: str
    """`done` or `already_done`."""
    store: str
    rows: int
    views: int
    shards: int
    bytes: int
    plans: int
    linked: int
    """Shards that share their bytes with a source."""
    copied: int
    wall_s: float
    store_id: str


@dataclass(frozen=True)
class Part:
    """What one source has of one plan."""

    path: Path
    generation: Generation
    manifest: Manifest | None

    def shard(self, view: int, shard: int) -> Path | None:
        """Where it lies, if it is there; with a manifest it is, or should be."""
        path = self.path / self.generation.path(view, shard)
        return path if self.manifest is not None or path.exists() else None

    def verified(self, view: int, shard: int) -> str:
        """The sha256 of a shard that is what its header, and the manifest if there is one, say.

        Raises:
            DamagedError: it is not, or is missing.
        """
        plan = self.generation.plan
        path = self.path / self.generation.path(view, shard)
        opened = open_shard(path, plan, view, shard)
        digest = check_payload(path)
        if self.manifest is not None and digest != self.manifest.shards[view * plan.shards + shard].sha256:
            raise DamagedError(f"{path}: its sha256 is not the manifest's; {ADVICE}")
        check_rows(path, opened, plan, shard)
        return digest


def merge(stores: Sequence[Path], out: Path, report: Report | None = None) -> Merged:
    """Join stores: shards of the same plan, and behind each other the views of different plans.

    Plans stay as they are, and so do shards, which are linked where the file system can. What is there is kept:
    another call with the parts that are missing finishes `out`.

    Raises:
        UsageError: `out` is one of the stores, or something else.
        MismatchError: the stores are not of one teacher, data and transform, or draw the same view twice, or `out`
            is another store.
        DamagedError: a shard is damaged, or two of the same place differ, or some are missing in all stores.
        BusyError: another process works on `out`.
    """
    report, start = report or Report(), time.monotonic()
    _check_apart(stores, out)
    parts = [_parts(path) for path in stores]
    plans = {part.generation.plan.sha256: part.generation.plan for store in parts for part in store}
    generations = one_behind_the_other(list(plans.values()))
    _check_agreement(parts)
    manifests = complete(out, generations)
    if manifests is not None:
        report.stage(f"{out}: complete already, {sum(manifest.rows for manifest in manifests)} rows")
        return _summary("already_done", out, generations, manifests, {}, start)
    versions = {tuple(sorted(plan.software.items())) for plan in plans.values()}
    if len(versions) > 1:
        report.warn(f"{out}: its views were captured with other versions of libraries; store check tells if it matters")
    done = {"linked": 0, "copied": 0}
    with locked(out):
        writers = begin(out, generations)
        total = sum(plan.views * plan.shards for plan in plans.values())
        report.stage(f"verifying and joining {total} shards of {len(stores)} stores in {out}")
        missing = 0
        with report.progress("merge", total, unit="shards") as progress:
            for writer in writers:
                own = Part(out, writer.generation, None)
                sources = [
                    part for store in parts for part in store if part.generation.plan.sha256 == writer.plan.sha256
                ]
                for place in writer.plan.every_shard():
                    how = _join(own, sources, *place)
                    missing += how == "missing"
                    if how in done:
                        done[how] += 1
                    progress.advance(1)
        for folder in {(out / path).parent for writer in writers for path in writer.generation.paths()}:
            if folder.exists():
                fsync_directory(folder)
        if missing:
            raise DamagedError(
                f"{out}: {missing} of {total} shards are in none of these stores; the others are kept: "
                "run it again with the stores that have them"
            )
        manifests = finish(writers)
    return _summary("done", out, generations, manifests, done, start)


def _join(own: Part, sources: Sequence[Part], view: int, shard: int) -> str:
    """Bring one shard to its place; gives `there`, `linked`, `copied` or `missing`.

    Raises:
        DamagedError: a source's is damaged, or differs from another's.
    """
    found: tuple[Path, str] | None = None
    for part in (*sources, own):
        path = part.shard(view, shard)
        if path is None:
            continue
        if part is own and found and path.samefile(found[0]):
            return "there"
        digest = part.verified(view, shard)
        if found and digest != found[1]:
            raise DamagedError(
                f"{path}: is not the shard that {found[0]} is, of the same plan, view and number; "
                "delete the one that is wrong, or leave its store out"
            )
        if part is own:
            return "there"
        found = found or (path, digest)
    return "missing" if found is None else _bring(found[0], own.path / own.generation.path(view, shard))


def _bring(source: Path, target: Path) -> str:
    target.parent.mkdir(exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        # Of another file system, or of one without links. Shards are small enough to be held.
        write_atomic(target, source.read_bytes())
        return "copied"
    return "linked"


def _parts(path: Path) -> list[Part]:
    place = Folder(path)
    return [Part(path, found, read_manifest(place, found)) for found in read_generations(place)]


def _check_apart(stores: Sequence[Path], out: Path) -> None:
    """
    Raises:
        UsageError: a store is to be merged into itself.
    """
    for path in stores:
        if path.resolve() == out.resolve():
            raise UsageError(f'{out}: is one of the stores; give a new --out, or use "distill store extend"')


def _check_agreement(parts: Sequence[Sequence[Part]]) -> None:
    """
    Raises:
        MismatchError: plans of different teachers, data or transforms, or two that draw the same view.
    """
    first = parts[0][0]
    drawn: dict[tuple[int, int], Part] = {}
    for part in (part for store in parts for part in store):
        differing = list(_disagreements(first.generation.plan, part.generation.plan))
        if differing:
            raise MismatchError(
                f"{part.path}: is not of the same teacher, data and transform as {first.path} "
                f"({'; '.join(differing)}: there, here); only such stores can be merged"
            )
        for seed, view in part.generation.plan.drawn:
            other = drawn.setdefault((seed, view), part)
            if other.generation.plan.sha256 != part.generation.plan.sha256:
                raise MismatchError(
                    f"{part.path}: draws view {view} of seed {seed}, as {other.path} does under another plan "
                    f"({'; '.join(other.generation.plan.differences(part.generation.plan))}); "
                    "capture views apart with another store.first_view"
                )


def _disagreements(ours: Plan, theirs: Plan) -> Iterator[str]:
    return (line for line in ours.differences(theirs) if line.startswith(AGREE))


def _summary(
    status: str,
    out: Path,
    generations: Sequence[Generation],
    manifests: Sequence[Manifest],
    done: dict[str, int],
    start: float,
) -> Merged:
    plans = [generation.plan for generation in generations]
    return Merged(
        status=status,
        store=str(out),
        rows=sum(manifest.rows for manifest in manifests),
        views=sum(plan.views for plan in plans),
        shards=sum(len(manifest.shards) for manifest in manifests),
        bytes=sum(manifest.bytes for manifest in manifests),
        plans=len(plans),
        linked=done.get("linked", 0),
        copied=done.get("copied", 0),
        wall_s=round(time.monotonic() - start, 2),
        store_id=store_id(plans),
    )
