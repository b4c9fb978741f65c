"""DMAE: masked image modelling beside a teacher that sees the same patches, up to one of its blocks."""

from dataclasses import field
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from timm.layers import LayerNorm, Mlp
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from distill_cli.config import Positive, section
from distill_cli.data.batch import Batch
from distill_cli.errors import UsageError
from distill_cli.objectives.base import Losses, Need, Objective, Setting, TermConfig
from distill_cli.objectives.ramps import Weight, at
from distill_cli.randomness import derive, uniforms
from distill_cli.students.masked import gather, grid_of, plain_vit, visible_tokens

Pair = tuple[Positive, Positive]


@section
class DecoderConfig:
    depth: Positive = 8
    width: Positive = 512
    heads: Positive = 16

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.width % 4 or self.width % self.heads:
            found = {"width": self.width, "heads": self.heads}
            raise PydanticCustomError("width", "width {width} is no multiple of 4 and of {heads} heads", found)
        return self


@section
class DMAEConfig(TermConfig):
    name: Literal["dmae"] = "dmae"
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """Share of the N patches that nobody sees; int(N (1 - ratio)) are visible."""
    alpha: Weight = 1.0
    """Of the distillation part; 0 is MAE, and needs no teacher."""
    normalise: bool = True
    """Divide each token of both sides by its L2 norm, as the paper's code does; false: the paper's formula."""
    blocks: Annotated[tuple[Pair, ...], Field(min_length=1)] | None = None
    """Pairs of a block of the student and one of the teacher, counted from 1; by default one, at 3/4 of each depth."""
    projection: Literal["linear", "mlp"] = "linear"
    norm_pix: bool = False
    """Paint each patch normalised by its own mean and variance."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)


class DMAE(Objective):
    """The student paints the masked patches; inside, at the visible ones, it is drawn to a block of the teacher.

        L = L_MAE + alpha sum_l L_dist,    L_dist = mean |z_t / ||z_t|| - P(z_s) / ||P(z_s)|| |
        L_MAE = mean over the masked patches of the mean squared error of their pixels

    z are the tokens behind a block, before any norm: the visible patches and, where both models have one, the class
    token. P is a linear layer, or an MLP. Teacher and student see the same patches, drawn from (seed, view, sample id);
    the teacher stops behind the last block that is needed. Decoder and projections are trained, and are no part of the
    student. Its classifier is not trained.

    Paper: Bai et al. 2023, arXiv:2208.12256; the decoder is that of He et al. 2021, arXiv:2111.06377.
    Differs: the teacher stops, where the paper's code runs all of it. The student's position embeddings and initial
    weights are timm's, where MAE has fixed sines and Xavier's. A student whose norm is that of its pooled features
    (`global_pool = "avg"`) has none behind its last block; the decoder then begins with it, and it is dropped, as MAE's
    fine-tuning drops it. Register and distillation tokens, which the paper's models lack, are seen and decoded, but not
    compared.
    """

    needs = frozenset({"teacher"})
    own_forward = True
    whole_pass = False

    def __init__(self, student: nn.Module, config: DMAEConfig, setting: Setting) -> None:
        """
        Raises:
            UsageError: student or teacher is no plain ViT, or their patches, blocks and settings do not fit.
        """
        super().__init__(student, setting)
        self.config = config
        self.needs = self.needs_of(config)
        vit = plain_vit(student, "objective dmae", "take a student such as deit-small or vit_base_patch16_224")
        if not isinstance(vit.patch_drop, nn.Identity):
            raise UsageError("objective dmae: the student drops patches by itself; give it no patch_drop_rate")
        self.grid = grid_of(vit, setting.image_size)
        self.patch = vit.patch_embed.feat_ratio(as_scalar=False)
        covered = self.grid[0] * self.patch[0], self.grid[1] * self.patch[1]
        if covered != (setting.image_size, setting.image_size):
            raise UsageError(
                f"objective dmae: {self.grid[0]} x {self.grid[1]} patches do not fill images of "
                f"{setting.image_size} px; give --image-size {covered[0]}"
            )
        patches = self.grid[0] * self.grid[1]
        self.visible = int(patches * (1 - config.mask_ratio))
        if not 0 < self.visible < patches:
            raise UsageError(
                f"objective.mask_ratio: {config.mask_ratio} leaves {self.visible} of {patches} patches visible; "
                "give one that leaves some visible and some masked"
            )
        self.pairs = () if config.alpha == 0 else self._pairs()
        teacher_dim = self._teacher.embed_dim if self.pairs else 0
        self.projections = nn.ModuleList(_projection(config.projection, vit.embed_dim, teacher_dim) for _ in self.pairs)
        self.decoder = Decoder(vit, self.grid, 3 * self.patch[0] * self.patch[1], config.decoder)

    @classmethod
    def needs_of(cls, config: TermConfig) -> frozenset[Need]:
        assert isinstance(config, DMAEConfig)
        return frozenset() if config.alpha == 0 else cls.needs

    def forward(self, batch: Batch) -> Losses:
        order = random_order(self.setting.seed, batch, self.grid[0] * self.grid[1])
        keep, masked = order[:, : self.visible], order[:, self.visible :]
        inside, last = visible_tokens(self._student, batch.images, keep, [ours for ours, _ in self.pairs])
        painted = self.decoder(last, keep, masked)
        reconstruct = pixel_error(painted, gather(patchify(batch.images, self.patch), masked), self.config.norm_pix)
        if not self.pairs:
            return Losses(reconstruct, {"reconstruct": reconstruct.detach()})
        distill = self.distillation(inside, batch.images, keep)
        total = reconstruct + at(self.config.alpha, self.progress) * distill
        return Losses(total, {"reconstruct": reconstruct.detach(), "distill": distill.detach()})

    def distillation(self, inside: dict[int, Tensor], images: Tensor, keep: Tensor) -> Tensor:
        """The sum over the pairs of blocks.

        Args:
            inside: the student's tokens by block.
        """
        images, blocks = self.teacher.normalised(images), [theirs for _, theirs in self.pairs]
        with torch.no_grad():
            taught, _ = visible_tokens(self._teacher, images, keep, blocks, stop=True)
        distances = [
            token_distance(
                project(self._compared(inside[ours], self._student)),
                self._compared(taught[theirs], self._teacher),
                self.config.normalise,
            )
            for project, (ours, theirs) in zip(self.projections, self.pairs, strict=True)
        ]
        return torch.stack(distances).sum()

    @property
    def _student(self) -> Any:
        return self.student

    @property
    def _teacher(self) -> Any:
        return self.teacher.model

    def _pairs(self) -> tuple[Pair, ...]:
        """The blocks that are compared, with a teacher that fits."""
        theirs = f"teacher {self.teacher.name}"
        teacher = plain_vit(self._teacher, theirs, "objective dmae takes one such as vit_large_patch16_224.mae")
        grid = grid_of(teacher, self.teacher.image_size)
        if grid != self.grid:
            raise UsageError(
                f"{theirs}: has {grid[0]} x {grid[1]} patches, the student {self.grid[0]} x {self.grid[1]}, and "
                f"objective dmae masks both alike; give --image-size {grid[0] * self.patch[0]}, or another teacher"
            )
        depths = len(self._student.blocks), len(teacher.blocks)
        pairs = self.config.blocks or ((max(1, 3 * depths[0] // 4), max(1, 3 * depths[1] // 4)),)
        for pair in pairs:
            for block, depth, whose in zip(pair, depths, ("the student", theirs), strict=True):
                if block > depth:
                    raise UsageError(f"objective.blocks: {whose} has {depth} blocks, {block} asked; give 1 to {depth}")
        return pairs

    def _compared(self, tokens: Tensor, vit: Any) -> Tensor:
        """The visible patches, and the class token where both models have one."""
        patches = tokens[:, vit.num_prefix_tokens :]
        both = self._student.has_class_token and self._teacher.has_class_token
        return torch.cat((tokens[:, :1], patches), dim=1) if both else patches


class Decoder(nn.Module):
    """MAE's: a small ViT that paints the masked patches, from the tokens of the visible ones."""

    positions: Tensor
    """`[patches, width]`; prefix tokens have none."""

    def __init__(self, vit: Any, grid: tuple[int, int], pixels: int, config: DecoderConfig) -> None:
        """
        Args:
            vit: whose tokens it decodes.
            pixels: values of a patch.
        """
        super().__init__()
        self.norm_before = LayerNorm(vit.embed_dim) if isinstance(vit.norm, nn.Identity) else nn.Identity()
        self.embed = nn.Linear(vit.embed_dim, config.width)
        self.mask_token = nn.Parameter(torch.empty(config.width))
        self.register_buffer("positions", build_sincos2d_pos_embed(list(grid), config.width), persistent=False)
        self.blocks = nn.Sequential(*(Block(config.width, config.heads, qkv_bias=True) for _ in range(config.depth)))
        self.norm = LayerNorm(config.width)
        self.predict = nn.Linear(config.width, pixels)
        self.apply(_initialise)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, keep: Tensor, masked: Tensor) -> Tensor:
        """The pixels of the masked patches, `[batch, masked, pixels]`.

        Args:
            tokens: the student's last, `[batch, prefix + visible, channels]`.
            keep, masked: places of the visible and of the masked patches, `[batch, visible]`, `[batch, masked]`.
        """
        tokens = self.embed(self.norm_before(tokens))
        prefix, visible = tokens[:, : -keep.shape[1]], tokens[:, -keep.shape[1] :]
        hidden = self.mask_token.to(tokens.dtype).expand(*masked.shape, -1)
        order = torch.cat((keep, masked), dim=1)
        patches = torch.cat((visible, hidden), dim=1) + self.positions[order]
        # Attention knows no order but that of the positions, so the masked ones may stay behind the visible.
        painted = self.blocks(torch.cat((prefix, patches), dim=1))[:, -masked.shape[1] :]
        pixels: Tensor = self.predict(self.norm(painted))
        return pixels


def random_order(seed: int, batch: Batch, patches: int) -> Tensor:
    """The patches of each image in an order drawn from (seed, view, sample id): int64 `[batch, patches]`.

    The first are visible, so that a smaller ratio adds some to them.
    """
    images = zip(batch.each_view.tolist(), batch.sample_ids.tolist(), strict=True)
    seeds = [derive("mask", seed, view, sample_id) for view, sample_id in images]
    return uniforms(seeds, patches, batch.images.device).argsort(dim=-1, stable=True)


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """The pixels of each patch, row by row: `[batch, patches, height x width x 3]`.

    Args:
        images: `[batch, 3, rows x height, columns x width]`.
        patch: height and width.
    """
    batch, channels, *sides = images.shape
    rows, columns = (side // pixels for side, pixels in zip(sides, patch, strict=True))
    cut = images.reshape(batch, channels, rows, patch[0], columns, patch[1])
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


def pixel_error(painted: Tensor, pixels: Tensor, norm_pix: bool) -> Tensor:
    """L_MAE: the mean squared error of patches.

    Args:
        painted, pixels: `[batch, patches, pixels]`.
        norm_pix: of patches normalised by their own mean and, unbiased, variance.
    """
    pixels = pixels.float()
    if norm_pix:
        variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
        pixels = (pixels - mean) / (variance + 1e-6).sqrt()
    return F.mse_loss(painted.float(), pixels)


def token_distance(projected: Tensor, tokens: Tensor, normalise: bool) -> Tensor:
    """L_dist: the mean absolute difference, over all tokens and channels `[batch, tokens, channels]`.

    Args:
        normalise: divide each token by its L2 norm first.
    """
    projected, tokens = projected.float(), tokens.float()
    if normalise:
        projected, tokens = F.normalize(projected, dim=-1), F.normalize(tokens, dim=-1)
    return F.l1_loss(projected, tokens)


def _projection(kind: str, dim: int, teacher_dim: int) -> nn.Module:
    return nn.Linear(dim, teacher_dim) if kind == "linear" else Mlp(dim, teacher_dim, teacher_dim)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
