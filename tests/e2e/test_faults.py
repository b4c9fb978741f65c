"""Ended in a save, checkpoints cut or hostile, two at once, another recipe, jumping clocks; then the same command."""

import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from commands import check_same, contents, distil, kill, run, saved, start, wait_until

from distill_cli.checkpoint import checkpoints

pytestmark = pytest.mark.slow

SLOW_SAVES = """
import os, time
fsync = os.fsync
def slow(descriptor):
    if ".tmp-step-" in os.readlink(f"/proc/self/fd/{descriptor}"):
        time.sleep(2)
    fsync(descriptor)
os.fsync = slow
"""
JUMPING_CLOCK = """
import itertools, time
now, looks = time.time, itertools.count()
time.time = lambda: now() + {} * 3600 * next(looks)
"""
"""The time of day goes by an hour, or back by one, each time that somebody looks at it."""
HOSTILE = b"\x80\x04cposix\nsystem\n(S'touch %s'\ntR."


def in_a_save(command: tuple[str | Path, ...], out: Path, before: list[int]) -> subprocess.Popen[str]:
    """A run that is writing a checkpoint, and has so many."""
    process = start(*command, before=SLOW_SAVES)
    wait_until(lambda: saved(out) == before and any(out.rglob(".tmp-step-*")), process)
    return process


def interrupted(store: Path, folder: Path, out: Path) -> list[Path]:
    """A run that was killed with two checkpoints; gives them."""
    process = start(*distil(store, folder, out))
    wait_until(lambda: len(saved(out)) == 2, process)
    kill(process)
    return checkpoints(out)


def test_a_signal_in_a_save(undisturbed, store, folder, tmp_path):
    """The save comes to its end, and the steps since are saved too."""
    out = tmp_path / "run"
    command = distil(store, folder, out)
    process = in_a_save(command, out, before=[])
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    first, last = saved(out)
    assert (first, last > 5) == (5, True)
    assert err.splitlines()[-1].endswith(f"saved at step {last} of 36; the same command goes on")
    assert not list(out.rglob(".*"))
    _, err = run(*command)
    assert f"going on from step-{last:08d}" in err
    check_same(out, undisturbed)


@pytest.mark.parametrize("numbers", [[signal.SIGKILL], [signal.SIGTERM, signal.SIGTERM]])
def test_a_run_that_ends_in_a_save_goes_on_from_the_one_before(numbers, undisturbed, store, folder, tmp_path):
    """kill -9; and a second signal, which acts at once."""
    out = tmp_path / "run"
    command = distil(store, folder, out)
    process = in_a_save(command, out, before=[5])
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.5)
    kill(process)
    assert process.returncode == -numbers[-1]
    assert saved(out) == [5]
    assert list(out.rglob(".tmp-step-*"))
    _, err = run(*command)
    assert "going on from step-00000005" in err
    check_same(out, undisturbed)


@pytest.mark.parametrize("hostile", [False, True])
def test_a_newest_checkpoint_that_is_cut_or_a_pickle(hostile, undisturbed, store, folder, tmp_path):
    out = tmp_path / "run"
    before, last = interrupted(store, folder, out)
    content = last.read_bytes()
    last.write_bytes(HOSTILE % bytes(tmp_path / "hacked") if hostile else content[: len(content) // 2])
    _, err = run(*distil(store, folder, out))
    assert f"warning: {last}: not a readable checkpoint (" in err
    assert f"going on from {before.stem}" in err
    assert not (tmp_path / "hacked").exists()
    check_same(out, undisturbed)


def test_where_no_checkpoint_is_whole_nothing_begins_anew(store, folder, tmp_path):
    out = tmp_path / "run"
    for path in interrupted(store, folder, out):
        path.write_bytes(HOSTILE % bytes(tmp_path / "hacked"))
    before = contents(out / "checkpoints")
    _, err = run(*distil(store, folder, out), code=4)
    assert "not a readable checkpoint (" in err.splitlines()[-1]
    assert err.splitlines()[-1].endswith("; delete it to begin the run again")
    assert not (tmp_path / "hacked").exists()
    assert contents(out / "checkpoints") == before


def test_another_recipe_for_a_run_under_way_is_refused_by_field(undisturbed, store, folder, tmp_path):
    out = tmp_path / "run"
    interrupted(store, folder, out)
    command, before = distil(store, folder, out), contents(out)
    _, err = run(*command, "--lr", "0.5", "--seed", "7", code=3)
    assert "train.lr: 4.8828125e-05, 0.5; train.seed: 0, 7: there, asked" in err.splitlines()[-1]
    assert err.splitlines()[-1].endswith("; choose another --out")
    assert contents(out) == before
    run(*command)
    check_same(out, undisturbed)


def test_two_runs_in_one_directory(undisturbed, store, folder, tmp_path):
    """The second is told who is there, and the first is none the worse."""
    out = tmp_path / "run"
    command = distil(store, folder, out)
    first = start(*command)
    wait_until(lambda: bool(saved(out)), first)
    first.send_signal(signal.SIGSTOP)
    before = contents(out)
    _, err = run(*command, code=75)
    said = f"distill: {out}: held by pid {first.pid} on {socket.gethostname()}; wait for it, or choose another --out"
    assert err.splitlines()[-1] == said
    assert contents(out) == before
    first.send_signal(signal.SIGCONT)
    _, err = first.communicate(timeout=120)
    assert first.returncode == 0, err
    check_same(out, undisturbed)


@pytest.mark.parametrize(
    ("hours", "every", "checkpoints"), [(0, "0.001s", 36), (-1, "0.001s", 36), (1, "15min", 3), (-1, "15min", 3)]
)
def test_checkpoints_by_the_clock_whatever_the_time_of_day(
    hours, every, checkpoints, undisturbed, store, folder, tmp_path
):
    out = tmp_path / "run"
    command = (*distil(store, folder, out), "--set", f"train.save_every={every}", "--set", "train.keep=100")
    _, err = run(*command, before=JUMPING_CLOCK.format(hours))
    assert len(saved(out)) == checkpoints, err
    assert "36 steps, 12 an epoch" in next((out / "log").iterdir()).read_text()
    check_same(out, undisturbed)
