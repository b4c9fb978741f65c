import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from distill_cli.errors import BusyError, DamagedError, MismatchError
from distill_cli.locks import locked
from distill_cli.report import Report
from distill_cli.store.inventory import take_inventory
from distill_cli.store.place import Folder
from distill_cli.store.plan import PROBES, Generation, Plan, read_generations
from distill_cli.store.verify import Verification, check_verified
from distill_cli.store.verify import verify as verify_aloud
from distill_cli.store.writer import StoreWriter

MakePlan = Callable[..., Plan]
FillStore = Callable[..., StoreWriter]
SHARD = "view-000/shard-00001.h5"
LABELS = np.arange(10) % 5
QUIET = Report(quiet=True)


def verify(path: Path, repair: bool = False) -> Verification:
    return verify_aloud(path, repair, 2, QUIET)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def found(verification: Verification) -> dict[str, str]:
    return {each.path: each.kind for each in verification.findings}


def flip(path: Path, at: int, by: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= by
    path.write_bytes(content)


@pytest.fixture
def plan(make_plan: MakePlan) -> Plan:
    return make_plan(views=2)


@pytest.fixture
def store(tmp_path: Path, plan: Plan, fill_store: FillStore) -> Path:
    """Two views of three shards."""
    fill_store(tmp_path / "store", plan, LABELS, skip=(3,))
    return tmp_path / "store"


@pytest.fixture
def extended(store: Path, plan: Plan, make_plan: MakePlan, make_rows: Callable) -> Path:
    """A second generation of one view besides."""
    generation = Generation(1, make_plan(views=1, first_view=2), 2)
    writer = StoreWriter(store, generation, LABELS)
    for view, shard in list(writer.missing()):
        rows = make_rows(generation.plan, view, shard)
        writer.write(view, shard, rows, np.arange(min(PROBES, len(rows)), dtype=np.uint32))
    writer.finish()
    return store


def test_a_sound_store_is_ok(extended: Path) -> None:
    result = verify(extended)
    assert (result.status, result.findings, result.shards, result.sound) == ("ok", (), 9, 9)
    assert result.rows == 2 * 9 + 10
    assert result.bytes == sum(path.stat().st_size for path in extended.rglob("*.h5"))
    check_verified(result)


def test_every_flipped_byte_is_noticed(extended: Path) -> None:
    before, draw = files(extended), random.Random(0)
    names = [name for name in sorted(before) for _ in range(24)]
    for name in names:
        flip(extended / name, draw.randrange(len(before[name])), draw.randrange(1, 256))
        try:
            result = verify(extended)
        except (MismatchError, DamagedError):
            assert name.startswith("plan")
        else:
            assert result.status == "damaged", name
            assert any(each.path == name or name.startswith("plan") for each in result.findings), name
            with pytest.raises(DamagedError, match="damaged"):
                check_verified(result)
        (extended / name).write_bytes(before[name])
    assert verify(extended).status == "ok"


def test_a_damaged_shard_is_deleted_and_the_next_capture_gives_the_same_bytes(
    store: Path, plan: Plan, fill_store: FillStore
) -> None:
    before = files(store)
    flip(store / SHARD, 1500)
    result = verify(store, repair=True)
    assert [(each.path, each.repaired) for each in result.findings] == [(SHARD, "deleted")]
    assert result.status == "incomplete"
    with pytest.raises(DamagedError, match=r"1 deleted; 5 of 6 shards are sound; run the same .* again"):
        check_verified(result)
    assert sorted(files(store)) == sorted(set(before) - {SHARD, "manifest.json"})
    fill_store(store, plan, LABELS, skip=(3,))
    assert files(store) == before
    assert verify(store).status == "ok"


@pytest.mark.parametrize("damage", [lambda path: flip(path, 40), Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_manifest_of_sound_shards_is_written_anew(store: Path, damage: Callable[[Path], None]) -> None:
    before = files(store)
    damage(store / "manifest.json")
    assert found(verify(store)).keys() == {"manifest.json"}
    result = verify(store, repair=True)
    assert (result.status, result.findings[0].repaired) == ("repaired", "written anew")
    check_verified(result)
    assert files(store) == before


def test_a_changed_plan_is_not_taken_for_damage_of_every_shard(store: Path) -> None:
    text = (store / "plan.json").read_text().replace('"seed": 0', '"seed": 1')
    (store / "plan.json").write_text(text)
    before = files(store)
    result = verify(store, repair=True)
    assert found(result) == {"plan.json": "damaged"}
    assert files(store) == before
    with pytest.raises(DamagedError, match="restore the plan from a copy"):
        check_verified(result)


def test_a_plan_that_is_gone_is_named_and_nothing_is_deleted(extended: Path) -> None:
    before = files(extended)
    (extended / "plan-001.json").rename(extended / "plan-002.json")
    assert found(verify(extended, repair=True)) == {"plan-001.json": "missing"}
    (extended / "plan-002.json").unlink()
    assert found(verify(extended, repair=True)) == {"manifest-001.json": "stray", "view-002": "stray"}
    assert files(extended) == {name: content for name, content in before.items() if name != "plan-001.json"}


def test_swapped_shards_are_damaged(store: Path) -> None:
    one, other = store / SHARD, store / "view-001/shard-00001.h5"
    one.rename(store / "kept")
    other.rename(one)
    (store / "kept").rename(other)
    assert found(verify(store)) == {SHARD: "damaged", "view-001/shard-00001.h5": "damaged"}
    (store / "manifest.json").unlink()
    assert found(verify(store)) == {SHARD: "damaged", "view-001/shard-00001.h5": "damaged"}


@pytest.mark.parametrize("size", [0, 100, 1024, 2000])
def test_a_truncated_shard_is_damaged(store: Path, size: int) -> None:
    os.truncate(store / SHARD, size)
    assert found(verify(store)) == {SHARD: "damaged"}
    (store / "manifest.json").unlink()
    assert found(verify(store)) == {SHARD: "damaged"}


def test_a_missing_shard_is_named(store: Path) -> None:
    (store / SHARD).unlink()
    result = verify(store)
    assert (result.status, found(result)) == ("incomplete", {SHARD: "missing"})


def test_an_unfinished_store_is_verified_as_far_as_it_is(tmp_path: Path, plan: Plan, fill_store: FillStore) -> None:
    fill_store(tmp_path, plan, only=4)
    missing = {"view-001/shard-00001.h5": "missing", "view-001/shard-00002.h5": "missing"}
    result = verify(tmp_path)
    assert (result.status, result.sound, found(result)) == ("incomplete", 4, missing)
    flip(tmp_path / SHARD, 1400)
    assert found(verify(tmp_path)) == {SHARD: "damaged", **missing}


def test_a_plan_without_end_names_only_so_many_shards(tmp_path: Path, make_plan: MakePlan) -> None:
    StoreWriter(tmp_path, make_plan(samples=2**60, views=1000, shard_rows=1))
    result = verify(tmp_path)
    assert (result.status, len(result.findings)) == ("incomplete", 1001)


def test_what_does_not_belong_there_is_named_and_only_leftovers_are_deleted(store: Path) -> None:
    for name in ("view-000/.tmp-shard-00001.h5", "view-000/notes", "view-002/shard-00000.h5", "README.md"):
        (store / name).parent.mkdir(exist_ok=True)
        (store / name).write_text("x")
    named = {
        "view-000/.tmp-shard-00001.h5": "leftover",
        "view-000/notes": "stray",
        "view-002": "stray",
        "README.md": "foreign",
    }
    result = verify(store)
    assert (result.status, found(result)) == ("untidy", named)
    with pytest.raises(DamagedError, match="1 leftover, 2 stray; 6 of 6 shards are sound"):
        check_verified(result)
    verify(store, repair=True)
    assert "view-000/.tmp-shard-00001.h5" not in files(store)
    shutil.rmtree(store / "view-002")
    (store / "view-000/notes").unlink()
    assert verify(store).status == "ok"


def test_links_are_not_followed(store: Path, tmp_path: Path) -> None:
    (store / SHARD).rename(tmp_path / "outside.h5")
    (store / SHARD).symlink_to(tmp_path / "outside.h5")
    (finding,) = verify(store).findings
    assert (finding.path, finding.found) == (SHARD, "is a link, which is not followed")
    verify(store, repair=True)
    assert not (store / SHARD).is_symlink()
    assert (tmp_path / "outside.h5").exists()


def test_a_linked_view_stops_a_repair(store: Path, tmp_path: Path) -> None:
    (store / "view-000").rename(tmp_path / "outside")
    (store / "view-000").symlink_to(tmp_path / "outside")
    before = files(tmp_path / "outside")
    result = verify(store, repair=True)
    assert result.status == "damaged"
    assert result.findings[0].path == "view-000"
    assert files(tmp_path / "outside") == before
    assert (store / "manifest.json").exists()


def test_a_pipe_in_a_shards_place_keeps_nobody_waiting(store: Path) -> None:
    (store / SHARD).unlink()
    os.mkfifo(store / SHARD)
    assert verify(store).findings[0].found == "is no regular file"


def test_a_header_that_hdf5_does_not_agree_with_is_damage(store: Path) -> None:
    """Consistent sums, and rows that the package reads; but another name in HDF5 than by the first line."""
    (store / "manifest.json").unlink()
    with h5py.File(store / SHARD, "r+") as file:
        file.move("log_tail", "log_tale")
    content = (store / SHARD).read_bytes()
    header = json.loads(content[:1024])
    header["payload_sha256"] = hashlib.sha256(content[1024:]).hexdigest()
    (store / SHARD).write_bytes(json.dumps(header, sort_keys=True).encode().ljust(1023) + b"\n" + content[1024:])
    (finding,) = verify(store).findings[:1]
    assert finding.path == SHARD
    assert "log_tale" in finding.found


def test_a_repair_needs_the_folder_alone(store: Path) -> None:
    with locked(store), pytest.raises(BusyError):
        verify(store, repair=True)


def test_no_store_is_an_error(tmp_path: Path) -> None:
    for repair in (False, True):
        with pytest.raises(DamagedError, match=r"no plan\.json; this is not a store"):
            verify(tmp_path / "nothing", repair)
    assert not (tmp_path / "nothing").exists()


def test_an_inventory_knows_the_views_of_every_generation(extended: Path) -> None:
    inventory = take_inventory(extended, read_generations(Folder(extended)))
    assert [len(pieces) for pieces in inventory.shards] == [6, 3]
    assert not inventory.leftovers + inventory.strays + inventory.linked + inventory.foreign
