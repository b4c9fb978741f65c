"""Feature maps: what the layers of any architecture give, in one layout."""

from math import isqrt

import torch.nn.functional as F
from torch import Tensor, nn

from distill_cli.errors import UsageError


def as_tokens(value: Tensor, model: nn.Module) -> Tensor:
    """The patch tokens of a layer's output, row by row: `[batch, tokens, channels]`, without class tokens and the like.

    Maps are told by their shape, since images are square: of `[batch, a, b, c]` the two equal sizes are those of the
    grid, and where all are equal it is as the model says of itself. Of tokens, those before the last square number are
    prefix tokens, as many as the model has.

    Args:
        value: `[batch, tokens, channels]`, `[batch, channels, height, width]` or `[batch, height, width, channels]`.
        model: whose layer it is.

    Raises:
        UsageError: it is no square grid.
    """
    if value.ndim == 4:
        return value.flatten(1, 2) if _has_channels_last(value, model) else value.flatten(2).transpose(1, 2)
    if value.ndim == 3 and not hasattr(model, "reroll"):  # Hiera's tokens are in the order of its mask units.
        for prefix in (int(getattr(model, "num_prefix_tokens", 0)), 0):
            if isqrt(value.shape[1] - prefix) ** 2 == value.shape[1] - prefix > 0:
                return value[:, prefix:]
    raise UsageError(
        f"{type(model).__name__}: a layer's output {list(value.shape)} is no square grid of tokens; name another layer"
    )


def as_grid(value: Tensor, model: nn.Module) -> Tensor:
    """The same as a map: `[batch, channels, height, width]`."""
    tokens = as_tokens(value, model)
    side = isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def pooled(value: Tensor, model: nn.Module) -> Tensor:
    """The mean of a layer's patch tokens, `[batch, channels]`; what has no tokens comes back as it is."""
    return value if value.ndim == 2 else as_tokens(value, model).mean(dim=1)


def resample(grid: Tensor, side: int) -> Tensor:
    """A map of another size, `[batch, channels, side, side]`: averaged where it shrinks, else interpolated."""
    here = grid.shape[-1]
    if here == side:
        return grid
    if here % side == 0:
        return F.avg_pool2d(grid, here // side)
    return F.interpolate(grid, (side, side), mode="bilinear", align_corners=False, antialias=here > side)


def _has_channels_last(value: Tensor, model: nn.Module) -> bool:
    _, first, second, third = value.shape
    if first == second == third:
        return getattr(model, "output_fmt", "NCHW") == "NHWC"
    if second not in (first, third):
        raise UsageError(
            f"{type(model).__name__}: a layer's output {list(value.shape)} is no square map; name another layer"
        )
    return first == second
