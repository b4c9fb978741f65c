"""Colour jitter of a batch that is on the device already, for objectives whose two sides see other colours."""

import torch
from torch import Tensor

from distill_cli.data.batch import Batch
from distill_cli.objectives.base import Setting
from distill_cli.randomness import derive, uniforms

DRAWS = 6
"""Of an image: three factors, and three numbers whose order is that of the operations."""
LUMA = (0.2989, 0.587, 0.114)


def jittered(batch: Batch, strength: float, setting: Setting) -> Tensor:
    """A batch's images with other brightness, contrast and saturation; normalised, as they came.

    What is drawn depends on (seed, view, sample) alone, not on batch, rank or device.

    Args:
        strength: s; factors are uniform in [max(0, 1 - s), 1 + s].

    Returns:
        `[batch, 3, height, width]`. Values that are no colours, as erased boxes have, are clamped to 0 … 1.
    """
    pairs = zip(batch.each_view.tolist(), batch.sample_ids.tolist(), strict=True)
    seeds = [derive("color jitter", setting.seed, view, sample) for view, sample in pairs]
    drawn = uniforms(seeds, DRAWS, batch.images.device)
    low, high = max(0.0, 1 - strength), 1 + strength
    mean, std = (batch.images.new_tensor(values).view(3, 1, 1) for values in (setting.mean, setting.std))
    images = (batch.images * std + mean).clamp_(0, 1)
    changed = color_jitter(images, low + (high - low) * drawn[:, :3], drawn[:, 3:].argsort(dim=1))
    return (changed - mean) / std


def color_jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """torchvision's ColorJitter without hue, with factors and an order of its own for each image.

    Each operation is x <- clamp(f x + (1 - f) y): brightness with y = 0, contrast with the mean of the grey image,
    saturation with the grey image.

    Args:
        images: `[batch, 3, height, width]` in 0 … 1.
        factors: of brightness, contrast, saturation: `[batch, 3]`.
        order: which of the three comes first, second, third: int64 `[batch, 3]`.
    """
    luma = images.new_tensor(LUMA).view(3, 1, 1)
    for step in range(3):
        which = order[:, step]
        factor = factors.gather(1, which[:, None])[..., None, None]
        which = which.view(-1, 1, 1, 1)
        grey = (images * luma).sum(dim=1, keepdim=True)
        other = torch.where(which == 1, grey.mean(dim=(2, 3), keepdim=True), grey).masked_fill(which == 0, 0)
        images = (factor * images + (1 - factor) * other).clamp(0, 1)
    return images
