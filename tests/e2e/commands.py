"""The command line as processes of their own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill_cli.checkpoint import checkpoints, step_of

ROOT = Path(__file__).parents[2]
SMALL_TEACHER = ("--set", "student.kwargs={layers=[1,1,1,1],channels=[8,8,16,16]}", "--student", "resnet18")
SMALL_STUDENT = (
    "--student", "deit-tiny", "--set", "student.patch_size=7", "--set", "student.embed_dim=48",
    "--set", "student.depth=2", "--set", "student.drop_path=0.1",
)  # fmt: skip


def start(*arguments: str | Path, before: str | None = None) -> subprocess.Popen[str]:
    """Start a command with one thread, as everything here must be the same bit for bit.

    Args:
        before: Python that its process runs first.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    program = ["-m", "distill_cli"] if before is None else ["-c", f"{before}\nfrom distill_cli.cli import main\nmain()"]
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
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


def run(*arguments: str | Path, code: int = 0, before: str | None = None) -> tuple[str, str]:
    """Run a command to its end; gives stdout and stderr."""
    process = start(*arguments, before=before)
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


def distil(store: Path, folder: Path, out: Path, *more: str) -> tuple[str | Path, ...]:
    """The command that trains `undisturbed`: three epochs of twelve steps, saved after every fifth."""
    return (
        "train", *SMALL_STUDENT, "--store", store, "--data", folder, "--objective", "deit", "--epochs", "3",
        "--batch-size", "50", "--set", "train.save_every=5", "--set", "train.log_every=1", "--workers", "1",
        "--out", out, *more,
    )  # fmt: skip


def saved(run: Path) -> list[int]:
    """The steps of a run's checkpoints."""
    return [step_of(path) for path in checkpoints(run)]


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the machine decides."""
    measured = ("images_per_s", "data_wait", "memory_mb")
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in measured} for line in lines]


def check_same(run: Path, undisturbed: Path) -> None:
    """A run is finished and the same as one that was left alone, and nothing half-written lies about."""
    assert (run / "result.json").exists()
    assert (run / "student.safetensors").read_bytes() == (undisturbed / "student.safetensors").read_bytes()
    assert metrics(run) == metrics(undisturbed)
    assert not list(run.rglob(".*"))


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()
