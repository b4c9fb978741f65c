"""Gradient accumulation: a batch in parts, and the gradient of the whole."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill_cli.data.batch import Batch, MixedLabels
from distill_cli.distributed import World
from distill_cli.metrics import autocast
from distill_cli.objectives import Losses
from distill_cli.sparse import SparseLogits


def backward(model: nn.Module, batch: Batch, parts: int, world: World, precision: str, weight: float = 1.0) -> Losses:
    """Add the gradient of the mean loss over a rank's batch to the parameters, in `parts` passes.

    A part weighs as many images as it has, so parts need not be even. Ranks add up in the last pass alone. What
    depends on a whole batch, as BatchNorm's statistics do, sees a part.

    Args:
        weight: of the gradient, not of the losses. DDP gives the mean over the ranks, which is that over all images
            where each rank weighs its images over the mean of the ranks'.
    """
    found: list[Losses] = []
    pieces = list(cut(batch, parts))
    for number, piece in enumerate(pieces, 1):
        share = len(piece) / len(batch)
        with world.synced(model, last=number == len(pieces)):
            with autocast(world.device, precision):
                losses: Losses = model(piece)
            total = weight * share * losses.total
            total.backward()
        found.append(Losses(share * losses.total.detach(), _scaled(losses.parts, share), _scaled(losses.seen, share)))
    return Losses(
        torch.stack([losses.total for losses in found]).sum(),
        _summed([losses.parts for losses in found]),
        _summed([losses.seen for losses in found]),
    )


def _scaled(values: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    return {name: share * value for name, value in values.items()}


def _summed(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([values[name] for values in parts]).sum() for name in parts[0]}


def cut(batch: Batch, parts: int) -> Iterator[Batch]:
    """A batch in so many parts, their sizes as even as can be; none is empty, so a small batch has fewer."""
    count = min(parts, len(batch))
    batch = replace(batch, view_of=batch.each_view)
    for start, end in pairwise(len(batch) * part // count for part in range(count + 1)):
        rows = {item.name: _rows(getattr(batch, item.name), slice(start, end)) for item in fields(batch)}
        yield replace(batch, **rows)


def _rows(value: Any, rows: slice) -> Any:
    """Some rows of what has one for each image; all else as it is."""
    if isinstance(value, SparseLogits | MixedLabels):
        return value.at(rows)
    return value[rows] if isinstance(value, Tensor | np.ndarray) else value
