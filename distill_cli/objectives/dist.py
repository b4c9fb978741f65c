"""DIST: correlations in place of equal values."""

from typing import Literal

import torch
from torch import Tensor

from distill_cli.config import NonNegative, section
from distill_cli.sparse import SparseTarget

EPSILON = 1e-8
"""Of the authors' code, beside the product of two norms."""


@section
class DISTConfig:
    name: Literal["dist"] = "dist"
    inter: NonNegative = 2.0
    """The paper's beta: of the classes of an image."""
    intra: NonNegative = 2.0
    """The paper's gamma: of the images of a batch, class by class."""


def inter(logits: Tensor, target: SparseTarget) -> Tensor:
    """1 - Pearson's correlation of teacher and student over the classes of a row; `[batch]`.

        rho = sum_c (p_c - 1/C) (q_c - 1/C) / (|p - 1/C| |q - 1/C|)

    Exact, the target not densified: the mean of either is 1/C, and the tail's share of the product is a constant
    times a sum that is 0.

    Args:
        logits: of the student, at the target's temperature, `[batch, classes]`.

    Paper: Huang et al. 2022, arXiv:2205.10536, the inter-class relation.
    """
    classes, tail = target.num_classes, target.tail
    q = logits.softmax(dim=-1) - 1 / classes
    shared = ((target.prob - tail.unsqueeze(-1)) * q.gather(-1, target.class_id)).sum(dim=-1)
    # Padding has the mass of the tail, in place of as many of its classes.
    others = classes - target.class_id.shape[-1]
    square = (target.prob - 1 / classes).square().sum(dim=-1) + others * (tail - 1 / classes).square()
    norms = square.clamp(min=0).sqrt() * torch.linalg.vector_norm(q, dim=-1)
    rho: Tensor = shared / (norms + EPSILON)
    return 1 - rho


def intra(logits: Tensor, target: SparseTarget) -> Tensor:
    """1 - Pearson's correlation of teacher and student over the images of a batch, a mean over the classes; no dims.

    Exact, the target not densified: of a class p is a tail that differs by image, and what its entries have above.
    The student's probabilities are, with their gradient, several batch x classes tensors.

    It is of a whole batch: parts of one, and ranks, have correlations of their own, whose mean it is not.

    Args:
        logits: of the student, at the target's temperature, `[batch, classes]`.

    Paper: Huang et al. 2022, arXiv:2205.10536, the intra-class relation.
    Differs: with accumulation and under torchrun, by the part of the batch that is seen at once.
    """
    q = logits.softmax(dim=-1)
    q = q - q.mean(dim=0)
    tail = (target.tail - target.tail.mean()).unsqueeze(-1)
    above = target.prob - target.tail.unsqueeze(-1)
    shared = (tail * q).sum(dim=0) + _by_class(above * q.gather(-1, target.class_id), target)
    square = (
        tail.square().sum() + _by_class(above * (above + 2 * tail), target) - _by_class(above, target).square() / len(q)
    )
    norms = square.clamp(min=0).sqrt() * torch.linalg.vector_norm(q, dim=0)
    rho: Tensor = (shared / (norms + EPSILON)).mean()
    return 1 - rho


def _by_class(values: Tensor, target: SparseTarget) -> Tensor:
    """The sum of what entries have, by class: `[batch, k]` to `[classes]`."""
    sums = torch.zeros(target.num_classes, dtype=values.dtype, device=values.device)
    return sums.index_add(0, target.class_id.flatten(), values.flatten())
