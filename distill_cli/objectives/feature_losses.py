"""How features of a student differ from those of a teacher: the equations that `features` chooses from.

Features of both sides are float32 or float64, channels last, and of one shape where they are compared place by place.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_cli.randomness import derive, uniforms

Distance = Literal["cosine", "l2", "smooth_l1"]
Target = Literal["none", "layernorm"]


def distance(ours: Tensor, theirs: Tensor, kind: Distance, beta: float = 2.0) -> Tensor:
    """A mean over images, places and, but for `cosine`, channels.

        cosine       1 - <s, t> / (|s| |t|)
        l2           (s - t)^2
        smooth_l1    (s - t)^2 / (2 beta) where |s - t| < beta, else |s - t| - beta / 2

    Args:
        ours, theirs: `[batch, …, channels]`.

    Paper: `l2` Romero et al. 2014, arXiv:1412.6550, eq. 3; `smooth_l1` Wei et al. 2022, arXiv:2205.14141, section 3.
    Differs: FitNets' eq. 3 is half the sum over channels and places, here it is their mean.
    """
    if kind == "cosine":
        return 1 - F.cosine_similarity(ours, theirs, dim=-1).mean()
    return F.mse_loss(ours, theirs) if kind == "l2" else F.smooth_l1_loss(ours, theirs, beta=beta)


def as_target(theirs: Tensor, kind: Target) -> Tensor:
    """What a student is held against: the features, or each place's less their mean and by their deviation.

    `layernorm` is over the channels, without a scale and shift that are learnt (epsilon 1e-5): FD calls it whitening.

    Paper: Wei et al. 2022, arXiv:2205.14141, section 3.
    """
    return F.layer_norm(theirs, theirs.shape[-1:]) if kind == "layernorm" else theirs


def attention_map(grid: Tensor) -> Tensor:
    """Where a layer is active: the mean of its squared channels, `[batch, 1, height, width]`.

    Paper: Zagoruyko and Komodakis 2016, arXiv:1612.03928, section 3.1, F_sum^2 over the number of channels.
    """
    return grid.pow(2).mean(dim=1, keepdim=True)


def attention_transfer(ours: Tensor, theirs: Tensor) -> Tensor:
    """mean over images and places of (Q_s / |Q_s| - Q_t / |Q_t|)^2, the norms over an image's places.

    Args:
        ours, theirs: maps `[batch, 1, height, width]`, as `attention_map` gives them.

    Paper: Zagoruyko and Komodakis 2016, arXiv:1612.03928, eq. 2.
    Differs: eq. 2 has the norm of the difference; its square as a mean over the places is what the authors' code takes,
    times 1000.
    """
    ours, theirs = (F.normalize(map_.flatten(1), dim=1) for map_ in (ours, theirs))
    return F.mse_loss(ours, theirs)


def similarity(ours: Tensor, theirs: Tensor) -> Tensor:
    """sum_ij (G_s - G_t)_ij^2 / b^2,    G = A A^T, each row by its norm: which images of a batch resemble each other.

    Args:
        ours, theirs: activations A `[batch, any]`; their widths may differ.

    Paper: Tung and Mori 2019, arXiv:1907.09682, eq. 2 to 4.
    """
    ours, theirs = (F.normalize(values @ values.T, dim=1) for values in (ours, theirs))
    return F.mse_loss(ours, theirs)


def relative_distances(values: Tensor) -> Tensor:
    """|x_i - x_j| over its mean over all i != j; `[batch, batch]`.

    Args:
        values: `[batch, dim]`.

    Paper: Park et al. 2019, arXiv:1904.05068, eq. 4 and 5.
    """
    distances: Tensor = torch.linalg.vector_norm(_differences(values), dim=-1)
    pairs = max(1, len(values) * (len(values) - 1))
    mean = distances.sum() / pairs
    return distances / mean.clamp(min=torch.finfo(values.dtype).tiny)


def angles(values: Tensor) -> Tensor:
    """The cosine of the angle at x_i between x_j and x_k; `[batch, batch, batch]`, 0 where two of them are one.

    Args:
        values: `[batch, dim]`.

    Paper: Park et al. 2019, arXiv:1904.05068, eq. 7.
    """
    differences = _differences(values)
    lengths = torch.linalg.vector_norm(differences, dim=-1, keepdim=True)
    # An image has no direction to itself; by an epsilon the gradient of two that are alike would be its inverse.
    directions: Tensor = differences / lengths.masked_fill(lengths == 0, 1)
    return directions @ directions.transpose(1, 2)


def relation(ours: Tensor, theirs: Tensor, distance_weight: float, angle_weight: float) -> Tensor:
    """RKD: the Huber loss of relative distances and that of angles, each times its weight.

    Huber's delta is 1. Means over all pairs and all triplets, those of an image with itself among them.

    Args:
        ours, theirs: `[batch, dim]`; their widths may differ.

    Paper: Park et al. 2019, arXiv:1904.05068, eq. 6 and 8.
    Differs: the paper sums; the means are those of the authors' code.
    """
    loss = ours.new_zeros(())
    if distance_weight:
        loss = loss + distance_weight * F.smooth_l1_loss(relative_distances(ours), relative_distances(theirs))
    if angle_weight:
        loss = loss + angle_weight * F.smooth_l1_loss(angles(ours), angles(theirs))
    return loss


def kept(
    seed: tuple[int, int],
    views: Sequence[int],
    sample_ids: Sequence[int],
    count: int,
    mask: float,
    device: torch.device,
) -> Tensor:
    """What MGD leaves of each image: 1 with probability 1 - `mask`, else 0; float32 `[batch, count]`.

    A function of (seed, view, sample id) alone, whatever else is in the batch.

    Paper: Yang et al. 2022, arXiv:2205.01529, eq. 5.
    """
    seeds = [derive("mgd", *seed, view, sample) for view, sample in zip(views, sample_ids, strict=True)]
    return (uniforms(seeds, count, device) >= mask).float()


def _differences(values: Tensor) -> Tensor:
    """x_j - x_i at [i, j]."""
    return values.unsqueeze(0) - values.unsqueeze(1)
