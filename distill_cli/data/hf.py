"""Hugging Face datasets on disk: what `save_to_disk` wrote, or a folder of parquet files, as the hub has them.

The image column is the one of type Image (or of `{bytes, path}`); the label column the one of type ClassLabel, else
`label` or `labels`. Only bytes that are in the dataset are read: a path in it could name any file.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_cli.data.folder import SPLITS
from distill_cli.data.images import Encoded, Readable, unreadable
from distill_cli.data.keys import Numbers
from distill_cli.data.labels import Labels, from_numbers, from_text
from distill_cli.errors import UsageError

LABELS = ("label", "labels")


@dataclass(frozen=True)
class HfSource(Readable):
    """The images of one column; a sample's key is its index."""

    name: str
    dataset: Any
    """Its image column alone, undecoded."""
    labels: NDArray[np.int64] | None
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def keys(self) -> Sequence[str]:
        return Numbers(len(self))

    def content(self, sample_id: int) -> bytes:
        (stored,) = self.dataset[sample_id].values()
        if stored is None or stored["bytes"] is None:
            raise unreadable(f"{self.name}[{sample_id}]", "its bytes are not in the dataset")
        content: bytes = stored["bytes"]
        return content

    def encoded(self, sample_id: int, content: bytes) -> Encoded:
        return Encoded(content, f"{self.name}[{sample_id}]")


def open_hf(path: str, split: str) -> HfSource | None:
    """Open one split of a dataset; None where it has no such split. A dataset without splits is `train`.

    Raises:
        UsageError: `datasets` is not installed; the folder is none of a dataset; it has no column of images.
    """
    name, folder = f"hf:{path}", Path(path)
    if not folder.is_dir():
        raise UsageError(f"--data {name}: no such folder; download the dataset and give its folder")
    with _refused(name):
        splits = _load(folder)
        chosen = next((key for key in SPLITS[split] if key in splits), None)
        if "" in splits and split == "train":
            chosen = ""
        elif "" not in splits and not any(key in splits for keys in SPLITS.values() for key in keys):
            raise UsageError(f"--data {name}: has splits {', '.join(splits)}; name the folder of one")
        return None if chosen is None else _source(f"{name} {chosen}".strip(), splits[chosen]())


@contextmanager
def _refused(name: str) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except ImportError as error:
        raise UsageError(f"--data {name}: needs datasets ({error}); pip install 'distill-cli[hf]'") from error
    except Exception as error:
        # datasets and pyarrow let through whatever a damaged file makes them stumble over.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"--data {name}: cannot be read as a dataset ({reason}); save or download it again") from error


def _load(folder: Path) -> Mapping[str, Callable[[], Any]]:
    """By split (`""` where there are none) what opens it."""
    import datasets

    datasets.disable_progress_bars()
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        loaded = datasets.load_from_disk(str(folder))
        parts = {"": loaded} if isinstance(loaded, datasets.Dataset) else loaded
        return {key: functools.partial(parts.__getitem__, key) for key in parts}
    files = sorted(str(path) for path in [*folder.glob("*.parquet"), *folder.glob("data/*.parquet")])
    if not files:
        raise UsageError(f"--data hf:{folder}: neither state.json nor dataset_dict.json nor parquet files in it")
    opened = datasets.Dataset.from_parquet
    return {key: functools.partial(opened, part) for key, part in _by_split(files).items()}


def _by_split(files: Sequence[str]) -> dict[str, list[str]]:
    """Parquet files by the split in their names, as the hub writes them: `train-00000-of-00002.parquet`."""
    found: dict[str, list[str]] = {}
    for file in files:
        found.setdefault(Path(file).name.partition("-")[0].removesuffix(".parquet"), []).append(file)
    known = {key for keys in SPLITS.values() for key in keys}
    return found if known & found.keys() else {"": list(files)}


def _source(name: str, dataset: Any) -> HfSource:
    import datasets

    features = dataset.features
    images = [key for key, kind in features.items() if _holds_images(kind)]
    if len(images) != 1:
        found = f"{len(images)} columns of images" if images else "no column of images"
        raise UsageError(f"--data {name}: {found} among {', '.join(features)}; save it with one")
    if not len(dataset):
        raise UsageError(f"--data {name}: no images in it; save or download it again")
    labels, classes = _labels(name, dataset)
    column = dataset.select_columns(images)
    if isinstance(features[images[0]], datasets.Image):
        column = column.cast_column(images[0], datasets.Image(decode=False))
    return HfSource(name, column, labels, classes)


def _holds_images(kind: Any) -> bool:
    return type(kind).__name__ == "Image" or (isinstance(kind, dict) and {"bytes", "path"} <= kind.keys())


def _labels(name: str, dataset: Any) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
    features = dataset.features
    typed = [key for key, kind in features.items() if type(kind).__name__ == "ClassLabel"]
    column = next((key for key in [*typed, *LABELS] if key in features), None)
    if column is None:
        return None, None
    where = f"--data {name}: column {column}"
    values = dataset.with_format("arrow")[:][column].to_pylist()
    if any(value is None for value in values):
        raise UsageError(f"{where}: row {values.index(None)} has no label; give one to every row, or to none")
    if values and isinstance(values[0], str):
        found: Labels = from_text(values, where)
        return found
    labels = from_numbers(values, where)
    names = getattr(features[column], "names", None)
    return labels, None if names is None else tuple(names)
