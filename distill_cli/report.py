"""What a person sees while a command works, on stderr: bars on a terminal, lines on a pipe, nothing when quiet."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

LINE_EVERY_S, LOG_EVERY_S = 10.0, 60.0
LOGS = 10
"""Files of a log that stay, an attempt each."""
WIDE = 110
"""Columns of a terminal from which on a bar's note stands on the same line."""


class Progress(Protocol):
    """A stretch of work under way."""

    def advance(self, count: int, note: str = "") -> None:
        """Say that `count` more are done; `note` stands behind the bar."""
        ...


@dataclass
class Report:
    """Talks to the person. Stages are the section markers of a command; the result itself goes to stdout, not here."""

    quiet: bool = False
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    _bars: "Bars | None" = None
    """On a terminal, while a bar is shown: lines go above it."""
    _log: "_Log | None" = None

    def stage(self, text: str) -> None:
        """A step of the command begins."""
        if self._log is not None:
            self._log.write(f"{text}\n")
        if not self.quiet:
            self._print(text)

    def warn(self, text: str) -> None:
        """Something the person should know; the work goes on. Said even when quiet."""
        if self._log is not None:
            self._log.write(f"warning: {text}\n")
        self._print(f"warning: {text}")

    @contextmanager
    def logged(self, folder: Path) -> Iterator[None]:
        """Keep what is said while the block runs, quiet or not, in a file of its own in `folder`; the oldest go."""
        folder.mkdir(exist_ok=True)
        path = folder / f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.log"
        with closing(_Log(path.open("a"))) as self._log:
            try:
                yield
            except Exception as error:
                self._log.write(f"{error}\n")
                raise
            finally:
                self._log = None
        # A clock that was set back makes this one the oldest by its name.
        for old in sorted(set(folder.glob("*.log")) - {path})[: 1 - LOGS]:
            old.unlink(missing_ok=True)

    @contextmanager
    def progress(self, label: str, total: int | None, done: int = 0, unit: str = "images") -> Iterator[Progress]:
        """Show progress towards `total`, if it is known; `done` of it was done by an earlier attempt."""
        with self._shown(label, total, done, unit) as shown:
            if self._log is None:
                yield shown
            else:
                yield _Both(shown, _Lines(label, total, done, unit, self._log, LOG_EVERY_S))

    @contextmanager
    def _shown(self, label: str, total: int | None, done: int, unit: str) -> Iterator[Progress]:
        if self.quiet:
            yield _Silent()
        elif self.stream.isatty():
            with _bars(self.stream) as self._bars:
                try:
                    yield _Bar(self._bars, self._bars.add_task(label, total=total, completed=done, unit=unit, note=""))
                finally:
                    self._bars = None
        else:
            yield _Lines(label, total, done, unit, self.stream, LINE_EVERY_S)

    def _print(self, text: str) -> None:
        if self._bars is None:
            print(text, file=self.stream, flush=True)
        else:
            self._bars.console.print(text, markup=False, highlight=False)


class _Silent:
    def advance(self, count: int, note: str = "") -> None:
        pass


class _Both:
    def __init__(self, *each: Progress) -> None:
        self._each = each

    def advance(self, count: int, note: str = "") -> None:
        for progress in self._each:
            progress.advance(count, note)


class _Log:
    """A file of lines with their times; a line that the disk has no room for is lost, and the work goes on."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, line: str) -> None:
        if line.strip():
            with suppress(OSError):
                self._file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {line.rstrip()}\n")
                self._file.flush()

    def flush(self) -> None:
        pass

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()


class _Lines:
    """A line now and then, with rate and time left: for logs of cron jobs and pipes."""

    def __init__(
        self, label: str, total: int | None, done: int, unit: str, stream: "TextIO | _Log", every_s: float
    ) -> None:
        self.label, self.total, self.unit, self.stream, self.every_s = label, total, unit, stream, every_s
        self.done, self.skipped = done, done
        self.start = self.spoken = time.monotonic()

    def advance(self, count: int, note: str = "") -> None:
        self.done += count
        now = time.monotonic()
        if now - self.spoken < self.every_s and self.done != self.total:
            return
        self.spoken = now
        rate = (self.done - self.skipped) / max(now - self.start, 1e-9)
        of = "" if self.total is None else f"/{self.total}"
        left = "" if self.total is None else f", {_clock((self.total - self.done) / max(rate, 1e-9))} left"
        said = f"{self.label}: {self.done}{of} {self.unit}, {rate:.0f} {self.unit}/s{left}"
        self.stream.write(said + (f", {note}" if note else "") + "\n")
        self.stream.flush()


class _Bar:
    def __init__(self, bars: "Bars", task: "TaskID") -> None:
        self.bars, self.task = bars, task

    def advance(self, count: int, note: str = "") -> None:
        self.bars.update(self.task, advance=count, note=note)


def _bars(stream: TextIO) -> "Bars":
    """A bar with its note behind it, or below it where a line has no room for both."""
    from rich.console import Console, RenderableType
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column
    from rich.text import Text

    console = Console(file=stream)
    wide = console.width >= WIDE
    whole = Column(no_wrap=True)

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.fields['unit']} {task.speed or 0:,.0f}/s")

    class Note(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(task.fields["note"], style="dim", no_wrap=True, overflow="ellipsis")

    class Lines(Progress):
        def get_renderables(self) -> Iterable[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            if not wide:
                yield from (Note().render(task) for task in self.tasks if task.fields["note"])

    columns = [
        TextColumn("{task.description}", table_column=whole),
        BarColumn(bar_width=16 if wide else 12),
        MofNCompleteColumn(table_column=whole),
        Rate(table_column=whole),
        TimeRemainingColumn(table_column=whole),
    ]
    return Lines(*columns, *([Note()] if wide else []), console=console)


def _clock(seconds: float) -> str:
    seconds = int(min(seconds, 359999))
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"
