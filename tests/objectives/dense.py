"""An independent reference for losses on sparse rows: dense distributions, plain softmax, float64."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from distill_cli.sparse import SparseLogits, SparseTarget


@dataclass(frozen=True)
class Example:
    """Rows, the logits of a student that has seen them, and a temperature."""

    rows: SparseLogits
    logits: Tensor
    """A leaf that requires its gradient."""
    temperature: float

    @property
    def classes(self) -> int:
        return self.logits.shape[-1]

    @property
    def p(self) -> Tensor:
        """The teacher at the temperature, `[batch, classes]`."""
        return densify(self.rows, self.classes, self.temperature)

    @property
    def log_q(self) -> Tensor:
        """The student at the temperature, `[batch, classes]`."""
        return (self.logits / self.temperature).log_softmax(-1)

    @property
    def cross_entropy(self) -> Tensor:
        return -(self.p * self.log_q).sum(-1)

    @property
    def kl(self) -> Tensor:
        return (torch.xlogy(self.p, self.p) - self.p * self.log_q).sum(-1)

    def assert_same(self, loss: Tensor, reference: Tensor) -> None:
        """Both losses and their gradients agree to 1e-6 of the largest value."""
        torch.testing.assert_close(loss, reference, rtol=1e-6, atol=1e-9)
        ours, theirs = (torch.autograd.grad(value.sum(), self.logits)[0] for value in (loss, reference))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def densify(rows: SparseLogits, classes: int, temperature: float = 1.0) -> Tensor:
    """Write the k masses into place, spread the tail evenly over the others, then p^(1/T) / sum p^(1/T)."""
    batch, width = rows.class_id.shape
    full = torch.zeros(batch, classes, dtype=torch.float64)
    for row in range(batch):
        k = width if rows.count is None else int(rows.count[row])
        if k < classes:
            full[row] = rows.log_tail[row].double().exp() / (classes - k)
        for place in range(k):
            full[row, rows.class_id[row, place]] = rows.log_prob[row, place].double().exp()
    softened = full ** (1 / temperature)
    return softened / softened.sum(-1, keepdim=True)


def whole(target: SparseTarget) -> Tensor:
    """A target written out, `[batch, classes]`."""
    full = target.tail[:, None].repeat(1, target.num_classes)
    return full.scatter_add(-1, target.class_id, target.prob - target.tail[:, None])


def some(rows: SparseLogits, part: slice) -> SparseLogits:
    """Some rows of a batch."""
    return SparseLogits(*(None if values is None else values[part] for values in vars(rows).values()))


def cut(rows: SparseLogits, count: Tensor) -> SparseLogits:
    """Only the first entries of each row, the others lost to the tail."""
    beyond = torch.arange(rows.class_id.shape[-1]) >= count[:, None]
    lost = torch.where(beyond, rows.log_prob.exp(), 0).sum(-1)
    return SparseLogits(
        torch.where(beyond, 0, rows.class_id),
        torch.where(beyond, -math.inf, rows.log_prob),
        (rows.log_tail.exp() + lost).log(),
        count,
    )


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """Peaked and flat rows over 2 to 64 classes, all of them or fewer, with or without mass in the tail; float64.

    Half of the batches are ragged, and may be padded to more places than there are classes.
    """
    classes = draw(st.integers(2, 64))
    k = draw(st.integers(1, classes) | st.just(classes))
    batch = draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    noise = torch.randn(2, batch, classes, dtype=torch.float64, generator=generator)
    teacher = (draw(st.sampled_from([0.0, 0.3, 4.0, 20.0])) * noise[0]).log_softmax(-1)
    student = draw(st.sampled_from([0.0, 0.3, 4.0, 20.0])) * noise[1]
    log_prob, class_id = teacher.topk(k)
    log_tail = torch.full((batch,), -math.inf, dtype=torch.float64)
    if k < classes and draw(st.booleans()):
        log_tail = teacher.sort(descending=True).values[:, k:].logsumexp(-1)
    rows = SparseLogits(class_id, log_prob, log_tail)
    if draw(st.booleans()):
        rows = pad(cut(rows, torch.tensor(draw(st.lists(st.integers(1, k), min_size=batch, max_size=batch)))), k + 3)
    temperature = draw(st.sampled_from([1.0, 2.0, 4.0]) | st.floats(0.5, 8))
    return Example(rows, student.requires_grad_(), temperature)


def pad(rows: SparseLogits, width: int) -> SparseLogits:
    """More places in ragged rows."""
    more = (0, width - rows.class_id.shape[-1])
    log_prob = F.pad(rows.log_prob, more, value=-math.inf)
    return SparseLogits(F.pad(rows.class_id, more), log_prob, rows.log_tail, rows.count)
