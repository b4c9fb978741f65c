"""The `[store]` section of a recipe."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from distill_cli.config import Natural, Positive, PositiveFloat, Precision, Seed, section

Mass = Annotated[float, Field(gt=0, le=1)]
Bits = Annotated[int, Field(ge=4, le=10)]


def _paths(value: Any) -> Any:
    """One path is a string, alone in a list too."""
    several = list(value) if isinstance(value, list | tuple) else [value]
    if not several or not all(isinstance(path, str | None) for path in several):
        raise ValueError("give a path, or a list of paths")
    return value if len(several) > 1 else several[0]


Paths = Annotated[str | tuple[str, ...] | None, BeforeValidator(_paths)]


@section
class StoreConfig:
    path: Paths = None
    """`--store`: the store that `train` and `eval` read: a directory, or a URL that fsspec reads; or several."""
    weights: tuple[PositiveFloat, ...] | None = None
    """Of several stores: the share of each in the average of their rows; by default the same."""
    average: Literal["probability", "log"] = "probability"
    """Of several stores: the mean of their probabilities, or of the logs of these."""
    class_maps: tuple[str, ...] | None = None
    """For each store a file with its class of each class of the student; empty where the classes are the same."""
    top_k: Natural | None = None
    """Classes kept of each row; by default 10, or all where there are fewer. 0 only with `sample`."""
    keep_mass: Mass | None = None
    """Keep of each row only as many of the `top_k` classes as are needed for this share of its mass."""
    min_k: Positive = 1
    """… but at least these."""
    sample: Natural = 0
    """Draws from the classes outside the top k, which make the row's expectation the whole distribution; 0: none."""
    views: Positive = 1
    """Views of each sample. Epoch e of a student reads view e mod views."""
    first_view: Natural = 0
    """The number by which the first view is drawn: other than 0 to capture views apart, and merge them."""
    order: Literal["dealt", "tars"] | None = None
    """`dealt`: each shard is a fair sample of the listing; `tars`: a shard for each tar, its samples in order. By
    default `tars` where the data is tars, unless `shard_rows` is given."""
    shard_rows: Positive | None = None
    """Rows of a shard: what a killed capture can lose, and one file; by default 16,384; with `tars`, its tar's."""
    codec: Literal["exact", "compact"] = "exact"
    bits: Bits | None = None
    """Of the codec `compact`."""
    seed: Seed = 0
    """Of the views."""
    batch_size: Positive = 256
    """Images of one teacher forward."""
    precision: Precision = "fp32"
    memory_mb: Positive = 1024
    """Of shards that a reader maps at once, in each process."""
    trust: bool = False
    """`--trust`: read shards without looking at their checksums."""
    cache: str | None = None
    """Where shards of a URL are kept; by default `distill` in the user's cache directory."""
    cache_gb: PositiveFloat | None = None
    """Bound of that directory; what was not read for longest goes first. By default none."""
