"""TinyViT: soft cross-entropy against stored sparse logits."""

from typing import Literal

from torch import nn

from distill_cli.config import Fraction, section
from distill_cli.data.batch import Batch
from distill_cli.objectives.base import (
    Losses,
    Need,
    Objective,
    Outputs,
    Setting,
    TermConfig,
    as_evaluated,
    beside_teacher,
    label_cross_entropy,
    teacher_rows,
)
from distill_cli.objectives.dkd import DKDConfig
from distill_cli.objectives.logits import LogitsConfig, soft_loss
from distill_cli.objectives.ramps import Weight, at


@section
class TinyViTConfig(LogitsConfig):
    name: Literal["tinyvit"] = "tinyvit"
    label_weight: Weight = 0.0
    """Of a cross-entropy with the labels, added to the soft one."""
    label_smoothing: Fraction = 0.0
    """Of that cross-entropy."""


class TinyViT(Objective):
    """Soft cross-entropy with the teacher's k most probable classes, its tail spread uniformly.

        L = T^2 D(p, q) + w CE(label, q),    D = -sum_c p_c log q_c,    w = 0
        p_c = m outside the k,    m = tail / (C - k)

    both sides at temperature T. The target is never densified to batch x classes. In ragged rows k is each row's own.
    Sampled rows have no tail, m = 0, and give the loss of the teacher's whole distribution in expectation, at
    temperature 1 only.

    Paper: Wu et al. 2022, arXiv:2207.10666, section 3.1.
    Differs: the log-softmax of both sides is float32, where TinyViT takes them in float16 and can meet a negative
    tail. What the paper has not: a temperature other than 1, since log-probabilities are stored, a label term, other
    tails (`tails`), other divergences D and standardised logits (`logits`).
    """

    needs = frozenset({"logits"})
    takes_any = True

    def __init__(self, student: nn.Module, config: TinyViTConfig, setting: Setting) -> None:
        super().__init__(student, setting)
        self.config = config
        self.relates_images = config.relates_images
        self.needs = self.needs_of(config)

    @classmethod
    def needs_of(cls, config: TermConfig) -> frozenset[Need]:
        assert isinstance(config, TinyViTConfig)
        labels = config.label_weight != 0 or isinstance(config.divergence, DKDConfig)
        return cls.needs | frozenset[Need]({"labels"} if labels else ())

    def losses(self, outputs: Outputs, batch: Batch) -> Losses:
        config, logits = self.config, as_evaluated(outputs)
        distill = soft_loss(logits, teacher_rows(batch), config, at(config.temperature, self.progress), batch)
        seen = beside_teacher(logits, batch)
        if config.label_weight == 0:
            return Losses(distill, {"distill": distill.detach()}, seen)
        label = label_cross_entropy(logits, batch, config.label_smoothing)
        total = distill + at(config.label_weight, self.progress) * label
        return Losses(total, {"label": label.detach(), "distill": distill.detach()}, seen)
