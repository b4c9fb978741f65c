"""`distill recipes ls|show|cp|validate`."""

from pathlib import Path
from typing import Annotated

import typer

from distill_cli import shipped
from distill_cli.cli.options import _complete_recipe
from distill_cli.cli.output import emit, print_table
from distill_cli.errors import UsageError
from distill_cli.files import write_atomic

app = typer.Typer(help="List, show, copy and check recipes.", no_args_is_help=True)
Name = Annotated[
    str, typer.Argument(metavar="NAME|PATH", help="A shipped recipe or a file.", autocompletion=_complete_recipe)
]


@app.command("ls")
def ls() -> None:
    """List the shipped recipes."""
    rows = [(name, next(shipped.header(path), "")) for name, path in shipped.recipes().items()]
    print_table(("recipe", "what"), rows)


@app.command("show")
def show(name: Name) -> None:
    """Print a recipe as it is written."""
    emit(shipped.find_recipe(name).read_text().rstrip("\n"))


@app.command("cp")
def cp(
    name: Name,
    to: Annotated[Path, typer.Argument(metavar="PATH", help="A new file, or a folder.")],
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Copy a recipe, to edit it."""
    source = shipped.find_recipe(name)
    target = to / source.name if to.is_dir() else to
    if target.exists() and not force:
        raise UsageError(f"{target}: exists; choose another name, or give --force")
    write_atomic(target, source.read_bytes())
    emit(str(target))


@app.command("validate")
def validate(name: Name) -> None:
    """Check a recipe's keys and values; opens neither data nor models."""
    from distill_cli.recipe import load

    load(name)
    emit(f"{name}: valid")
