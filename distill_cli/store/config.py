"""The `[store]` section of a recipe."""

from typing import Literal

from distill_cli.config import Positive, Precision, Seed, section


@section
class StoreConfig:
    path: str | None = None
    """`--store`: the store that `train` and `eval` read."""
    top_k: Positive | None = None
    """Classes kept of each row; by default 10, or all where there are fewer."""
    views: Positive = 1
    """Views of each sample. Epoch e of a student reads view e mod views."""
    shard_rows: Positive = 16384
    """Rows of a shard: what a killed capture can lose, and one file."""
    codec: Literal["exact"] = "exact"
    seed: Seed = 0
    """Of the views."""
    batch_size: Positive = 256
    """Images of one teacher forward."""
    precision: Precision = "fp32"
