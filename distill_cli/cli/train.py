"""`distill train`."""

from typing import Annotated

import typer

from distill_cli.cli import options
from distill_cli.cli.options import flags
from distill_cli.cli.output import print_bill, print_result, report_for


def command(
    out: options.RunOut,
    recipe: options.RecipeName = None,
    student: options.Student = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from timm's own weights.")] = False,
    store: options.StorePath = None,
    trust: options.Trust = False,
    data: options.Data = None,
    objective: Annotated[
        str | None, typer.Option("--objective", metavar="NAME", help="supervised, tinyvit or deit.")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", metavar="N", help="Passes over the data.")] = None,
    batch_size: options.BatchSize = None,
    views_per_read: options.ViewsPerRead = None,
    lr: Annotated[float | None, typer.Option("--lr", metavar="RATE", help="Peak learning rate, unscaled.")] = None,
    image_size: options.ImageSize = None,
    decode: options.Decode = None,
    workers: options.Workers = None,
    device: options.Device = None,
    precision: options.Precision = None,
    seed: options.Seed = None,
    skip_unreadable: options.SkipUnreadable = False,
    sets: options.Sets = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a student from a store or from labels, or go on where the run stopped."""
    from distill_cli import train
    from distill_cli.distributed import world
    from distill_cli.recipe import load

    loaded = load(
        recipe,
        sets or (),
        flags(
            ("--student", "student.name", student),
            ("--pretrained", "student.pretrained", pretrained),
            ("--store", "store.path", store),
            ("--trust", "store.trust", trust),
            ("--data", "data.path", data),
            ("--objective", "objective.name", objective),
            ("--epochs", "train.epochs", epochs),
            ("--batch-size", "train.batch_size", batch_size),
            ("--views-per-read", "train.views_per_read", views_per_read),
            ("--lr", "train.lr", lr),
            ("--image-size", "data.image_size", image_size),
            ("--decode", "data.decode", decode),
            ("--workers", "runtime.workers", workers),
            ("--device", "runtime.device", device),
            ("--precision", "train.precision", precision),
            ("--seed", "train.seed", seed),
            ("--skip-unreadable", "data.skip_unreadable", skip_unreadable),
        ),
    )
    with world(loaded.recipe.runtime) as here:
        report = report_for(here, quiet)
        if dry_run:
            bill = train.bill(loaded.recipe, out, here, report)
            if here.is_main:
                print_bill(bill, loaded.origins, as_json)
            return
        summary = train.train(loaded.recipe, out, here, report)
        if here.is_main:
            print_result(summary, as_json)
