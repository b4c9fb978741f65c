"""What an objective is: a module whose `forward(batch)` gives the losses, and whose `after_step` may follow a step."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from distill_cli.config import Colour, section
from distill_cli.data.batch import Batch
from distill_cli.live_teacher import LiveTeacher
from distill_cli.objectives.ramps import Weight
from distill_cli.sparse import SparseLogits
from distill_cli.students.second_head import Dropped


@dataclass(frozen=True)
class Losses:
    """What one batch costs: the total that is differentiated, and each part by name, detached."""

    total: Tensor
    parts: Mapping[str, Tensor]
    seen: Mapping[str, Tensor] = field(default_factory=dict)
    """What else a curve is made of, by name, means over the batch: see `beside_teacher`."""


Outputs = Tensor | tuple[Tensor, Tensor]
"""What a student gives in training: logits `[batch, classes]`, or those of its class and of its distillation token."""
Need = Literal["labels", "logits", "teacher"]


@section
class TermConfig:
    """What the settings of every objective have."""

    weight: Weight = 1.0
    """Of this objective in a sum of `terms`."""

    def beyond_samples(self) -> tuple[str, str] | None:
        """The setting that asks of sampled rows more than they are right in, which is expectation, and what to do."""
        return None


@dataclass(frozen=True)
class Setting:
    """What an objective works in, besides its student."""

    image_size: int
    """Of the student, in pixels."""
    mean: Colour = IMAGENET_DEFAULT_MEAN
    std: Colour = IMAGENET_DEFAULT_STD
    """By which the student's images are normalised."""
    seed: int = 0
    teacher: LiveTeacher | None = None
    """Where the objective needs one, or where there is no store to give its logits."""


class Objective(nn.Module):
    """Owns the student and its heads, and knows the frozen teacher, where it needs one live; DDP wraps the objective.

    Most objectives are their `losses`: functions of what one pass of the student gives, so that several can share it
    (see `terms`). One that sees the student otherwise has a `forward` of its own, and says so in `own_forward`.

    Losses are means over the batch; where they are not, `relates_images` says so.
    """

    needs: frozenset[Need] = frozenset()
    """What it learns from: `labels`; `logits`, rows of a store or of a live teacher; `teacher`, more of a live one."""
    takes_any: ClassVar[bool] = False
    """Whether any student will do."""
    own_forward: bool = False
    """Whether in a sum it makes a pass of the student for itself."""
    whole_pass: ClassVar[bool] = True
    """False: it cuts the student's pass short within a block, or calls its blocks by themselves."""
    relates_images: bool = False
    """Whether it compares images of a batch with each other. Such a loss is no mean over the images: it sees what is in
    one pass at once, so that accumulated parts and ranks are other batches."""

    progress: Tensor
    """Of the run, 0 to 1, without dimensions: what ramps depend on."""

    def __init__(self, student: nn.Module, setting: Setting) -> None:
        super().__init__()
        self.student = student
        self.setting = setting
        self.register_buffer("progress", torch.zeros(()), persistent=False)

    @classmethod
    def needs_of(cls, config: TermConfig) -> frozenset[Need]:
        """What it learns from with these settings."""
        return cls.needs

    @property
    def trains_classifier(self) -> bool:
        """Whether the student's logits come to mean anything: see `trains_classifier`."""
        return trains_classifier(self.needs)

    def forward(self, batch: Batch) -> Losses:
        """The losses of one batch of this rank."""
        return self.losses(self.student(batch.images), self.taught(batch))

    def losses(self, outputs: Outputs, batch: Batch) -> Losses:
        """The losses of a batch of which the student has given `outputs`."""
        raise NotImplementedError

    def evaluated(self, images: Tensor) -> Tensor:
        """The student's logits `[batch, classes]`; called in evaluation, through the objective as `forward` is."""
        logits: Tensor = self.student(images)
        return logits

    def taught(self, batch: Batch) -> Batch:
        """The batch with the teacher's rows, where the objective needs some: a store's, else the live teacher's."""
        if batch.teacher is not None or "logits" not in self.needs:
            return batch
        return replace(batch, teacher=self.teacher.rows(batch.images))

    @property
    def teacher(self) -> LiveTeacher:
        """The live one; an objective that asks for it says `teacher` in its `needs`."""
        assert self.setting.teacher is not None
        return self.setting.teacher

    def go_to(self, progress: float) -> None:
        """Called before each step with the progress of the run, 0 to 1."""
        self.progress.fill_(progress)

    def after_step(self, step: int) -> None:
        """Called after each optimiser step, for what moves without a gradient."""

    def __call__(self, batch: Batch, *args: Any, **kwargs: Any) -> Losses:
        losses: Losses = super().__call__(batch, *args, **kwargs)
        return losses


def trains_classifier(needs: frozenset[Need]) -> bool:
    """Whether an objective that learns from these trains the student's classifier, as from classes alone it can.

    One that does not may leave some of the student without a gradient, which is then not trained at all. Its run
    validates nothing and teaches no logits, and what begins from it begins with a new classifier.
    """
    return not needs.isdisjoint({"labels", "logits"})


def as_evaluated(outputs: Outputs) -> Tensor:
    """A student's logits as it is evaluated: with two heads their mean, or those of the class where one is dropped."""
    if isinstance(outputs, Dropped):
        return outputs[0]
    return outputs if isinstance(outputs, Tensor) else (outputs[0] + outputs[1]) / 2


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
