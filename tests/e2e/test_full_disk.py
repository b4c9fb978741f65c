"""A full disk: one line, nothing half-written under a final name, and the same command finishes elsewhere freed."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import capture, run

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
