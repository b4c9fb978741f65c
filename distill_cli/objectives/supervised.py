"""Supervised training on labels: how teachers and baselines are made."""

from typing import Literal

from torch import nn

from distill_cli.config import Fraction, section
from distill_cli.data.batch import Batch
from distill_cli.objectives.base import (
    Losses,
    Objective,
    Outputs,
    Setting,
    TermConfig,
    as_evaluated,
    beside_teacher,
    label_cross_entropy,
)


@section
class SupervisedConfig(TermConfig):
    name: Literal["supervised"] = "supervised"
    label_smoothing: Fraction = 0.1


class Supervised(Objective):
    """Cross-entropy with the labels, smoothed.

        L = -sum_c y_c log q_c,    y = (1 - s) onehot + s / C

    A student with a distillation token trains on the mean of its two heads, as it is evaluated.
    """

    needs = frozenset({"labels"})
    takes_any = True

    def __init__(self, student: nn.Module, config: SupervisedConfig, setting: Setting) -> None:
        super().__init__(student, setting)
        self.config = config

    def losses(self, outputs: Outputs, batch: Batch) -> Losses:
        logits = as_evaluated(outputs)
        loss = label_cross_entropy(logits, batch, self.config.label_smoothing)
        return Losses(loss, {"label": loss.detach()}, beside_teacher(logits, batch))
