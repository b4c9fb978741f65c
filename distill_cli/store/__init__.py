"""The store of teacher logits, version 1; docs/store-format.md is the specification. numpy and h5py only.

`plan` and `manifest` say what a store is and holds, `dealing` where a sample's row lies, `shard` how a file is laid
out, `codecs` how rows become arrays (`exact`, `compact`); `writer` and `reader` mirror each other.
"""

from pathlib import Path

from distill_cli.store.config import StoreConfig
from distill_cli.store.place import Folder, Place
from distill_cli.store.reader import Store
from distill_cli.store.remote import Remote


def open_place(path: str, config: StoreConfig | None = None) -> Place:
    """Where the store at a path or URL lies."""
    if "://" not in path:
        return Folder(Path(path))
    cache, size = (config.cache, config.cache_gb) if config else (None, None)
    return Remote(path, None if cache is None else Path(cache), None if size is None else size * 1e9)


def open_store(path: str, config: StoreConfig, share: int = 1) -> Store:
    """Open one store by the settings of `train` and `eval`.

    Args:
        share: stores that are read side by side.

    Raises:
        as `Store`.
    """
    return Store(open_place(path, config), config.memory_mb, config.trust, share)
