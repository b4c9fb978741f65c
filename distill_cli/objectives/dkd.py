"""DKD: decoupled knowledge distillation."""

from typing import Literal

import torch
from torch import Tensor

from distill_cli.config import NonNegative, section
from distill_cli.sparse import SparseTarget


@section
class DKDConfig:
    name: Literal["dkd"] = "dkd"
    alpha: NonNegative = 1.0
    """Of the label's mass against that of all others."""
    beta: NonNegative = 8.0
    """Of the distribution over the others."""


def dkd(logits: Tensor, target: SparseTarget, label: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha TCKD + beta NCKD; `[batch]`.

        TCKD = p_t log(p_t / q_t) + (1 - p_t) log((1 - p_t) / (1 - q_t)),    t the label
        NCKD = sum_{c != t} p'_c log(p'_c / q'_c),    p'_c = p_c / (1 - p_t),    q'_c = q_c / (1 - q_t)

    Exact, the target not densified: with m the mass of one class of the tail, the entries add p_k - m to what C - 1
    classes of m give. 1 - p_t and 1 - q_t are sums over the others, so that a label with nearly all of the mass loses
    nothing. Where a teacher leaves the others nothing, NCKD is 0. KL is alpha = 1 and beta = 1 - p_t.

    Args:
        logits: of the student, at the target's temperature, `[batch, classes]`.
        label: int64 `[batch]`.

    Paper: Zhao et al. 2022, arXiv:2203.08679, eq. 7.
    Differs: nothing but rounding; the authors' code masks the label by adding -1000 to its logit.
    """
    label, tail = label.unsqueeze(-1), target.tail
    z_label = logits.gather(-1, label).squeeze(-1)
    log_norm = logits.logsumexp(dim=-1)
    log_others = logits.scatter(-1, label, -torch.inf).logsumexp(dim=-1)
    # What entries have above a class of the tail; padding has nothing.
    above = target.prob - tail.unsqueeze(-1)
    is_label, others = target.class_id == label, target.num_classes - 1
    p_label = tail + (above * is_label).sum(dim=-1)
    above = above.masked_fill(is_label, 0)
    p_others = above.sum(dim=-1) + others * tail
    tckd = (
        torch.xlogy(p_label, p_label)
        + torch.xlogy(p_others, p_others)
        - p_label * (z_label - log_norm)
        - p_others * (log_others - log_norm)
    )
    entries = logits.gather(-1, target.class_id) - log_others.unsqueeze(-1)
    everywhere = logits.sum(dim=-1) - z_label - others * log_others
    crossed = (above * entries).sum(dim=-1) + tail * everywhere
    of_tail = torch.xlogy(tail, tail)
    own = (torch.xlogy(target.prob, target.prob) - of_tail.unsqueeze(-1)).masked_fill(is_label, 0)
    own_others = own.sum(dim=-1) + others * of_tail - torch.xlogy(p_others, p_others)
    weight = torch.where(p_others > torch.finfo(p_others.dtype).tiny, 1 / p_others, 0)
    nckd = weight * (own_others - crossed)
    return alpha * tckd + beta * nckd
