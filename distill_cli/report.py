"""What a person sees while a command works, on stderr: bars on a terminal, lines on a pipe, nothing when quiet."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TextIO

LINE_EVERY_S = 10.0


class Progress(Protocol):
    """A stretch of work under way."""

    def advance(self, count: int, note: str = "") -> None:
        """Say that `count` more are done; `note` stands behind the bar."""
        ...


@dataclass
class Report:
    """Talks to the person. Stages are the section markers of a command; the result itself goes to stdout, not here."""

    quiet: bool = False
    stream: TextIO = sys.stderr

    def stage(self, text: str) -> None:
        """A step of the command begins."""
        if not self.quiet:
            print(text, file=self.stream, flush=True)

    def warn(self, text: str) -> None:
        """Something the person should know; the work goes on. Said even when quiet."""
        print(f"warning: {text}", file=self.stream, flush=True)

    @contextmanager
    def progress(self, label: str, total: int, done: int = 0, unit: str = "images") -> Iterator[Progress]:
        """Show progress towards `total`; `done` of it was done by an earlier attempt."""
        if self.quiet:
            yield _Silent()
        elif self.stream.isatty():
            with _bar(self.stream) as bar:
                yield _Bar(bar, bar.add_task(label, total=total, completed=done, unit=unit, note=""))
        else:
            yield _Lines(label, total, done, unit, self.stream)


class _Silent:
    def advance(self, count: int, note: str = "") -> None:
        pass


class _Lines:
    """A line now and then, with rate and time left: for logs of cron jobs and pipes."""

    def __init__(self, label: str, total: int, done: int, unit: str, stream: TextIO) -> None:
        self.label, self.total, self.unit, self.stream = label, total, unit, stream
        self.done, self.skipped = done, done
        self.start = self.spoken = time.monotonic()

    def advance(self, count: int, note: str = "") -> None:
        self.done += count
        now = time.monotonic()
        if now - self.spoken < LINE_EVERY_S and self.done < self.total:
            return
        self.spoken = now
        rate = (self.done - self.skipped) / max(now - self.start, 1e-9)
        left = _clock((self.total - self.done) / max(rate, 1e-9))
        print(
            f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.0f} {self.unit}/s, {left} left"
            + (f", {note}" if note else ""),
            file=self.stream,
            flush=True,
        )


class _Bar:
    def __init__(self, bar, task) -> None:  # type: ignore[no-untyped-def]
        self.bar, self.task = bar, task

    def advance(self, count: int, note: str = "") -> None:
        self.bar.update(self.task, advance=count, note=note)


def _bar(stream: TextIO):  # type: ignore[no-untyped-def]
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(show_speed=True),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
        console=Console(file=stream),
    )


def _clock(seconds: float) -> str:
    seconds = int(min(seconds, 359999))
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"
