"""Images in, batches out: where they are (`sources`), what is done to them (`views`), in which order (`loader`).

`--data` names them:

    DIR            class folders, in `train/` and `val/` or as one tree; a folder without classes is unlabelled
    DIR            an IDX folder of the MNIST family (`*-images-idx3-ubyte[.gz]`)
    sample         the real images shipped in the package: 10,000 + 2,000 of Fashion-MNIST
"""

from pathlib import Path

from distill_cli.data.config import DataConfig
from distill_cli.data.folder import open_folder
from distill_cli.data.idx import holds_idx, open_idx, open_sample
from distill_cli.data.sources import Source, without_labels
from distill_cli.errors import UsageError

PREFIXES_TO_COME = ("wds:", "hf:", "timm:")


def open_source(path: str, split: str) -> Source | None:
    """Open the `train` or `val` split of what `--data` names; None where this data has no such split.

    A tree without `train/` and `val/` is its own `train` split.

    Raises:
        UsageError: there is nothing of the kind at `path`.
    """
    if path == "sample":
        return open_sample(split)
    if path.startswith(PREFIXES_TO_COME):
        raise UsageError(f'--data {path}: not read by this version; it reads folders, IDX folders and "sample"')
    folder = Path(path)
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "no such folder"
        raise UsageError(f'--data {path}: {found}; give a folder of images, an IDX folder or "sample"')
    return open_idx(folder, split) if holds_idx(folder) else open_folder(folder, split)


def open_train(config: DataConfig) -> Source:
    """The images to learn from, or to write a store of.

    Raises:
        UsageError: none are named, or there are none.
    """
    if config.path is None:
        raise UsageError('--data is missing: give a folder of images, an IDX folder or "sample"')
    source = open_source(config.path, "train")
    if source is None:
        raise UsageError(f"--data {config.path}: has no train split; name its folder directly")
    return _as_asked(source, config)


def open_val(config: DataConfig) -> Source | None:
    """The images to validate on: `data.val`, else the validation split of `data.path`; None where it has none."""
    if config.val is not None:
        source = open_source(config.val, "val") or open_source(config.val, "train")
    else:
        source = None if config.path is None else open_source(config.path, "val")
    return source and _as_asked(source, config)


def _as_asked(source: Source, config: DataConfig) -> Source:
    return source if config.labelled else without_labels(source)
