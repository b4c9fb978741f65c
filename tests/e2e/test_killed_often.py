"""kill -9 at 30 random moments over one capture: the bytes are those of an undisturbed one, and nothing is left."""

import os
import random
import signal
import time

import pytest
from commands import capture, contents
from warm import warm

pytestmark = pytest.mark.slow
KILLS, SHARDS = 30, 100


@pytest.fixture
def command(teacher, folder):
    """The capture that is killed: two loader workers, and shards of 12 rows, so that there are 100."""
    return lambda out: [*capture(teacher, folder, out), "--workers", "2", "--shard-rows", "12", "--quiet"]


def shards(out):
    return len(list(out.rglob("shard-*.h5")))


def wait_for_more(out):
    before, deadline = shards(out), time.monotonic() + 60
    while shards(out) == before < SHARDS and time.monotonic() < deadline:
        time.sleep(0.002)


def test_thirty_kills_at_random_moments(command, tmp_path):
    rng, out, kills = random.Random(0), tmp_path / "killed", 0
    with warm() as commands:
        # The first start is a slow one.
        for name in ("first", "whole"):
            start = time.monotonic()
            commands.start(*command(tmp_path / name))
            assert commands.wait() == 0
        undisturbed = time.monotonic() - start
        while kills < KILLS and not (out / "manifest.json").exists():
            child = commands.start(*command(out))
            if rng.random() < 0.5:
                # While it writes; the others while it starts. So short that thirty hardly come to the end.
                wait_for_more(out)
            time.sleep(rng.uniform(0, undisturbed / 30))
            os.kill(child, signal.SIGKILL)
            kills += commands.wait() == -signal.SIGKILL
        done = shards(out)
        commands.start(*command(out))
        assert commands.wait() == 0
    print(f"{kills} kills, {done} of {SHARDS} shards by then; {undisturbed:.1f} s undisturbed")
    assert kills >= 20, "it came to its end too early to say anything"
    assert done > 0, "it never came to a shard"
    assert contents(out) == contents(tmp_path / "whole")
    assert not list(out.rglob(".*"))
