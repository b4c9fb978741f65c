"""A few real images, a teacher and its store."""

from pathlib import Path

import numpy as np
import pytest
from commands import SMALL_TEACHER, capture, distil, run_json

from distill_cli.data.idx import open_sample


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 + 100 real images of ten classes as PNG in class folders."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 60), ("val", 10)):
        source = open_sample(split)
        assert source.labels is not None
        for label in range(10):
            target = root / split / f"{label}"
            target.mkdir(parents=True)
            for index in np.flatnonzero(source.labels == label)[:count]:
                source.read(int(index)).save(target / f"{index:05d}.png")
    return root


@pytest.fixture(scope="session")
def teacher(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a small ResNet."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    run_json(
        "train", *SMALL_TEACHER, "--data", folder, "--image-size", "28", "--epochs", "2", "--batch-size", "60",
        "--lr", "2e-3", "--out", out,
    )  # fmt: skip
    return out


@pytest.fixture(scope="session")
def store(folder: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two views of the images, in shards of 100 rows, never disturbed."""
    out = tmp_path_factory.mktemp("store") / "store"
    run_json(*capture(teacher, folder, out))
    return out


@pytest.fixture(scope="session")
def undisturbed(folder: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a student of that store, left alone; not to be written to."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run_json(*distil(store, folder, out))
    return out
