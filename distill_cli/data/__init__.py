"""Images in, batches out: where they are (`sources`), what is done to them (`views`), in which order (`loader`)."""

from distill_cli.data.sources import Source, open_source, without_labels
from distill_cli.data.views import DataConfig
from distill_cli.errors import UsageError


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
