"""A full disk: one line, nothing half-written under a final name, and the same command finishes elsewhere freed."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import capture, run, run_json

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
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    run(*capture(teacher, folder, out))
    assert (out / "manifest.json").read_bytes() == (store / "manifest.json").read_bytes()


def test_a_disk_that_is_full_from_the_start(small_disk, teacher, folder):
    (small_disk / "filler").write_bytes(bytes(128 * 1024))
    _, err = run(*capture(teacher, folder, small_disk / "store"), code=1)
    assert "no space left on device; free some space" in err.splitlines()[-1]


def test_a_read_only_folder_can_be_read_and_not_written(small_disk, store, teacher, folder):
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    shutil.copytree(store, small_disk / "store")
    (small_disk / "part").mkdir()
    shutil.copy(store / "plan.json", small_disk / "part")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for name in ("part", "new"):
        _, err = run(*capture(teacher, folder, small_disk / name), code=1)
        assert "read-only file system; choose a folder that you may write to" in err.splitlines()[-1]
    assert run_json(*capture(teacher, folder, small_disk / "store"))["status"] == "already_done"
    assert len(Store(small_disk / "store").rows(1, np.arange(600))) == 600
