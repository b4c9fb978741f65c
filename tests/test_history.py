import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill_cli import history as module
from distill_cli.distributed import World
from distill_cli.errors import DamagedError, DistillError, Stopped
from distill_cli.history import History, Window, last_validation, memory_mb, read_metrics
from distill_cli.objectives import Losses
from distill_cli.trackers import TensorBoard


def _write(run: Path, *lines: str) -> None:
    (run / "metrics.jsonl").write_text("".join(lines))


def _read(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _log(run: Path, start: int, steps: range) -> None:
    """A loss at each step, that tells the attempt by its start."""
    history = History(run, start, [TensorBoard(run, start)])
    for step in steps:
        history.log(step, {"loss": 10.0 * start + step}, "train")
    history.finish("finished")


def test_a_line_is_there_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    history = History(tmp_path, 0)
    history.log(1, {"loss": 2.5, "lr": 0.1}, "train")
    history.log(1, {"top1": 50.0, "top5": None}, "val")
    lines = _read(tmp_path)
    history.finish("finished")
    assert lines == [{"step": 1, "loss": 2.5, "lr": 0.1}, {"step": 1, "top1": 50.0, "top5": None}]


def test_a_full_disk_is_told_by_the_file_that_it_had_no_room_for(tmp_path: Path) -> None:
    history = History(tmp_path, 0)
    history._file.close()
    with Path("/dev/full").open("a") as history._file:
        with pytest.raises(OSError, match=r"No space left on device: '.*/metrics\.jsonl'"):
            history.log(1, {"loss": 2.5}, "train")
        history.finish("failed")


def test_lines_beyond_the_checkpoint_are_taken_back(tmp_path: Path) -> None:
    _log(tmp_path, 0, range(1, 6))
    _log(tmp_path, 3, range(4, 7))
    assert [(line["step"], line["loss"]) for line in _read(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 34.0),
        (5, 35.0),
        (6, 36.0),
    ]


def test_tensorboard_has_the_same_steps_once(tmp_path: Path) -> None:
    _log(tmp_path, 0, range(1, 6))
    _log(tmp_path, 3, range(4, 7))
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (line["step"], line["loss"]) for line in _read(tmp_path)
    ]


@pytest.mark.parametrize("last", ['{"step": 2, "lo', '{"step": 2, "loss": 1.0}'])
def test_a_last_line_without_its_end_is_dropped(tmp_path: Path, last: str) -> None:
    _write(tmp_path, '{"step": 1, "loss": 3.0}\n', last)
    _log(tmp_path, 2, range(3, 4))
    assert [line["step"] for line in _read(tmp_path)] == [1, 3]


def test_what_was_validated_is_known_after_a_restart(tmp_path: Path) -> None:
    _write(tmp_path, *(f'{{"step": {step}, "top1": 1.0}}\n' for step in (0, 5, 9)), '{"step": 6, "loss": 1.0}\n')
    history = History(tmp_path, 6)
    validated = set(history.validated)
    history.log(8, {"top1": 2.0}, "val")
    history.finish("finished")
    assert (validated, history.validated) == ({0, 5}, {0, 5, 8})


def test_ranks_that_only_follow_write_nothing(tmp_path: Path) -> None:
    history = History(tmp_path, 0, write=False)
    history.log(1, {"top1": 1.0}, "val")
    history.finish("finished")
    assert list(tmp_path.iterdir()) == []
    assert history.validated == {1}


def test_the_last_validation_is_the_newest_complete_one(tmp_path: Path) -> None:
    assert last_validation(tmp_path) is None
    _write(
        tmp_path, '{"step": 1, "top1": 1.0}\n{"step": 2, "top1": 2.0}\n{"step": 3, "loss": 1.0}\n{"step": 4, "top1": 4'
    )
    assert last_validation(tmp_path) == {"step": 2, "top1": 2.0}


@pytest.mark.parametrize("name", ["top1", "ema_top1"])
def test_the_best_validation_is_known_after_a_restart(tmp_path: Path, name: str) -> None:
    """Of the average, where there is one; the first of equals."""
    with History(tmp_path, 0) as history:
        for step, value in ((2, 40.0), (4, 60.0), (6, 60.0)):
            history.log(step, {"top1": 50.0, name: value}, "val")
    resumed = History(tmp_path, 6)
    better = [resumed.is_best({"top1": 99.0, name: value}) for value in (60.0, 60.1)]
    resumed.finish("finished")
    assert (history.best, resumed.best, better) == (4, 4, [False, True])


class Listener:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def log(self, *call: Any) -> None:
        self.calls.append(("log", *call))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self.calls.append(("image", step, name, image.shape))

    def finish(self, end: str) -> None:
        self.calls.append(("finish", end))


def test_its_trackers_are_told_the_same(tmp_path: Path) -> None:
    listener = Listener()
    with History(tmp_path, 0, [listener]) as history:
        history.log(3, {"loss": 1.0}, "train")
        history.image(0, "inputs", np.full((4, 6, 3), 7, np.uint8))
    assert listener.calls == [
        ("log", 3, {"loss": 1.0}, "train"),
        ("image", 0, "inputs", (4, 6, 3)),
        ("finish", "finished"),
    ]
    with Image.open(tmp_path / "images" / "inputs-00000000.png") as image:
        assert (image.size, image.getpixel((5, 3))) == ((6, 4), (7, 7, 7))


@pytest.mark.parametrize(
    ("error", "end"), [(Stopped("SIGTERM: saved", 15), "stopped"), (DistillError("not finite"), "failed")]
)
def test_how_the_run_ends_is_told(tmp_path: Path, error: DistillError, end: str) -> None:
    listener = Listener()
    with pytest.raises(type(error)), History(tmp_path, 0, [listener]):
        raise error
    assert listener.calls == [("finish", end)]


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"loss": 1}', '{"step": "1"}', "\xff"])
def test_a_line_that_is_none_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line.encode("latin1") + b"\n")
    with pytest.raises(DamagedError, match=r"metrics.jsonl: line 2 is no line of metrics; take it out"):
        read_metrics(tmp_path)


def losses(total: float, agreement: float) -> Losses:
    return Losses(torch.tensor(total), {"label": torch.tensor(total / 2)}, {"agreement": torch.tensor(agreement)})


def test_a_window_has_means_and_the_share_of_its_time_that_was_waited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([0.0, 10.0, 10.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(times))
    window = Window(World(torch.device("cpu")))
    window.add(1, losses(2.0, 0.25), torch.tensor(4.0), 50, waited=1.0)
    window.add(2, losses(4.0, 0.75), torch.tensor(6.0), 50, waited=3.0)
    values = window.flush()
    assert values.pop("memory_mb") > 10
    assert values == {
        "loss": 3.0, "label": 1.5, "agreement": 0.5, "grad_norm": 5.0, "images_per_s": 10.0, "data_wait": 0.4,
    }  # fmt: skip
    assert window.note == "loss 3, data wait 40 %"


def test_the_note_has_the_parts_of_a_loss_that_has_several(tmp_path: Path) -> None:
    window = Window(World(torch.device("cpu")))
    parts = {"label": torch.tensor(2.0), "distill": torch.tensor(0.12345)}
    window.add(1, Losses(torch.tensor(1.0), parts), torch.tensor(4.0), 50, waited=0.0)
    window.flush()
    assert window.note == "loss 1, label 2, distill 0.1235, data wait 0 %"


def test_memory_is_the_most_that_was_held() -> None:
    before = memory_mb(torch.device("cpu"))
    held = np.ones(300 * 2**20, np.uint8)
    del held
    assert memory_mb(torch.device("cpu")) >= max(before, 300)
