"""Every divergence, tail and standardisation against dense distributions in float64, whole and in pieces."""

import math
from dataclasses import replace

import pytest
import torch
from dense import Example, densify, examples
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from small import make_batch
from torch import Tensor

from distill_cli.by_rows import by_rows
from distill_cli.objectives.dist import DISTConfig
from distill_cli.objectives.dkd import DKDConfig, dkd
from distill_cli.objectives.logits import LogitsConfig, RowLoss, soft_loss
from distill_cli.objectives.standardise import LEAST, deviation, row_deviation, with_tail
from distill_cli.objectives.tails import first, renormalised
from distill_cli.sparse import SparseLogits, soften, top_k

CLOSE = {"rtol": 1e-5, "atol": 1e-7}
DIVERGENCES = ("cross-entropy", "kl", "jsd", "dist", "dkd")


def assert_same(example: Example, ours: Tensor, dense: Tensor) -> None:
    """Values and gradients to 1e-5."""
    torch.testing.assert_close(ours, dense, **CLOSE)
    gradients = [torch.autograd.grad(value.sum(), example.logits)[0] for value in (ours, dense)]
    torch.testing.assert_close(*gradients, **CLOSE)


def row_losses(example: Example, config: LogitsConfig, *labels: Tensor, rows: SparseLogits | None = None) -> Tensor:
    loss = RowLoss(config, example.temperature)
    return by_rows(loss, example.logits, rows or example.rows, *labels, elements=2 * example.classes)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


def pearson(p: Tensor, q: Tensor) -> Tensor:
    p, q = p - p.mean(-1, keepdim=True), q - q.mean(-1, keepdim=True)
    return (p * q).sum(-1) / (p.norm(dim=-1) * q.norm(dim=-1) + 1e-8)


@given(examples())
def test_renormalised_rows_have_nothing_outside(example: Example) -> None:
    p = densify(renormalised(example.rows), example.classes, example.temperature)
    ours = row_losses(example, LogitsConfig(tail="renormalise"))
    assert_same(example, ours, -(p * example.log_q).sum(-1))


@given(examples())
def test_a_bucket_is_the_sum_of_all_classes_outside(example: Example) -> None:
    for name in ("cross-entropy", "kl"):
        ours = row_losses(example, LogitsConfig(tail="bucket", divergence=name))
        dense = []
        for row, (p, log_q) in enumerate(zip(example.p, example.log_q, strict=True)):
            inside = example.rows.class_id[row, : example.rows.counts[row]]
            outside = torch.ones(example.classes, dtype=torch.bool).index_fill(0, inside, False)
            p, log_q = p[inside], log_q[inside]
            if outside.any():
                p = torch.cat([p, example.p[row, outside].sum()[None]])
                log_q = torch.cat([log_q, example.log_q[row, outside].logsumexp(0)[None]])
            dense.append((torch.xlogy(p, p) * (name == "kl") - p * log_q).sum())
        assert_same(example, ours, torch.stack(dense))


def test_a_bucket_outside_which_a_student_has_nearly_all_keeps_its_logarithm() -> None:
    """1 - q_k would be 0 in float32."""
    logits = torch.tensor([[40.0, 0.0, 0.0]], requires_grad=True)
    rows = SparseLogits(torch.tensor([[0]]), torch.tensor([[math.log(0.5)]]), torch.tensor([math.log(0.5)]))
    loss = soft_loss(logits, rows, LogitsConfig(tail="bucket"), 1.0)
    assert loss.item() == pytest.approx(0.5 * (40 - math.log(2)), rel=1e-6)
    loss.backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5, -0.25, -0.25]]))


@given(examples())
def test_jsd_is_the_dense_one(example: Example) -> None:
    p, q = example.p, example.log_q.exp()
    mean = (p + q) / 2
    assert_same(example, row_losses(example, LogitsConfig(divergence="jsd")), (kl(p, mean) + kl(q, mean)) / 2)


@given(examples(), st.data())
def test_dkd_is_the_dense_one(example: Example, data: st.DataObject) -> None:
    label = torch.tensor([data.draw(st.integers(0, example.classes - 1)) for _ in example.logits])
    ours = row_losses(example, LogitsConfig(divergence=DKDConfig(alpha=0.7, beta=3.0)), label)
    chosen = torch.nn.functional.one_hot(label, example.classes).bool()
    p, log_q = example.p, example.log_q
    p_label, p_others = (p * chosen).sum(-1), p.masked_fill(chosen, 0).sum(-1)
    log_others = log_q.masked_fill(chosen, -math.inf).logsumexp(-1)
    log_label = log_q.gather(-1, label[:, None])[:, 0]
    tckd = torch.xlogy(p_label, p_label) - p_label * log_label + torch.xlogy(p_others, p_others) - p_others * log_others
    of_others = torch.where(p_others > 0, 1 / p_others, 0)[:, None] * p.masked_fill(chosen, 0)
    nckd = torch.xlogy(of_others, of_others) - of_others * (log_q - log_others[:, None])
    assert_same(example, ours, 0.7 * tckd + 3 * nckd.sum(-1))


@given(examples())
def test_dkd_at_its_own_weights_is_kl(example: Example) -> None:
    """alpha = 1, beta = 1 - p of the label."""
    target, label = soften(example.rows, example.classes, example.temperature), example.rows.class_id[:, 0]
    logits = example.logits / example.temperature
    others = 1 - example.p.gather(-1, label[:, None])[:, 0]
    tckd, nckd = (dkd(logits, target, label, *weights) for weights in ((1, 0), (0, 1)))
    torch.testing.assert_close(tckd + others * nckd, example.kl, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2])
def test_dkd_of_a_teacher_that_leaves_the_others_nothing_has_no_part_of_them(k: int) -> None:
    logits = torch.randn(1, 2, requires_grad=True)
    rows = SparseLogits(
        torch.tensor([[1, 0]])[:, :k], torch.tensor([[0.0, -math.inf]])[:, :k], torch.tensor([-torch.inf])
    )
    loss = dkd(logits, soften(rows, 2), torch.tensor([1]), 1.0, 8.0)
    torch.testing.assert_close(loss, -logits.log_softmax(-1)[:, 1])
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_dkd_of_mixed_images_is_that_of_both_labels() -> None:
    batch, logits, config = make_batch(kind="mixed"), torch.randn(8, 5), LogitsConfig(divergence="dkd")
    assert batch.mixed is not None
    assert batch.teacher is not None
    own, partner = (
        by_rows(RowLoss(config, 2.0), logits, batch.teacher, labels) for labels in (batch.labels, batch.mixed.partner)
    )
    expected = 4 * (batch.mixed.lam * own + (1 - batch.mixed.lam) * partner).mean()
    torch.testing.assert_close(soft_loss(logits, batch.teacher, config, 2.0, batch), expected)


@given(examples())
def test_dist_is_the_dense_one(example: Example) -> None:
    p, q = example.p, example.log_q.exp()
    inter, intra = 1 - pearson(p, q).mean(), 1 - pearson(p.T, q.T).mean()
    config = LogitsConfig(divergence=DISTConfig(inter=0.5, intra=3.0))
    ours = soft_loss(example.logits, example.rows, config, example.temperature)
    torch.testing.assert_close(ours, example.temperature**2 * (0.5 * inter + 3 * intra), rtol=1e-5, atol=1e-4)


def test_the_gradient_of_dist_is_the_dense_one() -> None:
    """Away from rows that are all alike, where a correlation has none."""
    torch.manual_seed(0)
    logits, rows = torch.randn(7, 9, dtype=torch.float64, requires_grad=True), top_k(torch.randn(7, 9), 4)
    p, q = densify(rows, 9, 2.0), (logits / 2).softmax(-1)
    dense = 4 * (2 * (1 - pearson(p, q).mean()) + 2 * (1 - pearson(p.T, q.T).mean()))
    ours = soft_loss(logits, rows, LogitsConfig(divergence="dist"), 2.0)
    torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (ours, dense)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def standardised(logits: Tensor) -> Tensor:
    """The z-score."""
    return (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True, correction=0) + 1e-7)


@given(examples())
def test_standardised_rows_are_the_dense_z_scores(example: Example) -> None:
    rows = with_tail(example.rows, example.classes)
    logits = example.logits if example.logits.std() > 0 else example.logits + torch.arange(example.classes)
    dense = densify(rows, example.classes).log()
    target = (standardised(dense) / example.temperature).softmax(-1)
    ours = RowLoss(LogitsConfig(standardise=True), example.temperature)(logits, example.rows)
    expected = -(target * (standardised(logits) / example.temperature).log_softmax(-1)).sum(-1)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_standardised_logits_is_the_dense_one() -> None:
    logits, teacher = torch.randn(6, 9, dtype=torch.float64, requires_grad=True), torch.randn(6, 9)
    ours = soft_loss(logits, top_k(teacher, 9), LogitsConfig(standardise=True, divergence="kl"), 2.0)
    p, log_q = (standardised(teacher.double()) / 2).softmax(-1), (standardised(logits) / 2).log_softmax(-1)
    dense = 4 * (torch.xlogy(p, p) - p * log_q).sum(-1).mean()
    torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (ours, dense)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_standardised_a_student_may_be_the_teacher_in_another_scale() -> None:
    logits = torch.randn(4, 9)
    loss = soft_loss(3 * logits + 7, top_k(logits, 9), LogitsConfig(standardise=True, divergence="kl"), 1.0)
    assert loss.abs() < 1e-5


def test_logits_that_are_all_alike_have_a_gradient() -> None:
    logits = torch.zeros(2, 5, requires_grad=True)
    deviation(logits).sum().backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_an_empty_tail_is_taken_as_the_least_there_is() -> None:
    rows = SparseLogits(
        torch.tensor([[0, 1]] * 2), torch.tensor([[-0.1, -2.0], [0, -90]]), torch.full((2,), -torch.inf)
    )
    filled = with_tail(rows, 5).log_tail
    torch.testing.assert_close(filled, torch.tensor([math.log(LEAST), -90 + math.log(3)]))
    assert row_deviation(with_tail(rows, 5), 5).isfinite().all()
    full = top_k(torch.randn(2, 5), 5)
    torch.testing.assert_close(row_deviation(with_tail(full, 5), 5)[:, 0], full.log_prob.std(-1, correction=0))


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "cross-entropy"])
@pytest.mark.parametrize("classes", [2, 9])
def test_a_student_that_is_the_teacher_costs_nothing(name: str, standardise: bool, classes: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(8, classes, dtype=torch.float64).requires_grad_()
    log_prob, class_id = logits.detach().log_softmax(-1).sort(descending=True)
    rows = SparseLogits(class_id, log_prob, torch.full((8,), -torch.inf, dtype=torch.float64))
    batch = make_batch()
    batch = replace(batch, labels=batch.labels % classes)
    loss = soft_loss(logits, rows, LogitsConfig(divergence=name, standardise=standardise), 2.0, batch)
    # DIST's own epsilon takes a little off every correlation.
    assert loss.abs() < (1e-4 if name == "dist" else 1e-9)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < (1e-4 if name == "dist" else 1e-7)


@pytest.mark.parametrize("tail", ["uniform", "bucket", "renormalise"])
def test_a_uniform_student_costs_log_c(tail: str) -> None:
    rows = top_k(torch.randn(3, 20), 20)
    loss = soft_loss(torch.zeros(3, 20), rows, LogitsConfig(tail=tail), 2.0)
    assert loss.item() == pytest.approx(4 * math.log(20), rel=1e-6)


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_half_precision_logits_are_taken_in_float32(name: str, k: int) -> None:
    batch, rows = make_batch(), top_k(torch.randn(8, 20), k)
    logits = (3 * torch.randn(8, 20)).bfloat16()
    config = LogitsConfig(divergence=name, standardise=True)
    ours, full = (soft_loss(each, rows, config, 3.0, batch) for each in (logits, logits.float()))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, full, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_float32_stays_near_float64_over_many_classes(name: str) -> None:
    torch.manual_seed(0)
    batch, teacher, logits = make_batch(), 4 * torch.randn(8, 21841), torch.randn(8, 21841)
    logits[:, :5] += 6
    config, rows = LogitsConfig(divergence=name), top_k(teacher, 100)
    exact = SparseLogits(rows.class_id, rows.log_prob.double(), rows.log_tail.double())
    ours, dense = soft_loss(logits, rows, config, 1.0, batch), soft_loss(logits.double(), exact, config, 1.0, batch)
    torch.testing.assert_close(ours.double(), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "dist"])
@pytest.mark.parametrize("kind", ["fixed", "ragged"])
def test_pieces_are_the_whole(name: str, kind: str) -> None:
    """… and their gradients those of finite differences."""
    batch = make_batch(kind=kind)
    assert batch.teacher is not None
    logits = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    rows = SparseLogits(
        batch.teacher.class_id, batch.teacher.log_prob.double(), batch.teacher.log_tail.double(), batch.teacher.count
    )
    loss = RowLoss(LogitsConfig(divergence=name, temperature=2.0), 2.0)
    labels = (batch.labels,) if name == "dkd" else ()

    def in_pieces(logits: Tensor) -> Tensor:
        return by_rows(loss, logits, rows, *labels, elements=15)

    torch.testing.assert_close(in_pieces(logits), loss(logits, rows, *labels))
    assert torch.autograd.gradcheck(in_pieces, (logits,))


@pytest.mark.parametrize("settings", [{"divergence": "dkd"}, {"divergence": "jsd"}, {"standardise": True}])
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_what_is_of_all_classes_asks_for_the_uniform_tail(settings: dict[str, object], tail: str) -> None:
    with pytest.raises(ValidationError, match=rf"tail {tail}: \w+ is of all classes; give uniform"):
        LogitsConfig(tail=tail, **settings)


@given(examples(), st.integers(1, 70))
def test_the_first_entries_are_those_and_the_rest_is_tail(example: Example, k: int) -> None:
    rows = first(example.rows, k)
    assert torch.equal(rows.counts, example.rows.counts.clamp(max=k))
    assert torch.equal(rows.class_id, example.rows.class_id[:, :k])
    mass = rows.log_prob.exp().sum(-1) + rows.log_tail.exp()
    torch.testing.assert_close(mass, example.rows.log_prob.exp().sum(-1) + example.rows.log_tail.exp())
