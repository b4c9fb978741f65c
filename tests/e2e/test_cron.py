"""The script of docs/cron.md, run as it stands there."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT

from distill_cli.locks import locked

pytestmark = pytest.mark.slow

RECIPE = """
[data]
image_size = 28
[store]
views = 2
shard_rows = 200
[train]
epochs = 2
batch_size = 60
lr = 2e-3
[student]
name = "resnet18"
kwargs = {layers = [1, 1, 1, 1], channels = [8, 8, 16, 16]}
[runtime]
workers = 1
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with the script, a recipe, and `distill` and `jq` in `bin/`."""
    (script,) = re.findall(r"```sh\n(#!/bin/sh\n.*?)```", (ROOT / "docs" / "cron.md").read_text(), re.DOTALL)
    assert len([line for line in script.splitlines() if line and not line.startswith("#")]) <= 15
    (tmp_path / "bin").mkdir()
    programs = {
        "pipeline.sh": script,
        "distill": f'#!/bin/sh\nexec {sys.executable} -m distill_cli "$@"\n',
        "jq": f"#!{sys.executable}\nimport json, sys\nprint(json.load(sys.stdin)[sys.argv[1][1:]])\n",
    }
    for name, text in programs.items():
        path = tmp_path / "bin" / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "photos.toml").write_text(RECIPE)
    return tmp_path


def pipeline(home: Path, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ, "PATH": f"{home}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "DISTILL_HOME": str(home), "TEACHER": "resnet18", **more,
    }  # fmt: skip
    command = [home / "bin" / "pipeline.sh", folder, "photos.toml"]
    # As cron does: no terminal, nothing on stdin.
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
    )


def test_the_pipeline_runs_is_idempotent_and_ends_by_its_codes(home: Path, folder: Path) -> None:
    first = pipeline(home, folder)
    assert (first.returncode, first.stdout) == (0, ""), (home / "log").glob("*.log")
    status = {
        name: json.loads((home / f"{name}.json").read_text())["status"] for name in ("teacher", "store", "student")
    }
    assert set(status.values()) == {"done"}
    assert pipeline(home, folder).returncode == 0
    status = {
        name: json.loads((home / f"{name}.json").read_text())["status"] for name in ("teacher", "store", "student")
    }
    assert set(status.values()) == {"already_done"}
    assert len((home / "history.txt").read_text().splitlines()) == 2
    assert pipeline(home, folder, FLOOR="100").returncode == 5
    (home / "photos.toml").write_text(RECIPE.replace("2e-3", "1e-3"))
    assert pipeline(home, folder).returncode == 3
    (home / "photos.toml").write_text(RECIPE)
    (home / "student" / "result.json").unlink()
    with locked(home / "student"):
        assert pipeline(home, folder).returncode == 75
    (log,) = (home / "log").glob("*.log")
    assert "--fail-below 100" in log.read_text()
    assert f"held by pid {os.getpid()}" in log.read_text()
