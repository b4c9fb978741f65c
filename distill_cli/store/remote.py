"""A store behind a URL that fsspec reads (s3://, gs://, http://, …): shards are fetched whole, once, into a cache.

CACHE/<sha256>.h5     a shard by its content, so that stores and mirrors share it

A shard is fetched by one process while the others wait for it, checked, and renamed into place.
"""

from pathlib import Path

from distill_cli.cache import FileCache, user_cache
from distill_cli.errors import DamagedError
from distill_cli.files import sha256_file
from distill_cli.server import Server


class Remote:
    """A store behind a URL."""

    def __init__(self, url: str, cache: Path | None = None, cache_bytes: float | None = None) -> None:
        """
        Args:
            cache: where shards are kept; by default `distill` in the user's cache directory.
            cache_bytes: of it at most, less what is in use; the least recently used go first.
        """
        self.server = Server(url)
        self.shards = FileCache(cache or user_cache(), ".h5", cache_bytes)

    @property
    def url(self) -> str:
        return self.server.url

    def __str__(self) -> str:
        return self.url

    @property
    def advice(self) -> str:
        return "delete it to fetch it again; if it stays so, the store at the URL is damaged"

    def has(self, name: str) -> bool:
        return self.server.ask(name, lambda system, path: bool(system.exists(path)))

    def read(self, name: str) -> bytes:
        return self.server.ask(name, lambda system, path: bytes(system.cat_file(path)))

    def file(self, name: str, sha256: str) -> Path:
        def fetch(temporary: Path) -> None:
            self.server.ask(name, lambda system, source: system.get_file(source, str(temporary)))
            if sha256_file(temporary) != sha256:
                raise DamagedError(f"{self.url}/{name}: its sha256 is not the manifest's; the store there is damaged")

        return self.shards.file(sha256, fetch)
