"""What a student or a teacher gives to relations between tokens: where it is read, and on which grid."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from distill_cli.errors import UsageError
from distill_cli.students.maps import as_grid, resample

STUDENT_DEPTH = 12
"""Of the paper's students, for those whose blocks are no ViT's."""
FEATURE_SCALE = 8.0
"""Of cosines: the root of 64, the channels of a head in the paper's teachers."""

Relations = Mapping[str, tuple[Tensor, Tensor]]
"""By name the two factors of R before the softmax, `[batch, heads, tokens, dim]`, the scale in the first."""


class AttentionSide:
    """Queries, keys and values of a block of a ViT."""

    def __init__(self, where: str, model: nn.Module, block: int | None, layer: str | None, depth: int) -> None:
        """
        Args:
            where: `student` or `teacher`.
            block: from 1; by default the last, or three quarters up where the model is deeper than the student.
            layer: of features alone.
            depth: of the student.

        Raises:
            UsageError: there is no such block.
        """
        assert isinstance(model, VisionTransformer)
        number = _block(where, model, block, depth)
        self.model, self.layer = model, f"blocks.{number}.attn.qkv"
        attention: Any = model.get_submodule(f"blocks.{number}.attn")
        self.attention, self.heads = attention, int(attention.num_heads)
        self.has_class = model.cls_token is not None

    def channels(self, value: Tensor) -> int:
        return value.shape[-1] // 3

    def side(self, value: Tensor) -> int:
        return as_grid(value, self.model).shape[-1]

    @staticmethod
    def common_grid(ours: int, theirs: int) -> int:
        """
        Raises:
            UsageError: they are not the same.
        """
        if ours != theirs:
            raise UsageError(
                f"objective tinymim: the student's patches are a grid of {ours} x {ours}, the teacher's of "
                f"{theirs} x {theirs}; give objective.grid, the side that both are brought to, or another patch_size"
            )
        return ours

    def relations(self, value: Tensor, heads: int, grid: int, with_class: bool) -> Relations:
        """
        Args:
            value: what the layer gave.
            with_class: whether the class token is among the tokens.
        """
        patches = resample(as_grid(value, self.model), grid).flatten(2).transpose(1, 2)
        tokens = torch.cat([value[:, :1], patches], dim=1) if with_class else patches
        query, key, inner = tokens.reshape(*tokens.shape[:2], 3, self.heads, -1).unbind(2)
        # What is dotted in the block itself, which may be normalised first.
        query, key = self.attention.q_norm(query), self.attention.k_norm(key)
        query, key, inner = (split(each.flatten(2), heads) for each in (query, key, inner))
        scale = query.shape[-1] ** -0.5
        return {"qk": (scale * query, key), "vv": (scale * inner, inner)}


class FeatureSide:
    """The tokens that a layer of any architecture gives."""

    heads, has_class = 1, False

    def __init__(self, where: str, model: nn.Module, block: int | None, layer: str | None, depth: int) -> None:
        self.model, self.layer = model, layer or _last_layer(where, model, block, depth)

    def channels(self, value: Tensor) -> int:
        return as_grid(value, self.model).shape[1]

    def side(self, value: Tensor) -> int:
        return as_grid(value, self.model).shape[-1]

    @staticmethod
    def common_grid(ours: int, theirs: int) -> int:
        """
        Raises:
            UsageError: the coarser has one place, which stands to no other.
        """
        if min(ours, theirs) == 1:
            raise UsageError(
                f"objective tinymim: the student's layer is a grid of {ours} x {ours}, the teacher's of {theirs} x "
                f"{theirs}, and one token stands to no other; give larger images, or objective.student_layer, "
                "teacher_layer"
            )
        return min(ours, theirs)

    def relations(self, value: Tensor, heads: int, grid: int, with_class: bool) -> Relations:
        """As those of `AttentionSide`."""
        tokens = resample(as_grid(value, self.model), grid).flatten(2).transpose(1, 2)
        features = split(F.layer_norm(tokens, tokens.shape[-1:]), heads)
        return {"features": (FEATURE_SCALE / features.shape[-1] * features, features)}


def split(tokens: Tensor, heads: int) -> Tensor:
    """`[batch, tokens, channels]` by heads: `[batch, heads, tokens, channels / heads]`."""
    return tokens.reshape(*tokens.shape[:2], heads, -1).transpose(1, 2)


def attends(model: nn.Module) -> bool:
    """Whether queries, keys and values of all tokens can be read from it."""
    return isinstance(model, VisionTransformer) and all(
        isinstance(getattr(block, "attn", None), Attention) for block in model.blocks
    )


def depth_of(student: nn.Module) -> int:
    """In blocks of a ViT."""
    return len(student.blocks) if isinstance(student, VisionTransformer) else STUDENT_DEPTH


def _block(where: str, model: nn.Module, number: int | None, depth: int) -> int:
    """The place of a block, from 0.

    Args:
        number: from 1, where it is given.
        depth: of the student.

    Raises:
        UsageError: the model has no such block.
    """
    count = len(model.blocks) if isinstance(model, VisionTransformer) else 0
    if number is not None and number > count:
        has = (
            f"has {count} blocks; give 1 to {count}"
            if count
            else f"is no ViT; give objective.{where}_layer by timm's name"
        )
        raise UsageError(f"objective.{where}_block {number}: {type(model).__name__} {has}")
    return (number or (count if count <= depth else count * 3 // 4)) - 1


def _last_layer(where: str, model: nn.Module, block: int | None, depth: int) -> str:
    """The block that is named, or by default: of a ViT as of its attention, of others the last stage."""
    if isinstance(model, VisionTransformer) or block is not None:
        return f"blocks.{_block(where, model, block, depth)}"
    stages = [str(stage["module"]) for stage in getattr(model, "feature_info", ())]
    if not stages:
        raise UsageError(
            f"objective.{where}_layer is missing: timm names no stages of {type(model).__name__}; give one"
        )
    return stages[-1]
