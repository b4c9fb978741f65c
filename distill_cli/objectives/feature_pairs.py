"""A layer of the student beside a layer of the teacher: how they are brought to one shape, and compared."""

from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from distill_cli.config import Fraction, NonNegative, PositiveFloat, section
from distill_cli.data.batch import Batch
from distill_cli.errors import UsageError
from distill_cli.objectives.feature_losses import (
    Distance,
    Target,
    as_target,
    attention_map,
    attention_transfer,
    distance,
    kept,
    relation,
    similarity,
)
from distill_cli.objectives.ramps import Weight
from distill_cli.students.maps import as_grid, pooled, resample
from distill_cli.students.taps import INPUT

BETA = 2.0
"""Of `smooth_l1` in FD."""
CLASSIFIER = f"classifier{INPUT}"
"""The name of what the classifier of any model sees."""


@section
class PairConfig:
    weight: Weight = 1.0


@section
class VectorConfig(PairConfig):
    """Layers whose places, if they have any, do not matter."""

    student: str = CLASSIFIER
    """A module's name, for its output; with `:input` behind it, for its input; `classifier:input` in any model."""
    teacher: str = CLASSIFIER


@section
class GridConfig(PairConfig):
    """Layers that have a place for each part of the image, which a classifier's input has not."""

    student: str
    teacher: str
    grid: Literal["student", "teacher"] = "student"
    """Whose places they are compared at; the other's are averaged or interpolated to them."""


@section
class ComparedConfig(PairConfig):
    """Features that are compared value by value."""

    distance: Distance
    beta: PositiveFloat | None = None
    """`smooth_l1`: the difference from which on it is linear; by default 2."""
    target: Target = "none"
    """What becomes of the teacher's features first: see `as_target`."""
    projection: Literal["linear", "mlp", "none"] = "linear"
    """Of the student's channels to the teacher's; at each place of a grid, where `linear` is a 1 x 1 convolution."""

    @model_validator(mode="after")
    def _beta_is_of_smooth_l1(self) -> Self:
        if self.beta is not None and self.distance != "smooth_l1":
            raise PydanticCustomError("settings", 'beta is of distance = "smooth_l1"; give that too')
        return self


@section
class PooledConfig(VectorConfig, ComparedConfig):
    loss: Literal["pooled"] = "pooled"
    distance: Distance = "cosine"


@section
class DenseConfig(GridConfig, ComparedConfig):
    loss: Literal["dense"] = "dense"
    distance: Distance = "smooth_l1"
    target: Target = "layernorm"


@section
class MaskedConfig(GridConfig, ComparedConfig):
    loss: Literal["masked"] = "masked"
    distance: Distance = "l2"
    mask: Fraction = 0.5
    """Probability of each of the student's places or channels to be masked."""
    masked: Literal["places", "channels"] = "places"
    """The paper masks places; its code for classification masks channels, 0.15 of them."""


@section
class AttentionConfig(GridConfig):
    loss: Literal["attention"] = "attention"


@section
class SimilarityConfig(VectorConfig):
    loss: Literal["similarity"] = "similarity"


@section
class RelationConfig(VectorConfig):
    loss: Literal["relation"] = "relation"
    distances: NonNegative = 25.0
    """Weight of the distances between two images …"""
    angles: NonNegative = 50.0
    """… and of the angles between three."""


AnyPairConfig = Annotated[
    PooledConfig | DenseConfig | MaskedConfig | AttentionConfig | SimilarityConfig | RelationConfig,
    Field(discriminator="loss"),
]


Models = tuple[nn.Module, nn.Module]
"""Student and teacher."""


class Pair(nn.Module):
    """The loss of two layers: both brought to one shape by `align`, then compared by `loss` in float32."""

    relates_images: ClassVar[bool] = False

    def __init__(self, config: Any, models: Models, ours: Tensor, theirs: Tensor, seed: tuple[int, int]) -> None:
        """
        Args:
            models: which say how their layers lie; no parts of the pair.
            ours, theirs: what the two layers make of one image, for their shapes.
            seed: the run's, and the place of the pair among the others.

        Raises:
            UsageError: they cannot be compared.
        """
        super().__init__()
        self.config, self.models, self.seed = config, models, seed

    def forward(self, ours: Tensor, theirs: Tensor, batch: Batch) -> Tensor:
        """
        Args:
            ours, theirs: what the two layers made of the batch.
        """
        ours, theirs = (values.to(torch.promote_types(values.dtype, torch.float32)) for values in (ours, theirs))
        ours, theirs = self.align(ours, theirs, batch)
        dtype = torch.promote_types(ours.dtype, theirs.dtype)
        with torch.autocast(ours.device.type, enabled=False):
            return self.loss(ours.to(dtype), theirs.to(dtype))

    def align(self, ours: Tensor, theirs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def loss(self, ours: Tensor, theirs: Tensor) -> Tensor:
        raise NotImplementedError


class Compared(Pair):
    """Features value by value, the student's through a projection."""

    def __init__(self, config: Any, models: Models, ours: Tensor, theirs: Tensor, seed: tuple[int, int]) -> None:
        super().__init__(config, models, ours, theirs, seed)
        ours, theirs = self.sides(ours, theirs)
        self.projection = projection(config.projection, ours.shape[-1], theirs.shape[-1])

    def sides(self, ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
        """Both `[batch, …, channels]`."""
        raise NotImplementedError

    def align(self, ours: Tensor, theirs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        ours, theirs = self.sides(ours, theirs)
        return self.projection(ours), as_target(theirs, self.config.target)

    def loss(self, ours: Tensor, theirs: Tensor) -> Tensor:
        return distance(ours, theirs, self.config.distance, self.config.beta or BETA)


class Pooled(Compared):
    def sides(self, ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
        return pooled(ours, self.models[0]), pooled(theirs, self.models[1])


class Dense(Compared):
    def sides(self, ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
        ours, theirs = on_one_grid(ours, theirs, self.models, self.config.grid)
        return ours.permute(0, 2, 3, 1), theirs.permute(0, 2, 3, 1)


class Masked(Dense):
    """MGD: of what is left of the student's features a small block makes those of the teacher.

        G(f(s) M),    G = conv3x3(ReLU(conv3x3)),    f the projection

    Paper: Yang et al. 2022, arXiv:2205.01529, eq. 5 to 7.
    Differs: eq. 7 sums over channels and places; here `distance` takes the mean, so that alpha = 7e-5 of the paper is
    a weight of 7e-5 x channels x places. The projection is there for equal widths as well, unless it is "none".
    """

    def __init__(self, config: Any, models: Models, ours: Tensor, theirs: Tensor, seed: tuple[int, int]) -> None:
        super().__init__(config, models, ours, theirs, seed)
        width = self.sides(ours, theirs)[1].shape[-1]
        self.generation = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def align(self, ours: Tensor, theirs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        ours, theirs = super().align(ours, theirs, batch)
        grid = ours.permute(0, 3, 1, 2)
        shape = grid[:, :, :1, :1].shape if self.config.masked == "channels" else grid[:, :1].shape
        views, ids = batch.each_view.tolist(), batch.sample_ids.tolist()
        mask = kept(self.seed, views, ids, shape[1:].numel(), self.config.mask, grid.device)
        return self.generation(grid * mask.view(shape)).permute(0, 2, 3, 1), theirs


class Attention(Pair):
    def __init__(self, config: Any, models: Models, ours: Tensor, theirs: Tensor, seed: tuple[int, int]) -> None:
        super().__init__(config, models, ours, theirs, seed)
        on_one_grid(ours, theirs, models, config.grid)

    def align(self, ours: Tensor, theirs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        ours, theirs = attention_map(as_grid(ours, self.models[0])), attention_map(as_grid(theirs, self.models[1]))
        return one_size(ours, theirs, self.config.grid)

    def loss(self, ours: Tensor, theirs: Tensor) -> Tensor:
        return attention_transfer(ours, theirs)


class Similarity(Pair):
    relates_images = True

    def align(self, ours: Tensor, theirs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return ours.flatten(1), theirs.flatten(1)

    def loss(self, ours: Tensor, theirs: Tensor) -> Tensor:
        return similarity(ours, theirs)


class Relation(Pair):
    relates_images = True

    def __init__(self, config: Any, models: Models, ours: Tensor, theirs: Tensor, seed: tuple[int, int]) -> None:
        super().__init__(config, models, ours, theirs, seed)
        pooled(ours, models[0]), pooled(theirs, models[1])

    def align(self, ours: Tensor, theirs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return pooled(ours, self.models[0]), pooled(theirs, self.models[1])

    def loss(self, ours: Tensor, theirs: Tensor) -> Tensor:
        return relation(ours, theirs, self.config.distances, self.config.angles)


PAIRS: dict[str, type[Pair]] = {
    "pooled": Pooled,
    "dense": Dense,
    "masked": Masked,
    "attention": Attention,
    "similarity": Similarity,
    "relation": Relation,
}


def projection(kind: str, width: int, target_width: int) -> nn.Module:
    """From the student's channels to the teacher's, of the last dimension.

    Raises:
        UsageError: there shall be none, and they differ.
    """
    if kind == "none":
        if width != target_width:
            raise UsageError(
                f'projection "none" of {width} channels to the {target_width} of the teacher; give "linear" or "mlp"'
            )
        return nn.Identity()
    first = nn.Linear(width, target_width)
    return first if kind == "linear" else nn.Sequential(first, nn.GELU(), nn.Linear(target_width, target_width))


def on_one_grid(ours: Tensor, theirs: Tensor, models: Models, grid: str) -> tuple[Tensor, Tensor]:
    """Two layers as maps of one size, `[batch, channels, side, side]` each.

    Raises:
        UsageError: one of them has no square grid.
    """
    return one_size(as_grid(ours, models[0]), as_grid(theirs, models[1]), grid)


def one_size(ours: Tensor, theirs: Tensor, grid: str) -> tuple[Tensor, Tensor]:
    """Two maps, one of them resampled to the `grid` of the other."""
    if grid == "student":
        return ours, resample(theirs, ours.shape[-1])
    return resample(ours, theirs.shape[-1]), theirs
