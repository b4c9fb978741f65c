"""Runs of small students, whose losses and weights two ways of training can be held against each other by."""

from pathlib import Path
from typing import Any

from distill_cli.recipe import Recipe, load

VIT = {
    "student.name": "deit-tiny",
    "student.kwargs": {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 7},
    "student.drop_path": 0.0,
    "data.image_size": 28,
    "train.lr": 1e-3,
    # The biases of keys have no gradient but rounding, which AdamW would otherwise bring to the size of all others.
    "train.eps": 1e-6,
    "train.steps": 20,
    "train.log_every": 1,
}
"""Without BatchNorm, and nothing is drawn: what a rank does not do another one does."""
RESNET = VIT | {"student.name": "resnet18", "student.kwargs": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}}
del RESNET["student.drop_path"]


def small_recipe(folder: Path, settings: dict[str, Any]) -> Recipe:
    """A recipe of these settings; None leaves one out."""
    given = {"data.path": str(folder), **settings}
    return load(None, (), {path: ("a test", value) for path, value in given.items() if value is not None}).recipe
