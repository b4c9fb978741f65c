import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from distill_cli.store.codecs import compact
from distill_cli.store.codecs.numbers import CENTRES, SLACK
from distill_cli.store.rows import RowFormat, Rows

Datasets = Mapping[str, NDArray[Any]]


def _rows(rng: np.random.Generator, n: int, form: RowFormat, spread: float = 3.0, zeros: bool = False) -> Rows:
    """The top of softmax rows, some of them certain; with `zeros`, classes of probability 0 among them."""
    logits = rng.normal(0, spread, (n, min(form.num_classes, 3 * form.width + 50))) * rng.uniform(0.3, 3, (n, 1))
    if zeros:
        logits[rng.random(logits.shape) < 0.3] = -np.inf
        logits[:, 0] = 0
    classes = np.sort(rng.permuted(np.tile(np.arange(form.num_classes), (n, 1)), axis=1)[:, : logits.shape[1]], axis=1)
    log_prob = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    order = np.argsort(-log_prob, axis=1, kind="stable")
    top, rest = order[:, : form.width], order[:, form.width :]
    count = rng.integers(1, form.width + 1, n) if form.ragged else None
    ids, values = np.take_along_axis(classes, top, axis=1), np.take_along_axis(log_prob, top, axis=1)
    log_tail = np.logaddexp.reduce(np.take_along_axis(log_prob, rest, axis=1), axis=1, initial=-np.inf)
    if count is not None:
        padding = np.arange(form.width) >= count[:, None]
        log_tail = np.logaddexp.reduce(np.where(padding, values, -np.inf), axis=1, initial=-np.inf, where=padding)
        ids[padding], values[padding] = 0, -np.inf
    return Rows(np.arange(n), ids, values.astype(np.float32), log_tail.astype(np.float32), count)


def _decode(datasets: Datasets, n: int, form: RowFormat, at: Any = None) -> Rows:
    at = np.arange(n) if at is None else np.asarray(at, np.int64)
    return Rows(at, *compact.take([(compact.open(datasets, n, form), at)], form))


def _check(rows: Rows, back: Rows, form: RowFormat) -> None:
    """Classes exactly; values within their cells; order, padding and types."""
    scale = 9 << form.bits - 3
    assert back.class_id.dtype == (np.uint16 if form.num_classes < 2**16 else np.uint32)
    assert (back.log_prob.dtype, back.log_tail.dtype) == (np.float32, np.float32)
    assert (back.count is None) == (not form.ragged)
    assert (back.log_prob[:, :-1] >= back.log_prob[:, 1:]).all()
    for row in range(len(rows)):
        count = form.width if rows.count is None else int(rows.count[row])
        if back.count is not None:
            assert back.count[row] == count
        found = dict(zip(back.class_id[row, :count].tolist(), back.log_prob[row, :count].tolist(), strict=True))
        wanted = dict(zip(rows.class_id[row, :count].tolist(), rows.log_prob[row, :count].tolist(), strict=True))
        assert found.keys() == wanted.keys()
        for place, (name, value) in enumerate(wanted.items()):
            exact, level = (scale * np.exp(0.4 * number) for number in (value, found[name]))
            assert abs(exact - level) <= (SLACK if place == 0 else 1.5 if exact < 1.5 else 1) + 1e-3
            assert (found[name] == -np.inf) == (value == -np.inf)
        assert (back.class_id[row, count:] == 0).all()
        assert (back.log_prob[row, count:] == -np.inf).all()
    finite = rows.log_tail > -np.inf
    assert np.array_equal(finite, back.log_tail > -np.inf)
    wanted_tail, found_tail = np.maximum(rows.log_tail[finite], -4095 / 128), back.log_tail[finite]
    assert np.abs(wanted_tail - found_tail).max(initial=0) <= 0.5 / 128 + 1e-5


@st.composite
def _drawn(draw: st.DrawFn) -> tuple[RowFormat, Rows]:
    classes = draw(st.sampled_from([2, 3, 10, 100, 1000]))
    width = draw(st.integers(1, min(classes, 130)))
    form = RowFormat(classes, width, draw(st.booleans()), draw(st.integers(4, 10)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return form, _rows(
        rng, draw(st.integers(0, 20)), form, draw(st.sampled_from([0.01, 1.0, 4.0, 30.0])), draw(st.booleans())
    )


@given(_drawn())
@settings(max_examples=150, deadline=None)
def test_any_rows_come_back(drawn: tuple[RowFormat, Rows]) -> None:
    form, rows = drawn
    _check(rows, _decode(compact.encode(rows, form), len(rows), form), form)


@pytest.mark.parametrize(("classes", "width"), [(2, 2), (100, 100), (1000, 1000), (70_000, 40)])
@pytest.mark.parametrize("ragged", [False, True])
def test_all_classes_and_many(classes: int, width: int, ragged: bool) -> None:
    form = RowFormat(classes, width, ragged)
    rows = _rows(np.random.default_rng(0), 6, form)
    _check(rows, _decode(compact.encode(rows, form), 6, form), form)


def test_a_long_row() -> None:
    form = RowFormat(20_000, 20_000)
    rows = _rows(np.random.default_rng(0), 1, form, spread=1.0)
    back = _decode(compact.encode(rows, form), 1, form)
    assert np.array_equal(np.sort(back.class_id[0]), np.arange(20_000))


@pytest.mark.parametrize("ragged", [False, True])
def test_rows_of_many_shards_in_any_order(ragged: bool) -> None:
    form, rng, parts, wanted = RowFormat(1000, 20, ragged), np.random.default_rng(1), [], []
    for n in (1, 300, 2, 40, 1):
        datasets = compact.encode(_rows(rng, n, form), form)
        at = rng.integers(0, n, 25)
        parts.append((compact.open(datasets, n, form), at))
        wanted.append(_decode(datasets, n, form, at))
    found = compact.take(parts, form)
    for place, name in enumerate(("class_id", "log_prob", "log_tail", "count")):
        if name != "count" or ragged:
            assert np.array_equal(found[place], np.concatenate([getattr(one, name) for one in wanted])), name


def test_no_rows() -> None:
    form = RowFormat(1000, 20)
    datasets = compact.encode(_rows(np.random.default_rng(0), 0, form), form)
    assert compact.take([(compact.open(datasets, 0, form), np.zeros(0, np.int64))], form)[0].shape == (0, 20)
    assert compact.take([], form)[1].shape == (0, 20)


def test_equal_rows_have_equal_bytes() -> None:
    form = RowFormat(1000, 50)
    first, second = (compact.encode(_rows(np.random.default_rng(5), 200, form), form) for _ in range(2))
    assert list(first) == list(compact.NAMES)
    assert all(first[name].tobytes() == second[name].tobytes() for name in compact.NAMES)


def test_float16_rows_are_taken() -> None:
    form = RowFormat(1000, 50)
    rows = _rows(np.random.default_rng(5), 20, form)
    half = Rows(rows.sample_id, rows.class_id.astype(np.uint16), rows.log_prob.astype(np.float16), rows.log_tail)
    _check(half, _decode(compact.encode(half, form), 20, form), form)


def test_a_class_twice_is_refused() -> None:
    rows = Rows(np.zeros(1), np.array([[3, 3]]), np.log(np.array([[0.5, 0.4]])), np.log(np.array([0.1])))
    with pytest.raises(ValueError, match="class twice"):
        compact.encode(rows, RowFormat(10, 2))


def _imagenet_like(n: int) -> tuple[NDArray[np.float64], Rows]:
    """(Log-probabilities, top 100) of rows as flat and as certain as those of a small ImageNet teacher."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (n, 1000)) + rng.gumbel(0, 0.4, (n, 1000))
    logits[np.arange(n), rng.integers(0, 1000, n)] += rng.uniform(3, 10, n)
    log_prob = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    order = np.argsort(-log_prob, axis=1)
    values = np.take_along_axis(log_prob, order, axis=1)
    tail = np.logaddexp.reduce(values[:, 100:], axis=1)
    return log_prob, Rows(np.arange(n), order[:, :100], values[:, :100], tail)


def _divergence(log_prob: NDArray[np.float64], rows: Rows, temperature: float) -> float:
    others = log_prob.shape[1] - rows.class_id.shape[1]
    student = np.repeat(((rows.log_tail - np.log(others)) / temperature)[:, None], log_prob.shape[1], axis=1)
    np.put_along_axis(student, rows.class_id.astype(np.int64), rows.log_prob / temperature, axis=1)
    student -= np.logaddexp.reduce(student, axis=1, keepdims=True)
    teacher = log_prob / temperature - np.logaddexp.reduce(log_prob / temperature, axis=1, keepdims=True)
    return float((np.exp(teacher) * (teacher - student)).sum(axis=1).mean())


def test_the_default_loses_less_than_1e_4_nats_at_any_temperature() -> None:
    form = RowFormat(1000, 100)
    log_prob, rows = _imagenet_like(2000)
    datasets = compact.encode(rows, form)
    back = _decode(datasets, 2000, form)
    for temperature in (1, 2, 4):
        assert _divergence(log_prob, back, temperature) - _divergence(log_prob, rows, temperature) < 1e-4
    assert sum(data.nbytes for data in datasets.values()) / 2000 < 120
    assert np.abs(np.exp(back.log_prob).sum(axis=1) + np.exp(back.log_tail) - 1).max() < 6e-3


def _reference(datasets: Datasets, row: int, form: RowFormat) -> tuple[list[tuple[int, int]], int]:
    """([(class, level or -1 for what the others leave)] by class, tail) of one row, as docs/store-format.md has it."""
    sizes, tables = datasets["symbols"].tolist(), []
    for end, size in zip(np.cumsum(sizes).tolist(), sizes, strict=True):
        tables.append(datasets["freq"][end - size : end].tolist())
    start, length = int(datasets["length"][:row].sum(dtype=np.int64)), int(datasets["length"][row])
    content = datasets["rows"][start : start + length].tobytes()
    words = (length - 5) // 4 if length > 8 else 0
    state = int.from_bytes(content[4 * words :], "little")

    def raw(bits: int) -> int:
        nonlocal state, words
        number, state = state % 2**bits, state >> bits
        return fill(number)

    def fill(number: int) -> int:
        nonlocal state, words
        if state < 2**31 and words:
            words -= 1
            state = state * 2**32 + int.from_bytes(content[4 * words : 4 * words + 4], "little")
        return number

    def number(context: int) -> int:
        nonlocal state
        freq, symbol, first = tables[datasets["map"][context]], 0, 0
        while first + freq[symbol] <= state % 2048:
            first, symbol = first + freq[symbol], symbol + 1
        state = freq[symbol] * (state // 2048) + state % 2048 - first
        if symbol < 32:
            return fill(symbol)
        bits = (symbol - 32) // 4 + 3
        low, state = state % 2**bits, state >> bits
        return fill((4 + symbol % 4) * 2**bits + low)

    def symbol_of(number: int) -> int:
        high = number.bit_length() - 1
        return number if number < 32 else 4 * high + 12 + (number >> high - 2) % 4

    count = number(0) + 1 if form.ragged else form.width
    least, class_id, size, before, entries = number(1), -1, 1, 1, []
    group = min(symbol_of(least), 31)
    for _ in range(count):
        gap = number(2 + 3 * size + before)
        level = number(11 + group)
        class_id += gap + 1
        entries.append((class_id, least + level - 1 if level else -1))
        mean = form.num_classes // form.width
        small = form.num_classes // (4 * form.width)
        size, before = sum(symbol_of(gap) > symbol_of(limit) for limit in (small, mean)), size
    return entries, number(43 + group) * 64 + raw(6)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("classes", "width"), [(1000, 100), (30, 30), (70_000, 5), (10, 1)])
def test_a_scalar_decoder_reads_the_same(classes: int, width: int, ragged: bool) -> None:
    form = RowFormat(classes, width, ragged)
    datasets = compact.encode(_rows(np.random.default_rng(3), 30, form), form)
    back, scale = _decode(datasets, 30, form), 9 << form.bits - 3
    for row in range(30):
        entries, tail = _reference(datasets, row, form)
        count = width if back.count is None else int(back.count[row])
        assert sorted(back.class_id[row, :count].tolist()) == [class_id for class_id, _ in entries]
        expected = sorted(entries, key=lambda entry: (entry[1] >= 0, -entry[1], entry[0]))
        assert back.class_id[row, :count].tolist() == [class_id for class_id, _ in expected]
        assert back.log_tail[row] == (np.float32((64 - tail) / 128) if tail >= 64 else -np.inf)
        for (_, level), value in zip(expected, back.log_prob[row], strict=False):
            if level > CENTRES:
                assert value == np.float32(np.log(level / scale) / 0.4)


def _damage(rng: np.random.Generator, datasets: Datasets) -> dict[str, NDArray[Any]]:
    out = {name: data.copy() for name, data in datasets.items()}
    name = str(rng.choice(compact.NAMES, p=[0.1, 0.1, 0.1, 0.1, 0.1, 0.5]))
    kind = rng.integers(0, 4)
    if kind == 0:
        out[name] = out[name][: rng.integers(0, len(out[name]) + 1)]
    elif kind == 1:
        out[name] = rng.integers(0, 256, out[name].nbytes, np.uint8).view(out[name].dtype)
    elif kind == 2 and len(out[name]):
        out[name][rng.integers(0, len(out[name]), 3)] = rng.integers(0, 256, 3)
    else:
        order = rng.permutation(len(out["length"]))
        out["length"] = out["length"][order]
    return out


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("classes", "width"), [(1000, 10), (70_000, 3), (5, 5)])
def test_damage_is_refused_or_gives_rows(classes: int, width: int, ragged: bool) -> None:
    form, rng = RowFormat(classes, width, ragged), np.random.default_rng(0)
    datasets = compact.encode(_rows(rng, 12, form), form)
    seen = 0
    for _ in range(600):
        try:
            back = _decode(_damage(rng, datasets), 12, form)
        except ValueError:
            continue
        seen += 1
        assert back.class_id.shape == back.log_prob.shape == (12, width)
        assert back.class_id.max() < classes
        assert not np.isnan(back.log_prob).any()
        assert not np.isnan(back.log_tail).any()
        assert back.count is None or ((back.count >= 1) & (back.count <= width)).all()
    assert seen > 20


@given(st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_random_bytes_in_a_row(seed: int) -> None:
    form, rng = RowFormat(1000, 30), np.random.default_rng(seed)
    datasets = dict(compact.encode(_rows(np.random.default_rng(0), 20, form), form))
    datasets["length"] = rng.integers(0, 200, 20).astype("u1")
    datasets["rows"] = rng.integers(0, 256, int(datasets["length"].sum()), np.uint8)
    with contextlib.suppress(ValueError):
        assert _decode(datasets, 20, form).class_id.max() < 1000
