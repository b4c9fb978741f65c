"""A run's metrics over time: one JSON object a line in metrics.jsonl, and the same for its other trackers."""

import contextlib
import io
import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from distill_cli.distributed import World
from distill_cli.errors import DamagedError, Stopped
from distill_cli.files import named, write_atomic
from distill_cli.objectives import Losses
from distill_cli.trackers import End, Tracker, Values

METRICS, IMAGES = "metrics.jsonl", "images"


class History:
    """Appends to a run's metrics, and tells its other trackers; how its block ends is how the run ends.

    What an earlier attempt wrote beyond `step` is taken back, as it will come again.
    """

    def __init__(self, run: Path, step: int, trackers: Sequence[Tracker] = (), write: bool = True) -> None:
        """
        Args:
            write: False on the ranks that only follow.

        Raises:
            DamagedError: a line of metrics.jsonl is not what this program writes.
        """
        kept = [line for line in read_metrics(run) if line["step"] <= step]
        found = [line for line in kept if "top1" in line]
        self.validated = {line["step"] for line in found}
        self.best: int | None = None
        """The step of the best validation; of the average of the weights, where there is one."""
        self._best_top1 = -1.0
        for line in found:
            self._rank(line["step"], line)
        self._run, self._trackers, self._write = run, trackers, write
        if write:
            write_atomic(run / METRICS, "".join(f"{json.dumps(line)}\n" for line in kept))
            self._file = (run / METRICS).open("a")

    def __enter__(self) -> "History":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.finish("finished" if kind is None else "stopped" if issubclass(kind, Stopped) else "failed")

    def log(self, step: int, values: Values, prefix: str) -> None:
        """Add a line of values at a step; the trackers have them as `prefix/name`."""
        if prefix == "val":
            self.validated.add(step)
            self._rank(step, values)
        if not self._write:
            return
        with named(self._run / METRICS):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        for tracker in self._trackers:
            tracker.log(step, values, prefix)

    def is_best(self, values: Values) -> bool:
        """Whether a validation is better than all before."""
        return (values.get("ema_top1", values.get("top1")) or 0.0) > self._best_top1

    def _rank(self, step: int, values: Values) -> None:
        if self.is_best(values):
            self.best, self._best_top1 = step, values.get("ema_top1", values.get("top1")) or 0.0

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        """Write `images/NAME-STEP.png` of uint8 `[height, width, 3]`."""
        if not self._write:
            return
        png = io.BytesIO()
        Image.fromarray(image).save(png, "png")
        (self._run / IMAGES).mkdir(exist_ok=True)
        write_atomic(self._run / IMAGES / f"{name}-{step:08d}.png", png.getvalue())
        for tracker in self._trackers:
            tracker.image(step, name, image)

    def finish(self, end: End) -> None:
        if self._write:
            # A line that did not get to the disk has been an error already.
            with contextlib.suppress(OSError):
                self._file.close()
        for tracker in self._trackers:
            tracker.finish(end)


class Window:
    """Losses since the last line of metrics, of all ranks' images; they stay on the device until somebody looks.

    Then all ranks look, and the ranks add up what they have seen since.
    """

    def __init__(self, world: World) -> None:
        self.world, self.note = world, ""
        self._start()

    def _start(self) -> None:
        self._first, self._images, self._waited, self._began = 0, 0, 0.0, time.monotonic()
        self._values: dict[str, list[Tensor]] = {}
        self._shares: list[float] = []

    def add(
        self, step: int, losses: Losses, grad_norm: Tensor, images: int, waited: float, share: float | None = None
    ) -> None:
        """Count one step.

        Args:
            losses: means over this rank's images.
            grad_norm: of all ranks.
            images: of all ranks.
            waited: seconds until the loader had its batch.
            share: of this rank in the images; by default as the others'.
        """
        self._first = self._first or step
        self._images += images
        self._waited += waited
        self._shares.append(1 / self.world.size if share is None else share)
        self._parts = tuple(losses.parts)
        values = {"loss": losses.total.detach(), **losses.parts, **losses.seen, "grad_norm": grad_norm}
        for name, value in values.items():
            self._values.setdefault(name, []).append(value)

    def not_finite(self) -> tuple[int, dict[str, float]] | None:
        """The first step whose loss or gradient is not finite, and its values; None where all are."""
        if not self._values:
            return None
        found = self._gathered()
        finite = torch.stack([found["loss"], found["grad_norm"]]).isfinite().all(dim=0).cpu()
        if finite.all():
            return None
        index = int((~finite).nonzero()[0])
        return self._first + index, {name: float(values[index]) for name, values in found.items()}

    def flush(self) -> dict[str, float]:
        """The means of the window, which then starts again; images/s and `data_wait` are of its wall time."""
        means = {name: float(values.mean()) for name, values in self._gathered().items()}
        wall = max(time.monotonic() - self._began, 1e-9)
        rate, waited = round(self._images / wall, 1), round(self._waited / wall, 4)
        self.note = self._said(means, waited)
        self._start()
        return {**means, "images_per_s": rate, "data_wait": waited, "memory_mb": memory_mb(self.world.device)}

    def _gathered(self) -> dict[str, Tensor]:
        """By name, the means over the images of each step: float32 `[steps]`."""
        stacked = {name: torch.stack(values).float() for name, values in self._values.items()}
        if self.world.size == 1:
            return stacked
        shares = torch.tensor(self._shares).to(self.world.device, non_blocking=True)
        weighted = [
            values / self.world.size if name == "grad_norm" else shares * values for name, values in stacked.items()
        ]
        return dict(zip(stacked, self.world.sum(torch.stack(weighted)), strict=True))

    def _said(self, means: Mapping[str, float], waited: float) -> str:
        shown = ("loss", *(self._parts if len(self._parts) > 1 else ()))
        losses = ", ".join(f"{name} {means[name]:.4g}" for name in shown)
        return f"{losses}, data wait {100 * waited:.0f} %"


def memory_mb(device: torch.device) -> float:
    """The most that this process has held so far, in MiB: of the GPU where the model is on one, else of the machine."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def last_validation(run: Path) -> dict[str, Any] | None:
    """The newest validation line of a run."""
    found = [line for line in read_metrics(run) if "top1" in line]
    return found[-1] if found else None


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that were written to their end; none where there is no file.

    Raises:
        DamagedError: a line is not what this program writes.
    """
    path = run / METRICS
    if not path.exists():
        return []
    text = path.read_bytes().decode(errors="replace")
    return [_line(path, number, line) for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1)]


def _line(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if isinstance(values, dict) and isinstance(values.get("step"), int):
        return values
    raise DamagedError(f"{path}: line {number} is no line of metrics; take it out")
