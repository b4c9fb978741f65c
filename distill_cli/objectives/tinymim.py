"""TinyMIM: relations between tokens, the teacher's and the student's."""

import math
from contextlib import suppress
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distill_cli.config import NonNegative, Positive, section
from distill_cli.data.batch import Batch
from distill_cli.errors import UsageError
from distill_cli.objectives.base import Losses, Objective, Outputs, Setting, TermConfig
from distill_cli.objectives.jitter import jittered
from distill_cli.objectives.relation_sides import AttentionSide, FeatureSide, attends, depth_of
from distill_cli.students.taps import Enough, Taps, glimpse

PIECE = (2**18, 2**24)
"""Elements of a map that is there at once: on a CPU, whose cache holds a few of them, and elsewhere."""


@section
class TinyMIMConfig(TermConfig):
    name: Literal["tinymim"] = "tinymim"
    relations: Literal["attention", "features"] | None = None
    """Of the queries, keys and values of a ViT's block, or of the tokens that a layer gives; by default the former
    where both sides are ViTs."""
    relation_heads: Positive | None = None
    """By default the teacher's heads; of features one."""
    teacher_block: Positive | None = None
    """Counted from 1, of a ViT. By default three quarters up where the teacher is deeper than the student, else its
    last."""
    student_block: Positive | None = None
    """Counted from 1, of a ViT; by default its last."""
    teacher_layer: str | None = None
    """Of features, by timm's name; by default the output of the block, or of the last stage."""
    student_layer: str | None = None
    grid: Annotated[int, Field(ge=2)] | None = None
    """Side of the grid that both sides' tokens are brought to; by default that of the coarser one for features, and for
    attention both must have the same."""
    color_jitter: NonNegative = 0.4
    """Of brightness, contrast and saturation, of what the student sees alone. With it the objective has a pass of its
    own in a sum of terms."""

    @model_validator(mode="after")
    def _a_layer_is_of_features(self) -> Self:
        for side in ("teacher", "student"):
            if getattr(self, f"{side}_layer") is None:
                continue
            if self.relations == "attention":
                found = {"side": side}
                raise PydanticCustomError("settings", '{side}_layer is of relations = "features"; give that', found)
            if getattr(self, f"{side}_block") is not None:
                raise PydanticCustomError("settings", "{side}_block and {side}_layer: give one of them", {"side": side})
        return self


class TinyMIM(Objective):
    """The student's tokens stand to each other as the teacher's do.

        R_QK = softmax(Q K^T / sqrt(d)),    R_VV = softmax(V V^T / sqrt(d)),    d = D / heads
        L = KL(R_QK of the teacher || the student's) + KL(R_VV of the teacher || the student's)

    Each KL is a sum over the tokens of a row and a mean over rows, heads and images; each side has its own d. Q, K and
    V of the student's last block are viewed with the teacher's number of heads, so that widths may differ. No labels.
    Both passes end at their block: what comes behind it (its projection and MLP, the last norm, the classifier) is not
    trained, and the classifier of a run by this objective alone says nothing.

    Where one of the two is no ViT with plain attention (TinyViT, Swin, LeViT, ConvNeXt, ResNet, …) there are no queries
    of all tokens to all tokens. Then one relation is learned, of the tokens F that a layer of each gives, each
    normalised over its channels, on the grid of the coarser layer:

        R_FF = softmax(8 F F^T / d)

    Paper: Ren et al. 2023, arXiv:2301.01296, eq. 4 and 9.
    Differs: relations of features are not in the paper, which has ViTs alone; 8 / d is its 1 / sqrt(d) at d = 64, and
    keeps the scale of cosines where widths differ. Prefix tokens have relations only where they are class tokens that
    both sides have. The jitter is torchvision's, on the device. `drop_path` rises with depth, in the paper it is the
    same in all blocks but the last.
    """

    needs = frozenset({"teacher"})
    whole_pass = False

    def __init__(self, student: nn.Module, config: TinyMIMConfig, setting: Setting) -> None:
        """
        Raises:
            UsageError: student or teacher has no such block or layer, or their widths or grids do not fit.
        """
        super().__init__(student, setting)
        self.config = config
        # A pass that sees other colours cannot be shared.
        self.own_forward = config.color_jitter > 0
        teacher = self.teacher.model
        if not isinstance(getattr(student, "patch_drop", nn.Identity()), nn.Identity):
            raise UsageError("objective tinymim: relations are of all patches; leave patch_drop_rate out")
        kind = _kind(config, student, teacher)
        depth = depth_of(student)
        self.ours = kind("student", student, config.student_block, config.student_layer, depth)
        self.theirs = kind("teacher", teacher, config.teacher_block, config.teacher_layer, depth)
        blank = torch.zeros(1, 3, setting.image_size, setting.image_size, device=next(student.parameters()).device)
        own = glimpse(student, [self.ours.layer], blank)[self.ours.layer]
        other = self.teacher.glimpse([self.theirs.layer], setting.image_size)[self.theirs.layer]
        self.grid = config.grid or kind.common_grid(self.ours.side(own), self.theirs.side(other))
        self.heads = config.relation_heads or self.theirs.heads
        _check_heads(self.heads, self.ours.channels(own), self.theirs.channels(other))
        self.taps = Taps(student, [self.ours.layer], only_in_training=True)
        self.teacher.tap(self.theirs.layer)

    def forward(self, batch: Batch) -> Losses:
        images = jittered(batch, self.config.color_jitter, self.setting) if self.own_forward else batch.images
        self.taps.stop = True
        with suppress(Enough):
            self.student(images)
        self.taps.stop = False
        return self._losses(batch)

    def losses(self, outputs: Outputs, batch: Batch) -> Losses:
        return self._losses(batch)

    def _losses(self, batch: Batch) -> Losses:
        with_class = self.ours.has_class and self.theirs.has_class
        values = self.taps.take()[self.ours.layer], self.teacher.inside(batch.images)[self.theirs.layer]
        # Under autocast too the relations are taken in float32.
        with torch.autocast(batch.images.device.type, enabled=False):
            student, teacher = (
                side.relations(value.float(), self.heads, self.grid, with_class)
                for side, value in zip((self.ours, self.theirs), values, strict=True)
            )
            parts = {name: relation_divergence(*student[name], *teacher[name]) for name in student}
        return Losses(torch.stack([*parts.values()]).sum(), {name: loss.detach() for name, loss in parts.items()})


def relation_divergence(query: Tensor, key: Tensor, teacher_query: Tensor, teacher_key: Tensor) -> Tensor:
    """KL(teacher || student) of their relations R = softmax(query key^T): summed over a row, a mean over all rows.

    The maps, `[batch, heads, tokens, tokens]`, are never all there at once: those of a few images are computed, with
    the gradient that they give to the student's queries and keys, and forgotten. Differentiable once.

    Args:
        query, key: `[batch, heads, tokens, dim]`, the scale within them; the teacher's dim may be another.
    """
    value: Tensor = _RelationDivergence.apply(query, key, teacher_query, teacher_key)
    return value


class _RelationDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, teacher_query: Tensor, teacher_key: Tensor) -> Tensor:
        batch, heads, tokens, _ = query.shape
        rows = batch * heads * tokens
        images = max(1, PIECE[query.device.type != "cpu"] // (heads * tokens * tokens))
        total = query.new_zeros(())
        trains = any(ctx.needs_input_grad)
        of_query, of_key = torch.empty_like(query), torch.empty_like(key)
        for start in range(0, batch, images):
            piece = slice(start, start + images)
            log_s = _log_relation(query[piece], key[piece])
            log_t = _log_relation(teacher_query[piece], teacher_key[piece])
            target = log_t.exp()
            total += log_t.sub_(log_s).mul_(target).sum()
            if trains:
                # Of the products q k^T: R of the student less R of the teacher.
                slope = log_s.exp_().sub_(target).div_(rows)
                torch.matmul(slope, key[piece], out=of_query[piece])
                torch.matmul(slope.mT, query[piece], out=of_key[piece])
        ctx.save_for_backward(of_query, of_key)
        return total / rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        of_query, of_key = ctx.saved_tensors
        return upstream * of_query, upstream * of_key, None, None


def _log_relation(query: Tensor, key: Tensor) -> Tensor:
    return (query @ key.mT).log_softmax(dim=-1)


def _kind(config: TinyMIMConfig, student: nn.Module, teacher: nn.Module) -> type[AttentionSide] | type[FeatureSide]:
    """Whose relations are learnt.

    Raises:
        UsageError: those of attention are asked of a model that has none of all tokens to all tokens.
    """
    others = [type(model).__name__ for model in (student, teacher) if not attends(model)]
    if config.relations == "attention" and others:
        raise UsageError(
            f"objective.relations attention: {others[0]} is no ViT with plain attention; "
            'give "features", or leave it out'
        )
    named = config.teacher_layer or config.student_layer
    return FeatureSide if config.relations == "features" or named or others else AttentionSide


def _check_heads(heads: int, ours: int, theirs: int) -> None:
    """
    Raises:
        UsageError: they do not divide the channels of both sides.
    """
    if ours % heads or theirs % heads:
        both = math.gcd(ours, theirs)
        known = ", ".join(str(count) for count in range(1, both + 1) if both % count == 0)
        raise UsageError(
            f"objective tinymim: {heads} relation heads do not divide the {ours} channels of the student and the "
            f"{theirs} of the teacher; give objective.relation_heads, one of {known}"
        )
