"""Sparse logits: the k largest log-probabilities of a row, and the mass of the other classes.

With m the mass of one class of the tail (spread uniformly, as TinyViT and FKD's marginal smoothing do) and C classes,
the cross-entropy of a student q against a sparse target needs no batch x classes target:

    CE = -sum_k (p_k - m) log q_k - m sum_c log q_c,    sum_c log q_c = sum_c z_c - C logsumexp(z)

Rows come in three kinds, which the functions here need not tell apart:

    top_k        k classes a row, and the mass of the others
    keep_mass    as many classes as hold a given mass, and the mass of the others: ragged
    sample_tail  k classes, and others drawn at random that stand for the whole tail: ragged, no mass beside

The first two are distributions at any temperature. A sampled row is one only in expectation, and only at
temperature 1: p^(1/T) of a draw is no estimate of p^(1/T). Its entropy is not the teacher's either, so that it
measures no KL. Whoever brings rows and an objective together refuses another temperature.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from distill_cli.randomness import derive


@dataclass(frozen=True)
class SparseLogits:
    """Some classes of each row of a batch, at temperature 1. Log-probabilities are logits up to a constant a row."""

    class_id: Tensor
    """int64 `[batch, k]`, most probable first; where rows are sampled, the exact ones before the drawn ones."""
    log_prob: Tensor
    """float32 `[batch, k]`."""
    log_tail: Tensor
    """float32 `[batch]`: log of the mass of all other classes; -inf where nothing remains."""
    count: Tensor | None = None
    """int64 `[batch]`, at least 1: entries of each row, the rest being padding (class 0, -inf); None: each has k."""

    @property
    def counts(self) -> Tensor:
        """Entries of each row: int64 `[batch]`."""
        batch, k = self.class_id.shape
        return torch.full((batch,), k, device=self.class_id.device) if self.count is None else self.count

    @property
    def entries(self) -> Tensor:
        """What is not padding: bool `[batch, k]`."""
        return _entries(self.counts, self.class_id.shape[-1])

    @property
    def top1(self) -> Tensor:
        """The first class, int64 `[batch]`: the most probable, or in a row of draws alone the most drawn."""
        return self.class_id[:, 0]

    def to(self, device: torch.device) -> "SparseLogits":
        return self._each(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> "SparseLogits":
        return self._each(Tensor.pin_memory)

    def at(self, rows: Tensor | slice) -> "SparseLogits":
        """Some of the rows."""
        return self._each(lambda part: part[rows])

    def clone(self) -> "SparseLogits":
        return self._each(Tensor.clone)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Its tensors."""
        return (self.class_id, self.log_prob, self.log_tail, *(() if self.count is None else (self.count,)))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "SparseLogits":
        count = None if self.count is None else change(self.count)
        return SparseLogits(change(self.class_id), change(self.log_prob), change(self.log_tail), count)


@dataclass(frozen=True)
class SparseTarget:
    """A distribution over classes: `prob` on the k classes of `class_id`, `tail` on each of the C - k besides.

    The padding of a ragged row has `tail` too, in place of as many classes of its tail: `prob - tail` is zero there,
    and the rest of the row is C - k times `tail` whatever its count. No sum over a target has to know of padding.
    """

    class_id: Tensor
    """int64 `[batch, k]`."""
    prob: Tensor
    """`[batch, k]`."""
    tail: Tensor
    """`[batch]`: the mass of one class outside the entries."""
    num_classes: int


def top_k(logits: Tensor, k: int) -> SparseLogits:
    """The k largest log-probabilities of each row of `logits` `[batch, classes]`, taken in float32."""
    log_prob = logits.float().log_softmax(dim=-1)
    values, class_id = log_prob.topk(k, dim=-1)
    # Summing what is left keeps a tail of 1e-9 exact, where 1 - sum of the k would round it to zero.
    log_tail = log_prob.scatter(-1, class_id, -torch.inf).logsumexp(dim=-1)
    return SparseLogits(class_id, values, log_tail)


def stacked(parts: Sequence[SparseLogits]) -> SparseLogits:
    """The rows of several batches, one behind the other, in memory of their own; shorter rows are padded."""
    width = max(part.class_id.shape[-1] for part in parts)
    ragged = any(part.count is not None or part.class_id.shape[-1] < width for part in parts)
    padding = [(0, width - part.class_id.shape[-1]) for part in parts]
    return SparseLogits(
        torch.cat([F.pad(part.class_id, pad) for part, pad in zip(parts, padding, strict=True)]),
        torch.cat([F.pad(part.log_prob, pad, value=-torch.inf) for part, pad in zip(parts, padding, strict=True)]),
        torch.cat([part.log_tail for part in parts]),
        torch.cat([part.counts for part in parts]) if ragged else None,
    )


def keep_mass(rows: SparseLogits, mass: float, min_k: int) -> SparseLogits:
    """The fewest first entries of each row that hold `mass`; what the others hold goes to the tail.

        count = min {n : p_1 + ... + p_n >= mass},  at least min_k and at most what the row has

    Args:
        rows: k entries a row, most probable first; not sampled.
        mass: 0 to 1.
        min_k: 1 to k.
    """
    # In float64, so that a thousand classes' rounding does not decide how many of them are kept.
    short = rows.log_prob.double().exp().cumsum(dim=-1) < mass
    count = (1 + short.sum(dim=-1)).clamp(min=min_k).minimum(rows.counts)
    kept = _entries(count, rows.class_id.shape[-1])
    dropped = torch.cat([rows.log_prob.masked_fill(kept, -torch.inf), rows.log_tail.unsqueeze(-1)], dim=-1)
    return SparseLogits(
        rows.class_id.masked_fill(~kept, 0),
        rows.log_prob.masked_fill(~kept, -torch.inf),
        dropped.logsumexp(dim=-1),
        count,
    )


def sample_tail(logits: Tensor, k: int, draws: int, uniform: Tensor) -> SparseLogits:
    """The k most probable classes as they are, and `draws` draws from the others in place of all of them.

        p'_c = p_c for the k,    p'_c = tail n_c / N for a class drawn n_c times out of N,    E[p'] = p

    The expectation being the whole distribution, cross-entropy and its gradient are unbiased, at temperature 1.

    Args:
        logits: `[batch, classes]`.
        k: 0 to `classes`; with 0 a row is draws alone, the paper's own estimator.
        draws: N >= 1. A row has k + N places, and as many entries as there are different classes: at least 1.
        uniform: float64 `[batch]` in [0, 1), independent of each other; all the randomness there is.

    Paper: Anshumann et al. 2025, arXiv:2503.16870 (random sampling KD).
    Differs: the draws are systematic, the points (i + u) / N on the cumulative tail, where the paper's are
    independent: n_c is N p_c / tail rounded down or up and has the same mean and less variance. The k most probable
    classes have no variance at all. Drawn masses follow the exact ones, more draws first, then the lower class, and
    can be larger than the exact ones before them.
    """
    classes = logits.shape[-1]
    log_prob = logits.float().log_softmax(dim=-1)
    exact = log_prob.topk(k, dim=-1)
    rest = log_prob.double().exp().scatter(-1, exact.indices, 0)
    drawn = _systematic(rest, draws, uniform)
    # No two keys are the same, so that every device sorts them alike: more draws first, then the lower class.
    keys = drawn * classes + torch.arange(classes - 1, -1, -1, device=logits.device)
    class_id = keys.topk(min(draws, classes), dim=-1).indices
    times = drawn.gather(-1, class_id)
    log_mass = (rest.sum(dim=-1, keepdim=True) * times / draws).log().to(log_prob.dtype)
    places = (0, draws - times.shape[-1])
    return SparseLogits(
        torch.cat([exact.indices, F.pad(class_id.masked_fill(times == 0, 0), places)], dim=-1),
        torch.cat([exact.values, F.pad(log_mass, places, value=-torch.inf)], dim=-1),
        torch.full_like(log_prob[:, 0], -torch.inf),
        k + (times > 0).sum(dim=-1),
    )


def sampling_uniforms(seed: int, view: int, sample_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """The number in [0, 1) that `sample_tail` takes for each sample of a view: float64 `[n]`."""
    # 53 bits are what a float64 holds; with all 63 the largest would round to 1.
    return np.array([(derive("sample", seed, view, int(i)) >> 10) / 2**53 for i in sample_ids], np.float64)


def _entries(count: Tensor, k: int) -> Tensor:
    """What is not padding: bool `[batch, k]`."""
    return torch.arange(k, device=count.device) < count.unsqueeze(-1)


def _systematic(mass: Tensor, draws: int, uniform: Tensor) -> Tensor:
    """How many of the points (i + u) / N, i < N, each class's share of the mass holds: int64 `[batch, classes]`.

    Args:
        mass: float64 `[batch, classes]`; a row without any gets no point.
    """
    total = mass.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
    # Whole numbers add up to the same in any order, so every device draws alike, and no class without mass is drawn.
    cumulative = (mass / total * 2**52).round().long().cumsum(dim=-1)
    end = cumulative[:, -1:].clamp(min=1)
    below = (draws * (cumulative / end.double()) - uniform.unsqueeze(-1)).ceil().clamp(min=0).long()
    # N - u can round to N - 1, which would lose the last point.
    below = below.masked_fill(cumulative == end, draws)
    return below.diff(dim=-1, prepend=torch.zeros_like(below[:, :1]))


@torch.no_grad()
def soften(rows: SparseLogits, num_classes: int, temperature: float | Tensor = 1.0) -> SparseTarget:
    """The distribution p^(1/T) / sum p^(1/T), the tail taken as uniform before the temperature.

    Args:
        rows: some classes of `num_classes` a row.
        temperature: T > 0, or one of each row `[batch, 1]`; 1 gives the stored distribution, made to sum to one
            exactly.
    """
    others = num_classes - rows.counts
    log_others = others.double().log().to(rows.log_prob.dtype)
    log_one = (rows.log_tail - log_others).masked_fill(others == 0, -torch.inf).unsqueeze(-1) / temperature
    parts = torch.cat([rows.log_prob / temperature, log_one + log_others.unsqueeze(-1)], dim=-1)
    masses = parts.softmax(dim=-1)
    prob, tail = masses[:, :-1], masses[:, -1:] / others.clamp(min=1).unsqueeze(-1)
    if rows.count is not None:
        prob = torch.where(rows.entries, prob, tail)
    return SparseTarget(rows.class_id, prob, tail.squeeze(-1), num_classes)


def cooled(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """logits / T; half precisions are taken in float32.

    Args:
        temperature: T > 0, or one of each row `[batch, 1]`.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return logits if not isinstance(temperature, Tensor) and temperature == 1 else logits / temperature


def cross_entropy(logits: Tensor, target: SparseTarget, temperature: float | Tensor = 1.0) -> Tensor:
    """-sum_c p_c log q_c with q = softmax(logits / T), never densified; `[batch]`.

    Args:
        logits: `[batch, classes]`; half precisions are taken in float32.
    """
    logits = cooled(logits, temperature)
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
