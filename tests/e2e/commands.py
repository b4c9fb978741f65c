"""The command line as processes of their own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def capture(teacher: Path, folder: Path, out: Path) -> tuple[str | Path, ...]:
    """The command that writes `store`."""
    return (
        "teacher-logits", "--teacher", teacher, "--data", folder, "--views", "2", "--shard-rows", "100",
        "--batch-size", "32", "--workers", "1", "--out", out,
    )  # fmt: skip


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()
