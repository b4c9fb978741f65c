"""Rows of several teachers as one, beside distributions written out in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from distill_cli.averaging import EmptyRow, Space, average, gather
from distill_cli.sparse import SparseLogits, sample_tail, soften
from distill_cli.store.rows import Rows

Dense = NDArray[np.float64]


def dense(rows: Rows, classes: int) -> Dense:
    """Each row written out, its tail spread evenly, of sum one; entry by entry."""
    full = np.zeros((len(rows), classes))
    for row in range(len(rows)):
        k = rows.class_id.shape[1] if rows.count is None else int(rows.count[row])
        if k < classes:
            full[row] = np.exp(np.float64(rows.log_tail[row])) / (classes - k)
        for place in range(k):
            full[row, rows.class_id[row, place]] = np.exp(np.float64(rows.log_prob[row, place]))
    return full / full.sum(axis=1, keepdims=True)


def averaged(full: list[Dense], weights: list[float], space: Space) -> Dense:
    if space == "probability":
        return sum(weight * p for weight, p in zip(weights, full, strict=True))  # type: ignore[return-value]
    product = np.prod([p**weight for weight, p in zip(weights, full, strict=True)], axis=0)
    return product / product.sum(axis=1, keepdims=True)


def top(p: Dense, k: int, count: NDArray[np.int64] | None = None, tail: bool = True) -> Rows:
    """The k largest of each row, or the first `count` of them; without `tail` what is left is lost."""
    order = np.argsort(-p, axis=1, kind="stable")[:, :k]
    values = np.take_along_axis(p, order, axis=1)
    if count is not None:
        beyond = np.arange(k) >= count[:, None]
        order, values = np.where(beyond, 0, order), np.where(beyond, 0, values)
    with np.errstate(divide="ignore"):
        log_tail = np.log(np.maximum(0, 1 - values.sum(axis=1))) if tail else np.full(len(p), -np.inf)
        return Rows(np.arange(len(p)), order, np.log(values), log_tail, count)


def softmax(logits: Dense) -> Dense:
    p: Dense = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


@st.composite
def teachers(draw: st.DrawFn, least: int = 1, tail: bool = False) -> tuple[int, list[Rows]]:
    """Peaked and flat teachers of 2 to 40 classes: all of them, one or some; ragged, padded, without a tail."""
    classes, batch = draw(st.integers(2, 40)), draw(st.integers(1, 4))
    parts = []
    for _ in range(draw(st.integers(least, 4))):
        k = draw(st.sampled_from([1, classes]) | st.integers(1, classes))
        drawn = np.random.default_rng(draw(st.integers(0, 2**31)))
        p = softmax(draw(st.sampled_from([0.0, 0.3, 4.0])) * drawn.normal(size=(batch, classes)))
        count = drawn.integers(1, k + 1, batch) if draw(st.booleans()) else None
        rows = top(p, k, count, tail or draw(st.booleans()))
        if count is not None and draw(st.booleans()):
            wide = ((0, 0), (0, 3))
            log_prob = np.pad(rows.log_prob, wide, constant_values=-np.inf)
            rows = replace(rows, class_id=np.pad(rows.class_id, wide), log_prob=log_prob)
        parts.append(rows)
    return classes, parts


def check_form(rows: Rows, classes: int) -> None:
    """Most probable first, of equal ones the lower class; no class twice; padding as it is everywhere."""
    count = np.full(len(rows), rows.class_id.shape[1]) if rows.count is None else rows.count
    assert (count >= 1).all()
    assert rows.log_prob.dtype == rows.log_tail.dtype == np.float32
    for row, k in enumerate(count.tolist()):
        ids, values = rows.class_id[row, :k].tolist(), rows.log_prob[row, :k].tolist()
        assert len(set(ids)) == k
        assert max(ids) < classes
        assert sorted(zip([-value for value in values], ids, strict=True)) == list(
            zip([-value for value in values], ids, strict=True)
        )
        assert np.isfinite(values).all()
        assert (rows.class_id[row, k:] == 0).all()
        assert np.isneginf(rows.log_prob[row, k:]).all()
    assert rows.count is None or count.min() < rows.class_id.shape[1] == count.max()


@given(teachers(), st.lists(st.floats(0.05, 1), min_size=4, max_size=4), st.sampled_from(["probability", "log"]))
def test_the_average_is_that_of_the_teachers_written_out(
    example: tuple[int, list[Rows]], given_weights: list[float], space: Space
) -> None:
    classes, parts = example
    weights = [weight / sum(given_weights[: len(parts)]) for weight in given_weights[: len(parts)]]
    full = [dense(rows, classes) for rows in parts]
    if space == "log" and not np.prod([p > 0 for p in full], axis=0).any(axis=1).all():
        with pytest.raises(EmptyRow):
            average(parts, weights, classes, space)
        return
    found = average(parts, weights, classes, space)
    np.testing.assert_allclose(dense(found, classes), averaged(full, weights, space), rtol=1e-5, atol=1e-9)
    check_form(found, classes)


@given(teachers(least=2), st.sampled_from(["probability", "log"]))
def test_a_row_sums_to_one_as_it_stands(example: tuple[int, list[Rows]], space: Space) -> None:
    classes, parts = example
    try:
        found = average(parts, [1 / len(parts)] * len(parts), classes, space)
    except EmptyRow:
        return
    total = np.exp(found.log_prob.astype(np.float64)).sum(axis=1) + np.exp(found.log_tail.astype(np.float64))
    np.testing.assert_allclose(total, 1, rtol=1e-5)


@given(teachers(tail=True), st.data())
def test_gathered_classes_are_those_of_the_row_written_out(
    example: tuple[int, list[Rows]], data: st.DataObject
) -> None:
    classes, (rows, *_) = example
    chosen = data.draw(st.permutations(range(classes)))[: data.draw(st.integers(1, classes))]
    full = dense(rows, classes)[:, chosen]
    if not full.sum(axis=1).all():
        with pytest.raises(EmptyRow):
            gather(rows, np.array(chosen), classes)
        return
    found = gather(rows, np.array(chosen), classes)
    expected = full / full.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(dense(found, len(chosen)), expected, rtol=1e-5, atol=1e-9)
    check_form(found, len(chosen))


def test_a_row_none_of_whose_entries_is_gathered_is_uniform() -> None:
    rows = top(np.array([[0.6, 0.2, 0.1, 0.1], [0.1, 0.1, 0.2, 0.6]]), 1)
    found = gather(rows, np.array([3, 2]), 4)
    np.testing.assert_allclose(dense(found, 2), [[0.5, 0.5], [9 / 11, 2 / 11]], rtol=1e-6)
    assert found.class_id[:, 0].tolist() == [0, 0]


def test_a_teacher_without_a_tail_gives_nothing_to_other_classes_in_logs() -> None:
    one = top(np.array([[0.5, 0.3, 0.2, 0.0]]), 2, tail=False)
    other = top(np.array([[0.25, 0.25, 0.25, 0.25]]), 1)
    found = average([one, other], [0.5, 0.5], 4, "log")
    assert sorted(found.class_id[0].tolist()) == [0, 1]
    assert np.isneginf(found.log_tail[0])


@pytest.mark.parametrize("space", ["probability", "log"])
def test_teachers_that_say_the_same_are_one_teacher(space: Space) -> None:
    p = softmax(np.random.default_rng(0).normal(size=(5, 9)))
    rows = top(p, 4)
    found = average([rows, rows, rows], [0.2, 0.3, 0.5], 9, space)
    assert found.class_id.tolist() == rows.class_id.tolist()
    np.testing.assert_allclose(found.log_prob, rows.log_prob, rtol=1e-5)
    np.testing.assert_allclose(found.log_tail, rows.log_tail, rtol=1e-5)
    assert found.count is None


def test_stored_types_and_rounded_values_count_as_their_softened_rows() -> None:
    """float16 values do not add up to one; `soften` makes them."""
    p = softmax(4 * np.random.default_rng(1).normal(size=(6, 30)))
    exact = top(p, 7)
    stored = Rows(
        exact.sample_id,
        exact.class_id.astype(np.uint16),
        exact.log_prob.astype(np.float16),
        exact.log_tail.astype(np.float32),
    )
    found = average([stored], [1.0], 30, "probability")
    sparse = SparseLogits(
        *(torch.from_numpy(part.astype(kind)) for part, kind in (
            (stored.class_id, np.int64), (stored.log_prob, np.float32), (stored.log_tail, np.float32)
        ))
    )  # fmt: skip
    np.testing.assert_allclose(np.exp(found.log_prob), soften(sparse, 30).prob.numpy(), rtol=1e-5)


def test_the_average_of_draws_has_the_averaged_teachers_as_its_mean() -> None:
    drawn, classes, times = torch.Generator().manual_seed(0), 12, 20_000
    logits = 2 * torch.randn(2, 1, classes, generator=drawn)
    parts = []
    for teacher in logits:
        rows = sample_tail(teacher.expand(times, -1), 1, 2, torch.rand(times, generator=drawn, dtype=torch.float64))
        parts.append(Rows(np.arange(times), *(part.numpy() for part in rows.parts)))
    found = dense(average(parts, [0.25, 0.75], classes, "probability"), classes)
    wanted = averaged([p.double().numpy() for p in logits.softmax(-1)], [0.25, 0.75], "probability")
    error = found.std(axis=0) / np.sqrt(times)
    assert (abs(found.mean(axis=0) - wanted[0]) < 5 * error + 1e-6).all()
    assert (error > 0).any()
