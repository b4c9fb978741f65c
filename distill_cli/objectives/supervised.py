"""Supervised training on labels: how teachers and baselines are made."""

from typing import Literal

from torch import nn

from distill_cli.config import Fraction, section
from distill_cli.data.loader import Batch
from distill_cli.objectives.base import Losses, Objective, beside_teacher, label_cross_entropy


@section
class SupervisedConfig:
    name: Literal["supervised"] = "supervised"
    label_smoothing: Fraction = 0.1


class Supervised(Objective):
    """Cross-entropy with the labels, smoothed.

        L = -sum_c y_c log q_c,    y = (1 - s) onehot + s / C

    A student with a distillation token trains on the mean of its two heads, as it is evaluated.
    """

    needs = frozenset({"labels"})

    def __init__(self, student: nn.Module, config: SupervisedConfig) -> None:
        super().__init__(student)
        self.config = config

    def forward(self, batch: Batch) -> Losses:
        logits = self.student(batch.images)
        loss = label_cross_entropy(logits, batch, self.config.label_smoothing)
        return Losses(loss, {"label": loss.detach()}, beside_teacher(logits, batch))
