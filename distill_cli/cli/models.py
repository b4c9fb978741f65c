"""`distill models ls`."""

from typing import Annotated

import typer

from distill_cli.cli.output import print_table
from distill_cli.errors import UsageError
from distill_cli.students.aliases import ALIASES

app = typer.Typer(help="Models that can be students and teachers.", no_args_is_help=True)


@app.command("ls")
def ls(
    pattern: Annotated[
        str | None, typer.Argument(metavar="[PATTERN]", help="Shell pattern over timm's names, such as 'levit*'.")
    ] = None,
) -> None:
    """List the aliases, or with a PATTERN the aliases and timm's models that match it."""
    if pattern is None:
        print_table(("model", "timm name"), list(ALIASES.items()))
        return
    from fnmatch import fnmatch

    import timm

    wildcard = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    rows = [(alias, name) for alias, name in ALIASES.items() if fnmatch(alias, wildcard)]
    rows += [(name, "") for name in timm.list_models(wildcard)]
    if not rows:
        raise UsageError(f"{pattern}: no model matches; 'distill models ls \"*\"' lists all of timm's")
    print_table(("model", "timm name"), rows)
