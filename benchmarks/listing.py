"""Listing a large tree of class folders: first start, second start, and what the keys cost each loader worker.

    PYTHONPATH=. python benchmarks/listing.py DIR [--files 1000000]

makes the tree in DIR where it is not there: empty files in 1,000 class folders. Beside it, in the same run, what was
done before: a sorted list of Python strings, at every start. With --cold the kernel forgets the directories before
each (for all of the machine; needs root).
"""

import argparse
import gc
import multiprocessing
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distill_cli.data import open_source
from distill_cli.data.images import EXTENSIONS
from distill_cli.data.sources import Source, fingerprint

CLASSES = 1000


def make(root: Path, files: int) -> None:
    for label in range(CLASSES):
        folder = root / "train" / f"n{label:08d}"
        if folder.is_dir():
            continue
        folder.mkdir(parents=True)
        for number in range(files // CLASSES):
            os.close(os.open(folder / f"n{label:08d}_{number}.JPEG", os.O_CREAT | os.O_WRONLY))


def plain(root: Path) -> list[str]:
    """As version 0.1.0 did."""
    keys = []
    for name in sorted(entry.name for entry in os.scandir(root / "train") if entry.is_dir()):
        keys += sorted(_images(root / "train" / name, f"{name}/"))
    return keys


def _images(folder: Path, prefix: str) -> Iterator[str]:
    for entry in os.scandir(folder):
        if entry.is_dir():
            yield from _images(Path(entry.path), f"{prefix}{entry.name}/")
        elif entry.name.lower().endswith(EXTENSIONS):
            yield prefix + entry.name


def private_mb() -> float:
    """Memory of this process that it shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def _touch(keys: Any, queue: Any) -> None:
    """What an epoch of a worker does to its copy of the keys."""
    gc.collect()
    before = private_mb()
    for place in range(len(keys)):
        keys[place]
    queue.put((before, private_mb()))


def worker_mb(keys: Any, method: str) -> float:
    """Memory that the keys cost a worker of its own: all of it when spawned, what it copies by touching when forked."""
    context = multiprocessing.get_context(method)
    queue = context.Queue()

    def run(given: Any) -> tuple[float, float]:
        process = context.Process(target=_touch, args=(given, queue))
        process.start()
        found: tuple[float, float] = queue.get()
        process.join()
        return found

    nothing, touched = run([])[1], run(keys)[1]
    return touched - nothing


def timed(what: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return what(), time.perf_counter() - start


def drop_caches() -> None:
    """Make the next reading of directories a reading of the disk."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def opened(root: Path) -> Source:
    source = open_source(str(root), "train")
    assert source is not None
    return source


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--cold", action="store_true")
    given = parser.parse_args()
    os.environ["XDG_CACHE_HOME"] = str(given.root / ".cache")
    make(given.root, given.files)
    time.sleep(3)
    kept = given.root / ".cache/distill/listings"
    for what, work in (
        ("before", lambda: plain(given.root)),
        ("first start", lambda: opened(given.root)),
        ("second start", lambda: opened(given.root)),
    ):
        if what == "first start":
            shutil.rmtree(kept, ignore_errors=True)
        if given.cold:
            drop_caches()
        print(f"{what}: {timed(work)[1]:.2f} s", flush=True)
    source, names = opened(given.root), plain(given.root)
    assert list(source.keys) == names
    print(f"fingerprint {timed(lambda: fingerprint(source))[1]:.2f} s")
    for method in ("fork", "spawn"):
        print(f"{method}: {worker_mb(names, method):.0f} MB before, {worker_mb(source.keys, method):.0f} MB now")
    print(f"largest memory of the whole run {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
