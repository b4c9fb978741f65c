"""`train`, `teacher-logits` and `eval` on a GPU: what they give on the processor, whatever the engine makes of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import RESNET, VIT, small_recipe

from distill_cli.distributed import World
from distill_cli.errors import DistillError
from distill_cli.evaluate import evaluate
from distill_cli.replay import SparseRows
from distill_cli.report import Report
from distill_cli.store.reader import Store
from distill_cli.teacher_logits import teacher_logits
from distill_cli.train import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
CPU, CUDA = World(torch.device("cpu")), World(torch.device("cuda", 0))
QUIET = Report(quiet=True)
LENGTH = {"train.steps": 12, "train.batch_size": 12}
SHORT_VIT, SHORT_RESNET = VIT | LENGTH, RESNET | LENGTH


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("student", [SHORT_VIT, SHORT_RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"runtime.channels_last": False},
        {"train.opt": "lamb", "train.ema_decay": 0.9, "train.accumulate": 2},
        {"runtime.compile": True},
        {"runtime.compile": "cuda-graphs"},
        {"train.precision": "bf16"},
    ],
    ids=lambda asked: ", ".join(map(str, asked.values())) or "plain",
)
def test_a_run_has_the_losses_of_the_processor(
    asked: dict[str, Any], student: dict[str, Any], image_folder: Path, tmp_path: Path
) -> None:
    values = {**student, **asked}
    train(small_recipe(image_folder, {**values, "runtime.compile": False}), tmp_path / "cpu", CPU, QUIET)
    train(small_recipe(image_folder, values), tmp_path / "cuda", CUDA, QUIET)
    found, expected = losses(tmp_path / "cuda"), losses(tmp_path / "cpu")
    assert len(set(found)) == 12
    assert found == pytest.approx(expected, rel=0.1 if values.get("train.precision") == "bf16" else 0.02)
    keys = [load_file(tmp_path / name / "student.safetensors").keys() for name in ("cuda", "cpu")]
    assert keys[0] == keys[1]


def test_a_run_goes_on_where_another_device_left_it(image_folder: Path, tmp_path: Path) -> None:
    """And a GPU's checkpoint holds what its fused optimiser has."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    asked = small_recipe(image_folder, SHORT_VIT | {"train.save_every": 1, "train.keep": 12})
    train(asked, whole, CUDA, QUIET)
    train(asked, out, CUDA, QUIET)
    for path in sorted((out / "checkpoints").iterdir())[6:]:
        path.unlink()
    for name in ("result.json", "student.safetensors"):
        (out / name).unlink()
    train(asked, out, CPU, QUIET)
    assert losses(out) == pytest.approx(losses(whole), rel=0.02)


def test_a_fused_optimizer_is_stopped_on_the_device(image_folder: Path, tmp_path: Path) -> None:
    asked = small_recipe(
        image_folder, SHORT_VIT | {"train.lr": 1e30, "train.batch_size": 6, "train.clip_grad": 0, "train.log_every": 12}
    )
    with pytest.raises(DistillError, match="the loss or its gradient is not finite at step"):
        train(asked, tmp_path, CUDA, QUIET)
    (kept,) = tmp_path.glob("nan-*.safetensors")
    weights = [value for name, value in load_file(kept).items() if name.startswith("model.")]
    assert weights
    assert all(value.isfinite().all() for value in weights)


def test_a_store_has_the_rows_of_the_processor(image_folder: Path, tmp_path: Path) -> None:
    teacher = {"train.steps": 1, "objective.name": "supervised"}
    train(small_recipe(image_folder, SHORT_RESNET | teacher), tmp_path / "teacher", CPU, QUIET)
    stores = []
    for name, world in {"cpu": CPU, "cuda": CUDA}.items():
        asked = {"teacher.name": str(tmp_path / "teacher"), "store.top_k": 3, "store.views": 2}
        teacher_logits(small_recipe(image_folder, asked), tmp_path / name, world, QUIET)
        stores.append(Store(tmp_path / name))
    for view in range(2):
        found, expected = (SparseRows(store)(view, np.arange(18)) for store in stores)
        by = [rows.class_id.argsort(-1) for rows in (found, expected)]
        torch.testing.assert_close(
            found.log_prob.gather(-1, by[0]), expected.log_prob.gather(-1, by[1]), atol=0.02, rtol=0
        )


def test_an_evaluation_has_the_accuracy_of_the_processor(image_folder: Path, tmp_path: Path) -> None:
    train(small_recipe(image_folder, SHORT_VIT), tmp_path / "run", CPU, QUIET)
    here, there = (
        evaluate(small_recipe(image_folder, {}), str(tmp_path / "run"), world, QUIET) for world in (CPU, CUDA)
    )
    assert there.top1 == here.top1
    assert there.nll == pytest.approx(here.nll, rel=1e-3)
