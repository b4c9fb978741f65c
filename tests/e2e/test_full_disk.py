"""A full disk: one line, nothing half-written under a final name, and the same command finishes elsewhere freed."""

import contextlib
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import capture, check_same, distil, run, run_json, saved, start, wait_until

from distill_cli.store.reader import Store

pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)


def test_a_full_disk_keeps_what_was_whole(small_disk, store, teacher, folder):
    filler = small_disk / "filler"
    filler.write_bytes(bytes(64 * 1024))
    out = small_disk / "store"
    _, err = run(*capture(teacher, folder, out), code=1)
    assert "no space left on device; free some space" in err.splitlines()[-1]
    assert f"{out}/view-" in err.splitlines()[-1]
    left = [path for path in out.rglob("*") if path.is_file()]
    assert left
    assert all(path.read_bytes() == (store / path.relative_to(out)).read_bytes() for path in left)
    assert not (out / "manifest.json").exists()
    filler.unlink()
    resize(small_disk, "4m")
    run(*capture(teacher, folder, out))
    assert (out / "manifest.json").read_bytes() == (store / "manifest.json").read_bytes()


def test_a_disk_that_is_full_from_the_start(small_disk, teacher, folder):
    (small_disk / "filler").write_bytes(bytes(128 * 1024))
    _, err = run(*capture(teacher, folder, small_disk / "store"), code=1)
    assert "no space left on device; free some space" in err.splitlines()[-1]


def test_a_read_only_folder_can_be_read_and_not_written(small_disk, store, teacher, folder):
    resize(small_disk, "4m")
    shutil.copytree(store, small_disk / "store")
    (small_disk / "part").mkdir()
    shutil.copy(store / "plan.json", small_disk / "part")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for name in ("part", "new"):
        _, err = run(*capture(teacher, folder, small_disk / name), code=1)
        assert "read-only file system; choose a folder that you may write to" in err.splitlines()[-1]
    assert run_json(*capture(teacher, folder, small_disk / "store"))["status"] == "already_done"
    assert len(Store(small_disk / "store").rows(1, np.arange(600))) == 600


LINGERING = """
import time
from pathlib import Path
unlink = Path.unlink
def later(path, missing_ok=False):
    time.sleep(path.name.startswith(".tmp-step"))
    unlink(path, missing_ok)
Path.unlink = later
"""
"""What is left of a checkpoint that found no room stays for a second."""


def test_a_run_goes_on_past_a_checkpoint_that_finds_no_room(small_disk, undisturbed, store, folder):
    """One fits, two do not; the room of one that fails is taken for a while, in which nothing else is written."""
    resize(small_disk, "1600k")
    out = small_disk / "run"
    words = distil(store, folder, out, "--set", "train.save_every=12")
    _, err = run(*words, code=1, before=LINGERING)
    warning = f"warning: {out}: a checkpoint was not written (No space left on device); the one before is intact"
    assert warning in err.splitlines()
    assert "step 36: top1" in err
    (left,) = (out / "checkpoints").iterdir()
    assert err.splitlines()[-1].startswith(f"distill: {out}/checkpoints/step-00000036.safetensors: no space left on")
    resize(small_disk, "8m")
    _, err = run(*words)
    assert f"going on from {left.stem}" in err
    check_same(out, undisturbed)


def test_a_disk_that_fills_up_beside_a_run(small_disk, undisturbed, store, folder):
    """Not even a line of metrics finds room."""
    resize(small_disk, "8m")
    out, filler = small_disk / "run", small_disk / "filler"
    process = start(*distil(store, folder, out))
    wait_until(lambda: saved(out) == [5], process)
    process.send_signal(signal.SIGSTOP)
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"distill: {out}/")
    assert "no space left on device; free some space" in err.splitlines()[-1]
    filler.unlink()
    _, err = run(*distil(store, folder, out))
    assert "going on from step-" in err
    check_same(out, undisturbed)
