"""A run's metrics over time: one JSON object a line in metrics.jsonl, and the same as TensorBoard scalars."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from distill_cli.checkpoint import checkpoints
from distill_cli.errors import DistillError
from distill_cli.files import write_atomic
from distill_cli.objectives import Losses

METRICS, TENSORBOARD = "metrics.jsonl", "tb"


class History:
    """Appends to a run's metrics; what an earlier attempt wrote beyond `step` is taken back, as it will come again."""

    def __init__(self, run: Path, step: int, write: bool = True) -> None:
        """
        Args:
            write: False on the ranks that only follow.
        """
        path = run / METRICS
        kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= step]
        self.validated = {values["step"] for values in map(json.loads, kept) if "top1" in values}
        self._write = write
        if write:
            from torch.utils.tensorboard import SummaryWriter

            write_atomic(path, "".join(f"{line}\n" for line in kept))
            self._file = path.open("a")
            self._writer = SummaryWriter(str(run / TENSORBOARD), purge_step=step + 1)

    def log(self, step: int, values: Mapping[str, float | int | None], prefix: str) -> None:
        """Add a line of values at a step; TensorBoard has them as `prefix/name`."""
        if prefix == "val":
            self.validated.add(step)
        if not self._write:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"{prefix}/{name}", value, step)

    def close(self) -> None:
        if self._write:
            self._file.close()
            self._writer.close()


class Window:
    """Losses since the last line of metrics; they stay on the device until somebody looks."""

    def __init__(self, out: Path) -> None:
        self.out, self.note = out, ""
        self._start()

    def _start(self) -> None:
        self._first, self._images, self._began = 0, 0, time.monotonic()
        self._values: dict[str, list[Tensor]] = {}

    def add(self, step: int, losses: Losses, grad_norm: Tensor, images: int) -> None:
        self._first = self._first or step
        self._images += images
        values = {"loss": losses.total.detach(), **losses.parts, "grad_norm": grad_norm}
        for name, value in values.items():
            self._values.setdefault(name, []).append(value)

    def check(self) -> None:
        """
        Raises:
            DistillError: a loss of the window, or the gradient of one, is not finite.
        """
        if not self._values:
            return
        finite = (
            torch.stack([*self._values["loss"], *self._values["grad_norm"]]).isfinite().view(2, -1).all(dim=0).cpu()
        )
        if finite.all():
            return
        index = int((~finite).nonzero()[0])
        parts = ", ".join(f"{name} {values[index].item():.4g}" for name, values in self._values.items())
        saved = checkpoints(self.out)
        last = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        raise DistillError(
            f"{self.out}: the loss or its gradient is not finite at step {self._first + index} ({parts}); {last}; "
            "lower --lr or use --precision fp32, in another --out"
        )

    def flush(self) -> dict[str, float]:
        """The means of the window, which then starts again.

        Raises:
            DistillError: see `check`.
        """
        self.check()
        means = {name: float(torch.stack(values).float().mean()) for name, values in self._values.items()}
        self.note = f"loss {means['loss']:.4f}"
        rate = self._images / max(time.monotonic() - self._began, 1e-9)
        self._start()
        return {**means, "images_per_s": round(rate, 1)}


def last_validation(run: Path) -> dict[str, float | int | None] | None:
    """The newest validation line of a run."""
    lines = [json.loads(line) for line in _complete_lines(run / METRICS)]
    found = [line for line in lines if "top1" in line]
    return found[-1] if found else None


def _complete_lines(path: Path) -> list[str]:
    """The lines that were written to their end."""
    if not path.exists():
        return []
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()
