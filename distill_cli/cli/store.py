"""`distill store`: what is done with stores besides writing and reading them."""

from typing import Annotated

import typer

app = typer.Typer(help="Look into, check, join, trim and convert stores.", no_args_is_help=True)

Store = Annotated[str, typer.Argument(metavar="STORE", help="The store's directory.")]
