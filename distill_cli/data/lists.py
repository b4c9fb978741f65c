"""A list of image files: CSV, TSV or parquet, with columns for the path, the label and the split.

Columns are found by their names (`path`, `file`, `image`; `label`, `class`; `split`), in any case of letters; where no
name of a path is among them, the path is the first column and the label the second. A first row whose first cell is an
image's name is no header. Samples are sorted by path, so a list of class folders is the same data as the folders.
"""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from distill_cli.data.folder import SPLITS, ImageFolder
from distill_cli.data.images import EXTENSIONS, printable
from distill_cli.data.keys import Keys, first_double
from distill_cli.data.labels import from_text
from distill_cli.errors import UsageError

SUFFIXES = (".csv", ".tsv", ".parquet")
PATH, LABEL, SPLIT = ("path", "file", "image"), ("label", "class"), ("split",)


@dataclass(frozen=True)
class _Table:
    """The columns of a list as text; None where there is no such column."""

    paths: list[str]
    labels: list[str] | None
    splits: list[str] | None
    first: int
    """The number of the first row, as an editor counts them."""


def open_list(path: Path, split: str, root: Path | None = None) -> ImageFolder | None:
    """Open one split of a list; None where it has no such split.

    Args:
        root: what paths are relative to; by default the list's folder.

    Raises:
        UsageError: the list cannot be read; a path leaves the root, or is there twice; a label is missing.
    """
    root = root or path.parent
    table = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_text(path)
    if not table.paths:
        raise UsageError(f"{path}: no rows; give a list with a path in each")
    keys = [_key(root, name, f"{path}: row {table.first + row}") for row, name in enumerate(table.paths)]
    chosen = _rows_of(path, table, split)
    if chosen is None:
        return None
    double = first_double([keys[row] for row in chosen])
    if double is not None:
        raise UsageError(f"{path}: {printable(double)} is there twice; a path may be listed once")
    order = sorted(chosen, key=keys.__getitem__)
    labels, classes = None, None
    if table.labels is not None:
        _check_labelled(path, table)
        # Of all rows, so that the splits agree in their classes.
        labels, classes = from_text(table.labels, str(path))
        labels = labels[order]
    return ImageFolder(root, Keys.of(keys[row] for row in order), labels, classes)


def _key(root: Path, name: str, where: str) -> str:
    """The path below the root, in one way of writing it."""
    if not {"", ".", ".."}.intersection(name.split("/")):
        return name
    path = PurePosixPath(name)
    if path.is_absolute():
        base = PurePosixPath(root.absolute())
        if not path.is_relative_to(base):
            raise UsageError(f"{where}: {printable(name)} is outside of {root}; name its folder by data.root")
        path = path.relative_to(base)
    if ".." in path.parts or not path.parts:
        raise UsageError(f"{where}: {printable(name) or 'an empty path'} is no path below {root}; write it without ..")
    return str(path)


def _rows_of(path: Path, table: _Table, split: str) -> Sequence[int] | None:
    """The rows of a split; None where there are none."""
    if table.splits is None:
        return range(len(table.paths)) if split == "train" else None
    known = [name for names in SPLITS.values() for name in names]
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(table.splits):
        rows.setdefault(name, []).append(row)
    for name, (row, *_) in rows.items():
        if name not in known:
            raise UsageError(f'{path}: row {table.first + row}: split "{printable(name)}"; give {", ".join(known)}')
    return next((rows[name] for name in SPLITS[split] if name in rows), None)


def _check_labelled(path: Path, table: _Table) -> None:
    for row, label in enumerate(table.labels or ()):
        if not label:
            raise UsageError(f"{path}: row {table.first + row} has no label; give one to every row, or to none")


def _read_text(path: Path) -> _Table:
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = [row for row in csv.reader(file, "excel-tab" if path.suffix.lower() == ".tsv" else "excel") if row]
    except (OSError, csv.Error) as error:
        raise UsageError(f"{path}: cannot be read as a list ({error}); give lines of path and label") from error
    if not rows:
        return _Table([], None, None, 1)
    headed = not rows[0][0].lower().endswith(EXTENSIONS)
    header = rows[0] if headed else ["path", "label"][: len(rows[0])]
    first = 2 if headed else 1

    def column(place: int) -> list[str]:
        for number, row in enumerate(rows[first - 1 :], first):
            if len(row) <= place:
                raise UsageError(f"{path}: row {number} has {len(row)} of {len(header)} columns; complete it")
        return [row[place] for row in rows[first - 1 :]]

    return _table(header, column, first)


def _read_parquet(path: Path) -> _Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(f"{path}: needs pyarrow; pip install 'distill-cli[parquet]', or write it as CSV") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        header = file.schema_arrow.names

        def column(place: int) -> list[str]:
            values = file.read([header[place]]).column(0).cast(pyarrow.string()).to_pylist()
            return ["" if value is None else value for value in values]

        return _table(header, column, 1)
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path}: cannot be read as a list ({reason}); give columns path and label") from error


def _table(header: Sequence[str], column: Callable[[int], list[str]], first: int) -> _Table:
    path, label, split = _columns([name.strip().lower() for name in header])
    if path is None:
        return _Table([], None, None, first)
    labels, splits = (None if place is None else [value.strip() for value in column(place)] for place in (label, split))
    return _Table(column(path), labels, splits, first)


def _columns(header: list[str]) -> tuple[int | None, int | None, int | None]:
    """Where path, label and split are."""
    path, label, split = (
        next((header.index(name) for name in names if name in header), None) for names in (PATH, LABEL, SPLIT)
    )
    if path is None:
        others = [place for place in range(len(header)) if place not in (label, split)]
        path = next(iter(others), None)
        label = next(iter(others[1:]), None) if label is None else label
    return path, label, split
