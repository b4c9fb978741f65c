from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_cli.store.codecs import exact
from distill_cli.store.rows import RowFormat, Rows

Arrays = dict[str, np.ndarray]
RAGGED = RowFormat(num_classes=8, width=3, ragged=True)


@st.composite
def _drawn(draw: st.DrawFn) -> tuple[RowFormat, Rows]:
    """Rows of any size, with tails of -inf among others; ragged ones with padding behind their entries."""
    n, width, ragged = draw(st.integers(0, 40)), draw(st.integers(1, 8)), draw(st.booleans())
    classes = draw(st.sampled_from([8, 1000, 65_535, 65_536, 100_000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    log_tail = np.where(rng.random(n) < 0.3, -np.inf, -rng.exponential(5, n)).astype(np.float32)
    class_id, log_prob = rng.integers(0, classes, (n, width)), -rng.exponential(5, (n, width)).astype(np.float16)
    class_id[: n // 2] = classes - 1
    count = rng.integers(1, width + 1, n) if ragged else None
    if count is not None:
        padding = np.arange(width) >= count[:, None]
        class_id[padding], log_prob[padding] = 0, -np.inf
    return RowFormat(classes, width, ragged), Rows(np.arange(n), class_id, log_prob, log_tail, count)


def _opened(arrays: Arrays, n: int, form: RowFormat) -> exact.Opened:
    opened = exact.open(arrays, n, form)
    exact.check(opened, form)
    return opened


@given(_drawn(), st.data())
def test_any_rows_come_back_bit_by_bit(drawn: tuple[RowFormat, Rows], data: st.DataObject) -> None:
    """… from one shard or two, in any order, as often as asked."""
    form, rows = drawn
    opened = _opened(exact.encode(rows, form), len(rows), form)
    places = st.lists(st.integers(0, len(rows) - 1), max_size=50) if len(rows) else st.just([])
    one, other = (np.array(data.draw(places), np.int64) for _ in range(2))
    found = exact.take([(opened, one), (opened, other)], form)
    at = np.concatenate([one, other])
    for name, read in zip(("class_id", "log_prob", "log_tail", "count"), found, strict=True):
        written = getattr(rows, name)
        assert (read is None) == (written is None)
        assert read is None or np.array_equal(read, written[at]), name
    assert [column.dtype for column in found[:3]] == [exact.class_dtype(form), np.float16, np.float32]


def test_nothing_is_taken_of_no_shards() -> None:
    class_id, log_prob, log_tail, count = exact.take([], RAGGED)
    assert (class_id.shape, log_prob.shape, log_tail.shape) == ((0, 3), (0, 3), (0,))
    assert count is not None
    assert count.shape == (0,)


@pytest.mark.parametrize(("classes", "dtype"), [(65_535, "<u2"), (65_536, "<u4")])
def test_class_ids_are_wide_from_65536_classes_on(classes: int, dtype: str) -> None:
    assert exact.class_dtype(RowFormat(classes, 1)) == np.dtype(dtype)


def test_padding_is_not_written() -> None:
    rows = Rows(np.arange(2), np.array([[4, 1, 0], [5, 0, 0]]), np.zeros((2, 3)), np.zeros(2), np.array([2, 1]))
    arrays = exact.encode(rows, RAGGED)
    assert arrays["count"].tolist() == [2, 1]
    assert arrays["class_id"].tolist() == [4, 1, 5]
    assert arrays["log_prob"].shape == (3,)


@pytest.fixture
def arrays() -> Arrays:
    """Of 4 rows of 2 of 5 classes, and of ragged ones: `count`."""
    return {
        "class_id": np.ones((4, 2), "<u2"),
        "log_prob": np.full((4, 2), -1, "<f2"),
        "log_tail": np.full(4, -np.inf, "<f4"),
    }


def test_an_array_that_is_missing_is_named(arrays: Arrays) -> None:
    for name in arrays:
        with pytest.raises(ValueError, match=f"{name} is missing"):
            _opened({other: array for other, array in arrays.items() if other != name}, 4, RowFormat(5, 2))


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("log_tail", np.zeros(4, "<f8"), r"log_tail is float64 \[4\], not float32 \[4\]"),
        ("log_tail", np.zeros(4, ">f4"), "log_tail is >f4"),
        ("log_tail", np.zeros(3, "<f4"), r"log_tail is float32 \[3\]"),
        ("class_id", np.zeros((4, 3), "<u2"), r"class_id is uint16 \[4, 3\]"),
        ("class_id", np.zeros((4, 2), "<u4"), "class_id is uint32"),
        ("class_id", np.full((4, 2), 5, "<u2"), "class_id has class 5 of 5"),
        ("log_prob", np.zeros(8, "<f2"), r"log_prob is float16 \[8\]"),
        ("log_prob", np.full((4, 2), np.nan, "<f2"), "log_prob has values that are no log-probabilities"),
        ("log_prob", np.full((4, 2), 0.5, "<f2"), "log_prob has values that are no log-probabilities"),
        ("log_tail", np.full(4, np.inf, "<f4"), "log_tail has values that are no log-probabilities"),
    ],
)
def test_what_rows_cannot_be_is_refused(arrays: Arrays, name: str, array: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _opened({**arrays, name: array}, 4, RowFormat(5, 2))


@pytest.mark.parametrize(
    ("count", "message"),
    [
        ([0, 2, 3, 3], "count has rows of 0 to 3 entries"),
        ([4, 2, 1, 1], "count has rows of 1 to 4 entries"),
        ([1, 1, 1, 1], r"class_id is uint16 \[8\], not uint16 \[4\]"),
        ([2, 2, 4], r"count is uint16 \[3\], not uint16 \[4\]"),
    ],
)
def test_counts_that_do_not_fit_are_refused(arrays: Arrays, count: list[int], message: str) -> None:
    flat = {name: array.reshape(-1) for name, array in arrays.items()}
    with pytest.raises(ValueError, match=message):
        _opened({**flat, "count": np.array(count, "<u2")}, 4, RAGGED)


def test_sums_of_float32_may_be_a_little_above_one(arrays: Arrays) -> None:
    arrays["log_tail"][:] = 1e-6
    _opened(arrays, 4, RowFormat(5, 2))


def test_narrow_and_wide_rows_are_the_same_bytes(make_plan: Callable[..., Any], make_rows: Callable[..., Rows]) -> None:
    plan = make_plan()
    rows = make_rows(plan, 0, 0)
    narrow = replace(rows, class_id=rows.class_id.astype("<u2"), log_prob=rows.log_prob.astype("<f2"))
    for name, array in exact.encode(rows, plan.form).items():
        assert array.tobytes() == exact.encode(narrow, plan.form)[name].tobytes()
