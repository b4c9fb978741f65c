"""Logit standardisation: logits by their standard deviation, a temperature of each row."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from distill_cli.sparse import SparseLogits

EPSILON = 1e-7
"""Of the authors' code, beside a standard deviation."""
LEAST = 1e-7
"""The mass of a tail of which nothing remained: float32's resolution of 1. The log of 0 has no deviation."""


def deviation(logits: Tensor) -> Tensor:
    """The standard deviation of each row, by which the z-score divides; `[batch, 1]`.

        z = (x - mean x) / std x,    softmax(z / T) = softmax(x / (T std x))

    so that of the z-score only the deviation is left: a temperature of the row.

    Paper: Sun et al. 2024, arXiv:2403.01427, the Z-score before the softmax.
    Differs: the deviation divides by C, as in the paper; the authors' code divides by C - 1.
    """
    centred = logits - logits.mean(dim=-1, keepdim=True)
    # Unlike that of std, the gradient of a norm of zeros is zero.
    norm: Tensor = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    return norm / math.sqrt(logits.shape[-1]) + EPSILON


@torch.no_grad()
def row_deviation(rows: SparseLogits, num_classes: int) -> Tensor:
    """The same of a teacher's rows, each class of the tail having an equal share of it; `[batch, 1]`.

    Exact for that tail, since log-probabilities are logits up to a constant a row.

    Args:
        rows: with a tail wherever classes remain, see `with_tail`.
    """
    others = (num_classes - rows.counts).unsqueeze(-1)
    values = torch.where(rows.entries, rows.log_prob, 0)
    one = torch.where(others > 0, rows.log_tail.unsqueeze(-1) - others.clamp(min=1).log(), 0)
    mean = (values.sum(dim=-1, keepdim=True) + others * one) / num_classes
    head = torch.where(rows.entries, values - mean, 0).square().sum(dim=-1, keepdim=True)
    return ((head + others * (one - mean).square()) / num_classes).sqrt() + EPSILON


@torch.no_grad()
def with_tail(rows: SparseLogits, num_classes: int) -> SparseLogits:
    """The rows, an empty tail having `LEAST`, but none of its classes more than the least of the entries."""
    others = (num_classes - rows.counts).clamp(min=1).log()
    least = rows.log_prob.masked_fill(~rows.entries, torch.inf).amin(dim=-1) + others
    empty = least.clamp(max=math.log(LEAST))
    return replace(rows, log_tail=torch.where(rows.log_tail == -torch.inf, empty, rows.log_tail))
