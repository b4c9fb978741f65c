"""DeiT: distillation through a token, or through a second head."""

import re
from dataclasses import field
from typing import Any, Literal, Self

import torch.nn.functional as F
from pydantic import model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from distill_cli.config import Fraction, section
from distill_cli.data.batch import Batch
from distill_cli.errors import UsageError
from distill_cli.objectives.base import (
    Losses,
    Objective,
    Outputs,
    Setting,
    as_evaluated,
    beside_teacher,
    label_cross_entropy,
    teacher_rows,
)
from distill_cli.objectives.logits import Divergence, KLConfig, LogitsConfig, soft_loss
from distill_cli.objectives.ramps import at
from distill_cli.sparse import SparseLogits
from distill_cli.students.second_head import AtEvaluation, add_second_head


@section
class DeiTConfig(LogitsConfig):
    name: Literal["deit"] = "deit"
    divergence: Divergence = field(default_factory=KLConfig)
    """`soft`, as are temperature, tail and standardise."""
    distillation: Literal["hard", "soft"] = "hard"
    alpha: Fraction = 0.5
    """Weight of the distillation part; the label part has 1 - alpha."""
    reduction: Literal["batchmean", "numel"] = "batchmean"
    """`soft`: divide the summed divergence by the batch, or by batch x classes as DeiT's code does."""
    label_smoothing: Fraction = 0.1
    """Of the label part only."""
    second_head: AtEvaluation | Literal[False] | None = None
    """Of a student without a distillation head: what becomes of the one that it gets, by default `average`; false for
    none, and no such student."""

    @model_validator(mode="after")
    def _is_soft(self) -> Self:
        plain = {"divergence": KLConfig(), "tail": "uniform", "standardise": False}
        other = next((name for name, value in plain.items() if getattr(self, name) != value), None)
        if self.distillation == "hard" and other:
            found = {"name": other}
            raise PydanticCustomError("settings", '{name} is of distillation = "soft"; give that too', found)
        if self.reduction == "numel" and self.divergence != KLConfig():
            raise PydanticCustomError("settings", "reduction numel is of divergence kl; leave one of them out")
        return self

    def beyond_samples(self) -> tuple[str, str] | None:
        if self.distillation == "hard":
            needs = "distillation: hard needs the teacher's most probable class"
            return needs, 'give objective.distillation="soft"'
        return super().beyond_samples()


class DeiT(Objective):
    """The class token learns from the labels, the distillation token from the teacher.

        L = (1 - alpha) CE(class, label) + alpha D(token, teacher)
        hard: D = CE(token, argmax teacher),    soft: D = T^2 KL(teacher || token), both at temperature T

    Students with a distillation head of timm's (DeiT, LeViT, PiT, EfficientFormer, RepViT, …) train that. Others get a
    second head on the features of their classifier: `second_head`.

    Paper: Touvron et al. 2021, arXiv:2012.12877, eq. 2 (soft) and eq. 3 (hard).
    Differs: the soft part is a mean over the batch; DeiT's code divides by batch x classes as well, which
    `reduction = "numel"` does. The teacher comes from a store, its hard label being the row's first class, or is live.
    With sampled rows the soft part at temperature 1 has the right gradient in expectation, but its value is too large
    by the entropy that a sampled row lacks. What the paper has not: a second head without a token, which sees the
    same features, other tails, divergences and standardised logits (`logits`).
    """

    needs = frozenset({"labels", "logits"})

    def __init__(self, student: nn.Module, config: DeiTConfig, setting: Setting) -> None:
        """
        Raises:
            UsageError: the student has no distillation head and can have none, or has one and a second is asked for.
        """
        super().__init__(student, setting)
        self.config = config
        self.relates_images = config.relates_images
        prepare(student, config.second_head, setting.image_size)

    def losses(self, outputs: Outputs, batch: Batch) -> Losses:
        class_logits, token_logits = outputs
        label = label_cross_entropy(class_logits, batch, self.config.label_smoothing)
        distill = self.distillation(token_logits, batch)
        total = (1 - self.config.alpha) * label + self.config.alpha * distill
        seen = beside_teacher(as_evaluated(outputs), batch)
        return Losses(total, {"label": label.detach(), "distill": distill.detach()}, seen)

    def distillation(self, token_logits: Tensor, batch: Batch) -> Tensor:
        config, rows = self.config, teacher_rows(batch)
        if config.distillation == "hard":
            return hard_distillation(token_logits, rows)
        loss = soft_loss(token_logits, rows, config, at(config.temperature, self.progress), batch)
        return loss / token_logits.shape[-1] if config.reduction == "numel" else loss


def hard_distillation(token_logits: Tensor, teacher: SparseLogits) -> Tensor:
    """Eq. 3: cross-entropy with the teacher's decision, a mean over the batch, never smoothed."""
    return F.cross_entropy(token_logits.float(), teacher.top1)


def prepare(student: Any, second_head: AtEvaluation | Literal[False] | None, image_size: int) -> None:
    """Let a student give the logits of two heads in training.

    Raises:
        UsageError: see `DeiT`.
    """
    others = "take a student that has one (deit-tiny, levit-256, …), or --objective tinyvit"
    # Some architectures have the method, but the head only where they were made with it.
    if hasattr(student, "set_distilled_training") and any(
        re.search(r"\bheads?_dist\b", name) for name, _ in student.named_parameters()
    ):
        if second_head:
            raise UsageError(
                f"objective.second_head: {type(student).__name__} has a distillation head of its own; leave it out"
            )
        student.set_distilled_training(True)
    elif second_head is False:
        raise UsageError(
            f"objective.second_head: {type(student).__name__} has no distillation head; "
            f'give "average" or "drop", {others}'
        )
    else:
        try:
            add_second_head(student, second_head or "average", image_size)
        except UsageError as error:
            raise UsageError(f"objective deit: {error}; {others}") from None
