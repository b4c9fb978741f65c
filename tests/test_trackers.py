"""TensorBoard as it is; W&B and MLflow by stand-ins, which take what the real ones take (wandb 0.31, mlflow 3.17)."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill_cli import trackers
from distill_cli.errors import UsageError
from distill_cli.trackers import Behind, MLflow, TensorBoard, WandB, check_installed, open_trackers

PICTURE = np.zeros((4, 6, 3), np.uint8)
SETTINGS = {"train.lr": 0.1}
Calls = list[tuple[Any, ...]]


def module(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    made = ModuleType(name)
    made.__file__ = f"{name}.py"
    vars(made).update(members)
    monkeypatch.setitem(sys.modules, name, made)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The calls that a stand-in for wandb gets."""
    calls: Calls = []

    class Run:
        def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
            calls.append(("log", data))

        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            calls.append(("define_metric", name, step_metric))

        def finish(self, exit_code: int | None = None) -> None:
            calls.append(("finish", exit_code))

    def init(
        *, project: str, name: str, dir: str, id: str, resume: str, config: dict[str, Any], settings: object
    ) -> Run:
        calls.append(("init", project, name, dir, id, resume, config))
        return Run()

    def image(data: np.ndarray) -> tuple[int, ...]:
        return data.shape

    module(monkeypatch, "wandb", init=init, Image=image, Settings=SimpleNamespace)
    for name in ("WANDB_MODE", "WANDB_SILENT", "WANDB_ERROR_REPORTING", "WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.setenv(name, "")  # So that what the tracker sets goes again.
        monkeypatch.delenv(name)
    return calls


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The calls that a stand-in for mlflow gets."""
    calls: Calls = []

    class MlflowClient:
        def __init__(self, tracking_uri: str | None = None) -> None:
            calls.append(("client", tracking_uri))

        def get_experiment_by_name(self, name: str) -> None:
            calls.append(("experiment", name))

        def create_experiment(self, name: str, artifact_location: str | None = None) -> str:
            calls.append(("create_experiment", artifact_location))
            return "1"

        def create_run(self, experiment_id: str, run_name: str | None = None) -> object:
            calls.append(("create_run", experiment_id, run_name))
            return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

        def update_run(self, run_id: str, status: str | None = None) -> None:
            calls.append(("update_run", run_id, status))

        def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
            calls.append(("log_batch", run_id, list(metrics), list(params)))

        def log_image(self, run_id: str, image: np.ndarray, key: str | None = None, step: int | None = None) -> None:
            calls.append(("log_image", run_id, image.shape, key, step))

        def set_terminated(self, run_id: str, status: str | None = None) -> None:
            calls.append(("set_terminated", run_id, status))

    def metric(key: str, value: float, timestamp: int, step: int) -> tuple[str, float, int]:
        return key, value, step

    entities = SimpleNamespace(Metric=metric, Param=lambda key, value: (key, value))
    module(monkeypatch, "mlflow", MlflowClient=MlflowClient, entities=entities)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")  # So that what the tracker sets goes again.
        monkeypatch.delenv(name)
    return calls


def log_a_little(tracker: trackers.Tracker, end: trackers.End = "finished") -> None:
    tracker.log(20, {"loss": 1.5, "top1": None}, "train")
    tracker.image(0, "inputs", PICTURE)
    tracker.finish(end)


def test_tensorboard_has_values_and_pictures(tmp_path: Path) -> None:
    log_a_little(TensorBoard(tmp_path, 0))
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(20, 1.5)]
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(event.step, event.height, event.width) for event in events.Images("inputs")] == [(0, 4, 6)]


def test_wandb_is_offline_in_the_run_and_has_steps_of_its_own(tmp_path: Path, wandb: Calls) -> None:
    log_a_little(WandB(tmp_path, SETTINGS))
    assert trackers.os.environ["WANDB_MODE"] == "offline"
    (_, project, name, folder, _, resume, config), *others = wandb
    assert (project, name, folder, resume, config) == ("distill", tmp_path.name, str(tmp_path), "allow", SETTINGS)
    assert others == [
        ("define_metric", "*", "step"),
        ("log", {"step": 20, "train/loss": 1.5}),
        ("log", {"step": 0, "inputs": (4, 6, 3)}),
        ("finish", 0),
    ]


def test_wandb_is_where_the_environment_says(tmp_path: Path, wandb: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    WandB(tmp_path, SETTINGS)
    assert trackers.os.environ["WANDB_MODE"] == "online"
    assert wandb[0][1] == "mine"


def test_a_run_that_goes_on_is_the_same_one_in_wandb(tmp_path: Path, wandb: Calls) -> None:
    log_a_little(WandB(tmp_path, SETTINGS), "stopped")
    log_a_little(WandB(tmp_path, SETTINGS))
    first, second = (call[4] for call in wandb if call[0] == "init")
    assert first == second
    assert [call[1] for call in wandb if call[0] == "finish"] == [1, 0]


def test_mlflow_is_in_the_run(tmp_path: Path, mlflow: Calls) -> None:
    log_a_little(MLflow(tmp_path, SETTINGS))
    assert trackers.os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert mlflow == [
        ("client", f"sqlite:///{tmp_path}/mlflow/mlflow.db"),
        ("experiment", "distill"),
        ("create_experiment", (tmp_path / "mlflow/artifacts").as_uri()),
        ("create_run", "1", tmp_path.name),
        ("log_batch", "r1", [], [("train.lr", "0.1")]),
        ("log_batch", "r1", [("train/loss", 1.5, 20)], []),
        ("log_image", "r1", (4, 6, 3), "inputs", 0),
        ("set_terminated", "r1", "FINISHED"),
    ]


def test_mlflow_is_where_the_environment_says(tmp_path: Path, mlflow: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    MLflow(tmp_path, SETTINGS)
    assert mlflow[0] == ("client", "http://server")
    assert ("create_experiment", None) in mlflow


def test_a_run_that_goes_on_is_the_same_one_in_mlflow(tmp_path: Path, mlflow: Calls) -> None:
    log_a_little(MLflow(tmp_path, SETTINGS), "stopped")
    mlflow.clear()
    log_a_little(MLflow(tmp_path, SETTINGS), "failed")
    assert mlflow[1] == ("update_run", "r1", "RUNNING")
    assert mlflow[-1] == ("set_terminated", "r1", "FAILED")


def test_one_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"train.trackers: needs wandb .*pip install 'distill-cli\[wandb\]'"):
        check_installed(["wandb"])


def test_a_folder_of_its_name_is_not_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "wandb").mkdir()
    with pytest.raises(UsageError, match="a folder of this name is not the library"):
        check_installed(["wandb"])


class Recorder:
    """A tracker that does what it is told to at each call."""

    def __init__(self, act: Callable[[], None] = lambda: None) -> None:
        self.calls: Calls = []
        self.act = act

    def log(self, *call: Any) -> None:
        self.calls.append(call)
        self.act()

    def image(self, *call: Any) -> None:
        self.calls.append(call)

    def finish(self, end: str) -> None:
        self.calls.append((end,))


def test_calls_come_in_order_on_another_thread() -> None:
    there, threads, said = Recorder(lambda: threads.append(threading.get_ident())), list[int](), list[str]()
    tracker = Behind("wandb", lambda: there, said.append)
    tracker.log(1, {}, "train")
    tracker.log(2, {}, "train")
    tracker.finish("stopped")
    assert there.calls == [(1, {}, "train"), (2, {}, "train"), ("stopped",)]
    assert threading.get_ident() not in threads
    assert said == []


def test_one_that_fails_is_told_of_once_and_left_alone() -> None:
    def fail() -> None:
        raise ConnectionError("no\nroute")

    there, said = Recorder(fail), list[str]()
    tracker = Behind("mlflow", lambda: there, said.append)
    for step in range(3):
        tracker.log(step, {}, "train")
    tracker.finish("finished")
    assert len(there.calls) == 1
    assert said == ["mlflow: no route; the training goes on without it, metrics.jsonl has everything"]


def test_one_that_cannot_begin_is_told_of_once() -> None:
    def fail() -> Recorder:
        raise SystemExit

    said: list[str] = []
    tracker = Behind("wandb", fail, said.append)
    tracker.log(1, {}, "train")
    tracker.finish("finished")
    assert said == ["wandb: SystemExit; the training goes on without it, metrics.jsonl has everything"]


def test_one_that_does_not_answer_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "PATIENCE_S", 0.05)
    answer, said = threading.Event(), list[str]()
    tracker = Behind("wandb", lambda: Recorder(lambda: answer.wait() and None), said.append)
    tracker.log(1, {}, "train")
    tracker.finish("finished")
    answer.set()
    assert said == ["wandb: has not answered for 0 s, and is left behind"]


def test_those_that_are_named_are_opened_beside_tensorboard(tmp_path: Path, wandb: Calls, mlflow: Calls) -> None:
    opened = open_trackers(["wandb", "mlflow"], tmp_path, 0, SETTINGS, pytest.fail)
    for tracker in opened:
        log_a_little(tracker)
    assert [type(tracker) for tracker in opened] == [TensorBoard, Behind, Behind]
    assert (wandb[-1], mlflow[-1]) == (("finish", 0), ("set_terminated", "r1", "FINISHED"))
