"""Which checkpoint is written, which stay, which is gone on from."""

import os
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD

from distill_cli import saver as module
from distill_cli.checkpoint import Snapshot, checkpoint_path, checkpoints, snapshot, step_of
from distill_cli.config import seconds_of
from distill_cli.errors import DamagedError, UsageError
from distill_cli.saver import Due, Saver, newest


def _model(value: float) -> tuple[nn.Module, SGD]:
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, value)
    return model, SGD(model.parameters())


def _snapshot(step: int) -> Snapshot:
    return snapshot(step, *_model(step), {})


def _written(run: Path, steps: list[int], keep: int = 9) -> None:
    with Saver(run, keep, pytest.fail) as saver:
        for step in steps:
            saver.save(_snapshot(step))
        saver.wait()


def _steps(run: Path) -> list[int]:
    return [step_of(path) for path in checkpoints(run)]


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    with Saver(tmp_path, 2, pytest.fail) as saver:
        for step in range(1, 7):
            saver.best = 2 if step > 2 else None
            saver.save(_snapshot(step))
        saver.wait()
    assert _steps(tmp_path) == [2, 5, 6]


def test_a_snapshot_is_of_its_own_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on while it is written."""
    go, write = threading.Event(), Snapshot.write

    def wait(self: Snapshot, path: Path) -> None:
        assert go.wait(10)
        write(self, path)

    monkeypatch.setattr(Snapshot, "write", wait)
    model, optimizer = _model(3)
    with Saver(tmp_path, 2, pytest.fail) as saver:
        saver.save(snapshot(1, model, optimizer, {}))
        nn.init.constant_(model.weight, 7)
        assert _steps(tmp_path) == []
        go.set()
        saver.wait()
    other, optimizer = _model(0)
    newest(tmp_path, "auto", other, optimizer, None, pytest.fail)
    assert torch.equal(other.weight, torch.full((1, 2), 3.0))


def test_a_checkpoint_that_cannot_be_written_is_told_and_the_next_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with Saver(tmp_path, 2, said.append) as saver:
        saver.save(_snapshot(1))
        saver.wait()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", _full)
            saver.save(_snapshot(2))
            saver.join()
        saver.save(_snapshot(3))
        saver.wait()
    assert said == [f"{tmp_path}: a checkpoint was not written (No space left on device); the one before is intact"]
    assert _steps(tmp_path) == [1, 3]


def test_the_last_checkpoint_must_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Saver(tmp_path, 2, pytest.fail) as saver:
        monkeypatch.setattr(os, "fsync", _full)
        saver.save(_snapshot(1))
        with pytest.raises(OSError, match="No space left"):
            saver.wait()
    assert _steps(tmp_path) == []


def _full(_: int) -> None:
    raise OSError(28, "No space left on device")


# Going on.


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "pickle"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(tmp_path: Path, damage: str) -> None:
    _written(tmp_path, [4, 8])
    path = checkpoint_path(tmp_path, 8)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    hostile = b"\x80\x04cos\nsystem\n(S'touch hacked'\ntR."
    path.write_bytes({"cut": content[: len(content) // 2], "flipped": content, "empty": b"", "pickle": hostile}[damage])
    said: list[str] = []
    model, optimizer = _model(0)
    state = newest(tmp_path, "auto", model, optimizer, None, said.append)
    assert state is not None
    assert (state["step"], model.weight[0, 0].item()) == (4, 4)
    (line,) = said
    assert line.startswith(f"{path}: not a readable checkpoint (")
    assert line.endswith("; going back to the checkpoint before it")
    assert not Path("hacked").exists()


def test_where_none_is_whole_the_run_does_not_begin_anew(tmp_path: Path) -> None:
    _written(tmp_path, [4])
    checkpoint_path(tmp_path, 4).write_bytes(b"")
    with pytest.raises(DamagedError, match=r"step-00000004\.safetensors: not a readable checkpoint"):
        newest(tmp_path, "auto", *_model(0), None, pytest.fail)


def test_resume_never_and_must(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match="has no checkpoint to go on from; leave out --resume must"):
        newest(tmp_path, "must", *_model(0), None, pytest.fail)
    assert newest(tmp_path, "never", *_model(0), None, pytest.fail) is None
    _written(tmp_path, [4])
    with pytest.raises(UsageError, match="a run is under way at step-00000004; choose another --out"):
        newest(tmp_path, "never", *_model(0), None, pytest.fail)
    assert newest(tmp_path, "must", *_model(0), None, pytest.fail) == {"step": 4}


# When.


def test_due_by_steps() -> None:
    assert [step for step in range(1, 10) if Due(4).at(step)] == [4, 8]
    assert not Due(None).at(4)


def test_due_by_time_whatever_the_clock_on_the_wall_says(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    monkeypatch.setattr(module.time, "time", lambda: 0.0)
    due = Due("15min")
    now += 899
    assert not due.at(1)
    now += 1
    assert due.at(2)
    due.saved()
    assert not due.at(3)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("15min", 900), ("2h", 7200), ("1.5h", 5400)])
def test_times(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["15", "15m", "min", "0s", "-1h", "1 h", ""])
def test_no_times(text: str) -> None:
    with pytest.raises(ValueError, match="give steps, or a time such as 90s, 15min or 2h"):
        seconds_of(text)
