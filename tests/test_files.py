import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from distill_cli.errors import BusyError, UsageError
from distill_cli.files import (
    canonical_json,
    check_ours,
    free_bytes,
    locked,
    remove_temporaries,
    sha256,
    sha256_file,
    write_atomic,
    write_json,
)

HOLD = """
import os, sys, time
from pathlib import Path
from distill_cli.files import locked
with locked(Path(sys.argv[1])):
    if "fork" not in sys.argv or os.fork() == 0:
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def _hold(folder: Path, *how: str) -> tuple[subprocess.Popen[str], str]:
    """A process that holds `folder`, and the pid of its forked worker, or its own."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), *how], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    return holder, holder.stdout.readline().strip()


def _end(holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.communicate()


def test_a_written_file_holds_all_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", "text é")
    assert (tmp_path / "a").read_bytes() == "text é".encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failed_write_keeps_the_former_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    (tmp_path / "a").write_text("former")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "a", "new")
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("a", "former")]


def test_equal_values_are_equal_json_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"b": [1], "a": "é"})
    write_json(tmp_path / "b", dict(sorted({"b": [1], "a": "é"}.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_json_has_no_nan() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"loss": float("nan")})


def test_json_of_a_name_that_is_not_unicode_can_be_written(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    write_json(tmp_path / "a", [name])
    assert json.loads((tmp_path / "a").read_bytes()) == [name]


def test_a_file_and_its_content_have_one_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == sha256(b"abc") == sha256("abc")
    assert sha256("abc").startswith("ba7816bf")


def test_temporaries_are_removed_at_any_depth_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "view-000").mkdir()
    for name in (".tmp-plan.json", "view-000/.tmp-shard", "view-000/shard"):
        (tmp_path / name).touch()
    remove_temporaries(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["shard"]


def test_free_space_is_told_for_a_folder_that_is_not_made_yet(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") > 0


@pytest.mark.parametrize("names", [(), ("plan.json", "x"), (".lock",), (".tmp-plan.json",)])
def test_our_own_or_an_empty_folder_is_taken(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).touch()
    check_ours(tmp_path, ("plan.json",), "store")
    check_ours(tmp_path / "new", ("plan.json",), "store")


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match="is not empty and not a store; choose another --out"):
        check_ours(tmp_path, ("plan.json",), "store")
    with pytest.raises(UsageError, match="is a file; --out names the directory of a run"):
        check_ours(tmp_path / "thesis.tex", ("recipe.toml",), "run")


def test_a_lock_makes_its_folder_and_leaves_no_file(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").exists()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_lock_is_let_go_on_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path):
        raise RuntimeError
    with locked(tmp_path):
        pass


def test_the_second_holder_is_told_who_holds(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(BusyError) as caught, locked(tmp_path):
        pass
    assert f"{tmp_path}: held by pid {os.getpid()} on {socket.gethostname()}; wait for it" in str(caught.value)
    assert caught.value.exit_code == 75


def test_a_killed_holder_frees_the_folder(tmp_path: Path) -> None:
    holder, _ = _hold(tmp_path)
    with pytest.raises(BusyError, match=f"pid {holder.pid} on"), locked(tmp_path):
        pass
    _end(holder)
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"pid {os.getpid()} ")
    assert not (tmp_path / ".lock").exists()


def test_a_killed_holder_frees_the_folder_though_its_loader_workers_live_on(tmp_path: Path) -> None:
    holder, worker = _hold(tmp_path, "fork")
    holder.kill()
    holder.wait()
    try:
        with locked(tmp_path):
            pass
    finally:
        os.kill(int(worker), signal.SIGKILL)
        _end(holder)


def test_a_forked_worker_that_ends_does_not_free_the_folder(tmp_path: Path) -> None:
    holder, worker = _hold(tmp_path, "fork")
    os.kill(int(worker), signal.SIGKILL)
    try:
        with pytest.raises(BusyError), locked(tmp_path):
            pass
    finally:
        _end(holder)


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
