"""`distill store extend`: more views of a complete store, under a plan of their own."""

import time
from dataclasses import replace
from pathlib import Path

from distill_cli.capture import open_capture
from distill_cli.data.views import check_decoder, check_replayable, read_view, stored_view
from distill_cli.distributed import World
from distill_cli.errors import DamagedError, MismatchError, UsageError
from distill_cli.recipe import Recipe, update
from distill_cli.report import Report
from distill_cli.store.place import Folder
from distill_cli.store.plan import Generation, Plan, read_generations
from distill_cli.store.reader import Store
from distill_cli.teacher_logits import Summary, write_generation

OF_A_GENERATION = ("views", "first_view", "software", "lineage")
"""Fields of a plan in which an extension may differ."""
KEPT = ("top_k", "keep_mass", "min_k", "sample", "codec", "bits", "seed", "precision")
"""Fields of a plan that are values of `[store]` too."""


def extend(
    recipe: Recipe,
    store: Path,
    views: int,
    world: World,
    report: Report | None = None,
    shards: tuple[int, int] | None = None,
) -> Summary:
    """Bring a store to `views` views: the further ones are captured under a plan that is added to it.

    Everything but teacher, data and machine comes from the store. No byte of it changes.

    Args:
        shards: of the further views, as in `teacher_logits`.

    Raises:
        UsageError: the store has more views already.
        MismatchError: teacher or data are not those of the store; both values are named.
        DamagedError: there is no store, or its views are not complete.
        as `teacher_logits`.
    """
    report, start = report or Report(), time.monotonic()
    generation = _next(store, views)
    before = generation.plan
    check_replayable(f"store {store}", before.transform)
    check_decoder(read_view(before.transform, f"store {store}"), world.device, store)
    capture = open_capture(_as_before(recipe, before), world, report)
    plan = capture.plan
    differing = [line for line in before.differences(plan) if not line.startswith(OF_A_GENERATION)]
    if differing:
        raise MismatchError(
            f"{store}: cannot be extended by this ({'; '.join(differing)}: there, asked); "
            "give the same teacher and data, or write another store"
        )
    summary = write_generation(capture, replace(generation, plan=plan), store, world, report, start, shards)
    return summary if summary.status == "part" else _of_all_views(summary, Store(store))


def _of_all_views(summary: Summary, store: Store) -> Summary:
    """The summary of a whole store; top1 and top5 stay those of the further views."""
    rows, size = (sum(getattr(manifest, name) for manifest in store.manifests) for name in ("rows", "bytes"))
    return replace(
        summary,
        rows=rows,
        views=store.views,
        shards=sum(len(manifest.shards) for manifest in store.manifests),
        bytes=size,
        bytes_per_row=round(size / max(1, rows), 1),
        skipped=store.plan.samples - len(store.sample_ids),
        store_id=store.id,
    )


def _next(store: Path, views: int) -> Generation:
    """The generation that brings a store to so many views; it may be there already, finished or not."""
    place = Folder(store)
    generations = read_generations(place)
    last = generations[-1]
    there = last.offset + last.plan.views
    if views < there:
        raise UsageError(f"--views {views}: the store has {there} already; give the number that it is to have")
    for generation in generations if views > there else generations[:-1]:
        if not place.has(generation.manifest_name):
            raise DamagedError(
                f"{store}: its views from {generation.offset} on are not complete; "
                "finish them by the command that began them"
            )
    if views == there:
        return last
    drawn = [pair for generation in generations for pair in generation.plan.drawn]
    first_view = 1 + max(view for seed, view in drawn if seed == last.plan.seed)
    plan = replace(last.plan, views=views - there, first_view=first_view, lineage=None)
    return Generation(len(generations), plan, there)


def _as_before(recipe: Recipe, plan: Plan) -> Recipe:
    """The recipe with all that the store decides."""
    values = {f"data.{name}": value for name, value in stored_view(recipe.data, plan.transform).table.items()}
    values |= {f"store.{name}": getattr(plan, name) for name in (*KEPT, "views", "first_view")}
    dealt = plan.shard_sizes is None
    values |= {"store.order": "dealt" if dealt else "tars", "store.shard_rows": plan.shard_rows if dealt else None}
    return update(recipe, values)
