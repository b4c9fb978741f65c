"""Images in, batches out: where they are (`sources`), what is done to them (`views`), in which order (`loader`).

`--data` names them:

    DIR            class folders, in `train/` and `val/` or as one tree; a folder without classes is unlabelled
    DIR            an IDX folder of the MNIST family (`*-images-idx3-ubyte[.gz]`)
    FILE           a list of files: .csv, .tsv or .parquet with columns path and label; an HDF5 file: .h5 or .hdf5
    wds:PATTERN    WebDataset tars: `wds:in1k-train-{000..146}.tar`, also behind URLs; or a folder of them
    hf:DIR         a Hugging Face dataset on disk
    timm:NAME      what timm's `create_dataset` opens in `data.root`
    sample         the real images shipped in the package: 10,000 + 2,000 of Fashion-MNIST
"""

from pathlib import Path

from distill_cli.data import hdf5, lists
from distill_cli.data.config import DataConfig
from distill_cli.data.folder import open_folder
from distill_cli.data.hf import open_hf
from distill_cli.data.idx import holds_idx, open_idx, open_sample
from distill_cli.data.sources import Source, without_labels
from distill_cli.data.timm_dataset import open_timm
from distill_cli.data.webdataset import open_tars
from distill_cli.errors import UsageError
from distill_cli.report import Report

PREFIXES = ("wds", "hf", "timm")
"""Of `--data` that is no path, before a colon."""
KINDS = 'a folder of images, a list (.csv, .tsv, .parquet), an HDF5 file, wds:PATTERN, hf:DIR, timm:NAME or "sample"'


def open_source(path: str, split: str, config: DataConfig | None = None, report: Report | None = None) -> Source | None:
    """Open the `train` or `val` split of what `--data` names; None where this data has no such split.

    A tree without `train/` and `val/` is its own `train` split.

    Args:
        config: how it is opened; the path in it is not looked at.
        report: shows the progress of a long listing.

    Raises:
        UsageError: there is nothing of the kind at `path`, or it cannot be read.
    """
    config = config or DataConfig()
    prefix, colon, name = path.partition(":")
    if path == "sample":
        return open_sample(split)
    if colon and prefix in PREFIXES:
        return _open_named(prefix, name, split, config, report)
    place = Path(path)
    if place.is_dir():
        return open_idx(place, split) if holds_idx(place) else open_folder(place, split, config.cache_listing, report)
    return _open_file(place, split, config)


def absolute(path: str) -> str:
    """What `--data` names, from whatever folder."""
    prefix, colon, name = path.partition(":")
    if path == "sample" or "://" in path or (colon and prefix == "timm"):
        return path
    if colon and prefix in PREFIXES:
        return f"{prefix}:{Path(name).resolve()}"
    return str(Path(path).resolve())


def _open_named(prefix: str, name: str, split: str, config: DataConfig, report: Report | None) -> Source | None:
    if prefix == "wds":
        most = None if config.cache_gb is None else config.cache_gb * 1e9
        return open_tars(name, split, config.cache_listing, most, report)
    return open_hf(name, split) if prefix == "hf" else open_timm(name, split, config.root)


def _open_file(path: Path, split: str, config: DataConfig) -> Source | None:
    suffix = path.suffix.lower()
    if path.is_file() and suffix in lists.SUFFIXES:
        return lists.open_list(path, split, None if config.root is None else Path(config.root))
    if path.is_file() and suffix in hdf5.SUFFIXES:
        return hdf5.open_hdf5(path, split)
    found = "is a file" if path.exists() else "no such folder or file"
    raise UsageError(f"--data {path}: {found}; give {KINDS}")


def open_train(config: DataConfig, report: Report | None = None) -> Source:
    """The images to learn from, or to write a store of.

    Raises:
        UsageError: none are named, or there are none.
    """
    if config.path is None:
        raise UsageError(f"--data is missing: give {KINDS}")
    source = open_source(config.path, "train", config, report)
    if source is None:
        raise UsageError(f"--data {config.path}: has no train split; name its folder directly")
    return _as_asked(source, config)


def open_val(config: DataConfig, report: Report | None = None) -> Source | None:
    """The images to validate on: `data.val`, else the validation split of `data.path`; None where it has none."""
    if config.val is not None:
        found = (open_source(config.val, split, config, report) for split in ("val", "train"))
        source = next((split for split in found if split is not None), None)
    else:
        source = None if config.path is None else open_source(config.path, "val", config, report)
    return source and _as_asked(source, config)


def _as_asked(source: Source, config: DataConfig) -> Source:
    return source if config.labelled else without_labels(source)
