"""A run's metrics over time: one JSON object a line in metrics.jsonl, and the same as TensorBoard scalars."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

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
        found = [values for values in map(json.loads, kept) if "top1" in values]
        self.validated = {values["step"] for values in found}
        self.best: int | None = None
        """The step of the best validation; of the average of the weights, where there is one."""
        self._best_top1 = -1.0
        for values in found:
            self._rank(values["step"], values)
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
            self._rank(step, values)
        if not self._write:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"{prefix}/{name}", value, step)

    def is_best(self, values: Mapping[str, float | int | None]) -> bool:
        """Whether a validation is better than all before."""
        return (values.get("ema_top1", values.get("top1")) or 0.0) > self._best_top1

    def _rank(self, step: int, values: Mapping[str, float | int | None]) -> None:
        if self.is_best(values):
            self.best, self._best_top1 = step, values.get("ema_top1", values.get("top1")) or 0.0

    def close(self) -> None:
        if self._write:
            self._file.close()
            self._writer.close()


class Window:
    """Losses since the last line of metrics; they stay on the device until somebody looks."""

    def __init__(self) -> None:
        self.note = ""
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

    def not_finite(self) -> tuple[int, dict[str, float]] | None:
        """The first step whose loss or gradient is not finite, and its values; None where all are."""
        if not self._values:
            return None
        both = torch.stack([*self._values["loss"], *self._values["grad_norm"]])
        finite = both.isfinite().view(2, -1).all(dim=0).cpu()
        if finite.all():
            return None
        index = int((~finite).nonzero()[0])
        return self._first + index, {name: float(values[index]) for name, values in self._values.items()}

    def flush(self) -> dict[str, float]:
        """The means of the window, which then starts again."""
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
