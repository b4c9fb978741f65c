"""The command line in this process, where torch is imported once."""

import contextlib
import io
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import TRAIN, Cli, Made, Refused, Result, capture

from distill_cli.cli import main
from distill_cli.data.idx import open_sample

CLASSES = {"bag": 14, "boot": 14, "coat": 12}


@pytest.fixture(scope="session")
def distill() -> Cli:
    def run(*arguments: str | Path) -> Result:
        out, err = io.StringIO(), io.StringIO()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        of_threads = threading.excepthook
        code: Any = None
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            threading.excepthook = of_threads
        return Result(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def refused(distill: Cli) -> Refused:
    def run(code: int, *arguments: str | Path) -> str:
        result = distill(*arguments, "--quiet")
        assert (result.code, result.out) == (code, ""), result
        assert result.err.startswith("distill: "), result
        assert result.err.count("\n") == 1, result
        return result.err.strip().removeprefix("distill: ")

    return run


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 + 20 images in class folders; not to be written to."""
    root = tmp_path_factory.mktemp("folder")
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
    """A finished run of a small ResNet; not to be written to."""
    out = tmp_path_factory.mktemp("made") / "run"
    result = distill("train", *TRAIN, "--data", folder, "--out", out, "--json", "--quiet")
    assert result.code == 0, result
    return Made(out, result.json)


@pytest.fixture(scope="session")
def store(distill: Cli, folder: Path, run: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A store of that run's logits; not to be written to."""
    out = tmp_path_factory.mktemp("made") / "store"
    result = distill(*capture(run.path, folder, out), "--json", "--quiet")
    assert result.code == 0, result
    return Made(out, result.json)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No torchrun around us, and no debugging."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "DISTILL_DEBUG"):
        monkeypatch.delenv(name, raising=False)
