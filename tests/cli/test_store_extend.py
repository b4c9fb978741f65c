import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import DISTIL, Cli, Made, Refused, capture

from distill_cli.store.reader import Store


@pytest.fixture
def copied_store(store: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store.path, tmp_path / "store"))


@pytest.fixture
def more(copied_store: Path, folder: Path, run: Made) -> tuple[str | Path, ...]:
    return ("store", "extend", copied_store, "--teacher", run.path, "--data", folder, "--workers", "0")


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_extended_store_has_the_rows_of_one_that_was_written_at_once(
    distill: Cli, folder: Path, run: Made, copied_store: Path, more: tuple[str | Path, ...], tmp_path: Path
) -> None:
    before = _files(copied_store)
    said = distill(*more, "--views", "3", "--json", "--quiet").json
    at_once = distill(*capture(run.path, folder, tmp_path / "once"), "--views", "3", "--json", "--quiet").json
    assert [said[key] for key in ("status", "views", "rows", "shards")] == ["done", 3, 120, at_once["shards"]]
    extended, whole = Store(copied_store), Store(tmp_path / "once")
    assert said["store_id"] == extended.id != whole.id
    assert extended.drawn == whole.drawn
    for view in range(3):
        one, other = (store.rows(view, np.arange(40)) for store in (extended, whole))
        np.testing.assert_array_equal(one.class_id, other.class_id)
        np.testing.assert_array_equal(one.log_prob, other.log_prob)
    after = _files(copied_store)
    assert {name: after[name] for name in before} == before


def test_a_student_reads_all_views_of_an_extended_store(
    distill: Cli, folder: Path, copied_store: Path, more: tuple[str | Path, ...], tmp_path: Path
) -> None:
    assert distill(*more, "--views", "3", "--quiet").code == 0
    steps = ("--set", "train.steps=15")  # of 5 an epoch
    train = ("train", *DISTIL, *steps, "--data", folder, "--store", copied_store, "--out", tmp_path / "r", "--quiet")
    assert distill(*train).code == 0


def test_the_same_command_again_is_done_already_and_another_goes_on_from_there(
    distill: Cli, copied_store: Path, more: tuple[str | Path, ...]
) -> None:
    assert distill(*more, "--views", "3", "--quiet").code == 0
    assert distill(*more, "--views", "3", "--json", "--quiet").json["status"] == "already_done"
    assert distill(*more, "--views", "5", "--json", "--quiet").json["views"] == 5
    assert [generation.plan.first_view for generation in Store(copied_store).generations] == [0, 2, 3]


def test_an_unfinished_extension_is_not_read_and_is_finished_by_the_same_command(
    distill: Cli, folder: Path, copied_store: Path, more: tuple[str | Path, ...], tmp_path: Path
) -> None:
    assert distill(*more, "--views", "3", "--shards", "0:1", "--json", "--quiet").json["status"] == "part"
    store = Store(copied_store)
    assert (store.views, store.unfinished_views) == (2, 1)
    train = ("train", *DISTIL, "--data", folder, "--store", copied_store, "--out", tmp_path / "r", "--quiet")
    assert "1 more views are not complete yet and are not read" in distill(*train).err
    assert distill(*more, "--views", "3", "--json", "--quiet").json["status"] == "done"


def test_what_does_not_fit_is_refused(
    distill: Cli,
    refused: Refused,
    folder: Path,
    copied: Path,
    run: Made,
    copied_store: Path,
    more: tuple[str | Path, ...],
) -> None:
    assert refused(2, *more, "--views", "1").startswith("--views 1: the store has 2 already; give the number that")
    other = ("store", "extend", copied_store, "--teacher", run.path, "--data", copied, "--views", "3")
    (copied / "train" / "bag" / "another.png").write_bytes((next((copied / "train" / "bag").iterdir())).read_bytes())
    line = refused(3, *other)
    assert line.startswith(f"{copied_store}: cannot be extended by this (data.keys_sha256: ")
    again = capture(run.path, folder, copied_store)
    assert '"distill store extend" adds views' in refused(3, *again, "--views", "3")
    (copied_store / "manifest.json").unlink()
    assert "its views from 0 on are not complete" in refused(4, *more, "--views", "3")
