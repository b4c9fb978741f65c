import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import Cli

from distill_cli import __version__
from distill_cli.cli import app

ROOT = Path(__file__).parents[2]
HEAVY = {
    "torch",
    "torchvision",
    "timm",
    "h5py",
    "numpy",
    "PIL",
    "safetensors",
    "tensorboard",
}  # typer itself imports pydantic.
PROBE = """
import contextlib, io, json, sys
from distill_cli.cli import main
found = {}
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main(arguments)
    found[" ".join(arguments)] = sorted(set(json.loads(sys.argv[2])) & set(sys.modules))
print(json.dumps(found))
"""


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with its words, groups too."""
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


EVERY = dict(commands(typer.main.get_command(app)))
every_command = pytest.mark.parametrize("path", EVERY, ids=lambda path: "-".join(path) or "distill")


def test_help_and_lists_import_nothing_heavy() -> None:
    asked = [[*path, "--help"] for path in EVERY] + [["--version"], ["models", "ls"], ["recipes", "ls"], ["trian"]]
    command = [sys.executable, "-c", PROBE, json.dumps(asked), json.dumps(sorted(HEAVY))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=True)
    assert json.loads(done.stdout) == {" ".join(arguments): [] for arguments in asked}


@every_command
def test_help_goes_to_stdout(path: tuple[str, ...], distill: Cli) -> None:
    result = distill(*path, "--help")
    assert (result.code, result.err) == (0, "")
    assert "Usage: " in result.out
    assert distill(*path, "-h").out == result.out


@every_command
def test_everything_that_can_be_given_is_explained(path: tuple[str, ...]) -> None:
    assert EVERY[path].help
    silent = [
        option.name for option in EVERY[path].params if not getattr(option, "help", None) and option.name != "name"
    ]
    assert silent == []


def test_the_commands_of_the_design_are_there() -> None:
    assert {("teacher-logits",), ("train",), ("eval",), ("recipes", "cp"), ("models", "ls"), ("doctor",)} <= set(EVERY)


@pytest.mark.parametrize("command", ["teacher-logits", "train", "eval"])
def test_the_three_commands_share_their_options(command: str) -> None:
    options = {name for option in EVERY[command,].params for name in option.opts}
    assert options >= {
        "--recipe", "--set", "--data", "--batch-size", "--image-size", "--workers", "--device", "--precision",
        "--dry-run", "--json", "--quiet",
    }  # fmt: skip


def test_the_version_is_one_line(distill: Cli) -> None:
    result = distill("--version")
    assert (result.code, result.out, result.err) == (0, f"distill {__version__}\n", "")


@pytest.mark.parametrize("path", [(), ("recipes",), ("models",)])
def test_a_group_without_a_command_shows_its_help_and_no_empty_error(path: tuple[str, ...], distill: Cli) -> None:
    result = distill(*path)
    assert "Usage: " in result.out + result.err
    assert "distill:  " not in result.err
