"""A store that follows tars, through every command that reads or writes one."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from command_line import DISTIL, STUDENT, Cli, Made, Refused, Result
from served import write_tar

from distill_cli.store.reader import Store

SIZES = (1, 25, 8, 6)
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def tars(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The forty images in tars of 1, 25, 8 and 6; not to be written to."""
    root, files = tmp_path_factory.mktemp("tars"), sorted((folder / "train").glob("*/*"))
    random.Random(0).shuffle(files)
    for number, size in enumerate(SIZES):
        members: dict[str, bytes | str] = {}
        for file in files[:size]:
            members |= {file.name: file.read_bytes(), f"{file.stem}.cls": file.parent.name}
        write_tar(root / f"x-train-{number}.tar", members)
        files = files[size:]
    return root


def _capture(teacher: Path, tars: Path, out: Path, *more: str) -> tuple[str | Path, ...]:
    return (
        "teacher-logits", "--teacher", teacher, "--data", f"wds:{tars}", "--top-k", "2", "--batch-size", "4",
        "--workers", "0", "--out", out, *more,
    )  # fmt: skip


def _done(result: Result, status: str = "done") -> dict:
    assert (result.code, result.json["status"]) == (0, status), result
    return result.json


@pytest.fixture(scope="module")
def over_tars(distill: Cli, run: Made, tars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two views that follows the tars; not to be written to."""
    out = tmp_path_factory.mktemp("made") / "store"
    said = _done(distill(*_capture(run.path, tars, out, "--views", "2"), "--json", "--quiet"))
    assert (said["rows"], said["shards"]) == (80, 8)
    return out


def test_the_plan_names_the_tars_sizes_and_a_shard_has_its_tar(over_tars: Path) -> None:
    store = Store(over_tars)
    assert (store.plan.shard_sizes, store.plan.shard_rows) == (list(SIZES), 25)
    assert [store.ids(1, shard).tolist() for shard in (0, 2)] == [[0], list(range(26, 34))]


def test_its_dry_run_says_what_its_shards_follow(distill: Cli, run: Made, tars: Path, tmp_path: Path) -> None:
    result = distill(*_capture(run.path, tars, tmp_path / "s"), "--dry-run", "--json", "--quiet")
    assert result.code == 0, result
    assert (result.json["recipe"]["store.order"], result.json["origins"]["store.order"]) == ("tars", "data")
    assert "store.shard_rows" not in result.json["recipe"]
    assert (result.json["bill"]["shards"], result.json["bill"]["rows"]) == (4, 40)


def test_it_is_verified_checked_and_inspected(distill: Cli, run: Made, tars: Path, over_tars: Path) -> None:
    assert _done(distill("store", "verify", over_tars, "--json", "--quiet"), "ok")["sound"] == 8
    command = ("store", "check", over_tars, "--teacher", run.path, "--data", f"wds:{tars}", "--workers", "0")
    said = _done(distill(*command, "--batch-size", "4", "--json", "--quiet"), "ok")
    assert (said["rows"], said["identical"], said["shards"]) == (80, 100.0, 8)
    said = distill("store", "inspect", over_tars, "--json", "--quiet").json
    assert (said["order"], said["shard_rows"], said["damaged"]) == ("tars", 25, {})


def test_it_is_extended_merged_trimmed_and_exported(
    distill: Cli, run: Made, tars: Path, over_tars: Path, tmp_path: Path
) -> None:
    """Views 2 and 3 captured one behind the other and apart are the same bytes."""
    _done(distill(*_capture(run.path, tars, tmp_path / "a", "--views", "2"), "--json", "--quiet"))
    extend = ("store", "extend", tmp_path / "a", "--views", "4", "--teacher", run.path, "--data", f"wds:{tars}")
    _done(distill(*extend, "--batch-size", "4", "--workers", "0", "--json", "--quiet"))
    apart = ("--views", "2", "--set", "store.first_view=2")
    _done(distill(*_capture(run.path, tars, tmp_path / "b", *apart), "--json", "--quiet"))
    _done(distill("store", "merge", over_tars, tmp_path / "b", "--out", tmp_path / "m", "--json", "--quiet"))
    extended, merged = Store(tmp_path / "a"), Store(tmp_path / "m")
    assert extended.id == merged.id
    assert extended.manifests == merged.manifests
    trim = ("store", "trim", merged.place.path, "--codec", "compact", "--views", "3", "--out", tmp_path / "t")
    assert _done(distill(*trim, "--json", "--quiet"))["rows"] == 120
    assert _done(distill("store", "verify", tmp_path / "t", "--json", "--quiet"), "ok")["sound"] == 12
    export = ("store", "export", "parquet", tmp_path / "t", "--out", tmp_path / "rows.parquet")
    _done(distill(*export, "--json", "--quiet"))
    found = pq.read_table(tmp_path / "rows.parquet").to_pydict()
    assert found["sample_id"] == [*range(40)] * 3
    assert found["class_id"][40:80] == Store(tmp_path / "t").rows(1, np.arange(40)).class_id.tolist()
    lines = subprocess.run(
        [sys.executable, DOCS / "read_compact.py", tmp_path / "t", "2"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [int(line.split()[0]) for line in lines] == list(range(40))


def test_a_student_learns_from_it_and_its_order_is_part_of_the_run(
    distill: Cli, refused: Refused, tars: Path, over_tars: Path, folder: Path, tmp_path: Path
) -> None:
    data = ("--data", f"wds:{tars}", "--set", f"data.val={folder}/val")
    command = ("train", *DISTIL, *data, "--store", over_tars, "--out", tmp_path / "r", "--set", "train.shuffle_tars=2")
    assert _done(distill(*command, "--json", "--quiet"))["top1"] is not None
    assert "shuffle_tars = 2" in (tmp_path / "r" / "recipe.toml").read_text()
    said = refused(3, *command[:-1], "train.shuffle_tars=3")
    assert "holds a run of another recipe (train.shuffle_tars: 2, 3: there, asked)" in said
    result = distill("eval", tmp_path / "r", "--json", "--quiet", "--store", over_tars)
    assert (result.code, result.json["images"]) == (0, 20), result


def test_sixteen_tars_are_shuffled_at_a_time_with_and_without_a_store(
    distill: Cli, tars: Path, folder: Path, tmp_path: Path
) -> None:
    data = ("--data", f"wds:{tars}", "--set", f"data.val={folder}/val", "--image-size", "28")
    result = distill("train", *DISTIL, *data, "--out", tmp_path / "r", "--dry-run", "--json", "--quiet")
    found = json.loads(result.out)
    assert (found["recipe"]["train.shuffle_tars"], found["origins"]["train.shuffle_tars"]) == (16, "data")


def test_what_is_no_tars_follows_none(refused: Refused, folder: Path, run: Made, tars: Path, tmp_path: Path) -> None:
    command = ("teacher-logits", "--teacher", run.path, "--data", folder, "--out", tmp_path / "s")
    said = refused(2, *command, "--set", "store.order=tars")
    assert said == f"store.order tars: --data {folder} is no tars; give wds:PATTERN, or leave it out"
    both = refused(2, *_capture(run.path, tars, tmp_path / "s", "--shard-rows", "5", "--set", "store.order=tars"))
    assert both == "--shard-rows 5: store.order is tars, and shards end where these end; give one of them"
    train = ("train", *STUDENT, "--data", folder, "--image-size", "28", "--out", tmp_path / "r")
    said = refused(2, *train, "--set", "train.shuffle_tars=4")
    assert said == f"train.shuffle_tars: --data {folder} is no tars; leave it out"
    assert not (tmp_path / "s").exists()


def test_given_rows_of_a_shard_deal_the_samples_of_tars(distill: Cli, run: Made, tars: Path, tmp_path: Path) -> None:
    said = _done(distill(*_capture(run.path, tars, tmp_path / "s", "--shard-rows", "15"), "--json", "--quiet"))
    assert said["shards"] == 3
    assert "shard_sizes" not in json.loads((tmp_path / "s" / "plan.json").read_text())
