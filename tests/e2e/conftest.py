"""The command line as processes of their own, on a few real images."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill_cli.data.idx import open_sample

ROOT = Path(__file__).parents[2]
SMALL_TEACHER = ("--set", "student.kwargs={layers=[1,1,1,1],channels=[8,8,16,16]}", "--student", "resnet18")
SMALL_STUDENT = (
    "--student", "deit-tiny", "--set", "student.patch_size=7", "--set", "student.embed_dim=48",
    "--set", "student.depth=2", "--set", "student.drop_path=0.1",
)  # fmt: skip


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start a command with one thread, as everything here must be the same bit for bit."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "distill_cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the command alone; its loader workers find out by themselves."""
    process.kill()
    process.wait()
    for pipe in (process.stdout, process.stderr):
        assert pipe is not None
        pipe.close()


def run(*arguments: str | Path, code: int = 0) -> tuple[str, str]:
    """Run a command to its end; gives stdout and stderr."""
    process = start(*arguments)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return out, err


def run_json(*arguments: str | Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(run(*arguments, "--json", "--quiet")[0])
    return values


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 + 100 real images of ten classes as PNG in class folders."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 60), ("val", 10)):
        source = open_sample(split)
        assert source.labels is not None
        for label in range(10):
            target = root / split / f"{label}"
            target.mkdir(parents=True)
            for index in np.flatnonzero(source.labels == label)[:count]:
                source.read(int(index)).save(target / f"{index:05d}.png")
    return root


@pytest.fixture(scope="session")
def teacher(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a small ResNet."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    run_json(
        "train", *SMALL_TEACHER, "--data", folder, "--image-size", "28", "--epochs", "2", "--batch-size", "60",
        "--lr", "2e-3", "--out", out,
    )  # fmt: skip
    return out


@pytest.fixture(scope="session")
def store(folder: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two views of the images, in shards of 100 rows, never disturbed."""
    out = tmp_path_factory.mktemp("store") / "store"
    run_json(*capture(teacher, folder, out))
    return out


def capture(teacher: Path, folder: Path, out: Path) -> tuple[str | Path, ...]:
    """The command that writes `store`."""
    return (
        "teacher-logits", "--teacher", teacher, "--data", folder, "--views", "2", "--shard-rows", "100",
        "--batch-size", "32", "--workers", "1", "--out", out,
    )  # fmt: skip
