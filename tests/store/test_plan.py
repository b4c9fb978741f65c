import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from distill_cli.errors import DamagedError, MismatchError
from distill_cli.files import canonical_json, sha256, write_atomic
from distill_cli.store.place import Folder
from distill_cli.store.plan import Generation, Plan, read_generations, read_plan, store_id

MakePlan = Callable[..., Plan]


def _write(folder: Path, plan: Plan, name: str = "plan.json", **changes: object) -> None:
    """Write a plan, with fields changed as a program would: its form stays canonical."""
    write_atomic(folder / name, canonical_json({**json.loads(plan.text), **changes}, indent=2) + "\n")


def test_a_plan_reads_back_equal(tmp_path: Path, make_plan: MakePlan) -> None:
    plan = make_plan(views=3, seed=2**62)
    write_atomic(tmp_path / "plan.json", plan.text)
    assert read_plan(Folder(tmp_path)) == plan
    assert read_plan(Folder(tmp_path)).sha256 == plan.sha256


def test_a_class_name_that_is_not_unicode_has_a_place_in_a_plan(tmp_path: Path, make_plan: MakePlan) -> None:
    """A folder's name is any bytes; Python hands them over as surrogates."""
    plan = make_plan(top_k=1, teacher={"num_classes": 1, "classes": [os.fsdecode(b"caf\xe9")]})
    write_atomic(tmp_path / "plan.json", plan.text)
    assert read_plan(Folder(tmp_path)) == plan


@pytest.mark.parametrize("change", [{"samples": 11}, {"seed": 1}, {"num_classes": 6}, {"software": {"torch": "2.8.0"}}])
def test_every_field_is_part_of_the_identity(make_plan: MakePlan, change: dict[str, object]) -> None:
    assert make_plan(**change).sha256 != make_plan().sha256


def test_a_plan_counts_its_shards_and_rows(make_plan: MakePlan) -> None:
    plan = make_plan(samples=9, shard_rows=4, views=2)
    assert (plan.shards, plan.rows) == (3, 18)
    assert list(plan.every_shard()) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_a_plan_of_dealt_samples_has_the_bytes_that_it_had_before_shards_could_follow_tars(make_plan: MakePlan) -> None:
    assert make_plan().sha256 == "cf810ab443af0a90776af9b6e0e6928b552577a7fa45a13027eac5a83f2a84e4"
    assert "shard_sizes" not in make_plan().text


def test_a_plan_of_shards_that_follow_tars_reads_back(tmp_path: Path, make_plan: MakePlan) -> None:
    plan = make_plan(shard_sizes=(3, 1, 6), shard_rows=6)
    write_atomic(tmp_path / "plan.json", plan.text)
    found = read_plan(Folder(tmp_path))
    assert (found.sha256, found.shards, found.rows) == (plan.sha256, 3, 10)
    assert found.differences(plan) == []
    assert make_plan(shard_rows=6).differences(plan) == ["shard_sizes: None, (3, 1, 6)"]


def test_differences_name_the_inner_field_and_both_values(make_plan: MakePlan) -> None:
    other = make_plan(software={"torch": "2.8.0"}, transform={"image_size": 32, "mean": (0.5, 0.5, 0.5)})
    assert make_plan().differences(other) == ["software.torch: 2.7.0, 2.8.0"]
    assert make_plan().differences(make_plan()) == []


def test_a_folder_without_a_plan_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(
        DamagedError, match=r'no plan.json; this is not a store; "distill teacher-logits --out .*" makes'
    ):
        read_plan(Folder(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[1]", "not of the format distill-store"),
        ('{"format": "zarr"}', "not of the format distill-store"),
        ('{"format": "distill-store", "version": 1}', "not a plan"),
    ],
)
def test_what_is_no_plan_is_damaged(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(DamagedError, match=message):
        read_plan(Folder(tmp_path))


def test_a_plan_with_a_field_that_is_not_known_is_of_a_newer_program(tmp_path: Path, make_plan: MakePlan) -> None:
    values = {**json.loads(make_plan().text), "colour": 3}
    write_atomic(tmp_path / "plan.json", canonical_json(values, indent=2) + "\n")
    with pytest.raises(
        MismatchError, match=r"plan\.json: says colour, which this program does not know; update distill"
    ):
        read_plan(Folder(tmp_path))


def test_a_plan_may_lack_a_field_that_has_a_default(tmp_path: Path, make_plan: MakePlan) -> None:
    values = json.loads(make_plan().text)
    del values["keep_mass"]
    text = canonical_json(values, indent=2) + "\n"
    write_atomic(tmp_path / "plan.json", text)
    plan = read_plan(Folder(tmp_path))
    assert plan == make_plan()
    assert plan.sha256 == sha256(text) != make_plan().sha256


def test_a_plan_edited_by_hand_is_damaged(tmp_path: Path, make_plan: MakePlan) -> None:
    (tmp_path / "plan.json").write_text(make_plan().text.replace('  "seed"', '    "seed"'))
    with pytest.raises(DamagedError, match="was edited by hand"):
        read_plan(Folder(tmp_path))


TEACHER = {"name": "vit", "num_classes": 5, "classes": None}


@pytest.mark.parametrize(
    "change",
    [
        {"shard_rows": 0}, {"samples": "ten"}, {"samples": True}, {"samples": 10.0}, {"samples": -1}, {"views": None},
        {"views": 2**63}, {"seed": -1}, {"teacher": []}, {"teacher": {}}, {"teacher": {**TEACHER, "classes": "abc"}},
        {"teacher": {**TEACHER, "classes": [1]}}, {"teacher": {**TEACHER, "num_classes": 2**40}}, {"data": {}},
        {"data": {"keys_sha256": 1, "labels_sha256": None}}, {"transform": None}, {"top_k": 0}, {"top_k": 6},
        {"keep_mass": 0.0}, {"keep_mass": 1}, {"keep_mass": 0.5, "sample": 3}, {"codec": "zip"}, {"bits": 8},
        {"codec": "compact"}, {"codec": "compact", "bits": 99},
        {"shard_sizes": []}, {"shard_sizes": 10}, {"shard_sizes": [4, 4]}, {"shard_sizes": [4, 4, 3]},
        {"shard_sizes": [4, 0, 4, 2]}, {"shard_sizes": [4, -4, 4, 4, 2]}, {"shard_sizes": [4, 4, 2.0]},
        {"shard_sizes": [4, 4, True, True]}, {"shard_sizes": [5, 5]}, {"shard_sizes": [[4], 4, 2]},
        {"shard_sizes": "4"}, {"shard_sizes": {"4": 4}}, {"shard_sizes": [2**63, 10 - 2**63]},
        {"top_k": 70_000, "teacher": {**TEACHER, "num_classes": 10**5}},
    ],
)  # fmt: skip
def test_values_that_no_plan_has_are_damage(tmp_path: Path, make_plan: MakePlan, change: dict[str, object]) -> None:
    _write(tmp_path, make_plan(), **change)
    with pytest.raises(DamagedError, match="not a plan"):
        read_plan(Folder(tmp_path))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"seed": 0', '"seed": NaN', "not JSON .*NaN is no number"),
        ('"seed": 0', '"seed": -Infinity', "not JSON .*-Infinity is no number"),
        ('"seed": 0', '"seed": 1, "seed": 0', "not JSON .*a name comes twice"),
        ('"seed": 0', '"seed": ' + "9" * 5000, "not JSON"),
        ('"seed": 0', '"seed": ' + "[" * 100_000, "not JSON"),
        ('"seed": 0', '"seed": 0e400', "not a plan"),
        ('"seed": 0', '"seed": 0 ', "was edited by hand"),
        ('"vit"', '"\xff"', "was edited by hand"),
    ],
)
def test_json_of_a_hostile_kind_is_damage(
    tmp_path: Path, make_plan: MakePlan, old: str, new: str, message: str
) -> None:
    (tmp_path / "plan.json").write_text(make_plan().text.replace(old, new))
    with pytest.raises(DamagedError, match=message):
        read_plan(Folder(tmp_path))


def test_a_newer_format_is_told_apart_from_damage(tmp_path: Path, make_plan: MakePlan) -> None:
    _write(tmp_path, make_plan(), version=2)
    with pytest.raises(MismatchError, match="store version 2, this program reads version 1; update distill") as caught:
        read_plan(Folder(tmp_path))
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("version", [True, 1.0, "1", None])
def test_a_version_is_a_whole_number(tmp_path: Path, make_plan: MakePlan, version: object) -> None:
    _write(tmp_path, make_plan(), version=version)
    with pytest.raises(MismatchError):
        read_plan(Folder(tmp_path))


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_what_is_no_file_is_not_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "plan.json"
    {"fifo": lambda: os.mkfifo(path), "folder": path.mkdir, "device": lambda: path.symlink_to("/dev/zero")}[kind]()
    with pytest.raises(DamagedError, match=r"plan.json: not a file"):
        read_plan(Folder(tmp_path))


# Generations.


def test_generations_count_their_views_through(tmp_path: Path, make_plan: MakePlan) -> None:
    plans = [make_plan(views=2), make_plan(views=3, first_view=2), make_plan(views=1, seed=7, top_k=2)]
    for name, plan in zip(("plan.json", "plan-001.json", "plan-002.json"), plans, strict=True):
        _write(tmp_path, plan, name)
    found = read_generations(Folder(tmp_path))
    assert [generation.plan for generation in found] == plans
    assert [generation.offset for generation in found] == [0, 2, 5]
    assert found[1].path(2, 0) == "view-004/shard-00000.h5"
    assert found[2].manifest_name == "manifest-002.json"
    assert found[1].plan.drawn == ((0, 2), (0, 3), (0, 4))


@pytest.mark.parametrize("change", [{"samples": 11}, {"num_classes": 6}, {"transform": {"image_size": 64}}])
def test_a_generation_of_another_teacher_or_other_data_is_damage(
    tmp_path: Path, make_plan: MakePlan, change: dict[str, object]
) -> None:
    _write(tmp_path, make_plan())
    _write(tmp_path, make_plan(**change), "plan-001.json")
    with pytest.raises(DamagedError, match=r"plan-001.json: its \w+ is not that of plan.json: a plan of another store"):
        read_generations(Folder(tmp_path))


def test_the_id_of_one_plan_is_its_own_and_of_several_that_of_all(make_plan: MakePlan) -> None:
    one, other = make_plan(), make_plan(seed=1)
    assert store_id([one]) == one.sha256
    assert store_id([one, other]) == sha256(f"{one.sha256}\n{other.sha256}\n")
    assert store_id([one, other]) != store_id([other, one])


def test_a_shard_has_a_name_within_its_generation(make_plan: MakePlan) -> None:
    assert list(Generation(0, make_plan()).paths()) == [f"view-000/shard-{shard:05d}.h5" for shard in range(3)]
