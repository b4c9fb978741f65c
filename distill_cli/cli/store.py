"""`distill store`: what is done with stores besides writing and reading them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from distill_cli.cli import options
from distill_cli.cli.options import flags
from distill_cli.cli.output import emit, print_result, print_table, report_for, text

app = typer.Typer(help="Look into, check, join, trim and convert stores.", no_args_is_help=True)

Store = Annotated[str, typer.Argument(metavar="STORE", help="The store's directory.")]


@app.command("inspect")
def inspect(
    store: Store,
    shards_sampled: Annotated[
        int | None,
        typer.Option("--shards-sampled", metavar="N", min=1, help="Read so many shards; by default at most 6."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Read every shard.")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what a store is and holds, complete or not."""
    from distill_cli.report import Report
    from distill_cli.store import open_place
    from distill_cli.store.inspect import ALL, ENDS, inspect, tables

    sampled = ALL if every else ENDS if shards_sampled is None else shards_sampled
    found = inspect(open_place(store), sampled, Report(quiet))
    if as_json:
        emit(json.dumps(asdict(found)))
        return
    for number, (head, rows) in enumerate(tables(found)):
        print_table(head, [[text(cell) for cell in row] for row in rows], apart=number > 0)


@app.command("verify")
def verify(
    store: Store,
    repair: Annotated[
        bool, typer.Option("--repair", help="Delete what is damaged, so that the next capture fills it.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="N", help="Threads; by default one a core.")
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Read every file of a store and name what is damaged or missing; exit 4 if anything is."""
    from distill_cli.report import Report
    from distill_cli.store.verify import check_verified, verify

    found = verify(Path(store), repair, workers, Report(quiet))
    if as_json:
        emit(json.dumps(asdict(found)))
    else:
        rows = [(each.path, each.kind, each.found, each.repaired or "") for each in found.findings]
        if rows:
            print_table(("file", "is", "found", "repaired"), rows)
        values = {name: value for name, value in asdict(found).items() if name != "findings"}
        print_table(("", ""), [(name, text(value)) for name, value in values.items()], apart=bool(rows))
    check_verified(found)


@app.command("check")
def check(
    store: Store,
    recipe: options.RecipeName = None,
    teacher: options.Teacher = None,
    teacher_weights: options.TeacherWeights = None,
    pretrained: options.Pretrained = False,
    data: options.Data = None,
    cache: options.Cache = None,
    files: Annotated[
        bool, typer.Option("--files", help="Instead of the teacher: read every file once and name those that changed.")
    ] = False,
    rows: Annotated[
        int, typer.Option("--rows", metavar="N", min=1, help="Rows to compare; whole batches are taken.")
    ] = 2000,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", metavar="X", min=0, help="Nats; by default 0.02, of a store in bf16 0.2."),
    ] = None,
    batch_size: options.BatchSize = None,
    workers: options.Workers = None,
    device: options.Device = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of the choice of rows.")] = 0,
    skip_unreadable: options.SkipUnreadable = False,
    sets: options.Sets = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Run the teacher again on some rows and compare, or look at the files; exit 3 if they are not the store's."""
    from distill_cli.check import check, check_passed
    from distill_cli.check_files import check_files, check_unchanged
    from distill_cli.distributed import world
    from distill_cli.recipe import load

    loaded = load(
        recipe,
        sets or (),
        flags(
            ("STORE", "store.path", store),
            ("--teacher", "teacher.name", teacher),
            ("--teacher-weights", "teacher.weights", teacher_weights),
            ("--pretrained", "teacher.pretrained", pretrained),
            ("--data", "data.path", data),
            ("--cache", "data.cache", cache),
            ("--batch-size", "store.batch_size", batch_size),
            ("--workers", "runtime.workers", workers),
            ("--device", "runtime.device", device),
            ("--skip-unreadable", "data.skip_unreadable", skip_unreadable),
        ),
    )
    with world(loaded.recipe.runtime) as here:
        if files:
            found = check_files(loaded.recipe, here, report_for(here, quiet))
            if here.is_main:
                print_result(found, as_json)
            check_unchanged(found)
            return
        summary = check(loaded.recipe, here, report_for(here, quiet), rows, tolerance, seed)
        if here.is_main:
            print_result(summary, as_json)
        check_passed(summary)


@app.command("extend")
def extend(
    store: Store,
    views: Annotated[int, typer.Option("--views", metavar="N", help="Views that the store is to have.", min=1)],
    recipe: options.RecipeName = None,
    teacher: options.Teacher = None,
    teacher_weights: options.TeacherWeights = None,
    pretrained: options.Pretrained = False,
    data: options.Data = None,
    cache: options.Cache = None,
    shards: options.Shards = None,
    batch_size: options.BatchSize = None,
    workers: options.Workers = None,
    device: options.Device = None,
    skip_unreadable: options.SkipUnreadable = False,
    sets: options.Sets = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Add views to a complete store, by the teacher and the data that it was written from."""
    from distill_cli.distributed import world
    from distill_cli.extend import extend
    from distill_cli.recipe import load

    loaded = load(
        recipe,
        sets or (),
        flags(
            ("--teacher", "teacher.name", teacher),
            ("--teacher-weights", "teacher.weights", teacher_weights),
            ("--pretrained", "teacher.pretrained", pretrained),
            ("--data", "data.path", data),
            ("--cache", "data.cache", cache),
            ("--batch-size", "store.batch_size", batch_size),
            ("--workers", "runtime.workers", workers),
            ("--device", "runtime.device", device),
            ("--skip-unreadable", "data.skip_unreadable", skip_unreadable),
        ),
    )
    with world(loaded.recipe.runtime) as here:
        summary = extend(loaded.recipe, Path(store), views, here, report_for(here, quiet), options.part(shards))
        if here.is_main:
            print_result(summary, as_json)


imports = typer.Typer(help="Make a store of what other programs have saved.", no_args_is_help=True)
exports = typer.Typer(help="Write a store as the files of other programs.", no_args_is_help=True)
app.add_typer(imports, name="import")
app.add_typer(exports, name="export")

NewStore = Annotated[Path, typer.Option("--out", metavar="NEW", help="The new store's directory.", show_default=False)]
Codec = Annotated[
    str | None, typer.Option("--codec", metavar="exact|compact", help="How rows are kept: as float16, or small.")
]
Bits = Annotated[int | None, typer.Option("--bits", metavar="B", help="Of a value, with the codec compact; 4 to 12.")]


@app.command("merge")
def merge(
    stores: Annotated[list[Path], typer.Argument(metavar="STORE...", help="The stores' directories.")],
    out: NewStore,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Join shards, or views, that were captured apart; shards are linked where possible."""
    from distill_cli.report import Report
    from distill_cli.store.merge import merge

    print_result(merge(stores, out, Report(quiet)), as_json)


@app.command("trim")
def trim(
    store: Store,
    out: NewStore,
    top_k: Annotated[int | None, typer.Option("--top-k", metavar="K", help="Classes to keep of each row.")] = None,
    views: Annotated[int | None, typer.Option("--views", metavar="N", help="Views to keep, from the first.")] = None,
    codec: Codec = None,
    bits: Bits = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a store of fewer classes or views of another, or by another codec."""
    from distill_cli.report import Report
    from distill_cli.store import open_place
    from distill_cli.store.reader import Store
    from distill_cli.store.trim import trim

    print_result(trim(Store(open_place(store)), out, top_k, views, codec, bits, Report(quiet)), as_json)


@imports.command("tinyvit")
def import_tinyvit(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where its logits_top{K}_epoch{E} folders are.")],
    data: options.Data,
    out: NewStore,
    teacher: Annotated[str, typer.Option("--teacher", metavar="NAME", help="What the plan calls it.")] = "tinyvit",
    num_classes: Annotated[
        int | None, typer.Option("--num-classes", metavar="C", help="Of the teacher; by default the data's.")
    ] = None,
    keys: Annotated[
        str, typer.Option("--keys", metavar="auto|index|stem", help="How samples are named in the files.")
    ] = "auto",
    codec: Codec = None,
    bits: Bits = None,
    shard_rows: Annotated[
        int | None, typer.Option("--shard-rows", metavar="N", help="Rows of one file: 16,384, or those of a tar.")
    ] = None,
    sets: options.Sets = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Make a store of the logits that TinyViT's own code saved."""
    from distill_cli.import_tinyvit import import_tinyvit
    from distill_cli.recipe import load
    from distill_cli.report import Report

    recipe = load(
        None,
        sets or (),
        flags(
            ("--data", "data.path", data),
            ("--codec", "store.codec", codec),
            ("--bits", "store.bits", bits),
            ("--shard-rows", "store.shard_rows", shard_rows),
        ),
    ).recipe
    print_result(import_tinyvit(folder, recipe, out, teacher, num_classes, keys, Report(quiet)), as_json)


@exports.command("tinyvit")
def export_tinyvit(
    store: Store,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="For a folder of each view.", show_default=False)],
    keys: Annotated[
        str, typer.Option("--keys", metavar="index|stem", help="How to name samples; stem needs --data.")
    ] = "index",
    data: options.Data = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write the files that TinyViT's own code reads."""
    from distill_cli.report import Report
    from distill_cli.store import open_place
    from distill_cli.store.export_tinyvit import export_tinyvit
    from distill_cli.store.reader import Store

    opened = Store(open_place(store))
    names = None
    if keys != "index":
        from distill_cli.tinyvit_keys import names_of

        names = names_of(opened, keys, data)
    print_result(export_tinyvit(opened, out, names, Report(quiet)), as_json)


@exports.command("parquet")
def export_parquet(
    store: Store,
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="FILE|DIR", help="X.parquet, or a folder for a file of each view.", show_default=False
        ),
    ],
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a table of view, sample_id, class_id, log_prob and log_tail."""
    from distill_cli.report import Report
    from distill_cli.store import open_place
    from distill_cli.store.export_parquet import export_parquet
    from distill_cli.store.reader import Store

    print_result(export_parquet(Store(open_place(store)), out, Report(quiet)), as_json)
