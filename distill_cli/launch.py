"""`--gpus N`: one process a rank on this machine, with the environment of torchrun.

Differs from torchrun, which several nodes and elastic restarts need: a signal is passed on to the ranks and waited
for, and the exit code is theirs. torchrun ends a stopped job by a traceback and 1, which no pipeline can tell from a
failure.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from distill_cli.errors import DistillError, UsageError

GRACE_S = 60.0
"""After one rank has gone the others have so long to notice and to say so; then they are told to end, then killed."""
_POLL_S = 0.1
_PR_SET_PDEATHSIG = 1


def launch(ranks: int, device: str | None, arguments: Sequence[str] | None = None) -> int:
    """Run this command line as several ranks; gives the exit code of the first that ended badly, or 0.

    Args:
        device: `--device`; with `cpu` the ranks share the processor.
        arguments: the command line; by default that of this process. `--gpus` is taken out of it.

    Raises:
        UsageError: there are not so many GPUs, or this is a rank already.
        DistillError: a rank was killed.
    """
    _check(ranks, device)
    words = without_gpus(sys.argv[1:] if arguments is None else arguments)
    port = _free_port()
    processes: list[subprocess.Popen[bytes]] = []
    with _passed_on(processes):
        for rank in range(ranks):
            environment = {
                # As torchrun: threads of ranks that wait for each other's cores are many times slower.
                "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks)),
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            command = [sys.executable, "-m", "distill_cli", *words]
            # In a session of its own: Ctrl-C reaches it once, through this process.
            processes.append(
                subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_end_with_parent)
            )
        code, rank = _wait(processes)
    if code < 0:
        raise DistillError(
            f"rank {rank}: was killed ({signal.Signals(-code).name}); run the same command again to go on"
        )
    return code


def without_gpus(words: Sequence[str]) -> list[str]:
    """A command line without `--gpus N`."""
    kept, skip = [], False
    for word in words:
        if skip or word == "--gpus":
            skip = not skip
        elif not word.startswith("--gpus="):
            kept.append(word)
    return kept


def _check(ranks: int, device: str | None) -> None:
    if "WORLD_SIZE" in os.environ:
        raise UsageError("--gpus: this is one of several ranks already; leave it out under torchrun")
    if ranks < 1:
        raise UsageError(f"--gpus {ranks}: give at least 1")
    if device == "cpu":
        return
    import torch

    if ranks > torch.cuda.device_count():
        raise UsageError(
            f"--gpus {ranks}: this machine has {torch.cuda.device_count()} CUDA devices; give as many, or --device cpu "
            "for ranks that share the processor"
        )


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int]:
    """Until all have ended; gives the first bad code and its rank, or (0, 0)."""
    first: tuple[int, int] | None = None
    deadline = kill = float("inf")
    while any(process.poll() is None for process in processes):
        bad = [(code, rank) for rank, process in enumerate(processes) if (code := process.poll())]
        now = time.monotonic()
        if bad and first is None:
            first, deadline, kill = bad[0], now + GRACE_S, now + 2 * GRACE_S
        if now > deadline:
            _send(processes, signal.SIGKILL if now > kill else signal.SIGTERM)
            deadline = kill
        time.sleep(_POLL_S)
    return first or next(
        ((process.poll() or 0, rank) for rank, process in enumerate(processes) if process.poll()), (0, 0)
    )


def _send(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


@contextlib.contextmanager
def _passed_on(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Signals go to the ranks while the block runs; none is left if it fails."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda number, _: _send(processes, number)) for number in numbers}
    try:
        yield
    finally:
        _send(processes, signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _end_with_parent() -> None:
    # Linux: killed by -9, this process can pass nothing on.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
