"""`distill eval`."""

from typing import Annotated

import typer

from distill_cli.cli import options
from distill_cli.cli.options import flags
from distill_cli.cli.output import print_bill, print_result, report_for


def command(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A finished run directory.", show_default=False)
    ] = None,
    recipe: options.RecipeName = None,
    model: options.Model = None,
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="FILE", help="Of --model: safetensors or torch checkpoint.")
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Of --model: timm's own weights.")] = False,
    data: options.Data = None,
    cache: options.Cache = None,
    store: options.StorePaths = None,
    trust: options.Trust = False,
    fail_below: Annotated[
        float | None, typer.Option("--fail-below", metavar="TOP1", help="Exit 5 if top1 (percent) is less.")
    ] = None,
    image_size: options.ImageSize = None,
    batch_size: options.BatchSize = None,
    workers: options.Workers = None,
    device: options.Device = None,
    gpus: options.Gpus = None,
    precision: options.Precision = None,
    skip_unreadable: options.SkipUnreadable = False,
    sets: options.Sets = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Report a model's accuracy and calibration, and with --store its agreement with the teacher."""
    if gpus is not None:
        from distill_cli.launch import launch

        raise typer.Exit(launch(gpus, device))
    from distill_cli import evaluate
    from distill_cli.distributed import world
    from distill_cli.recipe import load

    loaded = load(
        recipe,
        sets or (),
        flags(
            ("--model", "student.name", model),
            ("--weights", "eval.weights", weights),
            ("--pretrained", "student.pretrained", pretrained),
            ("--data", "data.path", data),
            ("--cache", "data.cache", cache),
            ("--store", "store.path", store),
            ("--trust", "store.trust", trust),
            ("--fail-below", "eval.fail_below", fail_below),
            ("--image-size", "data.image_size", image_size),
            ("--batch-size", "eval.batch_size", batch_size),
            ("--workers", "runtime.workers", workers),
            ("--device", "runtime.device", device),
            ("--precision", "eval.precision", precision),
            ("--skip-unreadable", "data.skip_unreadable", skip_unreadable),
        ),
    )
    with world(loaded.recipe.runtime) as here:
        report = report_for(here, quiet)
        if dry_run:
            bill = evaluate.bill(loaded.recipe, run, here, report)
            if here.is_main:
                print_bill(bill, loaded.origins, as_json)
            return
        summary = evaluate.evaluate(loaded.recipe, run, here, report)
        if here.is_main:
            print_result(summary, as_json)
        evaluate.check_gate(summary, loaded.recipe.eval.fail_below)
