"""`distill doctor`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from distill_cli.cli import options
from distill_cli.cli.output import emit, print_table
from distill_cli.errors import DistillError


def command(
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="Whose disk and file locks are looked at.")
    ] = Path(),
    as_json: options.Json = False,
) -> None:
    """Look at the versions, devices, disk and file locks here; exit 1 if something stands in the way."""
    from distill_cli.doctor import examine

    findings = list(examine(folder))
    wrong = [finding for finding in findings if finding.advice]
    if as_json:
        emit(json.dumps({finding.what: {"found": finding.found, "advice": finding.advice} for finding in findings}))
    else:
        rows = [("!!" if finding.advice else "ok", finding.what, finding.found, finding.advice) for finding in findings]
        print_table(("", "what", "found", "what to do"), rows)
    if wrong:
        raise DistillError(f"doctor: {len(wrong)} of {len(findings)} need care: {', '.join(f.what for f in wrong)}")
