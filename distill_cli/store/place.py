"""Where a store lies: a folder here, or a URL that fsspec reads. Shards are handed out as local files either way."""

from pathlib import Path
from typing import Protocol

ADVICE = 'run "distill store verify --repair" on the store, then the same "distill teacher-logits" command again'


class Place(Protocol):
    """A store's files by their names relative to it. Pickles, so that spawned loader workers can have it."""

    def has(self, name: str) -> bool: ...

    def read(self, name: str) -> bytes:
        """
        Raises:
            FileNotFoundError: there is no such file.
        """
        ...

    def file(self, name: str, sha256: str) -> Path:
        """A local file with the content of `name`, which should have this sha256.

        Raises:
            FileNotFoundError: there is no such file.
        """
        ...

    @property
    def advice(self) -> str:
        """What to do about a damaged shard."""
        ...

    def __str__(self) -> str:
        """As a person would write it."""
        ...


class Folder:
    """A store in a folder of this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def file(self, name: str, sha256: str) -> Path:
        return self.path / name

    @property
    def advice(self) -> str:
        return ADVICE

    def __str__(self) -> str:
        return str(self.path)
