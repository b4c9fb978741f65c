"""Killed or stopped anywhere, then the same command again: the same bytes as undisturbed."""

import json
import signal
from pathlib import Path

import pytest
from commands import SMALL_STUDENT, capture, contents, kill, run, run_json, start, wait_until

pytestmark = pytest.mark.slow


def distil(store: Path, folder: Path, out: Path) -> tuple[str | Path, ...]:
    return (
        "train", *SMALL_STUDENT, "--store", store, "--data", folder, "--objective", "deit", "--epochs", "3",
        "--batch-size", "50", "--set", "train.save_every=5", "--set", "train.log_every=1", "--workers", "1",
        "--out", out,
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
    out = tmp_path / "store"
    process = start(*capture(teacher, folder, out))
    wait_until(lambda: (out / "plan.json").exists() and len(list(out.rglob("shard-*.h5"))) >= shards, process)
    kill(process)
    assert not (out / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("shard-*.h5")}
    assert run_json(*capture(teacher, folder, out))["status"] == "done"
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
