"""A store behind a URL that fsspec reads (s3://, gs://, http://, …): shards are fetched whole, once, into a cache.

CACHE/<sha256>.h5     a shard by its content, so that stores and mirrors share it

A shard is fetched by one process while the others wait for it, checked, and renamed into place.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from distill_cli.errors import DamagedError, DistillError, UsageError
from distill_cli.files import sha256_file

T = TypeVar("T")
TRIES, WAIT_S = 3, 1.0


class Remote:
    """A store behind a URL."""

    def __init__(self, url: str, cache: Path | None = None, cache_bytes: float | None = None) -> None:
        """
        Args:
            cache: where shards are kept; by default `distill` in the user's cache directory.
            cache_bytes: of it at most, less what is in use; the least recently used go first.
        """
        self.url = url.rstrip("/")
        self.cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill"
        self.cache_bytes = cache_bytes
        self._system: tuple[int, Any, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_system": None}

    def __str__(self) -> str:
        return self.url

    @property
    def advice(self) -> str:
        return "delete it to fetch it again; if it stays so, the store at the URL is damaged"

    def has(self, name: str) -> bool:
        return self._ask(name, lambda system, path: bool(system.exists(path)))

    def read(self, name: str) -> bytes:
        return self._ask(name, lambda system, path: bytes(system.cat_file(path)))

    def file(self, name: str, sha256: str) -> Path:
        path = self.cache / f"{sha256}.h5"
        if not path.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            with self._turn(sha256):
                if not path.exists():
                    self._fetch(name, sha256, path)
        # What `_evict` goes by; the time of access is not kept everywhere.
        os.utime(path)
        return path

    def _fetch(self, name: str, sha256: str, path: Path) -> None:
        temporary = path.with_suffix(".tmp")
        try:
            self._ask(name, lambda system, source: system.get_file(source, str(temporary)))
            if sha256_file(temporary) != sha256:
                raise DamagedError(f"{self.url}/{name}: its sha256 is not the manifest's; the store there is damaged")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        if self.cache_bytes is not None:
            self._evict(path, self.cache_bytes)

    def _evict(self, keep: Path, most: float) -> None:
        kept = 0
        entries = [(path.stat(), path) for path in self.cache.glob("*.h5")]
        for status, path in sorted(entries, key=lambda entry: -entry[0].st_mtime):
            kept += status.st_size
            if kept > most and path != keep:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _turn(self, sha256: str) -> Iterator[None]:
        """One process at a time fetches a shard; the kernel ends a dead one's turn."""
        with (self.cache / ".lock").open("a") as file:
            fcntl.lockf(file, fcntl.LOCK_EX, 1, int(sha256[:15], 16))
            yield

    def _ask(self, name: str, question: Callable[[Any, str], T]) -> T:
        """
        Raises:
            FileNotFoundError: there is no such file.
            DistillError: the server cannot be read.
            UsageError: nothing is installed that reads such URLs.
        """
        system, root = self._opened()
        for left in range(TRIES - 1, -1, -1):
            try:
                return question(system, f"{root}/{name}")
            except FileNotFoundError:
                raise
            except Exception as error:
                if not left:
                    reason = " ".join(str(error).split()) or type(error).__name__
                    raise DistillError(
                        f"{self.url}/{name}: cannot be read ({reason}); look at the network and the credentials, "
                        "then run the same command again"
                    ) from error
                time.sleep(WAIT_S)
        raise AssertionError

    def _opened(self) -> tuple[Any, str]:
        """fsspec's file system, one a process: its connections cross no fork."""
        if self._system is None or self._system[0] != os.getpid():
            try:
                import fsspec

                system, root = fsspec.core.url_to_fs(self.url, skip_instance_cache=True, use_listings_cache=False)
            except (ImportError, ValueError) as error:
                raise UsageError(
                    f"{self.url}: cannot be read here ({error}); pip install 'distill-cli[remote]', or give a directory"
                ) from error
            self._system = os.getpid(), system, str(root).rstrip("/")
        return self._system[1:]
