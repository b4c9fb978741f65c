"""Files that say for each class of a student its class elsewhere."""

import json
from pathlib import Path

from distill_cli.errors import UsageError

NEW = -1
"""A class that is not known there."""


def read_class_map(path: Path, name: str) -> list[int]:
    """For each class of the student its class there, or `NEW`: a JSON list, or whole numbers in a text.

    Args:
        name: the recipe field that names the file.

    Raises:
        UsageError: it is neither.
    """
    try:
        text = path.read_text()
        rows = json.loads(text) if path.suffix == ".json" else [int(word) for word in text.split()]
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UsageError(f"{name} {path}: cannot be read ({reason}); give class ids") from error
    rows = [NEW if row is None else row for row in rows] if isinstance(rows, list) else None
    if not rows or not all(type(row) is int and row >= NEW for row in rows):
        raise UsageError(f"{name} {path}: is no list of class ids; give one for each class, -1 for a new one")
    return rows
