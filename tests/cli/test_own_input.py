"""A student that sees its teacher's crops at its own size and in its own colours, through the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import DISTIL, TRAIN, Cli, Made, Refused
from safetensors import safe_open

CLIP = [0.48145466, 0.4578275, 0.40821073]
VIEW = ("--set", "data.auto_augment=rand-m9-mstd0.5-inc1", "--set", "data.reprob=0.25")


@pytest.fixture(scope="session")
def at_48(distill: Cli, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The store of a teacher of 48 px with CLIP's mean; not to be written to."""
    made = tmp_path_factory.mktemp("at_48")
    teacher = (*TRAIN, "--image-size", "48", "--set", f"data.mean={CLIP}", "--data", folder, "--out", made / "T")
    assert distill("train", *teacher, "--quiet").code == 0
    capture = ("--teacher", made / "T", "--data", folder, "--top-k", "2", "--views", "2", "--workers", "0", *VIEW)
    result = distill("teacher-logits", *capture, "--out", made / "S", "--json", "--quiet")
    assert result.code == 0, result
    return Made(made / "S", result.json)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "R"


def _card(run: Path) -> dict[str, Any]:
    with safe_open(run / "student.safetensors", "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["input"])
        return found


@pytest.mark.parametrize(
    ("asked", "size", "mean"),
    [
        ((), 48, CLIP),
        (("--image-size", "28"), 28, CLIP),
        (("--set", "student.img_size=28", "--set", "data.mean=[0.5,0.5,0.5]"), 28, [0.5, 0.5, 0.5]),
        (("--set", "data.input=student"), 224, [0.485, 0.456, 0.406]),
        (("--set", "data.input=student", "--image-size", "28"), 28, [0.485, 0.456, 0.406]),
    ],
    ids=["as the teacher", "another size", "another size and mean", "its own", "its own, smaller"],
)
def test_train_and_eval(
    asked: tuple[str, ...], size: int, mean: list[float], at_48: Made, folder: Path, out: Path, distill: Cli
) -> None:
    command = ("train", *DISTIL, *asked, "--store", at_48.path, "--data", folder, "--out", out, "--json")
    result = distill(*command)
    assert (result.code, result.json["status"], result.json["steps"]) == (0, "done", 2), result
    assert _card(out)["input_size"] == [3, size, size]
    assert _card(out)["mean"] == mean
    assert ("by an input of its own" in result.err) == bool(asked)
    assert json.loads((at_48.path / "plan.json").read_text())["transform"]["image_size"] == 48
    scores = distill("eval", out, "--store", at_48.path, "--workers", "0", "--json", "--quiet")
    assert (scores.code, scores.json["rows"], scores.json["images"]) == (0, 40, 20), scores
    assert scores.json["top1"] == result.json["top1"]
    assert distill(*command, "--quiet").json["status"] == "already_done"


def test_what_differs_is_said(at_48: Made, folder: Path, out: Path, distill: Cli) -> None:
    command = ("train", *DISTIL, "--image-size", "28", "--store", at_48.path, "--data", folder, "--out", out)
    said = "the student sees the teacher's crops by an input of its own: image_size 28 (the teacher 48)"
    assert said in distill(*command).err


def test_a_dry_run_says_where_the_input_comes_from(at_48: Made, folder: Path, out: Path, distill: Cli) -> None:
    command = ("train", *DISTIL, "--store", at_48.path, "--data", folder, "--out", out, "--dry-run", "--json")
    found = distill(*command, "--set", "data.input=student", "--image-size", "28").json
    origins = {name: found["origins"][f"data.{name}"] for name in ("image_size", "mean", "crop_pct", "hflip")}
    assert origins == {"image_size": "--image-size", "mean": "student", "crop_pct": "student", "hflip": "store"}


def test_another_input_is_another_run(at_48: Made, folder: Path, out: Path, distill: Cli, refused: Refused) -> None:
    command = ("train", *DISTIL, "--store", at_48.path, "--data", folder, "--out", out)
    assert distill(*command, "--quiet").code == 0
    said = refused(3, *command, "--image-size", "28")
    assert said.startswith(f"{out}: holds a run of another recipe (data.image_size: 48, 28; student.img_size: 48, 28")


@pytest.mark.parametrize(
    ("asked", "code", "line"),
    [
        (("--set", "data.hflip=0.25"), 3, "data.hflip: 0.25 asked, the store has 0.5; leave it out"),
        (("--set", "data.interpolation=random"), 3, "one is drawn and the other is not"),
        (
            ("--image-size", "28", "--set", "student.img_size=32"),
            2,
            "data.image_size 28, student.img_size 32; give one",
        ),
    ],
)
def test_what_cannot_agree_is_refused(
    asked: tuple[str, ...], code: int, line: str, at_48: Made, folder: Path, out: Path, refused: Refused
) -> None:
    assert line in refused(code, "train", *DISTIL, *asked, "--store", at_48.path, "--data", folder, "--out", out)


def test_a_teacher_takes_no_student_input(at_48: Made, folder: Path, out: Path, distill: Cli, refused: Refused) -> None:
    """`store extend` goes on with what the teacher saw."""
    teacher = at_48.path.parent / "T"
    command = ("store", "extend", at_48.path, "--views", "3", "--teacher", teacher, "--data", folder)
    said = refused(3, *command, "--set", "data.image_size=28")
    assert said.startswith("data.image_size: 28 asked, the store has 48; leave it out")
