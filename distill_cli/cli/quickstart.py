"""`distill quickstart`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from distill_cli.cli import options
from distill_cli.cli.output import emit, print_table, text


def command(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Everything is written below it.")] = Path(
        "quickstart"
    ),
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of all that is drawn.", min=0)] = 0,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a teacher, store its logits and distil a student, on real images, in minutes."""
    from distill_cli.quickstart import finished, quickstart
    from distill_cli.report import Report

    summary = finished(out, seed)
    if summary is None:
        from distill_cli.config import RuntimeConfig
        from distill_cli.distributed import world

        with world(RuntimeConfig(device=device)) as here:
            summary = quickstart(out, seed, here, Report(quiet))
    if as_json:
        emit(json.dumps(asdict(summary)))
        return
    if summary.status == "already_done":
        emit(f"{out}: finished already; these are its results")
    rows = [(row.model, f"{row.top1:.2f}", f"{row.parameters_m:.3f}", f"{row.wall_s:.0f}") for row in summary.rows]
    print_table(("model", "top1 %", "parameters, M", "wall, s"), rows)
    per_row = summary.store_bytes / summary.store_rows
    emit(
        f"\nstore: {text(summary.store_rows)} rows, {text(summary.store_bytes)} bytes ({per_row:.1f} a row), "
        f"{summary.store_wall_s:.0f} s; distillation adds {summary.gain:+.2f} points of top1; "
        f"{summary.wall_s:.0f} s in all\n\nthe commands, each to be copied:"
    )
    for line in summary.commands:
        emit(f"  {line}")
