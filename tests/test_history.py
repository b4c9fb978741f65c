import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill_cli.history import History, last_validation
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
