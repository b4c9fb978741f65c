import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill_cli.errors import DamagedError, MismatchError
from distill_cli.files import canonical_json, sha256
from distill_cli.store.manifest import Manifest, read_manifest
from distill_cli.store.place import Folder
from distill_cli.store.plan import Generation, Plan
from distill_cli.store.writer import StoreWriter

MakePlan = Callable[..., Plan]
FillStore = Callable[..., StoreWriter]


@pytest.fixture
def store(tmp_path: Path, make_plan: MakePlan, fill_store: FillStore) -> Path:
    fill_store(tmp_path, make_plan())
    return tmp_path


@pytest.fixture
def read(store: Path, make_plan: MakePlan) -> Callable[..., Manifest | None]:
    return lambda **changes: read_manifest(Folder(store), Generation(0, make_plan(**changes)))


def _edit(store: Path, **changes: object) -> None:
    """Change fields of the manifest as a program would: it is canonical, and its own sha256 is right."""
    values: dict[str, Any] = {**json.loads((store / "manifest.json").read_text()), **changes}
    del values["sha256"]
    values["sha256"] = sha256(canonical_json(values, indent=2) + "\n")
    (store / "manifest.json").write_text(canonical_json(values, indent=2) + "\n")


def _entry(store: Path, number: int = 0, **changes: object) -> dict[str, Any]:
    """The manifest's shards, one of them changed."""
    shards = json.loads((store / "manifest.json").read_text())["shards"]
    shards[number].update(changes)
    return {"shards": shards}


def test_a_manifest_reads_back_as_it_was_written(tmp_path: Path, make_plan: MakePlan, fill_store: FillStore) -> None:
    writer = fill_store(tmp_path, make_plan(), np.zeros(10, np.int64), skip=(3,))
    manifest = read_manifest(Folder(tmp_path), writer.generation)
    assert manifest == writer.finish()
    assert (manifest.rows, manifest.skipped) == (9, (3,))


def test_a_store_without_a_manifest_has_none(store: Path, read: Callable[..., Manifest | None]) -> None:
    (store / "manifest.json").unlink()
    assert read() is None


def test_a_manifest_lists_each_shard_once_in_order(read: Callable[..., Manifest]) -> None:
    assert [entry.path for entry in read().shards] == [f"view-000/shard-{shard:05d}.h5" for shard in range(3)]


def test_a_manifest_of_another_store_is_damage(read: Callable[..., Manifest]) -> None:
    """… and so is one beside a plan that a program has edited."""
    with pytest.raises(DamagedError, match=r"belongs to store .*, the plan beside it to"):
        read(seed=1)


def test_a_newer_format_is_told_apart_from_damage(store: Path, read: Callable[..., Manifest]) -> None:
    _edit(store, version=2)
    with pytest.raises(MismatchError, match="store version 2, this program reads version 1; update distill") as caught:
        read()
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(("old", "new"), [('"rows": 10', '"rows": 11'), ('"rows": 4', '"rows": 3'), ("  ", "\t")])
def test_a_manifest_edited_by_hand_is_damage(store: Path, read: Callable[..., Manifest], old: str, new: str) -> None:
    path = store / "manifest.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DamagedError, match="was changed since it was written"):
        read()


@pytest.mark.parametrize(
    "change",
    [
        {"shards": [], "rows": 0, "bytes": 0}, {"shards": 3}, {"shards": ["x"]}, {"shards": [{"path": "x"}]},
        {"skipped": None},
        {"skipped": ["a"]}, {"skipped": [True]}, {"skipped": [-1]}, {"skipped": [1.0]}, {"top1": "high"},
        {"plan_sha256": 1}, {"colour": 3},
    ],
)  # fmt: skip
def test_values_that_no_manifest_has_are_damage(
    store: Path, read: Callable[..., Manifest], change: dict[str, object]
) -> None:
    _edit(store, **change)
    with pytest.raises(DamagedError) as caught:
        read()
    assert "was changed" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"rows": -1}, {"rows": True}, {"rows": 4.0}, {"bytes": "many"}, {"bytes": -1}, {"sha256": 0}, {"colour": 3}],
)
def test_values_that_no_shard_has_are_damage(
    store: Path, read: Callable[..., Manifest], change: dict[str, object]
) -> None:
    _edit(store, **_entry(store, **change))
    with pytest.raises(DamagedError):
        read()


@pytest.mark.parametrize("path", ["../view-000/shard-00000.h5", "/etc/passwd", "view-000/../../x", "", None, 3])
def test_a_path_outside_the_store_is_damage(store: Path, read: Callable[..., Manifest], path: object) -> None:
    _edit(store, **_entry(store, path=path))
    with pytest.raises(DamagedError, match="does not list the shards of the plan"):
        read()


@pytest.mark.parametrize(("number", "rows", "found"), [(2, 1, 9), (2, 3, 11), (0, 10**9, 10**9 + 6)])
def test_a_manifest_has_the_rows_of_its_plan(
    store: Path, read: Callable[..., Manifest], number: int, rows: int, found: int
) -> None:
    changed = _entry(store, number, rows=rows, bytes=10**10)
    _edit(store, **changed, rows=found, bytes=sum(entry["bytes"] for entry in changed["shards"]))
    with pytest.raises(DamagedError, match=f"lists {found} rows of 10 samples in view 0"):
        read()


def test_what_is_no_file_is_not_read(store: Path, read: Callable[..., Manifest]) -> None:
    (store / "manifest.json").unlink()
    os.mkfifo(store / "manifest.json")
    with pytest.raises(DamagedError, match=r"manifest.json: not a file"):
        read()
