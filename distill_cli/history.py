"""A run's metrics over time: one JSON object a line in metrics.jsonl, and the same as TensorBoard scalars."""

import json
from collections.abc import Mapping
from pathlib import Path

from distill_cli.files import write_atomic

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
