"""`distill train --objective features`, as a user gives it."""

import json
import shutil
from pathlib import Path

import pytest
from command_line import Cli, Made, Refused
from safetensors.torch import load_file

from distill_cli.checkpoint import checkpoints, step_of
from distill_cli.students.build import create

VIT = ("--student", "vit_tiny_patch16_224", "--image-size", "28", "--workers", "0", "--batch-size", "8")
SHAPE = {"patch_size": 7, "embed_dim": 48, "depth": 2, "num_heads": 3}
FEATURES = (
    *VIT,
    "--objective",
    "features",
    *(word for name in SHAPE for word in ("--set", f"student.{name}={SHAPE[name]}")),
)
GRID = ("--set", 'objective.pairs.grid={loss="dense", student="blocks.1", teacher="layer2"}')


def last(run: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in reversed(lines) if "loss" in line)


def test_each_pair_is_logged_by_its_name_and_the_student_is_timm_s(
    distill: Cli, run: Made, folder: Path, tmp_path: Path
) -> None:
    weights = ("--set", "objective.pairs.last.weight=2", *GRID, "--set", "objective.pairs.grid.weight=0.5")
    steps = ("--set", "train.steps=2", "--set", "train.ema_decay=0.5")
    out = tmp_path / "out"
    result = distill(
        "train", *FEATURES, *weights, *steps, "--teacher", run.path, "--data", folder, "--out", out, "--json"
    )
    assert result.code == 0, result
    line = last(out)
    assert line["loss"] == pytest.approx(line["label"] + 2 * line["last"] + 0.5 * line["grid"], rel=1e-5)
    student = create("vit_tiny_patch16_224", num_classes=3, arguments={**SHAPE, "img_size": 28})
    assert load_file(out / "student.safetensors").keys() == student.state_dict().keys()
    newest = max(checkpoints(out), key=step_of)
    names = [name for name in load_file(newest) if "projection" in name and name.startswith("model.")]
    assert sorted(names) == [
        f"model.pairs.{place}.projection.{part}" for place in (0, 1) for part in ("bias", "weight")
    ]


def test_an_interrupted_run_ends_as_one_that_was_not(distill: Cli, run: Made, folder: Path, tmp_path: Path) -> None:
    """Its projections are in the checkpoint, and its masks are of the images."""
    masked = ("--set", 'objective.pairs.m={loss="masked", student="blocks.1", teacher="layer2"}')
    common = ("train", *FEATURES, *masked, "--teacher", run.path, "--data", folder, "--set", "train.save_every=2")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert distill(*common, "--set", "train.steps=4", "--out", whole).code == 0
    shutil.copytree(whole, cut)
    (cut / "student.safetensors").unlink()
    (cut / "result.json").unlink()
    max(checkpoints(cut), key=step_of).unlink()
    again = distill(*common, "--set", "train.steps=4", "--out", cut)
    assert again.code == 0, again
    assert "going on from step-00000002" in again.err
    assert (cut / "student.safetensors").read_bytes() == (whole / "student.safetensors").read_bytes()


def test_relations_of_parts_of_a_batch_are_said(distill: Cli, run: Made, folder: Path, tmp_path: Path) -> None:
    relation = ("--set", 'objective.pairs.r={loss="relation"}', "--set", "train.accumulate=2", "--set", "train.steps=1")
    result = distill("train", *FEATURES, *relation, "--teacher", run.path, "--data", folder, "--out", tmp_path / "out")
    assert result.code == 0, result
    said = (
        "warning: objective features: compares the images of a batch with each other, and sees 2 parts of it, each by"
    )
    assert said in result.err


WRONG = [
    (
        ("--set", GRID[1].replace("blocks.1", "blocks.9")),
        "objective.pairs.grid.student: blocks.9: VisionTransformer has",
    ),
    (
        ("--set", GRID[1].replace("layer2", "fc")),
        "objective.pairs.grid: ResNet: a layer's output [1, 3] is no square grid",
    ),
    (
        ("--set", "objective.pairs.p.projection=none"),
        'objective.pairs.p: projection "none" of 48 channels to the 8 of the',
    ),
    (("--set", "objective.pairs.p.mask=0.5"), "--set: objective.pairs.p.mask: unknown key of the loss that is chosen"),
]


@pytest.mark.parametrize(("given", "said"), WRONG)
def test_layers_that_do_not_fit_are_refused_before_the_data_is_opened(
    given: tuple[str, ...], said: str, refused: Refused, run: Made, tmp_path: Path
) -> None:
    arguments = (*FEATURES, *given, "--teacher", run.path, "--data", "/nowhere", "--out", tmp_path / "out")
    assert said in refused(2, "train", *arguments)


def test_a_student_that_does_not_take_the_size_is_refused_in_a_line(
    refused: Refused, run: Made, tmp_path: Path
) -> None:
    arguments = ("--student", "levit-128s", "--image-size", "20", "--objective", "features", "--teacher", run.path)
    said = refused(2, "train", *arguments, "--data", "/nowhere", "--out", tmp_path / "out")
    assert said.startswith("levit-128s: does not take 20 px images (")


def test_it_has_no_use_for_a_store_alone(refused: Refused, store: Made, folder: Path, tmp_path: Path) -> None:
    arguments = (*FEATURES, "--store", store.path, "--data", folder, "--out", tmp_path / "out")
    assert "objective features: learns from more of a teacher than the logits of a store; leave --store out" in refused(
        2, "train", *arguments
    )


def test_with_a_store_s_logits_it_shares_the_student_s_pass(
    distill: Cli, run: Made, store: Made, folder: Path, tmp_path: Path
) -> None:
    terms = ("--set", "objective.terms.tinyvit.weight=1", "--set", "objective.terms.features.label_weight=0")
    student = (word for name in SHAPE for word in ("--set", f"student.{name}={SHAPE[name]}"))
    out = tmp_path / "out"
    arguments = ("--student", "vit_tiny_patch16_224", *student, "--workers", "0", "--batch-size", "8", *terms)
    places = ("--teacher", run.path, "--store", store.path, "--data", folder, "--set", "train.steps=2", "--out", out)
    result = distill("train", *arguments, *places)
    assert result.code == 0, result
    line = last(out)
    assert line["loss"] == pytest.approx(line["tinyvit"] + line["features"], rel=1e-5)
