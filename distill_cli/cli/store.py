"""`distill store`: what is done with stores besides writing and reading them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from distill_cli.cli import options
from distill_cli.cli.output import emit, print_table, text

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
            print_table(("file", "", "found", "repaired"), rows)
        values = {name: value for name, value in asdict(found).items() if name != "findings"}
        print_table(("", ""), [(name, text(value)) for name, value in values.items()], apart=bool(rows))
    check_verified(found)
