"""Where a run's metrics go beside metrics.jsonl: TensorBoard always, W&B and MLflow where `train.trackers` names them.

Each is the same three calls. What belongs to somebody else is imported only when it is asked for, writes into the run's
directory unless the user's environment names a server, and works on a thread of its own: the training neither waits
for it nor ends with it.
"""

import importlib
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from distill_cli.errors import UsageError
from distill_cli.files import named, write_atomic

Values = Mapping[str, float | int | None]
End = Literal["finished", "stopped", "failed"]
"""`stopped`: by a signal, to go on later."""

TENSORBOARD = "tb"
PATIENCE_S = 30.0
"""How long the end of a run waits for a tracker that is behind."""


UNLESS_SAID = {
    "wandb": {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"},
    "mlflow": {"MLFLOW_DISABLE_TELEMETRY": "true"},
}
"""Environment that the user's own wins over; read by the libraries when they are imported."""


class Tracker(Protocol):
    def log(self, step: int, values: Values, prefix: str) -> None:
        """Add values at a step, named `prefix/name`; those that are None are left out."""
        ...

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        """Add a picture: uint8 `[height, width, 3]`."""
        ...

    def finish(self, end: End) -> None:
        """Write what is still to be written; nothing follows."""
        ...


class TensorBoard:
    """Event files in `RUN/tb`; what an earlier attempt wrote beyond `step` is taken back."""

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = run / TENSORBOARD
        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)

    def log(self, step: int, values: Values, prefix: str) -> None:
        with named(self._folder):
            for name, value in _named(values, prefix).items():
                self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        with named(self._folder):
            self._writer.add_image(name, image, step, dataformats="HWC")

    def finish(self, end: End) -> None:
        with named(self._folder):
            self._writer.close()


class WandB:
    """Weights & Biases, offline in `RUN/wandb` unless WANDB_MODE says otherwise; `wandb sync` uploads it later.

    A run that goes on is the same W&B run. What W&B calls its step only grows, so steps are a metric of their own; the
    lines since the last checkpoint are there twice.
    """

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        wandb = _import("wandb")
        kept = _kept_id(run / "wandb") or secrets.token_hex(4)
        self._image = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "distill"),
            name=os.environ.get("WANDB_NAME", run.resolve().name),
            dir=str(run),
            id=kept,
            resume="allow",
            config=dict(settings),
            settings=wandb.Settings(silent=True, console="off"),
        )
        _keep_id(run / "wandb", kept)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Values, prefix: str) -> None:
        self._run.log({"step": step, **_named(values, prefix)})

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        self._run.log({"step": step, name: self._image(image)})

    def finish(self, end: End) -> None:
        self._run.finish(exit_code=0 if end == "finished" else 1)


class MLflow:
    """MLflow, in `RUN/mlflow` (SQLite, as MLflow has put its file store away) unless MLFLOW_TRACKING_URI is set.

    A run that goes on is the same MLflow run; the lines since the last checkpoint are there twice.
    """

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        mlflow = _import("mlflow")
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        folder = run.resolve() / "mlflow"
        folder.mkdir(exist_ok=True)
        server = os.environ.get("MLFLOW_TRACKING_URI")
        self._metric = mlflow.entities.Metric
        self._client = mlflow.MlflowClient(tracking_uri=server or f"sqlite:///{folder / 'mlflow.db'}")
        kept = _kept_id(folder)
        if kept is not None:
            self._id = kept
            self._client.update_run(kept, status="RUNNING")
            return
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "distill")
        there = self._client.get_experiment_by_name(experiment)
        place = None if server else (folder / "artifacts").as_uri()
        number = there.experiment_id if there else self._client.create_experiment(experiment, artifact_location=place)
        self._id = self._client.create_run(number, run_name=run.resolve().name).info.run_id
        _keep_id(folder, self._id)
        params = [mlflow.entities.Param(name, str(value)) for name, value in settings.items()]
        self._client.log_batch(self._id, params=params)

    def log(self, step: int, values: Values, prefix: str) -> None:
        now = round(1000 * time.time())
        metrics = [self._metric(name, float(value), now, step) for name, value in _named(values, prefix).items()]
        self._client.log_batch(self._id, metrics=metrics)

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        self._client.log_image(self._id, image, key=name, step=step)

    def finish(self, end: End) -> None:
        status = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[end]
        self._client.set_terminated(self._id, status=status)


OPTIONAL: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {"wandb": WandB, "mlflow": MLflow}
"""What `train.trackers` can name; each is an extra of the same name."""


class Behind:
    """A tracker on a thread of its own; what fails is said once, and the tracker is then left alone."""

    def __init__(self, name: str, make: Callable[[], Tracker], warn: Callable[[str], None]) -> None:
        self._name, self._warn, self._left = name, warn, False
        self._calls: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(make,), name=name, daemon=True)
        self._thread.start()

    def log(self, step: int, values: Values, prefix: str) -> None:
        self._calls.put(lambda tracker: tracker.log(step, values, prefix))

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        self._calls.put(lambda tracker: tracker.image(step, name, image))

    def finish(self, end: End) -> None:
        self._calls.put(lambda tracker: tracker.finish(end))
        self._calls.put(None)
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            self._left = True
            self._warn(f"{self._name}: has not answered for {PATIENCE_S:.0f} s, and is left behind")

    def _work(self, make: Callable[[], Tracker]) -> None:
        try:
            tracker = make()
            while (call := self._calls.get()) is not None:
                call(tracker)
        except (Exception, SystemExit) as error:
            # Other people's servers fail in ways that have no list.
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            if self._left:
                return
            self._warn(f"{self._name}: {reason}; the training goes on without it, metrics.jsonl has everything")
            while self._calls.get() is not None:
                pass


def check_installed(names: Sequence[str]) -> None:
    """
    Raises:
        UsageError: a tracker is asked for and not installed.
    """
    for name in names:
        _import(name)


def open_trackers(
    names: Sequence[str], run: Path, step: int, settings: Mapping[str, Any], warn: Callable[[str], None]
) -> list[Tracker]:
    """TensorBoard, and what `train.trackers` names.

    Args:
        step: the last one that counts of earlier attempts.
        settings: the recipe's values by dotted path.
        warn: told of a tracker that fails.
    """

    def behind(name: str) -> Behind:
        return Behind(name, lambda: OPTIONAL[name](run, settings), warn)

    return [TensorBoard(run, step), *map(behind, names)]


def _import(name: str) -> ModuleType:
    for variable, value in UNLESS_SAID[name].items():
        os.environ.setdefault(variable, value)
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise _missing(name, error) from error
    if module.__file__ is None:
        # A folder `wandb` of earlier runs in the working directory is a module to Python.
        raise _missing(name, "a folder of this name is not the library")
    return module


def _missing(name: str, reason: object) -> UsageError:
    return UsageError(f"train.trackers: needs {name} ({reason}); pip install 'distill-cli[{name}]'")


def _named(values: Values, prefix: str) -> dict[str, float | int]:
    return {f"{prefix}/{name}": value for name, value in values.items() if value is not None}


def _kept_id(folder: Path) -> str | None:
    """The tracker's own name of this run, where an earlier attempt has left it."""
    path = folder / "run-id"
    return path.read_text().strip() if path.exists() else None


def _keep_id(folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True)
    write_atomic(folder / "run-id", f"{name}\n")
