"""What lies in a store's folder, told by names alone: nothing is opened, and no link is followed."""

import bisect
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distill_cli.files import LOCK, TEMPORARY
from distill_cli.store.plan import Generation

Piece = tuple[int, int]
"""(view, shard), the view counted from 0 within its generation."""
_VIEW = re.compile(r"view-([0-9]{3,})")
_SHARD = re.compile(r"shard-([0-9]{5,})\.h5")
_OURS = re.compile(r"(plan|manifest)(-[0-9]+)?\.json|view-.*")


@dataclass(frozen=True)
class Inventory:
    """The names in a store's folder, each relative to it."""

    shards: tuple[set[Piece], ...]
    """Of each generation: those that have a file, or something of its name."""
    leftovers: list[str] = field(default_factory=list)
    """Half-written files; those of a writer at work are among them."""
    linked: list[str] = field(default_factory=list)
    """Folders of views that are links."""
    strays: list[str] = field(default_factory=list)
    """Names like a store's own, or in the folder of a view, that no plan has."""
    foreign: list[str] = field(default_factory=list)
    """Names beside the store's own that have nothing to do with it."""

    def missing(self, generation: Generation) -> Iterator[Piece]:
        """The shards of a generation that have no file, in order; without end, where a plan is."""
        there = self.shards[generation.number]
        return (piece for piece in generation.plan.every_shard() if piece not in there)


def take_inventory(folder: Path, generations: Sequence[Generation]) -> Inventory:
    """List the folder of a store and those of its views.

    Raises:
        OSError: a folder cannot be listed.
    """
    found = Inventory(tuple(set() for _ in generations))
    planned = {name for each in generations for name in (each.plan_name, each.manifest_name)}
    for entry in _entries(folder):
        name = entry.name
        if name.startswith(TEMPORARY):
            found.leftovers.append(name)
        elif name in planned or name == LOCK:
            continue
        elif _generation_of(name, generations) is None:
            (found.strays if _OURS.fullmatch(name) else found.foreign).append(name)
        elif not entry.is_dir(follow_symlinks=False):
            (found.linked if entry.is_symlink() else found.strays).append(name)
        else:
            _view(folder, name, generations, found)
    return found


def _view(folder: Path, name: str, generations: Sequence[Generation], found: Inventory) -> None:
    generation = _generation_of(name, generations)
    assert generation is not None
    view = int(name.removeprefix("view-")) - generation.offset
    for entry in _entries(folder / name):
        match = _SHARD.fullmatch(entry.name)
        piece = (view, int(match[1])) if match else None
        path = f"{name}/{entry.name}"
        if entry.name.startswith(TEMPORARY):
            found.leftovers.append(path)
        elif piece is not None and piece[1] < generation.plan.shards and generation.path(*piece) == path:
            found.shards[generation.number].add(piece)
        else:
            found.strays.append(path)


def _generation_of(name: str, generations: Sequence[Generation]) -> Generation | None:
    """The generation that a folder of this name holds a view of."""
    match = _VIEW.fullmatch(name)
    if match is None or not generations or name != f"view-{int(match[1]):03d}":
        return None
    number = int(match[1])
    found = generations[bisect.bisect_right(generations, number, key=lambda each: each.offset) - 1]
    return found if number - found.offset < found.plan.views else None


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)
