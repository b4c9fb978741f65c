"""Two ranks do the work of one process."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT, SMALL_STUDENT, run_json, start, wait_until
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


AVERAGED = ("--set", "train.accumulate=2", "--set", "train.ema_decay=0.9", "--set", "train.layer_decay=0.8")
"""Parts of 25 and 25 images; on two ranks, of 12 and 13 each."""


def distil(store: Path, folder: Path, out: Path, *more: str) -> list[str]:
    words = [
        "train", *SMALL_STUDENT, "--set", "student.drop_path=0", "--store", store, "--data", folder,
        "--objective", "deit", "--set", "train.steps=20", "--batch-size", "50", "--workers", "0", "--out", out, *more,
    ]  # fmt: skip
    return [str(word) for word in words]


@pytest.mark.parametrize(("more", "names"), [((), ["student"]), (AVERAGED, ["student", "student-plain"])])
def test_two_ranks_train_the_weights_of_one_process(more, names, store, folder, tmp_path):
    alone = run_json(*distil(store, folder, tmp_path / "one", *more))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    arguments = ["-m", "distill_cli", *distil(store, folder, tmp_path / "two", *more), "--json"]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("{") == 1
    for file in names:
        one, two = (load_file(tmp_path / run / f"{file}.safetensors") for run in ("one", "two"))
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-5)
    assert alone["top1"] is not None


def test_ranks_of_our_own_stop_and_go_on_together(store, folder, tmp_path):
    """A signal to `--gpus 2` saves once; then a killed rank takes the other with it; then it is done."""
    out = tmp_path / "run"
    words = [*distil(store, folder, out), "--gpus", "2", "--device", "cpu", "--set", "train.log_every=1"]
    process = start(*words)
    wait_until(lambda: (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text()) > 0, process)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert err.count("SIGUSR1: ") == 1
    assert "; the same command goes on" in err.splitlines()[-1]
    lines = len((out / "metrics.jsonl").read_text().splitlines())
    process = start(*words)
    wait_until(lambda: len((out / "metrics.jsonl").read_text().splitlines()) > lines, process)
    os.kill(child_of(process.pid, rank=1), signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert "distill: another rank is gone (" in err
    assert err.splitlines()[-1] == "distill: rank 1: was killed (SIGKILL); run the same command again to go on"
    done = run_json(*words)
    alone = run_json(*distil(store, folder, tmp_path / "one"))
    assert (done["steps"], done["status"]) == (20, "done")
    assert done["nll"] == pytest.approx(alone["nll"], abs=1e-4)


def test_torchrun_starts_the_ranks_again_and_they_go_on(store, folder, tmp_path):
    """`--max-restarts 1`: a rank is killed in the first attempt; the second goes on from the checkpoint."""
    out = tmp_path / "run"
    torchrun = "import sys; from torch.distributed.run import main; main(sys.argv[1:]); sys.exit()"
    process = start(
        "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "distill_cli",
        *distil(store, folder, out, "--set", "train.log_every=1", "--set", "train.save_every=2", "--json"),
        before=torchrun,
    )  # fmt: skip
    wait_until(lambda: len(list(out.glob("checkpoints/*"))) > 1, process)
    os.kill(child_of(process.pid, rank=1), signal.SIGKILL)
    words, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert words.count("{") == 1
    assert "going on from step-000000" in err
    done = json.loads(words)
    alone = run_json(*distil(store, folder, tmp_path / "one"))
    assert (done["steps"], done["status"]) == (20, "done")
    assert done["nll"] == pytest.approx(alone["nll"], abs=1e-4)
    steps = [
        line["step"] for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in line
    ]
    assert steps == list(range(1, 21))


def child_of(parent: int, rank: int) -> int:
    """The process of a rank."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            below = int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            if below and f"\0RANK={rank}\0".encode() in (entry / "environ").read_bytes():
                return int(entry.name)
    raise AssertionError(f"no rank {rank} below {parent}")
