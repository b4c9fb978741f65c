"""Commands as processes that are forked from one which has torch imported: a hundred starts in a minute."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from commands import ROOT

SERVE = """
import json, os, sys
import distill_cli.capture, distill_cli.teacher_logits
from distill_cli.cli import main
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        main(json.loads(line))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Warm:
    """Starts commands, one at a time."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server

    def start(self, *arguments: str | Path) -> int:
        """Start a command; gives its pid."""
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
        self._server.stdin.flush()
        return self._line()

    def wait(self) -> int:
        """The exit code of the command started last; minus the signal that killed it."""
        return self._line()

    def _line(self) -> int:
        assert self._server.stdout is not None
        return int(self._server.stdout.readline())


@contextlib.contextmanager
def warm() -> Iterator[Warm]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SERVE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:
        yield Warm(server)
