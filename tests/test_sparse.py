import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objectives.dense import Example, densify, examples

from distill_cli.sparse import SparseLogits, cross_entropy, entropy, soften, top_k


@given(examples())
def test_softened_rows_are_the_dense_distribution(example: Example) -> None:
    target = soften(example.rows, example.classes, example.temperature)
    outside = torch.ones_like(example.p).scatter(-1, target.class_id, 0)
    ours = (outside * target.tail[:, None]).scatter(-1, target.class_id, target.prob)
    torch.testing.assert_close(ours, example.p, rtol=1e-9, atol=1e-12)


@given(examples())
def test_cross_entropy_is_the_dense_one(example: Example) -> None:
    target = soften(example.rows, example.classes, example.temperature)
    example.assert_same(cross_entropy(example.logits / example.temperature, target), example.cross_entropy)


@given(examples())
def test_cross_entropy_less_entropy_is_the_dense_kl(example: Example) -> None:
    target = soften(example.rows, example.classes, example.temperature)
    ours = cross_entropy(example.logits / example.temperature, target) - entropy(target)
    example.assert_same(ours, example.kl)


@given(examples())
def test_entropy_is_the_dense_one(example: Example) -> None:
    target = soften(example.rows, example.classes, example.temperature)
    torch.testing.assert_close(entropy(target), torch.special.entr(example.p).sum(-1), rtol=1e-9, atol=1e-12)


@given(examples())
def test_float32_stays_near_the_dense_float64(example: Example) -> None:
    rows = SparseLogits(example.rows.class_id, example.rows.log_prob.float(), example.rows.log_tail.float())
    ours = cross_entropy((example.logits / example.temperature).float(), soften(rows, example.classes))
    dense = -(densify(example.rows, example.classes) * example.log_q).sum(-1)
    torch.testing.assert_close(ours.double(), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_a_uniform_student_costs_log_c(k: int) -> None:
    target = soften(top_k(torch.randn(4, 10), k), 10)
    torch.testing.assert_close(cross_entropy(torch.full((4, 10), 0.7), target), torch.full((4,), math.log(10)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 8.0])
def test_a_student_that_is_the_teacher_costs_the_entropy_and_has_no_gradient(temperature: float) -> None:
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    rows = SparseLogits(torch.arange(7).expand(4, 7), logits.detach().log_softmax(-1), torch.full((4,), -math.inf))
    target = soften(rows, 7, temperature)
    kl = cross_entropy(logits / temperature, target) - entropy(target)
    kl.sum().backward()
    assert kl.abs().max() < 1e-12
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-12


def test_a_uniform_teacher_has_the_entropy_log_c() -> None:
    torch.testing.assert_close(entropy(soften(top_k(torch.zeros(2, 9), 4), 9)), torch.full((2,), math.log(9)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_target_sums_to_one_where_rounded_rows_did_not(temperature: float) -> None:
    rows = top_k(4 * torch.randn(8, 50), 10)
    rounded = SparseLogits(rows.class_id, rows.log_prob.half().float(), rows.log_tail)
    target = soften(rounded, 50, temperature)
    torch.testing.assert_close(target.prob.sum(-1) + 40 * target.tail, torch.ones(8))


def test_a_row_without_tail_leaves_the_other_classes_nothing() -> None:
    rows = SparseLogits(torch.tensor([[3, 0]]), torch.tensor([[-0.5, -2.0]]), torch.tensor([-math.inf]))
    target = soften(rows, 5, temperature=8.0)
    assert target.tail.item() == 0
    assert entropy(target).isfinite().all()


@given(classes=st.integers(2, 64), data=st.data())
def test_top_k_is_the_head_of_the_sorted_softmax(classes: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, classes))
    logits = 5 * torch.randn(3, classes, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 2**31))))
    rows = top_k(logits, k)
    probs = logits.double().softmax(-1).sort(descending=True).values
    torch.testing.assert_close(rows.log_prob.double().exp(), probs[:, :k], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(rows.log_tail.double().exp(), probs[:, k:].sum(-1), rtol=1e-5, atol=0)
    assert torch.equal(logits.gather(-1, rows.class_id), logits.sort(descending=True).values[:, :k])


def test_top_k_keeps_a_tail_that_one_minus_the_sum_would_lose() -> None:
    rows = top_k(torch.tensor([[0.0, -math.log(1e9)]]), 1)
    assert rows.log_tail.exp().item() == pytest.approx(1e-9, rel=1e-5)
    assert 1 - rows.log_prob.exp().sum().item() == 0


def test_top_k_of_all_classes_leaves_no_tail() -> None:
    assert top_k(torch.randn(2, 6), 6).log_tail.tolist() == [-math.inf, -math.inf]


def test_top_k_takes_half_precisions_in_float32() -> None:
    logits = torch.randn(4, 100).bfloat16()
    rows = top_k(logits, 10)
    assert rows.log_prob.dtype == torch.float32
    assert torch.equal(rows.log_prob, logits.float().log_softmax(-1).topk(10).values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cross_entropy_takes_half_precisions_in_float32(dtype: torch.dtype) -> None:
    target = soften(top_k(torch.randn(4, 20), 5), 20)
    logits = (3 * torch.randn(4, 20)).to(dtype)
    assert torch.equal(cross_entropy(logits, target), cross_entropy(logits.float(), target))


def test_cross_entropy_is_of_each_row_alone() -> None:
    logits, rows = torch.randn(6, 12), top_k(torch.randn(6, 12), 4)
    one_by_one = [
        cross_entropy(logits[i : i + 1], soften(rows._each(lambda part, i=i: part[i : i + 1]), 12)) for i in range(6)
    ]
    torch.testing.assert_close(torch.cat(one_by_one), cross_entropy(logits, soften(rows, 12)))


def test_top1_is_the_most_probable_class() -> None:
    logits = torch.randn(5, 9)
    assert torch.equal(top_k(logits, 3).top1, logits.argmax(-1))
