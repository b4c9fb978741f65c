"""A plain ViT that sees some of its patches only, as in masked image modelling; the model itself is not changed."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from distill_cli.errors import UsageError


def plain_vit(model: nn.Module, where: str, instead: str) -> VisionTransformer:
    """The model, if it is timm's `VisionTransformer`, with any prefix tokens: it goes on with fewer patches as it is.

    Others know where their tokens lie: by windows, by relative or rotated positions. Behind a convolutional stem a
    token would tell of the patches around it.

    Raises:
        UsageError: it is another one, or has such a stem.
    """
    if not isinstance(model, VisionTransformer):
        raise UsageError(f"{where}: {type(model).__name__} is no plain ViT, timm's VisionTransformer; {instead}")
    if not isinstance(model.patch_embed, PatchEmbed):
        stem = type(model.patch_embed).__name__
        raise UsageError(f"{where}: its patches are embedded by {stem}, which looks beyond each; {instead}")
    return model


def grid_of(vit: VisionTransformer, image_size: int) -> tuple[int, int]:
    """Rows and columns of its patches in images of so many pixels a side."""
    rows, columns = vit.patch_embed.dynamic_feat_size((image_size, image_size))
    return int(rows), int(columns)


@contextlib.contextmanager
def only_patches(vit: VisionTransformer, keep: Tensor) -> Iterator[None]:
    """Forward passes inside go on, behind the position embeddings, with some patches and all prefix tokens.

    Args:
        keep: int64 `[batch, visible]`, places in the grid, counted row by row.
    """

    def choose(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        prefix = output[:, : vit.num_prefix_tokens]
        return torch.cat((prefix, gather(output[:, vit.num_prefix_tokens :], keep)), dim=1)

    handle = vit.patch_drop.register_forward_hook(choose)
    try:
        yield
    finally:
        handle.remove()


def visible_tokens(
    vit: VisionTransformer, images: Tensor, keep: Tensor, blocks: Sequence[int], stop: bool = False
) -> tuple[dict[int, Tensor], Tensor | None]:
    """What a ViT makes of some patches of its images.

    Args:
        keep: see `only_patches`.
        blocks: whose tokens are wanted, counted from 1.
        stop: do no more than these blocks need.

    Returns:
        By block its tokens as the next block sees them, `[batch, prefix + visible, channels]`; and those of the last
        block behind the model's norm, or None where it stops.
    """
    wanted = sorted(set(blocks))
    with only_patches(vit, keep):
        if not wanted:
            return {}, vit.forward_features(images)
        found: Any = vit.forward_intermediates(
            images,
            [block - 1 for block in wanted],
            return_prefix_tokens=True,
            output_fmt="NLC",
            stop_early=stop,
            intermediates_only=stop,
        )
    last, inside = (None, found) if stop else found
    # A tensor where there are no prefix tokens, else the patches' and the prefix.
    whole = [each if isinstance(each, Tensor) else torch.cat(each[::-1], dim=1) for each in inside]
    return dict(zip(wanted, whole, strict=True)), last


def gather(tokens: Tensor, places: Tensor) -> Tensor:
    """Some tokens of each image: `[batch, tokens, channels]` at `[batch, places]`."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))
