"""What an objective is: a module whose `forward(batch)` gives the losses, and whose `after_step` may follow a step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_cli.data.loader import Batch
from distill_cli.sparse import SparseLogits


@dataclass(frozen=True)
class Losses:
    """What one batch costs: the total that is differentiated, and each part by name, detached."""

    total: Tensor
    parts: Mapping[str, Tensor]
    seen: Mapping[str, Tensor] = field(default_factory=dict)
    """What else a curve is made of, by name, means over the batch: see `beside_teacher`."""


class Objective(nn.Module):
    """Owns the student, its heads and, where it needs one live, the frozen teacher; DDP wraps the objective.

    Losses are means over the batch unless the docstring says otherwise.
    """

    needs: ClassVar[frozenset[Literal["labels", "logits"]]] = frozenset()
    """What a batch must bring: `labels`, `logits` (rows of a store)."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, batch: Batch) -> Losses:
        """The losses of one batch of this rank."""
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Called after each optimiser step, for what moves without a gradient."""

    def __call__(self, batch: Batch, *args: Any, **kwargs: Any) -> Losses:
        losses: Losses = super().__call__(batch, *args, **kwargs)
        return losses


def label_cross_entropy(logits: Tensor, batch: Batch, smoothing: float) -> Tensor:
    """Cross-entropy with the labels, a mean over the batch.

        L = -sum_c y_c log q_c,    y = (1 - s) onehot + s / C

    Of mixed images with both labels: lam L(label) + (1 - lam) L(the partner's), as timm's soft targets.

    Args:
        logits: `[batch, classes]`.
        smoothing: s.
    """
    logits = logits.float()
    if batch.mixed is None:
        return F.cross_entropy(logits, batch.labels, label_smoothing=smoothing)
    own, partner = (
        F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        for labels in (batch.labels, batch.mixed.partner)
    )
    return (batch.mixed.lam * own + (1 - batch.mixed.lam) * partner).mean()


def teacher_rows(batch: Batch) -> SparseLogits:
    """The teacher's rows of a batch; an objective that calls this says `logits` in its `needs`."""
    assert batch.teacher is not None
    return batch.teacher


@torch.no_grad()
def beside_teacher(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
    """How a student stands to the teacher's rows of a batch, without waiting for the device; nothing without a store.

    `agreement` is the share of the batch with the teacher's first class, `mass` the mean mass of the rows' entries.

    Args:
        logits: the student's as it is evaluated, `[batch, classes]`.
    """
    rows = batch.teacher
    if rows is None:
        return {}
    agreed = logits.argmax(dim=-1) == rows.top1
    return {"agreement": agreed.float().mean(), "mass": 1 - rows.log_tail.exp().mean()}
