"""A folder behind a URL that fsspec reads (s3://, gs://, http://, …), asked again where the network fails."""

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from distill_cli.errors import DistillError, UsageError

T = TypeVar("T")
TRIES, WAIT_S = 3, 1.0


class Server:
    """Pickles without its connections; they cross no fork either."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._system: tuple[int, Any, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_system": None}

    def ask(self, name: str, question: Callable[[Any, str], T]) -> T:
        """Put a question about one file to fsspec's file system: `question(system, path)`.

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
        """fsspec's file system, one a process."""
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
