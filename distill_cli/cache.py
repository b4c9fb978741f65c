"""Files that can be had again, kept in the user's cache: made by one process while the others wait, bounded by use."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


def user_cache() -> Path:
    """`distill` in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill"


@contextlib.contextmanager
def turn(folder: Path, sha256: str) -> Iterator[None]:
    """One process at a time for what has this name; the kernel ends a dead one's turn."""
    with (folder / ".lock").open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 1, int(sha256[:15], 16))
        yield


@dataclass(frozen=True)
class FileCache:
    """`FOLDER/<sha256><suffix>`: files that are fetched whole, once."""

    folder: Path
    suffix: str
    most_bytes: float | None = None
    """Of all of them, less what is in use; the least recently used go first."""

    def file(self, sha256: str, fetch: Callable[[Path], None]) -> Path:
        """The file of this name; where it is not there, `fetch` writes it to a temporary path, or raises."""
        path = self.folder / f"{sha256}{self.suffix}"
        while True:
            if not path.exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                with turn(self.folder, sha256):
                    if not path.exists():
                        self._fetch(path, fetch)
            # Another process may have let go of it since.
            with contextlib.suppress(FileNotFoundError):
                # What `_evict` goes by; the time of access is not kept everywhere.
                os.utime(path)
                return path

    def _fetch(self, path: Path, fetch: Callable[[Path], None]) -> None:
        temporary = path.with_suffix(".tmp")
        try:
            fetch(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        if self.most_bytes is not None:
            self._evict(path, self.most_bytes)

    def _evict(self, keep: Path, most: float) -> None:
        kept = 0
        entries = []
        for path in self.folder.glob(f"*{self.suffix}"):
            # Another process may evict too.
            with contextlib.suppress(FileNotFoundError):
                entries.append((path.stat(), path))
        for status, path in sorted(entries, key=lambda entry: -entry[0].st_mtime_ns):
            kept += status.st_size
            if kept > most and path != keep:
                path.unlink(missing_ok=True)
