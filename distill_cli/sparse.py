"""Sparse logits: the k largest log-probabilities of a row, and the mass of the other classes.

With m the mass of one class of the tail (spread uniformly, as TinyViT and FKD's marginal smoothing do) and C classes,
the cross-entropy of a student q against a sparse target needs no batch x classes target:

    CE = -sum_k (p_k - m) log q_k - m sum_c log q_c,    sum_c log q_c = sum_c z_c - C logsumexp(z)
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseLogits:
    """The top-k of a batch of rows, at temperature 1. Log-probabilities are logits up to a constant a row."""

    class_id: Tensor
    """int64 `[batch, k]`, most probable first."""
    log_prob: Tensor
    """float32 `[batch, k]`."""
    log_tail: Tensor
    """float32 `[batch]`: log of the mass outside the k; -inf where nothing remains."""

    @property
    def top1(self) -> Tensor:
        """The most probable class: int64 `[batch]`."""
        return self.class_id[:, 0]

    def to(self, device: torch.device) -> "SparseLogits":
        parts = (self.class_id, self.log_prob, self.log_tail)
        return SparseLogits(*(part.to(device, non_blocking=True) for part in parts))

    def pin_memory(self) -> "SparseLogits":
        return SparseLogits(self.class_id.pin_memory(), self.log_prob.pin_memory(), self.log_tail.pin_memory())


@dataclass(frozen=True)
class SparseTarget:
    """A distribution over classes: `prob` on the k classes of `class_id`, `tail` on each class besides."""

    class_id: Tensor
    """int64 `[batch, k]`."""
    prob: Tensor
    """`[batch, k]`."""
    tail: Tensor
    """`[batch]`: the mass of one class outside the k."""
    num_classes: int


def top_k(logits: Tensor, k: int) -> SparseLogits:
    """The k largest log-probabilities of each row of `logits` `[batch, classes]`, taken in float32."""
    log_prob = logits.float().log_softmax(dim=-1)
    values, class_id = log_prob.topk(k, dim=-1)
    # Summing what is left keeps a tail of 1e-9 exact, where 1 - sum of the k would round it to zero.
    log_tail = log_prob.scatter(-1, class_id, -torch.inf).logsumexp(dim=-1)
    return SparseLogits(class_id, values, log_tail)


@torch.no_grad()
def soften(rows: SparseLogits, num_classes: int, temperature: float = 1.0) -> SparseTarget:
    """The distribution p^(1/T) / sum p^(1/T), the tail taken as uniform before the temperature.

    Args:
        rows: k classes of `num_classes` a row.
        temperature: T > 0; 1 gives the stored distribution, made to sum to one exactly.
    """
    others = num_classes - rows.class_id.shape[-1]
    log_prob = rows.log_prob / temperature
    if others == 0:
        prob = log_prob.softmax(dim=-1)
        return SparseTarget(rows.class_id, prob, prob.new_zeros(prob.shape[:-1]), num_classes)
    log_one = (rows.log_tail - math.log(others)) / temperature
    parts = torch.cat([log_prob, (log_one + math.log(others)).unsqueeze(-1)], dim=-1)
    log_total = parts.logsumexp(dim=-1, keepdim=True)
    return SparseTarget(
        rows.class_id, (log_prob - log_total).exp(), (log_one - log_total.squeeze(-1)).exp(), num_classes
    )


def cross_entropy(logits: Tensor, target: SparseTarget, temperature: float = 1.0) -> Tensor:
    """-sum_c p_c log q_c with q = softmax(logits / T), never densified; `[batch]`.

    Args:
        logits: `[batch, classes]`; half precisions are taken in float32.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    logits = logits if temperature == 1 else logits / temperature
    log_norm = logits.logsumexp(dim=-1)
    log_q = logits.gather(-1, target.class_id) - log_norm.unsqueeze(-1)
    log_q_sum = logits.sum(dim=-1) - target.num_classes * log_norm
    head = ((target.prob - target.tail.unsqueeze(-1)) * log_q).sum(dim=-1)
    return -head - target.tail * log_q_sum


def entropy(target: SparseTarget) -> Tensor:
    """-sum_c p_c log p_c, the tail included; `[batch]`. KL(p || q) is `cross_entropy - entropy`."""
    others = target.num_classes - target.class_id.shape[-1]
    head: Tensor = torch.special.entr(target.prob).sum(dim=-1)
    tail: Tensor = torch.special.entr(target.tail)
    return head + others * tail
