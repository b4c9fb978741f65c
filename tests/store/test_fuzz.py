"""100,000 damaged shards: each is refused in one line, or gives rows of the right shape."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from distill_cli.errors import DamagedError, MismatchError
from distill_cli.store import shard as shards
from distill_cli.store.codecs import CODECS
from distill_cli.store.plan import Plan
from distill_cli.store.rows import Taken
from distill_cli.store.shard import DTYPES, HEADER_BYTES, check_rows, encode, open_shard

pytestmark = pytest.mark.slow
KINDS: list[dict[str, Any]] = [{}, {"keep_mass": 0.9}, {"sample": 2, "top_k": 1}]
KINDS += [{"codec": "compact", "bits": 8, **kind} for kind in KINDS]
CASES = 100_000
PATH = Path("shard.h5")
CRC = np.arange(3, dtype=np.uint32)


Shards = list[tuple[Plan, bytes]]


@pytest.fixture(scope="module")
def whole(make_plan: Callable[..., Plan], make_rows: Callable[..., Any]) -> Shards:
    """A shard of each kind, three of whose four samples have rows."""
    plans = [make_plan(**kind) for kind in KINDS]
    rows = [make_rows(plan, 0, 0, skip=(int(plan.dealing.sample_ids(0)[1]),)) for plan in plans]
    return [(plan, encode(plan, 0, 0, some, CRC)) for plan, some in zip(plans, rows, strict=True)]


def _take(plan: Plan, opened: object, at: NDArray[np.int64]) -> Taken:
    """As the store's reader does: what a codec finds in a row is damage."""
    try:
        return CODECS[plan.codec].take([(opened, at)], plan.form)
    except ValueError as error:
        raise DamagedError(str(error)) from error


def _rows(plan: Plan, content: bytes) -> bool:
    """Read some bytes as a shard; gives whether they have rows: if not, it was an error of one line."""
    message = ""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards, "_map", lambda _: content)
            opened = open_shard(PATH, plan, 0, 0)
        check_rows(PATH, opened, plan, 0)
        at = np.arange(len(opened))
        class_id, log_prob, log_tail, count = _take(plan, opened.rows, at)
    except (DamagedError, MismatchError) as error:
        message = str(error)
    if message:
        assert "\n" not in message
        assert len(message) < 2000
        return False
    assert class_id.shape == log_prob.shape == (len(at), plan.form.width)
    assert (log_tail.shape, count is None) == ((len(at),), not plan.form.ragged)
    assert class_id.size == 0 or class_id.max() < plan.num_classes
    return True


def _mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """One to four changes, most of them in the first line; now and then another length."""
    changed = bytearray(content)
    used = len(content[:HEADER_BYTES].rstrip())
    for _ in range(rng.integers(1, 5)):
        place = int(rng.integers(0, used if rng.random() < 0.7 else len(changed)))
        kind = rng.integers(0, 5)
        if kind == 0:
            changed[place] = int(rng.integers(0, 256))
        elif kind == 1:
            changed[place] ^= 1 << int(rng.integers(0, 8))
        elif kind == 2:
            changed[place] = int(rng.choice(list(b'0123456789-.,:[]{}"eNtf')))
        elif kind == 3:
            length = int(rng.integers(1, 9))
            changed[place : place + length] = rng.choice(list(b"0123456789"), length).tobytes()[::8]
        else:
            source = int(rng.integers(0, len(changed) - 8))
            changed[place : place + 8] = changed[source : source + 8]
    if rng.random() < 0.05:
        del changed[int(rng.integers(0, len(changed))) :]
    return bytes(changed)


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_no_damage_is_more_than_an_error(whole: Shards, number: int) -> None:
    (plan, content), rng = whole[number], np.random.default_rng(0)
    assert _rows(plan, content)
    fine = sum(_rows(plan, _mutated(content, rng)) for _ in range(CASES // len(KINDS)))
    assert 0 < fine < CASES // len(KINDS)


NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70), st.integers(-10, 5000), st.sampled_from([0, 1, 4, 1024, 2**31, 2**32, 2**62, 2**63]),
    st.floats(), st.booleans(), st.text(max_size=4), st.none(),
)  # fmt: skip
LAYOUTS = st.one_of(
    NUMBERS,
    st.tuples(st.sampled_from([*DTYPES, "<f8", "|O", ">u4", "<U4"]) | NUMBERS, st.lists(NUMBERS, max_size=3), NUMBERS),
    st.dictionaries(st.text(max_size=3), NUMBERS, max_size=3),
)


@settings(max_examples=3000)
@given(data=st.data())
def test_no_first_line_is_more_than_an_error(whole: Shards, data: st.DataObject) -> None:
    plan, content = data.draw(st.sampled_from(whole))
    header = json.loads(content[:HEADER_BYTES])
    names = st.sampled_from([*header["arrays"], "another"])
    if data.draw(st.booleans()):
        header["arrays"].update(data.draw(st.dictionaries(names, LAYOUTS, min_size=1, max_size=3)))
    else:
        header[data.draw(st.sampled_from([*header, "another"]))] = data.draw(NUMBERS | LAYOUTS)
    line = json.dumps(header).encode()[: HEADER_BYTES - 1].ljust(HEADER_BYTES - 1) + b"\n"
    _rows(plan, line + content[HEADER_BYTES:])
