"""TinyViT: soft cross-entropy against stored sparse logits."""

from typing import Literal

from torch import Tensor, nn

from distill_cli.config import section
from distill_cli.data.loader import Batch
from distill_cli.objectives.base import (
    Losses,
    Objective,
    Outputs,
    Setting,
    TermConfig,
    as_evaluated,
    beside_teacher,
    teacher_rows,
)
from distill_cli.objectives.ramps import Temperature, at
from distill_cli.sparse import SparseLogits, cross_entropy, soften


@section
class TinyViTConfig(TermConfig):
    name: Literal["tinyvit"] = "tinyvit"
    temperature: Temperature = 1.0
    """Applied to both sides; the loss is multiplied by its square."""


class TinyViT(Objective):
    """Soft cross-entropy with the teacher's k most probable classes, its tail spread uniformly.

        L = -sum_c p_c log q_c,    p_c = m outside the k,    m = tail / (C - k)

    No label, no weight. The target is never densified to batch x classes. In ragged rows k is each row's own.
    Sampled rows have no tail, m = 0, and give the loss of the teacher's whole distribution in expectation, at
    temperature 1 only.

    Paper: Wu et al. 2022, arXiv:2207.10666, section 3.1.
    Differs: the log-softmax of both sides is float32, where TinyViT takes them in float16 and can meet a negative
    tail; a temperature other than 1 is possible, since log-probabilities are stored.
    """

    needs = frozenset({"logits"})
    takes_any = True

    def __init__(self, student: nn.Module, config: TinyViTConfig, setting: Setting) -> None:
        super().__init__(student, setting)
        self.config = config

    def losses(self, outputs: Outputs, batch: Batch) -> Losses:
        logits = as_evaluated(outputs)
        loss = soft_cross_entropy(logits, teacher_rows(batch), at(self.config.temperature, self.progress))
        return Losses(loss, {"distill": loss.detach()}, beside_teacher(logits, batch))


def soft_cross_entropy(logits: Tensor, teacher: SparseLogits, temperature: float | Tensor = 1.0) -> Tensor:
    """T^2 times the mean over the batch of -sum_c p_c log q_c, both sides at temperature T.

    Args:
        logits: the student's, `[batch, classes]`.
        teacher: k rows of the same classes.
    """
    target = soften(teacher, logits.shape[-1], temperature)
    return temperature**2 * cross_entropy(logits, target, temperature).mean()
