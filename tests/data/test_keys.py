import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_cli.data.keys import Keys, Numbers, first_double, keys_sha256
from distill_cli.files import sha256

FILE_NAMES = st.binary(min_size=1, max_size=12).map(lambda raw: raw.decode(errors="surrogateescape"))
"""Of any bytes, newlines and what is not UTF-8 included."""


@given(st.lists(FILE_NAMES, max_size=20))
def test_keys_are_the_names_that_they_were_made_of(names: list[str]) -> None:
    keys = Keys.of(names)
    assert (list(keys), len(keys)) == (names, len(names))
    assert keys[1:-1] == names[1:-1]
    assert pickle.loads(pickle.dumps(keys)) == keys
    assert [keys[-place - 1] for place in range(len(names))] == names[::-1]


@given(st.lists(FILE_NAMES, max_size=20))
def test_their_hash_is_that_of_the_names_joined_by_newlines(names: list[str]) -> None:
    """As it was when the first stores were written."""
    expected = sha256("\n".join(names).encode(errors="surrogateescape"))
    assert keys_sha256(Keys.of(names)) == keys_sha256(names) == expected


@given(st.lists(st.lists(FILE_NAMES, max_size=5), max_size=4))
def test_chained_keys_are_one_after_the_other(parts: list[list[str]]) -> None:
    names = [name for part in parts for name in part]
    assert Keys.chain([Keys.of(part) for part in parts]) == Keys.of(names)


@pytest.mark.parametrize("place", [2, -3])
def test_a_place_that_is_not_there_is_an_index_error(place: int) -> None:
    with pytest.raises(IndexError, match=f"{place} of 2 names"):
        Keys.of("ab")[place]


def test_a_place_may_be_of_numpy() -> None:
    assert Keys.of("ab")[np.int64(1)] == "b"  # type: ignore[call-overload]


def test_numbers_are_names() -> None:
    assert (list(Numbers(3)), Numbers(3)[1:], Numbers(12)[-1]) == (["0", "1", "2"], ["1", "2"], "11")
    assert keys_sha256(Numbers(3)) == sha256("0\n1\n2")


def test_a_name_that_is_there_twice_is_found() -> None:
    assert first_double("abcb") == "b"
    assert first_double("abc") is None
