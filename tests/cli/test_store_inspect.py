"""`store inspect`, `store verify` and `store check` as a person or a script meets them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import Cli, Made, Refused, capture
from safetensors.numpy import load_file, save_file

SHARD = "view-000/shard-00001.h5"


@pytest.fixture
def spoilt(store: Made, tmp_path: Path) -> Path:
    """The store, to be spoilt."""
    return Path(shutil.copytree(store.path, tmp_path / "store"))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_inspect_prints_tables_and_the_same_as_json(distill: Cli, store: Made) -> None:
    result = distill("store", "inspect", store.path, "--quiet")
    assert (result.code, result.err) == (0, "")
    for word in ("resnet18", "complete", "mass of the first", "first class", store.said["store_id"]):
        assert word in result.out
    said = distill("store", "inspect", store.path, "--json", "--all", "--quiet").json
    for name in ("store_id", "rows", "bytes", "bytes_per_row", "views", "shards", "top1", "top5", "skipped"):
        assert said[name] == store.said[name]
    assert sum(each["rows"] for each in said["first"]) == store.said["rows"]


def test_inspect_takes_an_unfinished_store(distill: Cli, spoilt: Path) -> None:
    (spoilt / "manifest.json").unlink()
    (spoilt / SHARD).unlink()
    result = distill("store", "inspect", spoilt, "--quiet")
    assert result.code == 0
    assert "unfinished" in result.out
    assert f"missing\n{SHARD}\n" in result.out


def test_verify_of_a_sound_store_is_0(distill: Cli, store: Made) -> None:
    before = files(store.path)
    result = distill("store", "verify", store.path, "--json", "--quiet")
    assert (result.code, result.json["status"], result.json["findings"]) == (0, "ok", [])
    assert files(store.path) == before


def test_verify_names_damage_on_stdout_and_ends_in_one_line(distill: Cli, spoilt: Path) -> None:
    flip(spoilt / SHARD, 1500)
    (spoilt / "view-001/shard-00000.h5").unlink()
    result = distill("store", "verify", spoilt, "--quiet")
    assert result.code == 4
    lines = [line.split() for line in result.out.splitlines()[1:3]]
    assert [line[:2] for line in lines] == [[SHARD, "damaged"], ["view-001/shard-00000.h5", "missing"]]
    assert result.err == (
        f"distill: {spoilt}: 1 damaged, 1 missing; 2 of 4 shards are sound; "
        f'run "distill store verify {spoilt} --repair", then the same "distill teacher-logits" command\n'
    )


def test_verify_repair_then_the_same_capture_gives_the_same_bytes(
    distill: Cli, run: Made, folder: Path, store: Made, spoilt: Path
) -> None:
    flip(spoilt / SHARD, 1500)
    flip(spoilt / "manifest.json", 30)
    assert distill("store", "verify", spoilt, "--repair", "--quiet").code == 4
    assert distill(*capture(run.path, folder, spoilt), "--quiet").code == 0
    assert files(spoilt) == files(store.path)
    assert distill("store", "verify", spoilt, "--quiet").code == 0


def test_verify_repair_writes_a_lost_manifest_anew(distill: Cli, store: Made, spoilt: Path) -> None:
    (spoilt / "manifest.json").unlink()
    assert distill("store", "verify", spoilt, "--quiet").code == 4
    result = distill("store", "verify", spoilt, "--repair", "--json", "--quiet")
    assert (result.code, result.json["status"]) == (0, "repaired")
    assert files(spoilt) == files(store.path)


def test_a_path_without_a_store_is_one_line(refused: Refused, tmp_path: Path) -> None:
    for command in ("inspect", "verify"):
        assert refused(4, "store", command, tmp_path).endswith("makes one")


def test_check_passes_a_fresh_store(distill: Cli, run: Made, folder: Path, store: Made) -> None:
    result = distill(
        "store", "check", store.path, "--teacher", run.path, "--data", folder, "--workers", "0", "--json", "--quiet"
    )
    assert (result.code, result.err) == (0, "")
    assert (result.json["status"], result.json["rows"], result.json["identical"]) == ("ok", store.said["rows"], 100)


def test_check_refuses_another_teacher(
    distill: Cli, refused: Refused, folder: Path, store: Made, run: Made, tmp_path: Path
) -> None:
    weights = load_file(run.path / "student.safetensors")
    other = {name: np.asarray(value + 1, value.dtype) for name, value in weights.items()}
    save_file(other, tmp_path / "other.safetensors")
    arguments = ("--teacher", "resnet18", "--teacher-weights", tmp_path / "other.safetensors", "--data", folder)
    kwargs = ("--set", "teacher.kwargs={layers=[1,1,1,1],channels=[8,8,8,8]}", "--workers", "0")
    line = refused(3, "store", "check", store.path, *arguments, *kwargs)
    assert line.startswith(f"store {store.path}: is of teacher resnet18 with weights ")
    assert line.endswith("give the teacher of the store")


def test_check_prints_what_it_measured_before_it_fails(distill: Cli, run: Made, folder: Path, store: Made) -> None:
    arguments = ("--teacher", run.path, "--data", folder, "--workers", "0", "--quiet")
    result = distill("store", "check", store.path, *arguments, "--tolerance", "0", "--json", "--batch-size", "7")
    # float16 alone is granted: another batch size can be off by a last bit, or by none.
    assert result.code in (0, 3)
    assert result.json["status"] == ("ok" if result.code == 0 else "differs")
    assert (result.err == "") == (result.code == 0)
