"""`distill store`: what is done with stores besides writing and reading them."""

from pathlib import Path
from typing import Annotated

import typer

from distill_cli.cli import options
from distill_cli.cli.options import flags
from distill_cli.cli.output import print_result, report_for

app = typer.Typer(help="Look into, check, join, trim and convert stores.", no_args_is_help=True)

Store = Annotated[str, typer.Argument(metavar="STORE", help="The store's directory.")]


@app.command("extend")
def extend(
    store: Store,
    views: Annotated[int, typer.Option("--views", metavar="N", help="Views that the store is to have.", min=1)],
    recipe: options.RecipeName = None,
    teacher: options.Teacher = None,
    teacher_weights: options.TeacherWeights = None,
    pretrained: options.Pretrained = False,
    data: options.Data = None,
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
