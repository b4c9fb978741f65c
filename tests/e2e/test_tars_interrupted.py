"""Stores that follow tars, and training over them, as processes: killed, on two ranks, and again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT, SMALL_STUDENT, contents, kill, run, run_json, start, wait_until
from safetensors.torch import load_file
from served import write_tar

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tars(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 600 images in fifteen tars of 40, a class after the other, and the others to validate on."""
    root = tmp_path_factory.mktemp("tars")
    for split in ("train", "val"):
        files = sorted((folder / split).glob("*/*"))
        for number in range(0, len(files), 40):
            members: dict[str, bytes | str] = {}
            for file in files[number : number + 40]:
                members |= {file.name: file.read_bytes(), f"{file.stem}.cls": file.parent.name}
            write_tar(root / f"x-{split}-{number // 40:02d}.tar", members)
    return root


def capture(teacher: Path, tars: Path, out: Path) -> tuple[str | Path, ...]:
    return (
        "teacher-logits", "--teacher", teacher, "--data", f"wds:{tars}", "--views", "2", "--batch-size", "32",
        "--workers", "1", "--out", out,
    )  # fmt: skip


def distil(store: Path, tars: Path, out: Path) -> tuple[str | Path, ...]:
    return (
        "train", *SMALL_STUDENT, "--set", "student.drop_path=0", "--data", f"wds:{tars}", "--store", store,
        "--objective", "deit", "--epochs", "2", "--batch-size", "50", "--set", "train.shuffle_tars=4",
        "--set", "train.save_every=5", "--workers", "2", "--out", out,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(teacher: Path, tars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store and a run, never disturbed."""
    root = tmp_path_factory.mktemp("made")
    assert run_json(*capture(teacher, tars, root / "store"))["shards"] == 30
    assert run_json(*distil(root / "store", tars, root / "run"))["steps"] == 24
    return root


@pytest.mark.parametrize("shards", [1, 9])
def test_a_killed_capture_over_tars_ends_in_the_same_bytes(shards, made, teacher, tars, tmp_path):
    out = tmp_path / "store"
    process = start(*capture(teacher, tars, out))
    wait_until(lambda: len(list(out.rglob("shard-*.h5"))) >= shards, process)
    kill(process)
    there = {(int(path.parent.name[5:]), int(path.stem[6:])) for path in out.rglob("shard-*.h5")}
    assert sorted(there, key=lambda piece: piece[::-1]) == [(n % 2, n // 2) for n in range(len(there))]
    assert run_json(*capture(teacher, tars, out))["status"] == "done"
    assert contents(out) == contents(made / "store")


def test_a_killed_run_over_tars_ends_in_the_same_weights(made, tars, tmp_path):
    out = tmp_path / "run"
    process = start(*distil(made / "store", tars, out))
    wait_until(lambda: bool(list(out.rglob("step-*.safetensors"))), process)
    kill(process)
    _, err = run(*distil(made / "store", tars, out))
    assert "going on from step-" in err
    assert (out / "student.safetensors").read_bytes() == (made / "run/student.safetensors").read_bytes()


def test_two_ranks_over_tars_train_the_weights_of_one_process(made, tars, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    arguments = map(str, ("-m", "distill_cli", *distil(made / "store", tars, tmp_path / "two"), "--quiet"))
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = (load_file(path / "student.safetensors") for path in (made / "run", tmp_path / "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-5)
