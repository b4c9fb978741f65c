import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_cli.store.dealing import Dealing, Following


@given(st.integers(1, 3000), st.integers(1, 4000))
def test_dealing_gives_each_sample_one_place(samples: int, shard_rows: int) -> None:
    dealing = Dealing(samples, shard_rows)
    dealt = np.concatenate([dealing.sample_ids(shard) for shard in range(-(-samples // shard_rows))])
    assert np.array_equal(np.sort(dealt), np.arange(samples))
    assert np.array_equal(dealing.place(dealt), np.arange(samples))


SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=20)


@given(
    st.one_of(st.builds(Dealing, st.integers(1, 3000), st.integers(1, 4000)), st.builds(Following, SIZES.map(tuple)))
)
def test_shards_are_the_runs_of_places(dealing: Dealing | Following) -> None:
    places = [dealing.places(shard) for shard in range(dealing.shards)]
    assert [place for shard in places for place in shard] == list(range(places[-1].stop))
    assert max(map(len, places)) == min(dealing.largest, places[-1].stop)
    for shard, each in enumerate(places):
        ids = dealing.sample_ids(shard)
        assert dealing.place(ids).tolist() == list(each)
        assert set(dealing.shard_of(np.array(each)).tolist()) == {shard}


@given(SIZES)
def test_shards_that_follow_have_the_samples_in_their_order(sizes: list[int]) -> None:
    following = Following(tuple(sizes))
    dealt = [following.sample_ids(shard).tolist() for shard in range(following.shards)]
    assert [len(ids) for ids in dealt] == sizes
    assert [sample for ids in dealt for sample in ids] == list(range(sum(sizes)))


@given(st.integers(2**31, 2**32), st.integers(0, 1000))
def test_dealing_is_exact_for_billions_of_samples(samples: int, shard: int) -> None:
    dealing = Dealing(samples, 1000)
    ids = dealing.sample_ids(shard)
    assert np.array_equal(dealing.place(ids), np.arange(1000) + 1000 * shard)
    assert ids.min() >= 0
    assert ids.max() < samples


def _unfairness(samples: int, shards: int, labels: np.ndarray) -> float:
    """How far any class of any shard is from its share, in standard deviations of a random draw (at least one row)."""
    shard = Dealing(samples, -(-samples // shards)).place(np.arange(samples)) // -(-samples // shards)
    counts = np.zeros((shard.max() + 1, labels.max() + 1))
    np.add.at(counts, (shard, labels), 1)
    expected = np.outer(np.bincount(shard), np.bincount(labels)) / samples
    return float((np.abs(counts - expected) / np.sqrt(expected + 1)).max())


@given(st.integers(100, 20_000), st.integers(2, 20), st.integers(2, 100))
def test_a_shard_is_a_fair_sample_of_a_sorted_listing(samples: int, shards: int, classes: int) -> None:
    assert _unfairness(samples, shards, np.arange(samples) * classes // samples) <= 6


@given(st.integers(100, 20_000), st.integers(2, 20), st.integers(2, 100))
def test_a_shard_is_a_fair_sample_of_a_periodic_listing(samples: int, shards: int, classes: int) -> None:
    assert _unfairness(samples, shards, np.arange(samples) % classes) <= 6


@pytest.mark.parametrize(("samples", "classes"), [(1000, 21), (50_000, 144), (9973, 144)])
def test_no_period_meets_the_dealing(samples: int, classes: int) -> None:
    """What multiples of the golden section deal badly: 48 rows of one class in a shard, where 5 are its share."""
    assert _unfairness(samples, 10, np.arange(samples) % classes) <= 6


def test_a_dealing_of_astronomically_many_samples_costs_nothing() -> None:
    dealing = Dealing(2**63 - 1, 2**62)
    ids = np.array([0, 5, 2**63 - 2])
    assert np.array_equal(dealing._walk(dealing.place(ids), range(3, -1, -1)), ids)
    assert len(dealing.places(1)) == 2**62 - 1
