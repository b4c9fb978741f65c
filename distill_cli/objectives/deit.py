"""DeiT: distillation through a token."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from distill_cli.config import Fraction, section
from distill_cli.data.loader import Batch
from distill_cli.errors import UsageError
from distill_cli.objectives.base import (
    Losses,
    Objective,
    Outputs,
    Setting,
    TermConfig,
    as_evaluated,
    beside_teacher,
    label_cross_entropy,
    teacher_rows,
)
from distill_cli.objectives.ramps import Temperature, at
from distill_cli.sparse import SparseLogits, cross_entropy, entropy, soften


@section
class DeiTConfig(TermConfig):
    name: Literal["deit"] = "deit"
    distillation: Literal["hard", "soft"] = "hard"
    alpha: Fraction = 0.5
    """Weight of the distillation part; the label part has 1 - alpha."""
    temperature: Temperature = 1.0
    """`soft`: applied to both sides; that part is multiplied by its square."""
    reduction: Literal["batchmean", "numel"] = "batchmean"
    """`soft`: divide the summed KL by the batch, or by batch x classes as DeiT's code does."""
    label_smoothing: Fraction = 0.1
    """Of the label part only."""


class DeiT(Objective):
    """The class token learns from the labels, the distillation token from the teacher.

        L = (1 - alpha) CE(class, label) + alpha D(token, teacher)

    Paper: Touvron et al. 2021, arXiv:2012.12877, eq. 2 (soft) and eq. 3 (hard).
    Differs: the soft part is a mean over the batch; DeiT's code divides by batch x classes as well, which
    `reduction = "numel"` does. The teacher comes from a store, its hard label being the row's first class. With
    sampled rows that is still the most probable class, or the most drawn one where a row is draws alone; the soft
    part at temperature 1 then has the right gradient in expectation, but its value is too large by the entropy that
    a sampled row lacks.
    """

    needs = frozenset({"labels", "logits"})

    def __init__(self, student: nn.Module, config: DeiTConfig, setting: Setting) -> None:
        """
        Raises:
            UsageError: the student has no distillation token or head.
        """
        super().__init__(student, setting)
        self.config = config
        set_distilled_training = getattr(student, "set_distilled_training", None)
        if set_distilled_training is None:
            raise UsageError(
                f"objective deit: {type(student).__name__} has no distillation token; take a student that has one "
                "(deit-tiny, levit-256, …) or --objective tinyvit"
            )
        set_distilled_training(True)

    def losses(self, outputs: Outputs, batch: Batch) -> Losses:
        class_logits, token_logits = outputs
        label = label_cross_entropy(class_logits, batch, self.config.label_smoothing)
        distill = self.distillation(token_logits, teacher_rows(batch))
        total = (1 - self.config.alpha) * label + self.config.alpha * distill
        seen = beside_teacher(as_evaluated(outputs), batch)
        return Losses(total, {"label": label.detach(), "distill": distill.detach()}, seen)

    def distillation(self, token_logits: Tensor, teacher: SparseLogits) -> Tensor:
        if self.config.distillation == "hard":
            return hard_distillation(token_logits, teacher)
        temperature = at(self.config.temperature, self.progress)
        return soft_distillation(token_logits, teacher, temperature, self.config.reduction)


def hard_distillation(token_logits: Tensor, teacher: SparseLogits) -> Tensor:
    """Eq. 3: cross-entropy with the teacher's decision, a mean over the batch, never smoothed."""
    return F.cross_entropy(token_logits.float(), teacher.top1)


def soft_distillation(
    token_logits: Tensor, teacher: SparseLogits, temperature: float | Tensor, reduction: str = "batchmean"
) -> Tensor:
    """Eq. 2: T^2 KL(teacher || student), both at temperature T, the teacher's tail spread uniformly."""
    num_classes = token_logits.shape[-1]
    target = soften(teacher, num_classes, temperature)
    kl = (cross_entropy(token_logits, target, temperature) - entropy(target)).mean()
    return temperature**2 * (kl / num_classes if reduction == "numel" else kl)
