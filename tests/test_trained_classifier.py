"""A run whose objective trains no classifier: what it does without, and who may use it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill_cli.capture import open_capture
from distill_cli.checkpoint import RESULT
from distill_cli.distributed import World
from distill_cli.errors import MismatchError
from distill_cli.evaluate import evaluate
from distill_cli.recipe import Recipe, update
from distill_cli.report import Report
from distill_cli.students.weights import BEST, STUDENT, read_card
from distill_cli.train import train

WORLD = World(torch.device("cpu"))
SETTINGS: dict[str, Any] = {
    "data.path": "sample",
    "student.name": "vit_tiny_patch16_224",
    "student.patch_size": 14,
    "student.embed_dim": 24,
    "student.depth": 1,
    "student.num_heads": 3,
    "train.batch_size": 4,
    "train.steps": 1,
    "runtime.workers": 0,
}


MAE = {"objective.name": "dmae", "objective.alpha": 0.0} | {
    f"objective.decoder.{name}": value for name, value in {"depth": 1, "width": 24, "heads": 3}.items()
}


class Said(Report):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def stage(self, text: str) -> None:
        self.lines.append(text)


def recipe(**more: Any) -> Recipe:
    return update(Recipe(), SETTINGS | more)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an objective that learns from neither labels nor logits."""
    out = tmp_path_factory.mktemp("untrained") / "run"
    report = Said()
    summary = train(recipe(**MAE), out, WORLD, report)
    assert "objective dmae trains no classifier: nothing is validated, and there is no top1" in report.lines
    assert (summary.status, summary.top1, summary.nll) == ("done", None, None)
    return out


def test_it_validates_nothing(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1]
    assert "top1" not in lines[0]
    assert json.loads((run / RESULT).read_text())["top1"] is None
    assert not (run / BEST).exists()
    assert not (run / "validation.json").exists()


def test_its_weights_say_so(run: Path) -> None:
    card = read_card(run / STUDENT)
    assert card is not None
    assert card.trained_classifier is False


def test_it_is_not_evaluated(run: Path) -> None:
    line = f"^{run}: has no logits, as objective dmae trains no classifier; fine-tune it first, by distill train"
    with pytest.raises(MismatchError, match=line):
        evaluate(Recipe(), str(run), WORLD, Report(quiet=True))


def test_it_teaches_no_logits(run: Path) -> None:
    line = f"^--teacher {run}: has no logits, as objective dmae trains no classifier"
    teacher = {"teacher.name": str(run), "data.path": "sample"}
    with pytest.raises(MismatchError, match=line):
        open_capture(update(Recipe(), teacher), WORLD, Report(quiet=True))
    live = {"teacher.name": str(run), "teacher.live": True, "objective.name": "tinyvit"}
    with pytest.raises(MismatchError, match=line):
        train(recipe(**live), run.parent / "taught", WORLD, Report(quiet=True))


def test_what_begins_from_it_has_a_new_classifier_and_all_else_of_it(run: Path, tmp_path: Path) -> None:
    begun = recipe(**{"train.init_from": str(run), "train.seed": 1, "train.lr": 1e-12, "train.warmup_epochs": 0})
    assert train(begun, tmp_path / "tuned", WORLD, Report(quiet=True)).top1 is not None
    before, after = (load_file(path / STUDENT) for path in (run, tmp_path / "tuned"))
    same = {name for name in before if torch.allclose(before[name], after[name], atol=1e-6)}
    assert before.keys() - same == {"head.weight"}  # Both biases begin at 0.
    (tmp_path / "map.txt").write_text(" ".join(map(str, range(10))))
    mapped = update(begun, {"student.class_map": str(tmp_path / "map.txt")})
    with pytest.raises(MismatchError, match=r"class_map .*: the classifier of .* was never trained; leave it out"):
        train(mapped, tmp_path / "mapped", WORLD, Report(quiet=True))
