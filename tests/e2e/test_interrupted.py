"""Killed or stopped anywhere, then the same command again: the same bytes as undisturbed."""

import signal
from pathlib import Path

import pytest
from commands import capture, check_same, contents, distil, kill, metrics, run, run_json, saved, start, wait_until

pytestmark = pytest.mark.slow


AVERAGED = ("--set", "train.ema_decay=0.9", "--set", "train.accumulate=3", "--set", "train.opt=lamb", "--lr", "2e-3")


@pytest.mark.parametrize("shards", [0, 3, 6])
def test_a_killed_capture_ends_in_the_same_bytes(shards, store, teacher, folder, tmp_path):
    check_killed_capture(shards, store, capture(teacher, folder, tmp_path / "store"))


def test_a_killed_capture_of_mixed_images_ends_in_the_same_bytes(teacher, folder, tmp_path):
    mixed = ("--set", "data.mixup=0.8", "--set", "data.cutmix=1.0")
    run(*capture(teacher, folder, tmp_path / "undisturbed"), *mixed)
    check_killed_capture(4, tmp_path / "undisturbed", (*capture(teacher, folder, tmp_path / "store"), *mixed))


def check_killed_capture(shards, store, command):
    out = Path(command[command.index("--out") + 1])
    process = start(*command)
    wait_until(lambda: (out / "plan.json").exists() and len(list(out.rglob("shard-*.h5"))) >= shards, process)
    kill(process)
    assert not (out / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("shard-*.h5")}
    assert run_json(*command)["status"] == "done"
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(out) == contents(store)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_capture_keeps_its_shards(number, code, store, teacher, folder, tmp_path):
    out = tmp_path / "store"
    process = start(*capture(teacher, folder, out))
    wait_until(lambda: len(list(out.rglob("shard-*.h5"))) >= 2, process)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == code, err
    assert err.splitlines()[-1].startswith(f"distill: {signal.Signals(number).name}: ")
    run(*capture(teacher, folder, out))
    assert contents(out) == contents(store)


@pytest.mark.parametrize("step", [0, 5, 20])
def test_a_killed_run_ends_in_the_same_weights(step, undisturbed, store, folder, tmp_path):
    out = tmp_path / "run"
    process = start(*distil(store, folder, out))
    wait_until(
        lambda: (out / "recipe.toml").exists() and (step == 0 or max(saved(out), default=0) >= step),
        process,
    )
    kill(process)
    run(*distil(store, folder, out))
    check_same(out, undisturbed)


def test_a_killed_run_ends_in_the_same_weights_and_the_same_average_of_them(store, folder, tmp_path):
    run_json(*distil(store, folder, tmp_path / "undisturbed", *AVERAGED))
    out = tmp_path / "run"
    process = start(*distil(store, folder, out, *AVERAGED))
    wait_until(lambda: max(saved(out), default=0) >= 10, process)
    kill(process)
    run(*distil(store, folder, out, *AVERAGED))
    for name in ("student.safetensors", "student-plain.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    assert metrics(out) == metrics(tmp_path / "undisturbed")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_saves_and_goes_on_mid_epoch(number, code, undisturbed, store, folder, tmp_path):
    out = tmp_path / "run"
    process = start(*distil(store, folder, out))
    wait_until(lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) >= 7, process)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == code, err
    assert "; the same command goes on" in err.splitlines()[-1]
    _, err = run(*distil(store, folder, out))
    assert "going on from step-" in err
    check_same(out, undisturbed)


def test_a_finished_command_says_so_and_changes_nothing(undisturbed, store, teacher, folder):
    before = contents(undisturbed), contents(store)
    assert run_json(*distil(store, folder, undisturbed))["status"] == "already_done"
    assert run_json(*capture(teacher, folder, store))["status"] == "already_done"
    assert (contents(undisturbed), contents(store)) == before


def test_a_signal_while_validating_loses_nothing(undisturbed, store, folder, tmp_path):
    """It waits for the checkpoint, and the next attempt begins with the validation."""
    out = tmp_path / "run"
    slow = (*distil(store, folder, out), "--set", "eval.batch_size=1")
    process = start(*slow)
    wait_until(lambda: 12 in saved(out), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 143, err
    assert "SIGTERM: " in err.splitlines()[-1]
    assert "while validating, after saving; the same command goes on" in err.splitlines()[-1]
    _, err = run(*slow)
    assert "going on from step-00000012" in err
    assert (out / "student.safetensors").read_bytes() == (undisturbed / "student.safetensors").read_bytes()
    assert [line["step"] for line in metrics(out) if "top1" in line] == [12, 24, 36]


def test_a_signal_in_the_first_step(undisturbed, store, folder, tmp_path):
    out = tmp_path / "run"
    process = start(*distil(store, folder, out))
    wait_until(lambda: (out / "metrics.jsonl").exists(), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert err.splitlines()[-1].endswith("saved at step 1 of 36; the same command goes on")
    assert saved(out) == [1]
    run(*distil(store, folder, out))
    check_same(out, undisturbed)
