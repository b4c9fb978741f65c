"""`distill report`."""

from pathlib import Path
from typing import Annotated

import typer

from distill_cli.cli import options
from distill_cli.cli.output import print_result, report_for


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, finished or not.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The page; by default RUN/report.html.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="DATA", help="Where the images are now, if they were moved.")
    ] = None,
    store: Annotated[
        list[str] | None,
        typer.Option("--store", metavar="STORE", help="Where the store is now, if it was moved; each of several."),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", metavar="N", min=1, help="Rows on which student and teacher are compared.")
    ] = 2000,
    workers: options.Workers = None,
    device: options.Device = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a run as one HTML page: curves, classes, calibration, the largest disagreements, recipe, lineage."""
    from distill_cli.config import RuntimeConfig
    from distill_cli.distributed import world
    from distill_cli.reports import write_report

    with world(RuntimeConfig(device=device or "auto", workers=workers)) as here:
        summary = write_report(run, here, out, data, store or (), samples, report_for(here, quiet))
        if here.is_main:
            print_result(summary, as_json)
