"""The recipes that come with the package; reading their names and texts needs neither torch nor pydantic."""

from collections.abc import Iterator
from pathlib import Path

from distill_cli.errors import UsageError, nearest

_PACKAGE = Path(__file__).parent
FOLDERS = (_PACKAGE / "recipes", _PACKAGE.parent / "recipes")
"""In an installed wheel, and in a checkout."""


def recipes() -> dict[str, Path]:
    """Shipped recipes by name."""
    return {path.stem: path for folder in FOLDERS for path in sorted(folder.glob("*.toml"))}


def find_recipe(name: str) -> Path:
    """The file of a shipped recipe's name, or of a path.

    Raises:
        UsageError: there is neither; the nearest names are given.
    """
    shipped = recipes()
    if name in shipped:
        return shipped[name]
    path = Path(name)
    if path.is_file():
        return path
    raise UsageError(
        f'--recipe {name}: no such recipe or file{nearest(name, shipped)}; "distill recipes ls" lists them'
    )


def header(path: Path) -> Iterator[str]:
    """The comment lines at the top of a recipe."""
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            return
        yield line.lstrip("# ").rstrip()
