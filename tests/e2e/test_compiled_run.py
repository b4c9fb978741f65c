"""A run may go on compiled that began eager; what it writes has the same names and, to rounding, the same values."""

import shutil
from pathlib import Path

import pytest
import torch
from commands import run_json, saved
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"),
]
STUDENT = (
    "--student", "deit-tiny", "--set", "student.patch_size=7", "--set", "student.embed_dim=48", "--set",
    "student.depth=1", "--set", "student.num_heads=3", "--set", "student.drop_path=0",
)  # fmt: skip


def test_a_run_goes_on_compiled(store: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = (
        "train", *STUDENT, "--store", store, "--data", folder, "--objective", "deit", "--set", "train.steps=24",
        "--batch-size", "50", "--workers", "0", "--set", "train.ema_decay=0.9", "--set", "train.eps=1e-6", "--out", out,
    )  # fmt: skip
    eager = run_json(*words)
    kept = {path.name: load_file(path) for path in (*out.glob("student*"), *(out / "checkpoints").iterdir())}
    assert saved(out) == [12, 24]
    (out / "result.json").unlink()
    (out / "checkpoints" / "step-00000024.safetensors").unlink()
    compiled = run_json(*words, "--compile")
    assert compiled["nll"] == pytest.approx(eager["nll"], abs=1e-5)
    for path in (*out.glob("student*"), *(out / "checkpoints").iterdir()):
        torch.testing.assert_close(load_file(path), kept[path.name], rtol=1e-5, atol=1e-5)
