"""Several processes fill one store: the bytes are those of one, and what a dead one had begun is taken over."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, capture, contents, kill, run, run_json, start, wait_until

pytestmark = pytest.mark.slow


def shards(out: Path) -> int:
    return len(list(out.rglob("shard-*.h5")))


@pytest.fixture
def halted(teacher, folder, tmp_path):
    """A capture that stands still, with two shards or more written and others claimed; and its command."""
    command = (*capture(teacher, folder, tmp_path / "store"), "--json")
    process = start(*command)
    wait_until(lambda: shards(tmp_path / "store") >= 2, process)
    process.send_signal(signal.SIGSTOP)
    yield process, command
    if process.poll() is None:
        process.kill()
    process.communicate()


def test_two_processes_share_one_store(halted, store, tmp_path):
    one, command = halted
    out = tmp_path / "store"
    before = shards(out)
    assert 2 <= before < 12
    other = start(*command)
    wait_until(lambda: shards(out) > before, other)
    one.send_signal(signal.SIGCONT)
    said = [json.loads(process.communicate()[0]) for process in (one, other)]
    assert [one.returncode, other.returncode] == [0, 0]
    assert {summary["status"] for summary in said} == {"done"}
    assert all(summary["images_per_s"] > 0 for summary in said)
    assert contents(out) == contents(store)


def test_a_dead_process_s_shard_is_taken_over(halted, store, tmp_path):
    dead, command = halted
    out = tmp_path / "store"
    before = shards(out)
    other = start(*command)
    wait_until(lambda: shards(out) > before, other)
    kill(dead)
    said, err = other.communicate(timeout=120)
    assert other.returncode == 0, err
    assert json.loads(said)["status"] == "done"
    assert contents(out) == contents(store)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_one_who_waits_for_another_can_be_stopped(halted, tmp_path, number, code):
    _, command = halted
    out = tmp_path / "store"
    other = start(*command)
    seen = [0]

    def waits() -> bool:
        """Whether for half a second no shard was added."""
        seen.append(shards(out))
        return len(seen) > 100 and seen[-100] == seen[-1] > seen[1]

    wait_until(waits, other)
    other.send_signal(number)
    _, err = other.communicate(timeout=30)
    assert other.returncode == code, err
    assert err.splitlines()[-1].startswith(f"distill: {signal.Signals(number).name}: {out}: finished shards are kept")


def test_a_reader_is_told_who_is_at_work(halted, folder, tmp_path):
    writer, _ = halted
    out = tmp_path / "store"
    student = ("train", "--student", "resnet18", "--store", out, "--data", folder, "--out", tmp_path / "run")
    _, err = run(*student, code=75)
    line = err.splitlines()[-1]
    assert f"{out}: {12 - shards(out)} of 12 shards missing, and pid {writer.pid} on " in line
    assert line.endswith("is writing them; wait for it to finish")
    kill(writer)
    _, err = run(*student, code=4)
    assert 'run the same "distill teacher-logits" command again to finish it' in err.splitlines()[-1]


def test_ranks_of_torchrun_share_one_store(teacher, folder, store, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [str(word) for word in capture(teacher, folder, tmp_path / "store")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, "-m", "distill_cli", *words, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["status"], said["rows"]) == ("done", 1200)
    assert 0 < said["images_per_s"] * said["wall_s"] < 1150, "rank 0 did all of it, or nothing"
    assert contents(tmp_path / "store") == contents(store)


def test_shards_can_be_split_by_hand(teacher, folder, store, tmp_path):
    command = capture(teacher, folder, tmp_path / "store")
    part = run_json(*command, "--shards", "0:5")
    assert (part["status"], part["shards"], part["rows"]) == ("part", 5, 500)
    assert shards(tmp_path / "store") == 5
    assert run_json(*command, "--shards", "3:5")["status"] == "part"
    whole = run_json(*command, "--shards", "5:12")
    assert (whole["status"], whole["shards"], whole["rows"]) == ("done", 12, 1200)
    assert contents(tmp_path / "store") == contents(store)
    assert run_json(*command, "--shards", "0:5")["status"] == "already_done"
