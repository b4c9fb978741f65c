"""A loss of each row of a batch x classes tensor, without temporaries of that size."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ELEMENTS = 2**18
"""Of a piece: 1 MiB of float32, of which a core's cache holds a few."""


def by_rows(loss: Callable[..., Tensor], logits: Tensor, *beside: Any, elements: int = ELEMENTS) -> Tensor:
    """`loss(logits, *beside)`, in pieces of a few rows where it is large; `[batch]`.

    The backward pass computes each piece again and writes its gradient into place, so that beside the logits and their
    gradient there is never more than what one piece takes. Its result is differentiable once.

    Args:
        loss: of some rows, from some rows of what is given: one value a row, each of its own row alone.
        logits: `[batch, classes]`; the only one that gets a gradient.
        beside: tensors `[batch, …]`, or what has `at(rows)`.
        elements: of a piece, about.
    """
    rows = max(1, elements // logits.shape[-1])
    if len(logits) <= rows:
        return loss(logits, *beside)
    value: Tensor = _ByRows.apply(logits, loss, beside, rows)
    return value


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Callable[..., Tensor], beside: tuple[Any, ...], rows: int) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.loss, ctx.beside, ctx.rows = loss, beside, rows
        return torch.cat([loss(logits[piece], *_some(beside, piece)) for piece in _pieces(len(logits), rows)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (logits,) = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for piece in _pieces(len(logits), ctx.rows):
            part = logits[piece].detach().requires_grad_()
            with torch.enable_grad():
                value = ctx.loss(part, *_some(ctx.beside, piece))
            (gradient[piece],) = torch.autograd.grad(value, part, upstream[piece])
        return gradient, None, None, None


def _pieces(count: int, rows: int) -> Iterator[slice]:
    return (slice(start, start + rows) for start in range(0, count, rows))


def _some(beside: tuple[Any, ...], rows: slice) -> list[Any]:
    return [each[rows] if isinstance(each, Tensor) else each.at(rows) for each in beside]
