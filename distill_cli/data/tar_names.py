"""The tars that `wds:PATTERN` names: braces as in a shell, stars, or a folder with the split in its tars' names."""

import itertools
import re
from glob import glob, has_magic
from pathlib import Path

from distill_cli.data.folder import SPLITS
from distill_cli.errors import UsageError
from distill_cli.server import Server


def tar_names(pattern: str, split: str) -> list[str] | None:
    """The sorted names of a split's tars; None where there are none of that split.

    Raises:
        UsageError: there are no such tars at all.
    """
    if Path(pattern).is_dir():
        return _split_of(pattern, split)
    if split != "train":
        return None
    names = {name for part in braces(pattern) for name in (_glob(part) if has_magic(part) else [part])}
    if not names:
        raise UsageError(f"--data wds:{pattern}: no such tars; give a path, {{000..146}}, *, or a folder of tars")
    return sorted(names)


def _split_of(folder: str, split: str) -> list[str] | None:
    """The tars of a folder and of the folders in it, by the split's name in theirs; without such names all are train.

    Raises:
        UsageError: there are none.
    """
    paths = sorted(itertools.chain(Path(folder).glob("*.tar"), Path(folder).glob("*/*.tar")))
    if not paths:
        raise UsageError(f"--data wds:{folder}: no .tar files in this folder")
    words = {path: set(re.split(r"[^a-z]+", str(path.relative_to(folder)).lower())) for path in paths}
    named = [name for names in SPLITS.values() for name in names if any(name in found for found in words.values())]
    if not named:
        return list(map(str, paths)) if split == "train" else None
    name = next((name for name in SPLITS[split] if name in named), None)
    return None if name is None else [str(path) for path in paths if name in words[path]]


def _glob(pattern: str) -> list[str]:
    if "://" not in pattern:
        return glob(pattern)  # noqa: PTH207
    url, _, last = pattern.rpartition("/")
    found = Server(url).ask(last, lambda system, path: [system.unstrip_protocol(name) for name in system.glob(path)])
    return list(map(str, found))


def braces(pattern: str) -> list[str]:
    """`a{0..2}{x,y}` -> `a0x`, `a0y`, …: as bash expands it, zeros in front kept."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if ends:
        low, high = map(int, ends.groups())
        width = max(map(len, ends.groups())) if any(e.startswith("0") and e != "0" for e in ends.groups()) else 0
        parts = [f"{number:0{width}d}" for number in range(min(low, high), max(low, high) + 1)]
    else:
        parts = found[1].split(",")
    return [name for part in parts for name in braces(pattern[: found.start()] + part + pattern[found.end() :])]
