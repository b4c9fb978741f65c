"""Mixup and CutMix through the command line: a store of mixed images, and what is made of it."""

import json
import shutil
from pathlib import Path

import pytest
from command_line import DISTIL, TRAIN, Cli, Made, Refused, capture

from distill_cli.data.config import View
from distill_cli.data.mixing import Mixing

MIXED = ("--set", "data.mixup=0.8", "--set", "data.cutmix=1.0")
STEPS = ("--set", "train.steps=6", "--workers", "2", "--quiet", "--json")


@pytest.fixture(scope="session")
def mixed(distill: Cli, folder: Path, run: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A store of mixed images, the batches of its capture odd; not to be written to."""
    out = tmp_path_factory.mktemp("mixed") / "store"
    result = distill(*capture(run.path, folder, out), *MIXED, "--batch-size", "7", "--json", "--quiet")
    assert result.code == 0, result
    return Made(out, result.json)


def test_a_student_is_trained_and_evaluated_on_it(distill: Cli, folder: Path, mixed: Made, tmp_path: Path) -> None:
    transform = json.loads((mixed.path / "plan.json").read_text())["transform"]
    assert (transform["mixup"], transform["cutmix"], "mixup_prob" in transform) == (0.8, 1.0, False)
    train = ("train", *DISTIL, "--store", mixed.path, "--data", folder, *STEPS)
    weights = []
    for name, workers in (("two", "2"), ("none", "0")):
        result = distill(*train, "--workers", workers, "--out", tmp_path / name)
        assert (result.code, result.json["status"]) == (0, "done"), result
        weights.append((tmp_path / name / "student.safetensors").read_bytes())
    assert weights[0] == weights[1]
    scores = distill("eval", tmp_path / "two", "--store", mixed.path, "--workers", "2", "--json", "--quiet")
    assert (scores.code, scores.json["rows"]) == (0, 40), scores
    page = distill("report", tmp_path / "two", "--samples", "15", "--workers", "2", "--json", "--quiet")
    assert (page.code, page.json["rows"]) == (0, 15), page
    student = ("--image-size", "48", "--objective", "tinyvit", "--out", tmp_path / "larger")
    assert distill(*train, *student).code == 0


def test_it_is_verified_checked_trimmed_extended_and_merged(
    distill: Cli, folder: Path, run: Made, mixed: Made, tmp_path: Path
) -> None:
    teacher = ("--teacher", run.path, "--data", folder, "--workers", "0")
    shutil.copytree(mixed.path, tmp_path / "S")
    assert distill("store", "extend", tmp_path / "S", *teacher, "--views", "3", "--quiet").code == 0
    more = (*capture(run.path, folder, tmp_path / "M"), *MIXED, "--views", "1", "--shard-rows", "9")
    assert distill(*more, "--set", "store.first_view=3", "--quiet").code == 0
    assert distill("store", "merge", tmp_path / "S", tmp_path / "M", "--out", tmp_path / "J", "--quiet").code == 0
    assert distill("store", "trim", tmp_path / "J", "--top-k", "1", "--out", tmp_path / "T", "--quiet").code == 0
    for name, rows in (("S", 120), ("J", 160), ("T", 160)):
        assert distill("store", "verify", tmp_path / name, "--quiet").code == 0
        found = distill("store", "check", tmp_path / name, *teacher, "--json", "--quiet")
        assert (found.code, found.json["status"], found.json["rows"]) == (0, "ok", rows), found
        assert found.json["max_difference"] < 0.004
    train = ("train", *DISTIL, *STEPS, "--set", "train.steps=20", "--views-per-read", "2", "--data", folder)
    assert distill(*train, "--store", tmp_path / "J", "--out", tmp_path / "R").code == 0


def test_another_lambda_than_the_store_s_is_refused(
    refused: Refused,
    distill: Cli,
    folder: Path,
    run: Made,
    mixed: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = ("train", *DISTIL, "--store", mixed.path, "--data", folder, "--out", tmp_path / "R")
    line = refused(3, *train, "--set", "data.mixup=0.4")
    assert line.startswith("data.mixup: 0.4 asked, the store has 0.8; leave it out")
    draw = Mixing.__call__

    def other(self: Mixing, *numbers: int) -> object:
        return draw(Mixing(View(**{**self.view.table, "mixup": 0.4, "cutmix": 0.4}), self.size), *numbers)

    monkeypatch.setattr(Mixing, "__call__", other)
    assert "does not replay to the pixels that the teacher saw" in refused(3, *train)
    check = ("store", "check", mixed.path, "--teacher", run.path, "--data", folder)
    assert "does not replay to the pixels that the teacher saw" in refused(3, *check)


@pytest.mark.parametrize("augment", ["none", "pad-crop"])
def test_from_labels_alone_and_with_any_augmentation(distill: Cli, folder: Path, tmp_path: Path, augment: str) -> None:
    train = ("train", *TRAIN, *MIXED, *STEPS, "--set", f"data.augment={augment}", "--data", folder)
    weights = []
    for name, workers in (("two", "2"), ("none", "0")):
        assert distill(*train, "--workers", workers, "--out", tmp_path / name).code == 0
        weights.append((tmp_path / name / "student.safetensors").read_bytes())
    assert weights[0] == weights[1]
    plain = ("train", *TRAIN, *STEPS, "--set", f"data.augment={augment}", "--data", folder, "--out", tmp_path / "P")
    assert distill(*plain).code == 0
    assert (tmp_path / "P" / "student.safetensors").read_bytes() != weights[0]


def test_several_views_a_read_save_nothing_and_that_is_said(
    distill: Cli, folder: Path, mixed: Made, tmp_path: Path
) -> None:
    train = (
        "train",
        *DISTIL,
        "--store",
        mixed.path,
        "--data",
        folder,
        "--views-per-read",
        "2",
        "--out",
        tmp_path / "R",
    )
    assert "--views-per-read 2: each view mixes a sample with another one" in distill(*train).err
