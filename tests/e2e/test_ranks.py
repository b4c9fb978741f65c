"""Two ranks do the work of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT, SMALL_STUDENT, run_json
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
