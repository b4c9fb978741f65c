"""What becomes of the classes outside a row's entries.

    uniform       each has the same share of their mass: TinyViT, and FKD's marginal smoothing
    bucket        together they are one class more, of the teacher and of the student
    renormalise   they have nothing, and the entries all: FKD's marginal renorm

Of sampled rows, which have no tail, the three are the same.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from distill_cli.sparse import SparseLogits, SparseTarget

Tail = Literal["uniform", "bucket", "renormalise"]


def renormalised(rows: SparseLogits) -> SparseLogits:
    """The rows without their tail; `soften` makes the entries sum to one."""
    return replace(rows, log_tail=torch.full_like(rows.log_tail, -torch.inf))


def first(rows: SparseLogits, k: int) -> SparseLogits:
    """The k first entries of each row, or as many as it has; what the others hold goes to the tail."""
    if rows.class_id.shape[-1] <= k:
        return rows
    dropped = torch.cat([rows.log_prob[:, k:], rows.log_tail.unsqueeze(-1)], dim=-1)
    count = None if rows.count is None else rows.count.clamp(max=k)
    return SparseLogits(rows.class_id[:, :k], rows.log_prob[:, :k], dropped.logsumexp(dim=-1), count)


def bucket_cross_entropy(logits: Tensor, rows: SparseLogits, target: SparseTarget) -> Tensor:
    """-sum_k p_k log q_k - p_o log q_o, with o all classes outside the k; `[batch]`.

        log q_o = logsumexp of the others' logits - logsumexp of all

    Both sums are of positive terms: 1 - sum_k q_k would be 0 in float32 where a student has 1e-8 outside.

    Args:
        logits: of the student, at the target's temperature, `[batch, classes]`.
        rows: what the target was made of.
    """
    entries, outside = rows.entries, target.num_classes - rows.counts
    # Padding is class 0, which may be outside: in its place stands the row's first class.
    class_id = torch.where(entries, rows.class_id, rows.class_id[:, :1])
    log_norm = logits.logsumexp(dim=-1)
    log_q = logits.gather(-1, class_id) - log_norm.unsqueeze(-1)
    # A row of all classes has nothing outside, and nothing is masked: its sum stays finite, and weighs nothing.
    inside = torch.zeros_like(logits, dtype=torch.bool)
    inside = inside.scatter(-1, class_id, (outside > 0).unsqueeze(-1).expand_as(class_id))
    log_outside = logits.masked_fill(inside, -torch.inf).logsumexp(dim=-1) - log_norm
    head = torch.where(entries, target.prob * log_q, 0).sum(dim=-1)
    return -head - outside * target.tail * log_outside


def bucket_entropy(rows: SparseLogits, target: SparseTarget) -> Tensor:
    """-sum_k p_k log p_k - p_o log p_o; `[batch]`."""
    head = torch.where(rows.entries, torch.special.entr(target.prob), 0).sum(dim=-1)
    outside: Tensor = torch.special.entr((target.num_classes - rows.counts) * target.tail)
    return head + outside
