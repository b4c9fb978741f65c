"""JSD: the Jensen-Shannon divergence of teacher and student."""

import math
from typing import Literal

import torch
from torch import Tensor

from distill_cli.config import section
from distill_cli.sparse import SparseTarget


@section
class JSDConfig:
    name: Literal["jsd"] = "jsd"


def jsd(logits: Tensor, target: SparseTarget) -> Tensor:
    """KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2; symmetric, 0 to log 2; `[batch]`.

    Exact, the target not densified: with f(p_c, q_c) what a class adds,

        JSD = sum_c f(t, q_c) + sum_k (f(p_k, q_k) - f(t, q_k)),    t the mass of one class of the tail

    The student's mass differs over the tail, so the first sum goes over all classes.

    Args:
        logits: of the student, at the target's temperature, `[batch, classes]`.

    Paper: Lin 1991, IEEE Trans. Inf. Theory 37(1), with equal weights.
    """
    log_q = logits.log_softmax(dim=-1)
    entries, tail = log_q.gather(-1, target.class_id), target.tail.unsqueeze(-1)
    head = _of_class(target.prob, entries) - _of_class(tail, entries)
    return _of_class(tail, log_q).sum(dim=-1) + head.sum(dim=-1)


def _of_class(p: Tensor, log_q: Tensor) -> Tensor:
    log_mean = torch.logaddexp(p.log(), log_q) - math.log(2)
    return (torch.xlogy(p, p) - p * log_mean + log_q.exp() * (log_q - log_mean)) / 2
