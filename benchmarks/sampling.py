"""How near the gradients of sparse targets are to the one of the teacher's whole distribution.

    python benchmarks/sampling.py

After the comparison of gradients in Anshumann et al. 2025, arXiv:2503.16870: angle and ratio of norms. The student is
a linear head on the teacher's features, its gradient that of one row (median over rows) or of all rows together: an
average removes the noise of the draws, and leaves a bias as it is.
"""

import argparse
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_cli.sparse import SparseLogits, cross_entropy, keep_mass, sample_tail, soften, top_k

CLASSES, DIM, PART = 1000, 256, 2048


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=32768)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    head, error = torch.randn(2, CLASSES, DIM) / DIM**0.5
    for distance in (2.0, 0.3):
        found = [one_part(head, distance * error) for _ in range(given.rows // PART)]
        print(f"\nThe student's logits are {distance} from the teacher's (standard deviation), {given.rows} rows.\n")
        print("| target | entries a row | one row: angle | norm | all rows: angle | norm |\n|---|---|---|---|---|---|")
        full = sum(part["full"].head for part in found)
        for name in list(found[0])[1:]:
            mine = [part[name] for part in found]
            together = compare(sum(part.head for part in mine).flatten(), full.flatten())
            one, count = (torch.stack(values).mean(0) for values in zip(*((p.one, p.count) for p in mine), strict=True))
            print(f"| {name} | {count:.1f} | {one[0]:.1f} | {one[1]:.3f} | {together[0]:.1f} | {together[1]:.3f} |")


@dataclass(frozen=True)
class Found:
    head: Tensor
    """The gradient of the linear head, `[classes, dim]`."""
    one: Tensor
    """Angle and ratio of norms, the median over rows."""
    count: Tensor


def one_part(head: Tensor, error: Tensor) -> dict[str, Found]:
    """By target, what it does on some rows; "full" is the first."""
    features = F.layer_norm(torch.randn(PART, DIM), (DIM,))
    teacher = features @ head.T * torch.empty(PART, 1).uniform_(2.5, 6)  # surer of some rows than of others
    student = teacher.double() + features.double() @ error.T.double()
    everything = {"full": top_k(teacher, CLASSES), **targets(teacher)}
    gradients = {name: gradient(student, rows) for name, rows in everything.items()}
    return {
        name: Found(ours.T @ features.double(), compare(ours, gradients["full"]), entries(everything[name]))
        for name, ours in gradients.items()
    }


def targets(teacher: Tensor) -> dict[str, SparseLogits]:
    uniform = torch.rand(len(teacher), dtype=torch.float64)
    nothing = torch.full((len(teacher),), -math.inf)
    bare = top_k(teacher, 12)
    return {
        "top-12, no tail": SparseLogits(bare.class_id, bare.log_prob, nothing),
        "top-10, uniform tail": top_k(teacher, 10),
        "top-12, uniform tail": bare,
        "top-50, uniform tail": top_k(teacher, 50),
        "mass 0.9, at most 50, uniform tail": keep_mass(top_k(teacher, 50), 0.9, min_k=1),
        "k = 0, 50 draws": sample_tail(teacher, 0, 50, uniform),
        "k = 0, 50 independent draws": independent(teacher, 0, 50),
        "k = 10, 10 draws": sample_tail(teacher, 10, 10, uniform),
        "k = 10, 50 draws": sample_tail(teacher, 10, 50, uniform),
        "k = 10, 50 independent draws": independent(teacher, 10, 50),
    }


def independent(teacher: Tensor, k: int, draws: int) -> SparseLogits:
    """The paper's draws; a class that is drawn twice is there twice."""
    exact = teacher.log_softmax(-1).topk(k)
    rest = teacher.softmax(-1).scatter(-1, exact.indices, 0)
    drawn = rest.multinomial(draws, replacement=True)
    log_mass = (rest.sum(-1, keepdim=True) / draws).log().expand(-1, draws)
    return SparseLogits(
        torch.cat([exact.indices, drawn], -1),
        torch.cat([exact.values, log_mass], -1),
        torch.full((len(teacher),), -math.inf),
    )


def entries(rows: SparseLogits) -> Tensor:
    """Different classes of a row, on average."""
    if rows.count is not None:
        return rows.count.double().mean()
    return 1 + rows.class_id.sort().values.diff().ne(0).sum(-1).double().mean()


def gradient(student: Tensor, rows: SparseLogits) -> Tensor:
    """Of each row's cross-entropy, by the logits: `[rows, classes]`."""
    logits = student.clone().requires_grad_()
    cross_entropy(logits, soften(rows, CLASSES)).sum().backward()
    assert logits.grad is not None
    return logits.grad


def compare(ours: Tensor, full: Tensor) -> Tensor:
    """Angle in degrees and ratio of norms, the median over rows: `[2]`."""
    cosine = F.cosine_similarity(ours, full, dim=-1).clamp(-1, 1)
    ratio = ours.norm(dim=-1) / full.norm(dim=-1)
    return torch.stack([cosine.acos().rad2deg().median(), ratio.median()])


if __name__ == "__main__":
    main()
