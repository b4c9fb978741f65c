import contextlib
import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill_cli import locks
from distill_cli.errors import BusyError, UsageError
from distill_cli.locks import holder_of, locked, shared

HOLD = """
import os, sys, time
from pathlib import Path
from distill_cli import locks
how = sys.argv[2]
with getattr(locks, how.split(":")[0])(Path(sys.argv[1])) as claims:
    if how.startswith("shared:"):
        assert claims.claim(int(how[7:]))
    if "fork" not in sys.argv or os.fork() == 0:
        print(os.getpid(), flush=True)
    if "leave" in sys.argv:
        sys.stdin.readline()
    else:
        time.sleep(60)
"""
HERE = f"pid {os.getpid()} on {socket.gethostname()}"


def _start(folder: Path, *how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(folder), *how]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _end(holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.communicate()


@contextlib.contextmanager
def _held(folder: Path, *how: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that holds `folder` as `how` says, and the pid of its forked worker, or its own."""
    holder = _start(folder, *how)
    assert holder.stdout is not None
    try:
        yield holder, int(holder.stdout.readline())
    finally:
        _end(holder)


# One alone.


def test_a_lock_makes_its_folder_and_leaves_no_file(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").exists()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_lock_is_let_go_on_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path):
        raise RuntimeError
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("kind", [locked, shared])
def test_a_process_is_told_that_it_holds_already(tmp_path: Path, kind: object) -> None:
    with locked(tmp_path):
        with pytest.raises(BusyError, match=f"{tmp_path}: held by this process; wait for it") as caught:
            kind(tmp_path).__enter__()  # type: ignore[operator]
        assert caught.value.exit_code == 75
        assert holder_of(tmp_path) == "this process"
        # Opening the file again would have ended this process's own locks.
        ask = f"from distill_cli.locks import *; print(holder_of(Path({str(tmp_path)!r})))"
        assert subprocess.check_output([sys.executable, "-c", ask], text=True) == f"{HERE}\n"


def test_the_second_holder_is_told_who_holds(tmp_path: Path) -> None:
    with _held(tmp_path, "locked") as (holder, _):
        for kind in (locked, shared):
            with pytest.raises(BusyError) as caught, kind(tmp_path):
                pass
            assert f"{tmp_path}: held by pid {holder.pid} on {socket.gethostname()}; wait for it" in str(caught.value)
            assert caught.value.exit_code == 75


def test_a_killed_holder_frees_the_folder(tmp_path: Path) -> None:
    with _held(tmp_path, "locked") as (holder, _), pytest.raises(BusyError, match=f"pid {holder.pid} on"):
        locked(tmp_path).__enter__()
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{HERE}\n"
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("kind", ["locked", "shared"])
def test_a_killed_holder_frees_the_folder_though_its_loader_workers_live_on(tmp_path: Path, kind: str) -> None:
    with _held(tmp_path, kind, "fork") as (holder, worker):
        holder.kill()
        holder.wait()
        try:
            with locked(tmp_path):
                pass
        finally:
            os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("kind", ["locked", "shared"])
def test_a_forked_worker_that_ends_does_not_free_the_folder(tmp_path: Path, kind: str) -> None:
    with _held(tmp_path, kind, "fork") as (_, worker):
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(BusyError), locked(tmp_path):
            pass


@pytest.mark.parametrize("looks", [1, 2])
def test_a_holder_that_leaves_at_any_moment_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: int
) -> None:
    """The former holder removes its file just before our look number `looks` at it."""
    real, seen = os.stat, []

    def stat(path: object, *args: object, **kwargs: object) -> os.stat_result:
        if str(path).endswith(".lock"):
            seen.append(path)
            if len(seen) == looks:
                Path(str(path)).unlink(missing_ok=True)
        return real(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", stat)
    with locked(tmp_path):
        assert [entry.name for entry in tmp_path.iterdir()] == [".lock"]
    assert list(tmp_path.iterdir()) == []


# Several who share.


def test_those_who_share_are_named_to_one_who_would_be_alone(tmp_path: Path) -> None:
    with _held(tmp_path, "shared") as (one, _), _held(tmp_path, "shared") as (other, _):
        host = socket.gethostname()
        with (
            pytest.raises(BusyError, match=f"held by pid {one.pid} on {host}, pid {other.pid} on {host};"),
            locked(tmp_path),
        ):
            pass
        assert holder_of(tmp_path) == f"pid {one.pid} on {host}, pid {other.pid} on {host}"
    assert holder_of(tmp_path) is None


def test_a_piece_is_one_process_s_until_that_is_gone(tmp_path: Path) -> None:
    with shared(tmp_path) as claims, _held(tmp_path, "shared:3") as (holder, _):
        assert [claims.claim(piece) for piece in (2, 3, 4)] == [True, False, True]
        holder.kill()
        holder.wait()
        assert claims.claim(3)


def test_a_piece_can_be_let_go(tmp_path: Path) -> None:
    with shared(tmp_path) as claims:
        assert claims.claim(2**40)
        claims.release(2**40)
        with _held(tmp_path, f"shared:{2**40}"):
            assert not claims.claim(2**40)


def test_the_desk_is_had_by_one_after_the_other(tmp_path: Path) -> None:
    wait = HOLD.replace("    if how", "    with claims.desk(): print('had', flush=True)\n    if how")
    with shared(tmp_path) as claims, claims.desk():
        other = subprocess.Popen(
            [sys.executable, "-c", wait, str(tmp_path), "shared"], stdout=subprocess.PIPE, text=True
        )
        assert other.stdout is not None
        assert select.select([other.stdout], [], [], 1) == ([], [], [])
    assert other.stdout.readline() == "had\n"
    _end(other)


def test_the_last_to_leave_takes_the_file_along(tmp_path: Path) -> None:
    with shared(tmp_path):
        with _held(tmp_path, "shared", "leave") as (other, _):
            other.communicate("\n")
        assert (tmp_path / ".lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_of_two_who_leave_at_once_one_takes_the_file_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """We look whether the other is still there, and it leaves before we have closed the file."""
    with _held(tmp_path, "shared", "leave") as (other, _):
        real = fcntl.lockf

        def lockf(file: object, kind: int, *where: int) -> None:
            try:
                real(file, kind, *where)  # type: ignore[arg-type]
            except BlockingIOError:
                other.communicate("\n")
                raise

        with shared(tmp_path):
            monkeypatch.setattr(locks.fcntl, "lockf", lockf)
    assert other.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_another_s_by_now_stays(tmp_path: Path) -> None:
    with shared(tmp_path):
        (tmp_path / ".lock").unlink()
        (tmp_path / ".lock").write_text("another\n")
    assert (tmp_path / ".lock").read_text() == "another\n"


def test_only_those_who_came_since_it_was_empty_are_named(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("pid 1 on moon\n")
    with shared(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{HERE}\n"


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("distill_cli.locks.fcntl.lockf", refuse)
    with pytest.raises(UsageError, match="has no locks; give each process its own part by --shards A:B"):
        shared(tmp_path).__enter__()
    with shared(tmp_path, without_locks=True) as claims, claims.desk():
        assert claims.claim(1)
        claims.release(1)
