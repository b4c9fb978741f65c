"""Students without a distillation token, taught through a second head."""

import json
import math
from pathlib import Path

import pytest
import timm
import torch
from command_line import DISTIL, Cli, Made, Refused, capture
from safetensors.torch import load_file

DEIT = (*DISTIL, "--objective", "deit", "--set", "train.log_every=1")


@pytest.mark.parametrize("more", [(), ("--set", "objective.second_head=drop", "--set", "train.ema_decay=0.5")])
def test_a_run_delivers_what_it_was_evaluated_by(
    distill: Cli, folder: Path, store: Made, tmp_path: Path, more: tuple[str, ...]
) -> None:
    command = ("train", *DEIT, "--store", store.path, "--data", folder, *more, "--out", tmp_path / "r")
    said = distill(*command, "--json", "--quiet")
    assert said.code == 0, said
    weights = load_file(tmp_path / "r" / "student.safetensors")
    student = timm.create_model("resnet18", num_classes=3, layers=[1, 1, 1, 1], channels=[8, 8, 8, 8])
    student.load_state_dict(weights)
    assert said.json["parameters_m"] == round(sum(each.numel() for each in student.parameters()) / 1e6, 3)
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["distill"]) and math.isfinite(line["label"]) for line in lines if "loss" in line)
    found = distill("eval", tmp_path / "r", "--data", folder, "--workers", "0", "--json", "--quiet").json
    assert found["top1"] == said.json["top1"]
    assert found["nll"] == pytest.approx(said.json["nll"], rel=1e-5)
    taught = distill(*capture(tmp_path / "r", folder, tmp_path / "s"), "--quiet")
    assert taught.code == 0, taught


def test_a_stopped_run_goes_on_with_both_heads(distill: Cli, folder: Path, store: Made, tmp_path: Path) -> None:
    command = ("train", *DEIT, "--set", "train.steps=3", "--set", "train.save_every=1", "--set", "train.keep=9")
    command = (*command, "--store", store.path, "--data", folder)
    for name in ("whole", "r"):
        assert distill(*command, "--out", tmp_path / name).code == 0
    assert "model.student.head_dist.weight" in load_file(tmp_path / "r" / "checkpoints" / "step-00000001.safetensors")
    for gone in ("result.json", "checkpoints/step-00000002.safetensors", "checkpoints/step-00000003.safetensors"):
        (tmp_path / "r" / gone).unlink()
    assert "going on from step-00000001" in distill(*command, "--out", tmp_path / "r").err
    ours, theirs = (load_file(tmp_path / name / "student.safetensors") for name in ("r", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_student_of_two_heads_begins_from_one_of_one(
    distill: Cli, folder: Path, run: Made, store: Made, tmp_path: Path
) -> None:
    command = ("train", *DEIT, "--lr", "1e-12", "--set", "train.warmup_lr=0", "--set", "train.min_lr=0")
    command = (*command, "--store", store.path, "--data", folder, "--init-from", run.path, "--out", tmp_path / "r")
    assert distill(*command, "--set", "train.freeze_bn=true").code == 0
    ours, theirs = (load_file(path / "student.safetensors") for path in (tmp_path / "r", run.path))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)


@pytest.mark.parametrize(
    ("student", "setting", "line"),
    [
        ("resnet18", "false", 'objective.second_head: ResNet has no distillation head; give "average" or "drop", ta'),
        (
            "deit-tiny",
            "drop",
            "objective.second_head: VisionTransformerDistilled has a distillation head of its own; l",
        ),
    ],
)
def test_heads_that_do_not_fit_are_refused_before_the_data(
    refused: Refused, store: Made, tmp_path: Path, student: str, setting: str, line: str
) -> None:
    command = ("train", "--student", student, "--objective", "deit", "--set", f"objective.second_head={setting}")
    command = (*command, "--store", store.path, "--data", tmp_path / "none", "--out", tmp_path / "r")
    assert refused(2, *command).startswith(line)
