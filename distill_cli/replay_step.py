"""`distill train --replay-step`: run the step that stopped a run again, by itself."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill_cli.accumulate import backward
from distill_cli.checkpoint import RECIPE, load_checkpoint
from distill_cli.clipping import clip_gradients
from distill_cli.config import RuntimeConfig
from distill_cli.data.orders import TrainingOrder
from distill_cli.distributed import World
from distill_cli.divergence import in_json
from distill_cli.errors import DamagedError, UsageError
from distill_cli.experiment import open_experiment
from distill_cli.objectives import Losses
from distill_cli.randomness import derive
from distill_cli.recipe import load
from distill_cli.report import Report
from distill_cli.students.build import freeze_batch_norm
from distill_cli.training_batches import training_batches

SHOWN = 8
"""Parameters that are named."""


@dataclass(frozen=True)
class Replayed:
    """What a step gives when it is run again, from the same weights, on the same inputs, with the same draws."""

    step: int
    finite: bool
    values: dict[str, float | str]
    """Loss, its parts and the norm of the gradient."""
    first_module: str | None
    """The first module of the forward pass whose output is not finite."""
    parameters: int
    """Whose gradient is not finite …"""
    first_parameters: list[str]
    """… and the first of them."""
    images: int
    skipped: int


def replay_step(file: Path, runtime: RuntimeConfig, world: World, report: Report) -> Replayed:
    """Run the step that stopped a run again, by itself: forward and backward, no optimiser.

    Args:
        file: RUN/nan-STEP.json.

    Raises:
        UsageError, DamagedError: it is no such file, or the weights beside it are not whole.
        MismatchError: data or store are not those of the run.
    """
    record = _read(file)
    recipe = load(str(file.parent / RECIPE)).recipe
    setup = open_experiment(replace(recipe, runtime=runtime), world, report)
    load_checkpoint(file.with_suffix(".safetensors"), setup.objective, setup.optimizer, setup.ema)
    report.stage(f"step {record['step']}: {len(record['sample_ids'])} samples, views {record['views']}")
    step, ranks, config = record["step"] - 1, record["ranks"], setup.recipe.train
    setup.objective.train()
    setup.objective.go_to(step / setup.steps)
    if config.freeze_bn:
        freeze_batch_norm(setup.objective.student)
    setup.optimizer.zero_grad(set_to_none=True)
    found: list[Losses] = []
    shares: list[int] = []
    skipped = 0
    with _first_not_finite(setup.objective) as modules:
        for rank in range(ranks):
            order: TrainingOrder = replace(setup.order, rank=rank, world_size=ranks)
            (batch,) = training_batches(replace(setup, order=order), step, step + 1, world)
            torch.manual_seed(derive("step", config.seed, step, rank))
            found.append(backward(setup.objective, batch, config.accumulate, world, config.precision, len(batch)))
            shares.append(len(batch))
            skipped += len(batch.skipped)
    for parameter in setup.objective.parameters():
        if parameter.grad is not None:
            # As in training: the mean over all images of all ranks.
            parameter.grad /= sum(shares)
    bad = [
        name
        for name, parameter in setup.objective.named_parameters()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]
    values = {name: _mean([losses.parts[name] for losses in found], shares) for name in found[0].parts}
    values = {"loss": _mean([losses.total for losses in found], shares), **values}
    values["grad_norm"] = float(clip_gradients(setup.objective, config))
    return Replayed(
        step=record["step"],
        finite=not bad and all(map(math.isfinite, values.values())),
        values=in_json(values),
        first_module=next(iter(modules), None),
        parameters=len(bad),
        first_parameters=bad[:SHOWN],
        images=sum(shares),
        skipped=skipped,
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(file.read_text())
        if not {"step", "ranks", "sample_ids", "views"} <= record.keys():
            raise ValueError("lacks its fields")
    except FileNotFoundError:
        raise UsageError(f"--replay-step {file}: no such file; give RUN/nan-STEP.json of a run that stopped") from None
    except (OSError, ValueError, AttributeError) as error:
        raise DamagedError(f"{file}: not what a run writes that stops ({error}); run it again") from error
    return record


def _mean(values: list[Tensor], shares: list[int]) -> float:
    return sum(share * float(value) for value, share in zip(values, shares, strict=True)) / sum(shares)


@contextmanager
def _first_not_finite(model: nn.Module) -> Iterator[list[str]]:
    """Names of the modules whose output is not finite, in the order in which they were done."""
    names: list[str] = []

    def watch(name: str) -> Any:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensors = [output] if isinstance(output, Tensor) else output if isinstance(output, tuple | list) else []
            if any(isinstance(part, Tensor) and not part.isfinite().all() for part in tensors):
                names.append(name)

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()
