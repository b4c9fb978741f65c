import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objectives.dense import Example, cut, densify, examples, some, whole
from torch import Tensor

from distill_cli.sparse import (
    SparseLogits,
    cross_entropy,
    entropy,
    keep_mass,
    sample_tail,
    sampling_uniforms,
    soften,
    top_k,
)


@given(examples())
def test_softened_rows_are_the_dense_distribution(example: Example) -> None:
    target = soften(example.rows, example.classes, example.temperature)
    torch.testing.assert_close(whole(target), example.p, rtol=1e-9, atol=1e-12)


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
    rows = replace(example.rows, log_prob=example.rows.log_prob.float(), log_tail=example.rows.log_tail.float())
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
    parts = [slice(i, i + 1) for i in range(6)]
    one_by_one = [cross_entropy(logits[part], soften(some(rows, part), 12)) for part in parts]
    torch.testing.assert_close(torch.cat(one_by_one), cross_entropy(logits, soften(rows, 12)))


def test_top1_is_the_most_probable_class() -> None:
    logits = torch.randn(5, 9)
    assert torch.equal(top_k(logits, 3).top1, logits.argmax(-1))


def uniforms(batch: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def equal(ours: SparseLogits, theirs: SparseLogits) -> bool:
    return all(torch.equal(*pair) for pair in zip(vars(ours).values(), vars(theirs).values(), strict=True))


def test_padding_is_a_class_of_the_tail_and_so_contributes_nothing() -> None:
    rows = cut(top_k(torch.randn(3, 9), 4), torch.tensor([1, 3, 4]))
    target = soften(rows, 9, temperature=2.0)
    padding = rows.log_prob == -math.inf
    assert padding.sum() == 4
    assert not (target.prob - target.tail[:, None])[padding].any()
    torch.testing.assert_close(target.prob.sum(-1) + 5 * target.tail, torch.ones(3))


def test_an_entry_without_mass_is_not_padding() -> None:
    rows = SparseLogits(
        torch.tensor([[2, 4, 0]]), torch.tensor([[-0.5, -math.inf, -math.inf]]), torch.tensor([-1.0]), torch.tensor([2])
    )
    p = whole(soften(rows, 6, temperature=2.0))[0]
    assert p[4] == 0
    assert len(p[[0, 1, 3, 5]].unique()) == 1


def test_a_row_of_all_classes_beside_shorter_ones_has_no_tail() -> None:
    rows = cut(top_k(torch.randn(2, 4), 4), torch.tensor([4, 2]))
    target = soften(rows, 4)
    assert target.tail[0] == 0
    assert target.tail[1] > 0
    assert entropy(target).isfinite().all()


def test_rows_keep_their_count_on_the_way_to_a_device() -> None:
    rows = cut(top_k(torch.randn(2, 5), 3), torch.tensor([1, 3]))
    assert torch.equal(rows.to(torch.device("cpu")).counts, torch.tensor([1, 3]))
    assert replace(rows, count=None).to(torch.device("cpu")).count is None
    assert replace(rows, count=None).counts.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("mass", "counts"), [(0.0, [1, 1]), (0.5, [1, 2]), (0.75, [3, 3]), (0.76, [3, 4]), (1.0, [4, 4])]
)
def test_keep_mass_takes_the_fewest_entries_that_hold_it(mass: float, counts: list[int]) -> None:
    probs = torch.tensor([[0.625, 0.0625, 0.125, 0.0625], [0.25, 0.25, 0.25, 0.125]], dtype=torch.float64)
    rows = SparseLogits(torch.arange(4).repeat(2, 1), probs.log(), torch.full((2,), math.log(0.125)).double())
    assert keep_mass(rows, mass, min_k=1).counts.tolist() == counts


@given(examples(), st.floats(0, 1), st.integers(1, 64))
def test_keep_mass_moves_what_it_drops_to_the_tail(example: Example, mass: float, min_k: int) -> None:
    rows = example.rows
    kept = keep_mass(rows, mass, min_k)
    naive = [
        next((n for n in range(min(min_k, c), c) if p[:n].sum() >= mass), c)
        for p, c in zip(rows.log_prob.exp(), rows.counts.tolist(), strict=True)
    ]
    assert kept.counts.tolist() == naive
    expected = cut(replace(rows, count=None), kept.counts)
    assert torch.equal(kept.class_id, expected.class_id)
    assert torch.equal(kept.log_prob, expected.log_prob)
    torch.testing.assert_close(kept.log_tail, expected.log_tail, rtol=1e-9, atol=1e-12)


def test_keep_mass_that_drops_nothing_changes_nothing() -> None:
    rows = top_k(torch.randn(4, 20), 5)
    kept = keep_mass(rows, 1.0, min_k=1)
    assert equal(kept, replace(rows, count=torch.full((4,), 5)))


def test_keep_mass_is_exact_where_there_was_no_tail() -> None:
    rows = top_k(torch.tensor([[4.0, 1.0, 0.0]]), 3)
    assert torch.equal(keep_mass(rows, 0.97, min_k=2).log_tail, rows.log_prob[:, 2])


GRID = 4000


@pytest.fixture(scope="module", params=[(0, 7), (3, 7), (3, 40)], ids=lambda given: "k={} draws={}".format(*given))
def grid(request: pytest.FixtureRequest) -> tuple[Tensor, SparseLogits, int, int]:
    """One row of 20 classes, sampled with every number of an even grid."""
    k, draws = request.param
    logits = 1.5 * torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    uniform = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    return logits, sample_tail(logits.expand(GRID, -1), k, draws, uniform), k, draws


Grid = tuple[Tensor, SparseLogits, int, int]


def test_sampled_rows_are_the_whole_distribution_on_average(grid: Grid) -> None:
    logits, rows, _, _ = grid
    mean = whole(soften(rows, 20)).double().mean(0)
    torch.testing.assert_close(mean, logits[0].double().softmax(-1), rtol=0, atol=1e-4)


def test_their_gradient_is_that_of_the_whole_distribution_on_average(grid: Grid) -> None:
    logits, rows, _, _ = grid
    student = torch.randn(20, dtype=torch.float64, requires_grad=True)
    cross_entropy(student.expand(GRID, -1), soften(rows, 20)).mean().backward()
    dense = student.softmax(-1) - logits[0].double().softmax(-1)
    torch.testing.assert_close(student.grad, dense.detach(), rtol=0, atol=1e-4)


def test_their_loss_is_that_of_the_whole_distribution_on_average(grid: Grid) -> None:
    logits, rows, _, _ = grid
    student = torch.randn(1, 20)
    ours = cross_entropy(student.expand(GRID, -1), soften(rows, 20)).double().mean()
    dense = -(logits.double().softmax(-1) * student.double().log_softmax(-1)).sum()
    assert ours.item() == pytest.approx(dense.item(), abs=1e-3)


def test_a_class_is_drawn_its_share_of_times_rounded_down_or_up(grid: Grid) -> None:
    logits, rows, k, draws = grid
    rest = logits[0].double().softmax(-1)
    rest[logits[0].topk(k).indices] = 0
    drawn = torch.zeros(GRID, 20, dtype=torch.float64)
    drawn.scatter_add_(-1, rows.class_id[:, k:], rows.log_prob[:, k:].double().exp() * draws / rest.sum())
    share = draws * rest / rest.sum()
    assert ((drawn - drawn.round()).abs() < 1e-4).all()
    assert (drawn.round() >= share.floor()).all()
    assert (drawn.round() <= share.ceil()).all()
    assert torch.equal(drawn.round().sum(-1), torch.full((GRID,), float(draws)).double())


@given(classes=st.integers(2, 40), k=st.integers(0, 40), draws=st.integers(1, 60), seed=st.integers(0, 2**31))
def test_a_sampled_row_is_the_exact_classes_then_the_drawn_ones_then_padding(
    classes: int, k: int, draws: int, seed: int
) -> None:
    k = min(k, classes)
    logits = 3 * torch.randn(4, classes, generator=torch.Generator().manual_seed(seed))
    rows = sample_tail(logits, k, draws, uniforms(4, seed))
    exact = logits.log_softmax(-1).topk(k)
    assert torch.equal(rows.class_id[:, :k], exact.indices)
    assert torch.equal(rows.log_prob[:, :k], exact.values)
    assert rows.log_tail.tolist() == [-math.inf] * 4
    assert rows.class_id.shape == rows.log_prob.shape == (4, k + draws)
    for ids, log_prob, count in zip(rows.class_id, rows.log_prob, rows.counts.tolist(), strict=True):
        assert max(1, k) <= count <= min(k + draws, classes)
        assert len(set(ids[:count].tolist())) == count
        entries = list(zip((-log_prob[k:count]).tolist(), ids[k:count].tolist(), strict=True))
        assert entries == sorted(entries)
        assert log_prob[:count].isfinite().all()
        assert set(ids[count:].tolist()) <= {0}
        assert set(log_prob[count:].tolist()) <= {-math.inf}
    torch.testing.assert_close(rows.log_prob.exp().sum(-1), torch.ones(4))


@pytest.mark.parametrize("uniform", [0.0, 1e-300, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("draws", [1, 50, 999])
def test_no_draw_falls_off_either_end(uniform: float, draws: int) -> None:
    logits = torch.cat([torch.zeros(1, 300), torch.full((1, 100), -math.inf)], dim=1).roll(50, 1)
    rows = sample_tail(logits, 0, draws, torch.tensor([uniform], dtype=torch.float64))
    assert rows.log_prob.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert logits[0, rows.class_id[0, : rows.counts]].isfinite().all()


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_a_tail_without_mass_is_not_drawn_from(uniform: float) -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0], [-math.inf, 0.0, 0.5]])
    rows = sample_tail(logits, 2, 5, torch.full((2,), uniform, dtype=torch.float64))
    assert rows.counts.tolist() == [2, 2]
    assert sample_tail(logits, 3, 5, torch.full((2,), uniform, dtype=torch.float64)).counts.tolist() == [3, 3]


def test_one_class_beside_the_exact_ones_has_what_they_leave() -> None:
    logits = torch.tensor([[0.0, -20.0, 1.0]])
    rows = sample_tail(logits, 2, 3, uniforms(1))
    assert rows.class_id.tolist() == [[2, 0, 1, 0, 0]]
    torch.testing.assert_close(rows.log_prob[:, :3], logits.log_softmax(-1)[:, [2, 0, 1]])


def test_a_certain_teacher_is_drawn_alone() -> None:
    rows = sample_tail(torch.tensor([[0.0, 200.0]]), 0, 8, uniforms(1))
    assert (rows.top1.item(), rows.counts.item(), rows.log_prob[0, 0].item()) == (1, 1, 0)


def test_rows_are_sampled_each_by_its_own_number() -> None:
    logits, uniform = torch.randn(6, 50), uniforms(6)
    rows = sample_tail(logits, 4, 10, uniform)
    for part in (slice(0, 1), slice(2, 6)):
        assert equal(sample_tail(logits[part], 4, 10, uniform[part]), some(rows, part))


def test_half_precisions_are_sampled_in_float32() -> None:
    logits, uniform = torch.randn(4, 100).bfloat16(), uniforms(4)
    assert equal(sample_tail(logits, 3, 20, uniform), sample_tail(logits.float(), 3, 20, uniform))


def test_no_step_waits_for_the_values_of_a_device() -> None:
    device = torch.device("meta")
    logits, uniform = torch.empty(4, 30, device=device), torch.empty(4, dtype=torch.float64, device=device)
    for rows in (sample_tail(logits, 3, 8, uniform), keep_mass(top_k(logits, 8), 0.9, min_k=2)):
        target = soften(rows, 30, temperature=2.0)
        assert (cross_entropy(logits, target, 2.0) - entropy(target)).shape == (4,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_what_a_cpu_draws() -> None:
    logits, uniform = 3 * torch.randn(64, 1000), uniforms(64)
    ours = sample_tail(logits.cuda(), 10, 50, uniform.cuda()).to(torch.device("cpu"))
    theirs = sample_tail(logits, 10, 50, uniform)
    same = (ours.class_id == theirs.class_id).all(-1).double().mean()
    assert same > 0.9  # the softmaxes differ in their last bits, and a point can lie on a border
    torch.testing.assert_close(ours.log_prob.exp().sum(-1), theirs.log_prob.exp().sum(-1))


def test_the_numbers_of_samples_are_even_and_of_seed_view_and_sample() -> None:
    numbers = sampling_uniforms(3, 1, np.arange(2000))
    assert numbers.dtype == np.float64
    assert 0 <= numbers.min() < numbers.max() < 1
    assert np.abs(np.sort(numbers) - (np.arange(2000) + 0.5) / 2000).max() < 0.04
    assert np.array_equal(sampling_uniforms(3, 1, np.array([7, 5])), numbers[[7, 5]])
    assert not np.isin(sampling_uniforms(3, 2, np.arange(9)), numbers).any()
    assert not np.isin(sampling_uniforms(4, 1, np.arange(9)), numbers).any()
