"""`distill teacher-logits`."""

from typing import Annotated

import typer

from distill_cli.cli import options
from distill_cli.cli.options import flags
from distill_cli.cli.output import print_bill, print_result, report_for


def command(
    out: options.StoreOut,
    recipe: options.RecipeName = None,
    teacher: options.Teacher = None,
    teacher_weights: options.TeacherWeights = None,
    pretrained: options.Pretrained = False,
    data: options.Data = None,
    cache: options.Cache = None,
    top_k: Annotated[int | None, typer.Option("--top-k", metavar="K", help="Classes kept of each row.")] = None,
    views: Annotated[int | None, typer.Option("--views", metavar="N", help="Augmented views of each sample.")] = None,
    keep_mass: Annotated[
        float | None, typer.Option("--keep-mass", metavar="P", help="Keep only the classes needed for this mass.")
    ] = None,
    min_k: Annotated[
        int | None, typer.Option("--min-k", metavar="K", help="With --keep-mass: at least so many classes.")
    ] = None,
    sample: Annotated[
        int | None, typer.Option("--sample", metavar="N", help="Draw N times from the classes outside the top k.")
    ] = None,
    codec: Annotated[
        str | None, typer.Option("--codec", metavar="exact|compact", help="How rows are kept: as float16, or small.")
    ] = None,
    shard_rows: Annotated[
        int | None, typer.Option("--shard-rows", metavar="N", help="Rows of one file: 16,384, or those of a tar.")
    ] = None,
    shards: options.Shards = None,
    image_size: options.ImageSize = None,
    batch_size: options.BatchSize = None,
    decode: options.Decode = None,
    workers: options.Workers = None,
    device: options.Device = None,
    gpus: options.Gpus = None,
    precision: options.Precision = None,
    seed: options.Seed = None,
    skip_unreadable: options.SkipUnreadable = False,
    sets: options.Sets = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a store of a teacher's sparse top-k logits, or what is missing of it."""
    if gpus is not None:
        from distill_cli.launch import launch

        raise typer.Exit(launch(gpus, device))
    from distill_cli import teacher_logits
    from distill_cli.distributed import world
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
            ("--top-k", "store.top_k", top_k),
            ("--keep-mass", "store.keep_mass", keep_mass),
            ("--min-k", "store.min_k", min_k),
            ("--sample", "store.sample", sample),
            ("--views", "store.views", views),
            ("--codec", "store.codec", codec),
            ("--shard-rows", "store.shard_rows", shard_rows),
            ("--image-size", "data.image_size", image_size),
            ("--batch-size", "store.batch_size", batch_size),
            ("--decode", "data.decode", decode),
            ("--workers", "runtime.workers", workers),
            ("--device", "runtime.device", device),
            ("--precision", "store.precision", precision),
            ("--seed", "store.seed", seed),
            ("--skip-unreadable", "data.skip_unreadable", skip_unreadable),
        ),
    )
    part = options.part(shards)
    with world(loaded.recipe.runtime) as here:
        report = report_for(here, quiet)
        if dry_run:
            bill = teacher_logits.bill(loaded.recipe, out, here, report)
            if here.is_main:
                print_bill(bill, loaded.origins, as_json)
            return
        summary = teacher_logits.teacher_logits(loaded.recipe, out, here, report, part)
        if here.is_main:
            print_result(summary, as_json)
