from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill_cli.metrics import Accuracy, Compared
from distill_cli.pictures import data_uri
from distill_cli.recipe import load
from distill_cli.reports.beside import EXAMPLES, SIDE, Beside, Example
from distill_cli.reports.classes import CLASSES, by_class
from distill_cli.reports.page import page
from distill_cli.reports.run import Run, Validation

RUN = Run(Path("runs/one"), load().recipe, [], [], None, None, None, None)
NOTHING = Beside("There is no teacher here.")


def accuracy(classes: int) -> Accuracy:
    bins = tuple((10, 0.5, (i + 0.5) / 15) for i in range(15))
    return Accuracy(100, 50.0, 80.0, 1.5, 0.1, tuple(float(i % 100) for i in range(classes)), bins)


def compared(rows: int, classes: int) -> Compared:
    """The student right on every other row, the teacher on every row."""
    labels = np.arange(rows) % classes
    best = np.stack([labels, (labels + 1) % classes], axis=1)
    wrong = np.where(np.arange(rows)[:, None] % 2 == 0, best, best[:, ::-1])
    prob = np.tile([0.7, 0.2], (rows, 1))
    return Compared(np.arange(rows), labels, np.linspace(2, 0, rows), wrong, prob, best, prob)


def test_a_run_that_has_only_begun_says_what_is_missing() -> None:
    text = page(RUN, NOTHING)
    assert "under way, at step 0" in text
    assert "No line of metrics has been written yet." in text
    assert text.count("There is no teacher here.") == 2
    assert "recipe.toml" in text


def test_a_loss_of_one_part_is_one_curve() -> None:
    lines = [{"step": step, "loss": 1.0 + step, "distill": 1.0 + step} for step in (1, 2, 3)]
    assert page(replace(RUN, train=lines), NOTHING).count("<polyline") == 1
    several = [{**line, "label": 2.0} for line in lines]
    assert page(replace(RUN, train=several), NOTHING).count("<polyline") == 3


def test_by_class_both_are_counted_on_the_same_rows() -> None:
    assert by_class(compared(8, 2)) == {0: (4, 100.0, 100.0), 1: (4, 0.0, 100.0)}
    unlabelled = replace(compared(8, 2), labels=np.full(8, -1))
    assert by_class(unlabelled) == {}


def test_the_class_where_the_student_is_furthest_behind_is_first() -> None:
    run = replace(RUN, validation=Validation(3, ("<b>boot", "coat"), accuracy(2)))
    text = page(run, Beside(None, split="train", rows=compared(8, 2)))
    assert text.index('"name">coat<') < text.index('"name">&lt;b&gt;boot<')
    assert "8 training images with rows in the store" in text
    assert "Validation: the student on all 100 images at step 3." in text
    assert "-100.0" in text


def test_of_many_classes_the_worst_and_the_best_are_shown() -> None:
    run = replace(RUN, validation=Validation(3, None, accuracy(1000)))
    text = page(run, NOTHING)
    assert text.count('class="name"') == CLASSES
    assert "960 classes between are left out" in text


@pytest.mark.parametrize("key", ["a.png", "\u202e" * 5000])
def test_a_long_run_of_many_classes_and_long_names_stays_small(key: str) -> None:
    lines = [{"step": s, "loss": 2.0, **{f"part{i}": 1 / s for i in range(20)}, "lr": 0.1} for s in range(1, 20000)]
    names = tuple(f"{i}{'x' * 3000}" for i in range(1000))
    run = replace(RUN, train=lines, val=lines, validation=Validation(9, names, accuracy(1000)))
    # No picture is larger as JPEG than noise.
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 400, 3), np.uint8))
    examples = tuple(Example(row, key, *[data_uri(noise, SIDE)] * 2) for row in range(EXAMPLES))
    text = page(run, Beside(None, split="train", rows=compared(2000, 1000), examples=examples))
    assert len(text.encode()) < 3e6


def test_a_run_under_way_has_reached_what_its_average_has() -> None:
    lines = [{"step": 3, "top1": 40.0, "ema_top1": 45.0, "top5": 80.0, "nll": 1.5, "ece": 0.1}]
    text = page(replace(RUN, val=lines), NOTHING)
    assert "<dt>top-1</dt><dd>45.00 %</dd>" in text
    assert "<dt>top-5</dt><dd>80.00 %</dd>" in text
    assert "ema_top1" in text


def test_a_finished_run_has_reached_what_its_result_says() -> None:
    text = page(replace(RUN, result={"top1": 61.25, "wall_s": 7260.0}), NOTHING)
    assert "<dd>61.25 %</dd>" in text
    assert "<dd>2 h 01 min</dd>" in text
