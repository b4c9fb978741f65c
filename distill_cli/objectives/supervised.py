"""Supervised training on labels: how teachers and baselines are made."""

from typing import Literal

import torch.nn.functional as F
from torch import nn

from distill_cli.config import Fraction, section
from distill_cli.data.loader import Batch
from distill_cli.objectives.base import Losses, Objective, beside_teacher


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
        loss = F.cross_entropy(logits.float(), batch.labels, label_smoothing=self.config.label_smoothing)
        return Losses(loss, {"label": loss.detach()}, beside_teacher(logits, batch))
