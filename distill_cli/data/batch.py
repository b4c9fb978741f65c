"""What a step holds: some samples as they are seen, their labels, and what a teacher said of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_cli.data.sources import UnreadableImage
from distill_cli.sparse import SparseLogits


@dataclass(frozen=True)
class MixedLabels:
    """What is to be known of the labels of mixed images: each has lam of its own and 1 - lam of its partner's."""

    partner: Tensor
    """int64 `[batch]`; its own where it is not mixed, -1 where the data has no labels."""
    lam: Tensor
    """float32 `[batch]`; 1 where it is not mixed."""

    def to(self, device: torch.device) -> "MixedLabels":
        return MixedLabels(self.partner.to(device, non_blocking=True), self.lam.to(device, non_blocking=True))

    def pin_memory(self) -> "MixedLabels":
        return MixedLabels(self.partner.pin_memory(), self.lam.pin_memory())

    def at(self, rows: Tensor | slice) -> "MixedLabels":
        """Those of some of the batch."""
        return MixedLabels(self.partner[rows], self.lam[rows])


@dataclass(frozen=True)
class Batch:
    """Some samples as seen by a view; where there are several views, all samples by the first, then by the next."""

    images: Tensor
    """float32 `[batch, 3, height, width]`, normalised."""
    labels: Tensor
    """int64 `[batch]`; -1 where the data has no labels."""
    sample_ids: NDArray[np.int64]
    views: tuple[int, ...]
    teacher: SparseLogits | None = None
    skipped: tuple[str, ...] = ()
    """The messages of images that could not be decoded and are not in the batch."""
    probe_crc: Mapping[int, int] = field(default_factory=dict)
    """Sample id -> checksum, of those that lie first in their shard, where they were asked for."""
    mixed: MixedLabels | None = None
    """None where no images are mixed."""
    content_crc: Mapping[int, int] = field(default_factory=dict)
    """Sample id -> CRC-32 of what its image was decoded from, where they were asked for."""
    view_of: NDArray[np.int64] | None = None
    """int64 `[batch]`, of a part of a batch: see `each_view`."""

    def __len__(self) -> int:
        return len(self.sample_ids)

    def without(self, unreadable: Mapping[int, UnreadableImage]) -> "Batch":
        """The batch, which is not mixed, without some samples, by their places; `skipped` has what is said of them."""
        samples = len(self) // len(self.views)
        kept = np.flatnonzero([place % samples not in unreadable for place in range(len(self))])
        at, ids = torch.from_numpy(kept), self.sample_ids[kept]
        return replace(
            self,
            labels=self.labels[at],
            sample_ids=ids,
            teacher=self.teacher and self.teacher.at(at),
            skipped=(*self.skipped, *map(str, unreadable.values())),
            content_crc={i: self.content_crc[i] for i in ids.tolist()} if self.content_crc else {},
        )

    @property
    def view(self) -> int:
        """The only one, or the first of several."""
        return self.views[0]

    @property
    def each_view(self) -> NDArray[np.int64]:
        """By which view each sample is seen: int64 `[batch]`."""
        if self.view_of is not None:
            return self.view_of
        return np.repeat(np.array(self.views), len(self) // len(self.views))

    @property
    def larger_labels(self) -> Tensor:
        """int64 `[batch]`: of a mixed image that of the larger share."""
        return self.labels if self.mixed is None else self.labels.where(self.mixed.lam >= 0.5, self.mixed.partner)
