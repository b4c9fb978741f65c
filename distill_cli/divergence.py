"""A loss that is not finite: the run stops with the weights of before, and leaves what is needed to look into it."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from distill_cli.checkpoint import checkpoints, snapshot
from distill_cli.data.images import printable
from distill_cli.distributed import World
from distill_cli.errors import DistillError
from distill_cli.experiment import Experiment
from distill_cli.files import write_json
from distill_cli.history import Window
from distill_cli.objectives import Losses
from distill_cli.saver import Saver


class Guard:
    """Keeps an optimiser from a step whose loss or gradient is not finite, and from all that follow.

    Where the optimiser runs as one CUDA kernel it is told on the device, and nobody waits: the weights stay what they
    were, and the run finds out with its next line of metrics. Elsewhere each step asks.
    """

    def __init__(self, optimizer: Optimizer, world: World) -> None:
        self.refused = False
        """Known on the host, of all ranks."""
        self._optimizer, self._world = optimizer, world
        self._fused = all(group.get("fused") for group in optimizer.param_groups)
        self._bad: Tensor | None = None

    def grants(self, losses: Losses, grad_norm: Tensor) -> bool:
        """Whether the optimiser may be asked for a step."""
        # A loss may be infinite on one rank alone, and its gradient finite.
        bad = ~(losses.total.detach().isfinite() & grad_norm.isfinite())
        if not self._fused:
            self.refused = bool(self._world.agree(int(bad)))
            return not self.refused
        found = self._world.largest(bad.float())
        self._bad = found if self._bad is None else torch.maximum(self._bad, found)
        # What torch's gradient scaler tells a fused optimiser: 1 leaves everything as it is.
        vars(self._optimizer)["found_inf"] = self._bad
        return True


def check_finite(window: Window, setup: Experiment, saver: Saver, world: World) -> None:
    """Stop a run at a step that was not finite, and write what is needed to run it again.

    `nan-STEP.json` has the samples and their views, `nan-STEP.safetensors` all that the step began with.

    Raises:
        DistillError: a step of the window was not finite.
    """
    found = window.not_finite()
    if found is None:
        return
    step, values = found
    saver.join()
    saved, path = checkpoints(saver.run), saver.run / f"nan-{step}.json"
    last = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
    parts = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    if world.is_main or setup.sharded:
        began = snapshot(step - 1, setup.objective, setup.optimizer, {}, setup.ema)
    if world.is_main:
        began.write(path.with_suffix(".safetensors"))
        write_json(path, _record(step, values, setup, world.size))
    raise DistillError(
        f"{saver.run}: the loss or its gradient is not finite at step {step} ({parts}); {last}; lower --lr or use "
        f'--precision fp32, in another --out; "distill train --replay-step {path}" runs this step again'
    )


def in_json(values: Mapping[str, float]) -> dict[str, float | str]:
    """Values as strict JSON has them: one that is not finite by its name."""
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}


def _record(step: int, values: dict[str, float], setup: Experiment, ranks: int) -> dict[str, Any]:
    order = replace(setup.order, rank=0, world_size=1)
    first, sample_ids = order(step - 1)
    views = [(first + read) % order.views for read in range(order.views_per_read)]
    return {
        "step": step,
        "ranks": ranks,
        "lr": setup.learning_rate(step - 1),
        "values": in_json(values),
        "views": views,
        "sample_ids": sample_ids.tolist(),
        "keys": [printable(setup.source.keys[sample_id]) for sample_id in sample_ids.tolist()],
        "identity": setup.identity,
    }
