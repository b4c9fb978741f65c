import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_cli.errors import DamagedError, MismatchError
from distill_cli.files import canonical_json, write_atomic
from distill_cli.store.plan import Dealing, Plan, read_manifest, read_plan
from distill_cli.store.writer import StoreWriter

MakePlan = Callable[..., Plan]
FillStore = Callable[..., StoreWriter]


@pytest.fixture
def store(tmp_path: Path, make_plan: MakePlan, fill_store: FillStore) -> Path:
    fill_store(tmp_path, make_plan())
    return tmp_path


def _edit(path: Path, **changes: object) -> None:
    """Change fields of a JSON file as a program would: its form stays canonical."""
    path.write_text(canonical_json({**json.loads(path.read_text()), **changes}, indent=2) + "\n")


def test_a_plan_reads_back_equal(tmp_path: Path, make_plan: MakePlan) -> None:
    plan = make_plan(views=3, seed=2**62)
    write_atomic(tmp_path / "plan.json", plan.text)
    assert read_plan(tmp_path) == plan
    assert read_plan(tmp_path).sha256 == plan.sha256


def test_a_class_name_that_is_not_unicode_has_a_place_in_a_plan(tmp_path: Path, make_plan: MakePlan) -> None:
    """A folder's name is any bytes; Python hands them over as surrogates."""
    plan = make_plan(teacher={"num_classes": 1, "classes": [os.fsdecode(b"caf\xe9")]})
    write_atomic(tmp_path / "plan.json", plan.text)
    assert read_plan(tmp_path) == plan


@pytest.mark.parametrize("change", [{"samples": 11}, {"seed": 1}, {"num_classes": 6}, {"software": {"torch": "2.8.0"}}])
def test_every_field_is_part_of_the_identity(make_plan: MakePlan, change: dict[str, object]) -> None:
    assert make_plan(**change).sha256 != make_plan().sha256


def test_a_plan_counts_its_shards_and_rows(make_plan: MakePlan) -> None:
    plan = make_plan(samples=9, shard_rows=4, views=2)
    assert (plan.shards, plan.rows) == (3, 18)
    assert list(plan.every_shard()) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_differences_name_the_inner_field_and_both_values(make_plan: MakePlan) -> None:
    other = make_plan(software={"torch": "2.8.0"}, transform={"image_size": 32, "mean": (0.5, 0.5, 0.5)})
    assert make_plan().differences(other) == ["software.torch: 2.7.0, 2.8.0"]
    assert make_plan().differences(make_plan()) == []


def test_a_folder_without_a_plan_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(
        DamagedError, match=r'no plan.json; this is not a store; "distill teacher-logits --out .*" makes'
    ):
        read_plan(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[1]", "not of the format distill-store"),
        ('{"format": "zarr"}', "not of the format distill-store"),
        ('{"format": "distill-store", "version": 1, "colour": 3}', "not a plan"),
        ('{"format": "distill-store", "version": 1}', "not a plan"),
    ],
)
def test_what_is_no_plan_is_damaged(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(DamagedError, match=message):
        read_plan(tmp_path)


def test_a_plan_edited_by_hand_is_damaged(store: Path) -> None:
    path = store / "plan.json"
    path.write_text(path.read_text().replace('  "seed"', '    "seed"'))
    with pytest.raises(DamagedError, match="was edited by hand"):
        read_plan(store)


def test_a_plan_edited_by_a_program_parts_from_its_manifest(store: Path) -> None:
    _edit(store / "plan.json", seed=1)
    with pytest.raises(DamagedError, match=r"belongs to store .*, the plan beside it to"):
        read_manifest(store, read_plan(store))


@pytest.mark.parametrize("change", [{"shard_rows": 0}, {"samples": "ten"}, {"teacher": []}, {"views": None}])
def test_values_that_no_plan_has_are_damage(store: Path, change: dict[str, object]) -> None:
    (store / "manifest.json").unlink()
    _edit(store / "plan.json", **change)
    with pytest.raises(DamagedError):
        read_manifest(store, read_plan(store))


@pytest.mark.parametrize("name", ["plan.json", "manifest.json"])
def test_a_newer_format_is_told_apart_from_damage(store: Path, name: str) -> None:
    plan = read_plan(store)
    _edit(store / name, version=2)
    with pytest.raises(MismatchError, match="store version 2, this program reads version 1; update distill") as caught:
        read_manifest(store, read_plan(store) if name == "plan.json" else plan)
    assert caught.value.exit_code == 3


def test_an_unfinished_store_counts_what_is_missing(tmp_path: Path, make_plan: MakePlan, fill_store: FillStore) -> None:
    writer = fill_store(tmp_path, make_plan(views=2), only=4)
    with pytest.raises(DamagedError) as caught:
        read_manifest(tmp_path, writer.plan)
    assert f'{tmp_path}: 2 of 6 shards missing; run the same "distill teacher-logits" command again' in str(
        caught.value
    )
    assert caught.value.exit_code == 4


def test_a_manifest_of_another_store_is_damage(store: Path, make_plan: MakePlan) -> None:
    with pytest.raises(DamagedError, match="belongs to store"):
        read_manifest(store, make_plan(seed=1))


def test_a_manifest_reads_back_as_it_was_written(tmp_path: Path, make_plan: MakePlan, fill_store: FillStore) -> None:
    writer = fill_store(tmp_path, make_plan(), np.zeros(10, np.int64), skip=(3,))
    manifest = read_manifest(tmp_path, writer.plan)
    assert manifest == writer.finish()
    assert (manifest.rows, manifest.skipped) == (9, (3,))


@pytest.mark.parametrize(
    "change", [{"shards": []}, {"shards": 3}, {"shards": [{"path": "x"}]}, {"skipped": None}, {"skipped": ["a"]}]
)
def test_a_manifest_that_does_not_cover_its_plan_is_damage(store: Path, change: dict[str, object]) -> None:
    _edit(store / "manifest.json", **change)
    with pytest.raises(DamagedError):
        read_manifest(store, read_plan(store))


def test_a_manifest_lists_each_shard_once_in_order(store: Path) -> None:
    plan = read_plan(store)
    listed = [entry.path for entry in read_manifest(store, plan).shards]
    assert listed == [f"view-000/shard-{shard:05d}.h5" for shard in range(plan.shards)]


@given(st.integers(1, 3000), st.integers(1, 4000))
def test_dealing_gives_each_sample_one_place(samples: int, shard_rows: int) -> None:
    dealing = Dealing(samples, shard_rows)
    dealt = np.concatenate([dealing.sample_ids(shard) for shard in range(-(-samples // shard_rows))])
    assert np.array_equal(np.sort(dealt), np.arange(samples))
    assert np.array_equal(dealing.place(dealt), np.arange(samples))


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
