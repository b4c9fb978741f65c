"""What is measured of a model: sums over exactly the images there are, whatever the batches and ranks."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from distill_cli.config import NonNegative, Positive, Precision, section
from distill_cli.data.batch import Batch
from distill_cli.data.batches import Batches
from distill_cli.data.loader import Loader
from distill_cli.data.orders import ListingOrder
from distill_cli.data.sources import Source
from distill_cli.data.views import View, eval_transform
from distill_cli.distributed import World
from distill_cli.errors import DistillError
from distill_cli.report import Progress
from distill_cli.sparse import SparseLogits, cross_entropy, entropy, soften

ECE_BINS = 15
VALIDATION = "validation.json"
"""A run's newest validation, by class and by confidence: what metrics.jsonl has no room for."""


@section
class EvalConfig:
    weights: str | None = None
    """`--weights`: of `student.name`, where no run is given."""
    batch_size: Positive = 256
    """Images of one forward."""
    precision: Precision = "fp32"
    fail_below: NonNegative | None = None
    """`--fail-below`: exit 5 when top1 (percent) is less."""


@dataclass(frozen=True)
class Accuracy:
    """How a model does on labelled images; `top1` and `top5` in percent."""

    images: int
    top1: float
    top5: float
    nll: float
    """Mean negative log-likelihood of the label, in nats."""
    ece: float
    """Expected calibration error over 15 equal bins of confidence, 0 to 1."""
    per_class: tuple[float | None, ...]
    """Top-1 by class, in percent; None for a class without images."""
    calibration: tuple[tuple[int, float, float], ...] = ()
    """By bin of confidence: images, their accuracy, their mean confidence, both 0 to 1."""
    skipped: int = 0
    """Images that could not be decoded."""


@dataclass(frozen=True)
class Agreement:
    """How near a student is to its teacher on the rows of a store."""

    agreement: float
    """Share of rows with the teacher's first class, in percent: its most probable, or the most drawn of draws alone."""
    kl: float | None
    """Mean KL(teacher || student) in nats, the teacher's tail spread uniformly; None where it is sampled."""
    rows: int


@dataclass(frozen=True)
class Compared:
    """A model beside its teacher on some rows of a store, row by row; classes most probable first."""

    sample_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    """Of a mixed image that of the larger share; -1 where the data has none."""
    kl: NDArray[np.float64]
    """KL(teacher || student) in nats; of a sampled row, which lacks entropy, it is too large."""
    student: NDArray[np.int64]
    """`[n, 3]`, or fewer where there are fewer classes."""
    student_prob: NDArray[np.float64]
    teacher: NDArray[np.int64]
    """`[n, 3]`, or fewer where rows have fewer entries."""
    teacher_prob: NDArray[np.float64]
    """0 where a row has fewer entries than others."""

    @property
    def agreed(self) -> NDArray[np.bool_]:
        return self.student[:, 0] == self.teacher[:, 0]


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bfloat16 autocast, or nothing for `fp32`."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def every_image(source: Source, view: View, batch_size: int, skip_unreadable: bool, world: World) -> Loader:
    """This rank's share of all images of a source, as a model is evaluated on them; to be closed."""
    order = ListingOrder(np.arange(len(source)), batch_size, world.rank, world.size)
    batches = Batches(source, eval_transform(view), order, skip_unreadable=skip_unreadable)
    return Loader(batches, range(order.batches), world.workers, world.device)


@torch.inference_mode()
def measure_accuracy(
    model: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    num_classes: int,
    world: World,
    precision: str,
    progress: Progress,
    not_finite: str = "evaluation: the output is not finite; look at the model's weights, or use --precision fp32",
) -> Accuracy:
    """Evaluate a model on this rank's batches and add up over ranks.

    Args:
        not_finite: what is said where the outputs are not finite.

    Raises:
        DistillError: no image could be read, or the outputs are not finite.
    """
    sums = _Sums(num_classes, world.device)
    for batch in batches:
        if len(batch):
            with autocast(world.device, precision):
                logits = model(batch.images)
            sums.add(logits, batch.labels)
        sums.skipped += len(batch.skipped)
        progress.advance((len(batch) + len(batch.skipped)) * world.size)
    return sums.total(world, not_finite)


@torch.inference_mode()
def measure_agreement(
    model: nn.Module,
    batches: Iterable[Batch],
    world: World,
    precision: str,
    progress: Progress,
    sampled: bool = False,
) -> Agreement:
    """Compare a model with the store's rows of the same inputs, on this rank's batches, and add up over ranks.

    Args:
        sampled: the rows' tails are drawn. A sampled row has less entropy than the teacher, which would count as KL.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    for batch in batches:
        assert batch.teacher is not None
        with autocast(world.device, precision):
            logits = model(batch.images).float()
        kl = _kl(batch.teacher, logits)
        agreed = logits.argmax(dim=-1) == batch.teacher.top1
        sums += torch.stack(
            [agreed.double().sum(), kl.double().sum(), torch.tensor(float(len(batch)), device=sums.device)]
        )
        progress.advance(len(batch) * world.size)
    agreed_sum, kl_sum, rows = world.sum(sums).tolist()
    return Agreement(
        agreement=round(100 * agreed_sum / rows, 3),
        kl=None if sampled else round(kl_sum / rows, 6),
        rows=int(rows),
    )


@torch.inference_mode()
def compare(model: nn.Module, batches: Iterable[Batch], world: World, progress: Progress) -> Compared:
    """What a model and the store's rows say of the same inputs, in fp32, row by row; on one process."""
    columns: list[tuple[NDArray[Any], ...]] = []
    for batch in batches:
        rows = batch.teacher
        assert rows is not None
        logits = model(batch.images).float()
        best = logits.softmax(dim=-1).topk(min(3, logits.shape[-1]), dim=-1)
        kl = _kl(rows, logits)
        found = (batch.larger_labels, kl, best.indices, best.values, rows.class_id[:, :3], rows.log_prob[:, :3].exp())
        columns.append((batch.sample_ids, *(part.cpu().numpy() for part in found)))
        progress.advance(len(batch))
    # Ragged rows are as wide as the widest of their batch.
    ids, labels, kl, student, student_prob, teacher, teacher_prob = zip(*columns, strict=True)
    return Compared(
        np.concatenate(ids),
        np.concatenate(labels),
        np.concatenate(kl).astype(np.float64),
        np.concatenate(student),
        np.concatenate(student_prob).astype(np.float64),
        _stacked(teacher),
        _stacked(teacher_prob).astype(np.float64),
    )


def calibration(confidence: NDArray[np.float64], hit: NDArray[np.bool_]) -> tuple[tuple[int, float, float], ...]:
    """By bin of confidence, as in `Accuracy`: of what is already in memory."""
    bins = torch.zeros(3, ECE_BINS, dtype=torch.float64)
    _bin(bins, torch.from_numpy(confidence), torch.from_numpy(hit).double())
    return _by_confidence(bins)


def expected_error(bins: Iterable[tuple[int, float, float]]) -> float | None:
    """The expected calibration error of some bins, 0 to 1; None where there is no image."""
    gaps = [(images, images * abs(accurate - confident)) for images, accurate, confident in bins]
    total = sum(images for images, _ in gaps)
    return sum(gap for _, gap in gaps) / total if total else None


def _kl(rows: SparseLogits, logits: Tensor) -> Tensor:
    """KL(teacher || student) by row, `[batch]`, the teacher's tail spread uniformly."""
    target = soften(rows, logits.shape[-1])
    return cross_entropy(logits, target) - entropy(target)


def _stacked(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    width = max(part.shape[1] for part in parts)
    return np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in parts])


def _bin(bins: Tensor, confidence: Tensor, hit: Tensor) -> None:
    """Add images to `[images, hits, confidence]` by bin of confidence, all float64."""
    # Outputs that are not finite are told of at the end, without asking the device about every batch.
    place = (confidence.nan_to_num() * ECE_BINS).long().clamp(max=ECE_BINS - 1)
    for row, values in zip(bins, (torch.ones_like(hit), hit, confidence), strict=True):
        row.index_add_(0, place, values)


def _by_confidence(bins: Tensor) -> tuple[tuple[int, float, float], ...]:
    return tuple(
        (int(images), round(hits / max(images, 1), 6), round(confidence / max(images, 1), 6))
        for images, hits, confidence in bins.T.tolist()
    )


class _Sums:
    def __init__(self, num_classes: int, device: torch.device) -> None:
        zeros = {"dtype": torch.float64, "device": device}
        self.scalars = torch.zeros(4, **zeros)  # type: ignore[call-overload]
        self.bins = torch.zeros(3, ECE_BINS, **zeros)  # type: ignore[call-overload]
        self.classes = torch.zeros(2, num_classes, **zeros)  # type: ignore[call-overload]
        self.skipped = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
        hits = best == labels[:, None]
        hit = hits[:, 0].double()
        nll = F.cross_entropy(logits, labels, reduction="sum").double()
        self.scalars += torch.stack([hit.new_tensor(len(labels)), hit.sum(), hits.any(dim=1).double().sum(), nll])
        _bin(self.bins, logits.softmax(dim=-1).amax(dim=-1).double(), hit)
        self.classes[0].index_add_(0, labels, torch.ones_like(hit))
        self.classes[1].index_add_(0, labels, hit)

    def total(self, world: World, not_finite: str) -> Accuracy:
        skipped = torch.tensor([float(self.skipped)], dtype=torch.float64, device=world.device)
        flat = torch.cat([self.scalars, self.bins.flatten(), self.classes.flatten(), skipped])
        flat = world.sum(flat).cpu()
        scalars, bins, classes, skipped = flat.split([4, 3 * ECE_BINS, self.classes.numel(), 1])
        images, hits, hits5, nll = scalars.tolist()
        if not images:
            raise DistillError("evaluation: no image could be read; look at the first of the data by hand")
        if not math.isfinite(nll):
            raise DistillError(not_finite)
        bins = bins.view(3, ECE_BINS)
        _, accurate, confident = bins
        counts, right = classes.view(2, -1)
        return Accuracy(
            images=int(images),
            top1=round(100 * hits / images, 3),
            top5=round(100 * hits5 / images, 3),
            nll=round(nll / images, 6),
            ece=round(float((accurate - confident).abs().sum()) / images, 6),
            per_class=tuple(
                round(100 * float(hit / count), 3) if count else None for hit, count in zip(right, counts, strict=True)
            ),
            calibration=_by_confidence(bins),
            skipped=int(skipped.item()),
        )
