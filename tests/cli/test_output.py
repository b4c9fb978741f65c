import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from command_line import DISTIL, TRAIN, Cli, Made, Refused
from PIL import Image

from distill_cli import shipped
from distill_cli.cli.output import report_for
from distill_cli.distributed import World
from distill_cli.students.aliases import ALIASES

ROOT = Path(__file__).parents[2]


def process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command on pipes, where nothing of this process is in the way."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "distill_cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def evaluate(run: Made, folder: Path, *more: str | Path) -> tuple[str | Path, ...]:
    return ("eval", run.path, "--data", folder, "--workers", "0", *more)


def test_teacher_logits_says_what_it_has_written(store: Made) -> None:
    said = store.said
    assert said["status"] == "done"
    assert said["store"] == str(store.path)
    assert (said["rows"], said["views"], said["shards"], said["skipped"]) == (80, 2, 4, 0)
    assert said["bytes"] == sum(path.stat().st_size for path in store.path.rglob("*.h5"))
    assert said["bytes_per_row"] == pytest.approx(said["bytes"] / 80, abs=0.05)
    assert {"top1", "top5", "images_per_s", "wall_s"} <= said.keys()
    assert 0 <= said["top1"] <= 100


def test_train_says_what_it_has_reached(run: Made) -> None:
    said = run.said
    assert said["status"] == "done"
    assert said["run"] == str(run.path)
    assert (said["steps"], said["epochs"], said["top5"]) == (2, 1, 100)
    assert 0 <= said["top1"] <= 100
    assert {"images_per_s", "wall_s"} <= said.keys()


def test_eval_finds_what_train_found(run: Made, folder: Path, distill: Cli) -> None:
    said = distill(*evaluate(run, folder, "--json")).json
    assert {key: said[key] for key in ("top1", "top5", "nll", "ece")} == {
        key: run.said[key] for key in ("top1", "top5", "nll", "ece")
    }
    assert (said["images"], said["agreement"], said["kl"]) == (20, None, None)
    assert said["images_per_s"] > 0


def test_eval_with_a_store_says_how_near_its_teacher_is(run: Made, folder: Path, store: Made, distill: Cli) -> None:
    said = distill(*evaluate(run, folder, "--store", store.path, "--json")).json
    assert (said["agreement"], said["rows"]) == (100, 40)
    assert said["kl"] == pytest.approx(0, abs=1e-3)


def test_eval_finds_the_data_of_a_run_by_itself(run: Made, distill: Cli) -> None:
    assert distill("eval", run.path, "--workers", "0", "--json").json["top1"] == run.said["top1"]


def test_the_weights_of_a_run_are_evaluated_as_the_run_is(run: Made, folder: Path, distill: Cli) -> None:
    weights = ("--model", "resnet18", "--weights", run.path / "student.safetensors")
    said = distill("eval", *weights, "--data", folder, "--workers", "0", "--json").json
    assert (said["top1"], said["nll"]) == (run.said["top1"], run.said["nll"])


def test_eval_says_top1_by_class(run: Made, folder: Path, distill: Cli) -> None:
    said = distill(*evaluate(run, folder, "--json")).json["per_class"]
    assert list(said) == ["bag", "boot", "coat"]
    assert (7 * said["bag"] + 7 * said["boot"] + 6 * said["coat"]) / 20 == pytest.approx(run.said["top1"], abs=1e-2)


def test_a_finished_run_is_done_already(run: Made, folder: Path, distill: Cli) -> None:
    again = distill("train", *TRAIN, "--data", folder, "--out", run.path, "--json")
    assert again.code == 0
    assert again.json == {**run.said, "status": "already_done"}


def test_a_complete_store_is_done_already(store: Made, folder: Path, run: Made, distill: Cli) -> None:
    arguments = ("--top-k", "2", "--views", "2", "--shard-rows", "25", "--workers", "0", "--out", store.path, "--json")
    again = distill("teacher-logits", "--teacher", run.path, "--data", folder, *arguments)
    assert again.code == 0
    same = {key: value for key, value in store.said.items() if key not in ("status", "images_per_s", "wall_s")}
    assert again.json.items() >= same.items()
    assert again.json["status"] == "already_done"


def test_a_table_has_the_values_and_no_escape_codes(run: Made, folder: Path, distill: Cli) -> None:
    said = distill(*evaluate(run, folder)).out
    assert "\x1b" not in said
    rows = dict(line.split(maxsplit=1) for line in said.splitlines())
    assert float(rows["top1"]) == run.said["top1"]
    assert rows["images"] == "20"


def test_on_pipes_the_result_is_on_stdout_and_plain_progress_on_stderr(run: Made, folder: Path) -> None:
    done = process(*evaluate(run, folder, "--json"))
    assert done.returncode == 0
    assert done.stdout.startswith("{")
    assert done.stdout.count("\n") == 1
    assert "eval: 20/20 images, " in done.stderr
    assert " images/s, 0:00 left" in done.stderr
    assert "\x1b" not in done.stderr


def test_quiet_leaves_stderr_empty(run: Made, folder: Path) -> None:
    done = process(*evaluate(run, folder, "--quiet"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "top1" in done.stdout


def test_only_the_first_rank_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    for rank, said in ((0, "stage\nwarning: care\n"), (1, "")):
        report = report_for(World(torch.device("cpu"), rank, 2), quiet=False)
        report.stage("stage")
        report.warn("care")
        assert capsys.readouterr().err == said


def test_a_gate_that_is_not_met_is_told_after_the_result(run: Made, folder: Path, distill: Cli) -> None:
    result = distill(*evaluate(run, folder, "--fail-below", "99.5", "--json", "--quiet"))
    assert result.code == 5
    assert result.json["top1"] == run.said["top1"]
    assert result.err == f"distill: {run.path}: top1 {run.said['top1']} is below --fail-below 99.5\n"


def test_a_gate_that_is_met_is_not_told(run: Made, folder: Path, distill: Cli) -> None:
    result = distill(*evaluate(run, folder, "--fail-below", str(run.said["top1"]), "--quiet"))
    assert (result.code, result.err) == (0, "")


@pytest.mark.parametrize("command", ["teacher-logits", "train"])
def test_a_dry_run_prints_values_origins_and_the_bill_and_writes_nothing(
    command: str, run: Made, folder: Path, tmp_path: Path, distill: Cli
) -> None:
    out = tmp_path / "out"
    given = (*TRAIN, "--lr", "0.1") if command == "train" else ("--teacher", run.path, "--top-k", "2", "--workers", "0")
    said = distill(command, *given, "--data", folder, "--out", out, "--dry-run", "--json").json
    assert said["recipe"].keys() == said["origins"].keys()
    assert said["origins"]["data.path"] == "--data"
    assert said["bill"]["free_bytes"] > 0
    assert said["bill"]["hours"] >= 0
    assert said["bill"].get("steps", 2) == 2
    assert said["bill"].get("rows", 40) == 40
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_eval_counts_images_and_rows(run: Made, folder: Path, store: Made, distill: Cli) -> None:
    bill = distill(*evaluate(run, folder, "--store", store.path, "--dry-run", "--json")).json["bill"]
    assert (bill["images"], bill["rows"]) == (20, 40)


def test_a_dry_run_tells_what_was_given_from_what_follows(folder: Path, tmp_path: Path, distill: Cli) -> None:
    arguments = ("train", *TRAIN, "--lr", "0.1", "--data", folder, "--out", tmp_path / "out", "--dry-run")
    origins = distill(*arguments, "--json").json["origins"]
    assert origins["train.lr"] == "--lr"
    assert origins["train.steps"] == "--set"
    assert origins["student.num_classes"] == "data"
    assert origins["data.mean"] == "student"
    assert origins["train.epochs"] == "steps"
    table = [line.split() for line in distill(*arguments).out.splitlines()]
    assert ["train.lr", "0.1", "--lr"] in table
    assert ["train.seed", "0", "default"] in table


def test_a_default_that_nothing_changed_is_called_one(folder: Path, tmp_path: Path, distill: Cli) -> None:
    arguments = [*TRAIN[: TRAIN.index("train.steps=2") - 1], "--workers", "0"]
    origins = distill("train", *arguments, "--data", folder, "--out", tmp_path, "--dry-run", "--json").json["origins"]
    assert origins["train.epochs"] == "default"
    assert origins["data.hflip"] == "default"


def test_recipes_ls_names_each_with_its_title(distill: Cli) -> None:
    said = distill("recipes", "ls").out
    for name, path in shipped.recipes().items():
        assert f"{name} " in said
        assert next(shipped.header(path)) in said


@pytest.mark.parametrize("name", shipped.recipes())
def test_recipes_show_prints_the_file(name: str, distill: Cli) -> None:
    assert distill("recipes", "show", name).out == shipped.find_recipe(name).read_text()


def test_recipes_cp_copies_into_a_folder_or_to_a_name(tmp_path: Path, distill: Cli) -> None:
    name, source = next(iter(shipped.recipes().items()))
    for to, made in ((tmp_path, tmp_path / source.name), (tmp_path / "mine.toml", tmp_path / "mine.toml")):
        assert distill("recipes", "cp", name, to).out == f"{made}\n"
        assert made.read_bytes() == source.read_bytes()


def test_recipes_cp_writes_over_a_file_only_when_told_to(tmp_path: Path, distill: Cli) -> None:
    name, mine = next(iter(shipped.recipes())), tmp_path / "mine.toml"
    mine.write_text("precious")
    refused = distill("recipes", "cp", name, mine)
    assert (refused.code, refused.err) == (2, f"distill: {mine}: exists; choose another name, or give --force\n")
    assert mine.read_text() == "precious"
    assert distill("recipes", "cp", name, mine, "--force").code == 0
    assert mine.read_text() != "precious"


def test_recipes_validate_takes_names_and_paths(tmp_path: Path, distill: Cli) -> None:
    (tmp_path / "mine.toml").write_text("[train]\nlr = 1\n")
    assert distill("recipes", "validate", tmp_path / "mine.toml").out == f"{tmp_path / 'mine.toml'}: valid\n"
    (tmp_path / "mine.toml").write_text("[train]\nlr = -1\n")
    refused = distill("recipes", "validate", tmp_path / "mine.toml")
    assert refused.code == 2
    assert "train.lr: input should be greater than 0, not -1" in refused.err


def test_models_ls_lists_the_aliases(distill: Cli) -> None:
    lines = distill("models", "ls").out.splitlines()
    assert [line.split() for line in lines[1:]] == [list(pair) for pair in ALIASES.items()]


@pytest.mark.parametrize(("pattern", "found"), [("levit*", "levit_128s"), ("tinyvit", "tinyvit-21m"), ("t_18", "")])
def test_models_ls_takes_a_pattern_or_a_part_of_a_name(pattern: str, found: str, distill: Cli) -> None:
    names = [line.split()[0] for line in distill("models", "ls", pattern).out.splitlines()[1:]]
    assert not found or found in names
    assert all(pattern.strip("*") in name for name in names)


def test_a_reader_that_leaves_early_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "distill_cli", "models", "ls"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, cwd=ROOT, timeout=60, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_doctor_says_what_it_found(tmp_path: Path, distill: Cli) -> None:
    result = distill("doctor", tmp_path, "--json")
    wrong = [what for what, finding in result.json.items() if finding["advice"]]
    assert result.json["torch + torchvision"] == {"found": "work together", "advice": ""}
    assert result.code == (1 if wrong else 0)
    assert [line.split()[1] for line in distill("doctor", tmp_path).out.splitlines()[1:3]] == ["distill", "python"]


def test_a_training_line_says_what_a_person_wants_to_see(
    folder: Path, store: Made, tmp_path: Path, distill: Cli
) -> None:
    given = (*DISTIL, "--store", store.path, "--data", folder, "--set", "train.log_every=1", "--out", tmp_path / "run")
    assert distill("train", *given, "--quiet").code == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [1, 2]
    for line in training:
        assert line.keys() == {
            "step", "epoch", "lr", "loss", "distill", "agreement", "mass", "grad_norm", "images_per_s", "data_wait",
            "memory_mb",
        }  # fmt: skip
        assert 0 <= line["agreement"] <= 1
        assert 0.6 < line["mass"] <= 1
        assert 0 < line["data_wait"] < 1
    validation = json.loads((tmp_path / "run" / "validation.json").read_text())
    assert (validation["step"], validation["classes"]) == (2, ["bag", "boot", "coat"])
    assert validation["top1"] == lines[-1]["top1"]
    with Image.open(tmp_path / "run" / "images" / "inputs-00000000.png") as picture:
        assert picture.size == (3 * 30 - 2, 3 * 30 - 2)


def test_a_tracker_that_is_not_installed_ends_before_anything_is_written(
    folder: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    given = (*TRAIN, "--data", folder, "--set", 'train.trackers=["mlflow"]', "--out", tmp_path / "run")
    for more in ((), ("--dry-run",)):
        line = refused(2, "train", *given, *more)
        assert line.startswith("train.trackers: needs mlflow (")
        assert line.endswith("); pip install 'distill-cli[mlflow]'")
    assert list(tmp_path.iterdir()) == []


def test_trackers_are_no_part_of_what_a_run_is(
    run: Made, folder: Path, distill: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ModuleType("wandb")
    made.__file__ = "wandb.py"
    monkeypatch.setitem(sys.modules, "wandb", made)
    given = (*TRAIN, "--data", folder, "--set", 'train.trackers=["wandb"]', "--out", run.path, "--json")
    assert distill("train", *given).json["status"] == "already_done"


def test_eval_says_how_sure_the_model_was(run: Made, folder: Path, distill: Cli) -> None:
    said = distill(*evaluate(run, folder, "--json")).json
    bins = said["calibration"]
    assert (len(bins), sum(images for images, *_ in bins)) == (15, 20)
    gaps = sum(images * abs(right - sure) for images, right, sure in bins)
    assert gaps / 20 == pytest.approx(said["ece"], abs=1e-5)
