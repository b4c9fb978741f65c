"""`distill bench data`."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from distill_cli.cli import options
from distill_cli.cli.options import flags
from distill_cli.cli.output import emit, print_table, report_for, text

app = typer.Typer(help="Measure this machine.", no_args_is_help=True)


@app.command("data")
def data(
    recipe: options.RecipeName = None,
    path: options.Data = None,
    store: options.StorePaths = None,
    cache: options.Cache = None,
    batch_size: options.BatchSize = None,
    views_per_read: options.ViewsPerRead = None,
    image_size: options.ImageSize = None,
    decode: options.Decode = None,
    workers: options.Workers = None,
    device: options.Device = None,
    batches: Annotated[int | None, typer.Option("--batches", metavar="N", help="Batches timed in each part.")] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", metavar="S", help="Instead: seconds of timing each part; 4.")
    ] = None,
    skip_unreadable: options.SkipUnreadable = False,
    sets: options.Sets = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Time images from the disk to the device, by the views of a store or of a recipe, and say what bounds them."""
    from distill_cli.bench import bench_data
    from distill_cli.distributed import world
    from distill_cli.recipe import load

    loaded = load(
        recipe,
        sets or (),
        flags(
            ("--data", "data.path", path),
            ("--store", "store.path", store),
            ("--cache", "data.cache", cache),
            ("--batch-size", "train.batch_size", batch_size),
            ("--views-per-read", "train.views_per_read", views_per_read),
            ("--image-size", "data.image_size", image_size),
            ("--decode", "data.decode", decode),
            ("--workers", "runtime.workers", workers),
            ("--device", "runtime.device", device),
            ("--skip-unreadable", "data.skip_unreadable", skip_unreadable),
        ),
    )
    with world(loaded.recipe.runtime) as here:
        summary = bench_data(loaded.recipe, here, report_for(here, quiet), batches, seconds)
    if as_json:
        emit(json.dumps(asdict(summary)))
        return
    rows = [
        (
            stage.name,
            f"{stage.ms:.3f}",
            f"{stage.images_per_s:,.0f}",
            "-" if stage.share is None else f"{stage.share:.0f}",
        )
        for stage in summary.stages
    ]
    print_table(("stage", "ms an image", "images/s in one process", "% of a worker"), rows)
    names = ("workers", "batch_size", "worker_images_per_s", "images_per_s", "bottleneck", "advice")
    print_table(("", ""), [(name, text(getattr(summary, name))) for name in names], apart=True)
