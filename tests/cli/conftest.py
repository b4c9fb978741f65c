"""The command line, in this process, on sixty real images of three classes."""

import contextlib
import io
import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill_cli.cli import main
from distill_cli.data.idx import open_sample

CLASSES = {"bag": 14, "boot": 14, "coat": 12}
STUDENT = (
    "--student", "resnet18", "--set", "student.kwargs={layers=[1,1,1,1],channels=[8,8,8,8]}",
)  # fmt: skip
TRAIN = (*STUDENT, "--image-size", "28", "--batch-size", "8", "--set", "train.steps=2", "--workers", "0")


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """stdout as one line of strict JSON."""
        assert self.out.count("\n") == 1, self.out
        found: dict[str, Any] = json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        return found


@dataclass(frozen=True)
class Made:
    """A directory that a command has made, and what it said on stdout."""

    path: Path
    said: dict[str, Any]


Cli = Callable[..., Result]


@pytest.fixture(scope="session")
def distill() -> Cli:
    """Runs a command."""

    def run(*arguments: str | Path) -> Result:
        out, err = io.StringIO(), io.StringIO()
        before = signal.getsignal(signal.SIGTERM)
        code: Any = None
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        finally:
            signal.signal(signal.SIGTERM, before)
        return Result(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def refused(distill: Cli) -> Callable[..., str]:
    """Runs a command that must end with a code, nothing on stdout and one line on stderr; gives that line."""

    def run(code: int, *arguments: str | Path) -> str:
        result = distill(*arguments, "--quiet")
        assert result.code == code, result
        assert result.out == ""
        assert result.err.startswith("distill: ")
        assert result.err.count("\n") == 1, result.err
        return result.err.strip().removeprefix("distill: ")

    return run


Refused = Callable[..., str]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 + 20 images in class folders; read only."""
    root = tmp_path_factory.mktemp("images")
    for split, share in (("train", 1.0), ("val", 0.5)):
        source = open_sample(split)
        assert source.labels is not None
        for label, (name, count) in enumerate(CLASSES.items()):
            (root / split / name).mkdir(parents=True)
            for index in np.flatnonzero(source.labels == label)[: int(count * share)]:
                source.read(int(index)).save(root / split / name / f"{index:05d}.png")
    return root


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """The images, to be spoilt."""
    return Path(shutil.copytree(folder, tmp_path / "images"))


@pytest.fixture(scope="session")
def run(distill: Cli, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A finished run of a small ResNet; read only."""
    out = tmp_path_factory.mktemp("made") / "run"
    result = distill("train", *TRAIN, "--data", folder, "--out", out, "--json", "--quiet")
    assert result.code == 0, result.err
    return Made(out, result.json)


@pytest.fixture(scope="session")
def store(distill: Cli, folder: Path, run: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A store of that run's logits, two views in shards of 25 rows; read only."""
    out = tmp_path_factory.mktemp("made") / "store"
    result = distill(*capture(run.path, folder, out), "--json", "--quiet")
    assert result.code == 0, result.err
    return Made(out, result.json)


def capture(teacher: Path, folder: Path, out: Path) -> tuple[str | Path, ...]:
    """The command that writes `store`."""
    return (
        "teacher-logits", "--teacher", teacher, "--data", folder, "--top-k", "2", "--views", "2",
        "--shard-rows", "25", "--workers", "0", "--out", out,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No torchrun around us, and no debugging."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "DISTILL_DEBUG"):
        monkeypatch.delenv(name, raising=False)
