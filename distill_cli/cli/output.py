"""The result of a command on stdout: a table for a person, or one JSON object."""

import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill_cli.distributed import World
    from distill_cli.report import Report

NOT_IN_TABLES = ("per_class", "calibration", "recipe", "origins")


def print_result(summary: Any, as_json: bool) -> None:
    """Print the fields of a dataclass; what has no value is `-` in the table and null in JSON."""
    values = asdict(summary)
    if as_json:
        emit(json.dumps(values))
    else:
        print_table(("", ""), [(name, text(value)) for name, value in values.items() if name not in NOT_IN_TABLES])


def print_bill(bill: Any, origins: Mapping[str, str], as_json: bool) -> None:
    """Print what a dry run found: every recipe value with its origin, then the bill.

    Args:
        origins: of the values that recipe, `--set` and flags gave; the bill knows those that were settled later.
    """
    from distill_cli.recipe import flat

    values = {path: value for path, value in flat(bill.recipe).items() if value is not None}
    where = {path: origins.get(path) or bill.origins.get(path) or "default" for path in values}
    cost = {name: value for name, value in asdict(bill).items() if name not in NOT_IN_TABLES}
    if as_json:
        emit(json.dumps({"recipe": values, "origins": where, "bill": cost}))
        return
    print_table(("recipe", "value", "from"), [(path, text(value), where[path]) for path, value in values.items()])
    print_table(("bill", ""), [(name, text(value)) for name, value in cost.items()])


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], apart: bool = False) -> None:
    """Print columns; on a terminal with a rule and bold names, else plain, never cut to a width.

    Args:
        apart: leave a line above, where another table came before.
    """
    if not sys.stdout.isatty():
        if apart:
            emit("")
        lines = [*([head] if any(head) else []), *rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            emit("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_header=any(head), pad_edge=False)
    for index, name in enumerate(head):
        table.add_column(name, style="bold" if index == 0 else "", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


def emit(line: str) -> None:
    """Print a line of the result; a reader that has left, as `head` does, is no error."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report_for(here: "World", quiet: bool) -> "Report":
    """The report of this rank: only the first one speaks."""
    from distill_cli.report import Report

    return Report(quiet) if here.is_main else Report(quiet=True, stream=io.StringIO())


def text(value: Any) -> str:
    """A value as a person reads it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(list(value)) if isinstance(value, tuple) else str(value)
