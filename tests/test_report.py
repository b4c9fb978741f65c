import io
import os
import re
from pathlib import Path

import pytest

from distill_cli import report
from distill_cli.report import Report


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(*counts: int, total: int = 100, done: int = 0, note: str = "") -> list[str]:
    """What a pipe gets of these advances."""
    stream = io.StringIO()
    with Report(stream=stream).progress("train", total, done) as progress:
        for count in counts:
            progress.advance(count, note)
    return stream.getvalue().splitlines()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Times to come; the last one stays."""
    times = [0.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: times.pop(0) if len(times) > 1 else times[0])
    return times


def test_a_pipe_gets_lines_with_rate_and_time_left(clock: list[float]) -> None:
    clock[:] = [0, 20]
    assert lines(50, note="loss 1.5") == ["train: 50/100 images, 2 images/s, 0:20 left, loss 1.5"]


def test_a_pipe_gets_a_line_now_and_then_and_one_at_the_end(clock: list[float]) -> None:
    clock[:] = [0, 1, 11, 12, 13]
    assert [line.split(",")[0] for line in lines(10, 10, 10, 70)] == ["train: 20/100 images", "train: 100/100 images"]


def test_what_an_earlier_attempt_did_does_not_count_for_the_rate(clock: list[float]) -> None:
    clock[:] = [0, 10]
    assert lines(10, total=1000, done=900) == ["train: 910/1000 images, 1 images/s, 1:30 left"]


def test_hours_are_told_from_minutes(clock: list[float]) -> None:
    clock[:] = [0, 10]
    assert lines(1, total=1000) == ["train: 1/1000 images, 0 images/s, 2:46:30 left"]


@pytest.mark.parametrize(("columns", "shown"), [("120", 1), ("80", 2)])
def test_a_terminal_gets_a_bar_and_its_note_where_there_is_room(
    columns: str, shown: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", columns)
    stream = Terminal()
    with Report(stream=stream).progress("train", 100, unit="rows") as progress:
        progress.advance(100, "loss 1.5")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue().replace("\r", "\n")).strip()
    last = "\n".join(text.splitlines()[-shown:])
    assert last.startswith("train")
    assert "100/100 rows" in last
    assert last.endswith("\nloss 1.5" if shown == 2 else " loss 1.5")


def test_quiet_says_nothing_but_warnings() -> None:
    stream = Terminal()
    quiet = Report(quiet=True, stream=stream)
    quiet.stage("opening the data")
    with quiet.progress("train", 1) as progress:
        progress.advance(1)
    quiet.warn("no validation split")
    assert stream.getvalue() == "warning: no validation split\n"


def test_a_stage_is_a_line() -> None:
    stream = io.StringIO()
    Report(stream=stream).stage("opening the data")
    assert stream.getvalue() == "opening the data\n"


def test_the_newest_logs_stay_and_this_one_too_where_the_clock_was_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for hour in (*range(1, 13), 0):
        monkeypatch.setattr(report.time, "strftime", lambda _, hour=hour: f"{hour:02d}")
        quiet = Report(quiet=True)
        with quiet.logged(tmp_path):
            quiet.stage("opening the data")
    assert [int(path.name[:2]) for path in sorted(tmp_path.iterdir())] == [0, *range(4, 13)]


def test_a_log_without_room_on_the_disk_does_not_end_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.time, "strftime", lambda _: "now")
    (tmp_path / f"now-{os.getpid()}.log").symlink_to("/dev/full")
    stream = io.StringIO()
    said = Report(stream=stream)
    with said.logged(tmp_path):
        said.stage("opening the data")
    assert stream.getvalue() == "opening the data\n"


def test_it_talks_to_stderr_as_it_is_now_and_never_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    Report().stage("opening the data")
    assert capsys.readouterr() == ("", "opening the data\n")
