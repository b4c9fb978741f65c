"""Killed or stopped anywhere, then the same command again: the same bytes as undisturbed."""

import json
import signal
from pathlib import Path

import pytest
from commands import SMALL_STUDENT, capture, contents, kill, run, run_json, start, wait_until

pytestmark = pytest.mark.slow


AVERAGED = ("--set", "train.ema_decay=0.9", "--set", "train.accumulate=3", "--set", "train.opt=lamb", "--lr", "2e-3")


def distil(store: Path, folder: Path, out: Path, *more: str) -> tuple[str | Path, ...]:
    return (
        "train", *SMALL_STUDENT, "--store", store, "--data", folder, "--objective", "deit", "--epochs", "3",
        "--batch-size", "50", "--set", "train.save_every=5", "--set", "train.log_every=1", "--workers", "1",
        "--out", out, *more,
    )  # fmt: skip


def metrics(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what the machine decides."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    measured = ("images_per_s", "data_wait", "memory_mb")
    return [{name: value for name, value in line.items() if name not in measured} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(store: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run_json(*distil(store, folder, out))
    return out


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
        lambda: (
            (out / "recipe.toml").exists()
            and (step == 0 or any(int(path.stem[5:]) >= step for path in out.rglob("step-*.safetensors")))
        ),
        process,
    )
    kill(process)
    run(*distil(store, folder, out))
    assert (out / "student.safetensors").read_bytes() == (undisturbed / "student.safetensors").read_bytes()
    assert metrics(out) == metrics(undisturbed)


def test_a_killed_run_ends_in_the_same_weights_and_the_same_average_of_them(store, folder, tmp_path):
    run_json(*distil(store, folder, tmp_path / "undisturbed", *AVERAGED))
    out = tmp_path / "run"
    process = start(*distil(store, folder, out, *AVERAGED))
    wait_until(lambda: any(int(path.stem[5:]) >= 10 for path in out.rglob("step-*.safetensors")), process)
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
    assert (out / "student.safetensors").read_bytes() == (undisturbed / "student.safetensors").read_bytes()
    assert metrics(out) == metrics(undisturbed)


def test_a_finished_command_says_so_and_changes_nothing(undisturbed, store, teacher, folder):
    before = contents(undisturbed), contents(store)
    assert run_json(*distil(store, folder, undisturbed))["status"] == "already_done"
    assert run_json(*capture(teacher, folder, store))["status"] == "already_done"
    assert (contents(undisturbed), contents(store)) == before


def test_another_recipe_in_the_directory_is_refused_by_field(undisturbed, store, folder):
    _, err = run(*distil(store, folder, undisturbed), "--lr", "0.5", code=3)
    assert "train.lr" in err
    assert "choose another --out" in err


def test_a_signal_while_validating_loses_nothing(undisturbed, store, folder, tmp_path):
    """It waits for the checkpoint, and the next attempt begins with the validation."""
    out = tmp_path / "run"
    slow = (*distil(store, folder, out), "--set", "eval.batch_size=1")
    process = start(*slow)
    wait_until(lambda: any(int(path.stem[5:]) == 12 for path in out.rglob("step-*.safetensors")), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 143, err
    run(*slow)
    assert (out / "student.safetensors").read_bytes() == (undisturbed / "student.safetensors").read_bytes()
    assert [line["step"] for line in metrics(out) if "top1" in line] == [12, 24, 36]


def test_a_signal_in_the_first_step(undisturbed, store, folder, tmp_path):
    out = tmp_path / "run"
    process = start(*distil(store, folder, out))
    wait_until(lambda: (out / "metrics.jsonl").exists(), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    kill(process)
    run(*distil(store, folder, out))
    assert (out / "student.safetensors").read_bytes() == (undisturbed / "student.safetensors").read_bytes()


def test_checkpoints_by_the_clock(undisturbed, store, folder, tmp_path):
    out = tmp_path / "run"
    done = run_json(*distil(store, folder, out), "--set", "train.save_every=0.01s", "--set", "train.keep=100")
    assert done["steps"] == 36
    assert len(list((out / "checkpoints").iterdir())) == 36
    assert (out / "student.safetensors").read_bytes() == (undisturbed / "student.safetensors").read_bytes()
    assert "36 steps, 12 an epoch" in next((out / "log").iterdir()).read_text()


def test_a_newest_checkpoint_that_was_cut(undisturbed, store, folder, tmp_path):
    out = tmp_path / "run"
    process = start(*distil(store, folder, out), "--set", "train.keep=2")
    wait_until(lambda: len(list(out.rglob("step-*.safetensors"))) == 2, process)
    kill(process)
    last = sorted(out.rglob("step-*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:1000])
    _, err = run(*distil(store, folder, out))
    assert f"warning: {last}: not a readable checkpoint (" in err
    assert (out / "student.safetensors").read_bytes() == (undisturbed / "student.safetensors").read_bytes()
    assert metrics(out) == metrics(undisturbed)
