"""FKD: soft labels of many crops, decoded once for several of them."""

from typing import Literal

from torch import Tensor, nn

from distill_cli.by_rows import by_rows
from distill_cli.config import Positive, section
from distill_cli.data.batch import Batch
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
from distill_cli.objectives.tails import first, renormalised
from distill_cli.sparse import SparseLogits, SparseTarget, cross_entropy, soften

LabelType = Literal["marginal-smoothing", "marginal-renorm", "smoothing", "hard"]


@section
class FKDConfig(TermConfig):
    name: Literal["fkd"] = "fkd"
    label_type: LabelType = "marginal-smoothing"
    """The k first classes, and the others alike; the k renormalised; the first, and the others alike; the first."""
    k: Positive | None = None
    """Of the first two; by default all that a row has."""
    temperature: Temperature = 1.0
    """Of the student alone; the loss is not multiplied by its square."""

    def beyond_samples(self) -> tuple[str, str] | None:
        if self.label_type in ("smoothing", "hard"):
            return f"label_type: {self.label_type} needs the teacher's most probable class", "give marginal-smoothing"
        return None if self.k is None else (f"k: {self.k} needs the teacher's most probable classes", "leave it out")


class FKD(Objective):
    """Cross-entropy with a teacher's stored soft label of the same crop; no label of the data.

        L = -sum_c p_c log softmax(z / T)_c

    p is the teacher's at temperature 1, the classes outside the k having equal shares of their mass (marginal
    smoothing) or nothing (marginal renorm). The paper's other half is the loader: an image is decoded once for several
    of its stored crops, all in one step, which is `train.views_per_read`.

    Paper: Shen and Xing 2021, arXiv:2112.01528, section 3.
    Differs: views are random resized crops and any other augmentation, drawn anew from seeds, where FKD stores boxes
    and flips; every epoch has several crops of an image a step, the first and the last as well, which FKD trains with
    one. The masses are float32 of float16 log-probabilities, their tail as the teacher had it.
    """

    needs = frozenset({"logits"})
    takes_any = True

    def __init__(self, student: nn.Module, config: FKDConfig, setting: Setting) -> None:
        super().__init__(student, setting)
        self.config = config

    def losses(self, outputs: Outputs, batch: Batch) -> Losses:
        config, logits = self.config, as_evaluated(outputs)
        temperature = at(config.temperature, self.progress)

        def row_loss(logits: Tensor, rows: SparseLogits) -> Tensor:
            target = soft_label(rows, logits.shape[-1], config.label_type, config.k)
            return cross_entropy(logits, target, temperature)

        loss = by_rows(row_loss, logits, teacher_rows(batch)).mean()
        return Losses(loss, {"distill": loss.detach()}, beside_teacher(logits, batch))


def soft_label(rows: SparseLogits, num_classes: int, label_type: LabelType, k: int | None = None) -> SparseTarget:
    """What FKD makes of a teacher's row; at temperature 1.

    Args:
        k: of the marginal label types: entries that are kept, or as many as there are.
    """
    kept = 1 if label_type in ("smoothing", "hard") else k
    rows = rows if kept is None else first(rows, kept)
    return soften(renormalised(rows) if label_type in ("marginal-renorm", "hard") else rows, num_classes)
