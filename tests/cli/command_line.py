"""Commands on sixty real images of three classes, and what they give."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

STUDENT = ("--student", "resnet18", "--set", "student.kwargs={layers=[1,1,1,1],channels=[8,8,8,8]}")
DISTIL = (*STUDENT, "--batch-size", "8", "--set", "train.steps=2", "--workers", "0")
"""Of `train`, with a store, whose image size it takes."""
TRAIN = (*DISTIL, "--image-size", "28")
"""Of `train`, without a store."""


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """stdout as one line of strict JSON."""
        assert self.out.count("\n") == 1, self
        found: dict[str, Any] = json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        return found


@dataclass(frozen=True)
class Made:
    """A directory that a command has made, and what it said on stdout."""

    path: Path
    said: dict[str, Any]


Cli = Callable[..., Result]
"""Runs a command."""
Refused = Callable[..., str]
"""Runs a command that must end with a code, nothing on stdout and one line on stderr; gives that line."""


def capture(teacher: Path, folder: Path, out: Path) -> tuple[str | Path, ...]:
    """The command that writes two views in shards of 25 rows."""
    return (
        "teacher-logits", "--teacher", teacher, "--data", folder, "--top-k", "2", "--views", "2",
        "--shard-rows", "25", "--workers", "0", "--out", out,
    )  # fmt: skip
