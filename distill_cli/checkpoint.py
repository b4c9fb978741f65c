"""Checkpoints: one safetensors file a step, holding weights, optimiser and what it continues. Nothing is pickled."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from distill_cli.errors import DamagedError
from distill_cli.files import canonical_json
from distill_cli.tensors import as_there, check_tensors, save_tensors, whole

T = TypeVar("T")

FOLDER = "checkpoints"
RECIPE, RESULT = "recipe.toml", "result.json"
"""The first and the last file of a run."""


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds, on the host: what happens to the model since does not change it."""

    step: int
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    def write(self, path: Path) -> None:
        """Write it, atomically; equal snapshots are equal bytes.

        Raises:
            OSError: the disk is full or the folder cannot be written; nothing is left under the name.
        """
        save_tensors(path, self.tensors, self.metadata, checksum=True)


def snapshot(
    step: int, model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any], ema: nn.Module | None = None
) -> Snapshot:
    """A copy of a model, its average and its optimiser after so many steps; of all ranks where they are in parts.

    Args:
        state: JSON values that `load_checkpoint` gives back.
    """
    # Some of timm's optimisers count in Python's numbers, whose powers are float64 where those of a tensor are float32.
    plain = {name: slot for name, slot in _slots(optimizer).items() if not isinstance(slot, Tensor)}
    metadata = {"state": canonical_json({**state, "step": step}), "optimizer": canonical_json(plain)}
    tensors = checkpoint_tensors(model, optimizer, ema)
    return Snapshot(
        step, {name: whole(tensor.detach()).to("cpu", copy=True) for name, tensor in tensors.items()}, metadata
    )


def checkpoint_path(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:08d}.safetensors"


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(path.stem.removeprefix("step-"))


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((run / FOLDER).glob("step-*.safetensors"))


def checkpoint_tensors(model: nn.Module, optimizer: Optimizer, ema: nn.Module | None = None) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by name."""
    modules = {"model": model} if ema is None else {"model": model, "ema": ema}
    tensors = {f"{of}.{name}": value for of, module in modules.items() for name, value in module.state_dict().items()}
    slots = {f"optimizer.{name}": value for name, value in _slots(optimizer).items() if isinstance(value, Tensor)}
    return tensors | slots


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer, ema: nn.Module | None = None) -> dict[str, Any]:
    """Load a checkpoint into a model, its average and its optimiser; gives back the saved state with `step` in it.

    Raises:
        DamagedError: the file is cut short, its bytes are not those that were written, or it is of another model.
    """
    try:
        check_tensors(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        state: dict[str, Any] = json.loads(metadata["state"])
        tensors = load_file(path)
        for module, prefix in ((model, "model."), (ema, "ema.")):
            if module is not None:
                own = module.state_dict()
                values = {name: as_there(value, own.get(name)) for name, value in _below(tensors, prefix).items()}
                module.load_state_dict(values)
        _fill(optimizer, {**_below(tensors, "optimizer."), **json.loads(metadata.get("optimizer", "{}"))})
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DamagedError(f"{path}: not a readable checkpoint ({reason}); delete it to begin the run again") from error
    return state


def _slots(optimizer: Optimizer) -> dict[str, Any]:
    """What an optimiser remembers: `INDEX.NAME` of a parameter; `group.INDEX.step`, where timm's count by group."""
    state = optimizer.state_dict()
    slots = {f"{index}.{name}": slot for index, slots in state["state"].items() for name, slot in slots.items()}
    counts = {
        f"group.{index}.step": group["step"] for index, group in enumerate(state["param_groups"]) if "step" in group
    }
    return slots | counts


def _fill(optimizer: Optimizer, slots: Mapping[str, Any]) -> None:
    """Give a fresh optimiser what another one remembered."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, slot in slots.items():
        if not name.startswith("group."):
            index, kind = name.split(".", 1)
            state.setdefault(int(index), {})[kind] = _lying_as(parameters[int(index)], slot)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    for name, step in _below(slots, "group.").items():
        optimizer.param_groups[int(name.removesuffix(".step"))]["step"] = step


def _lying_as(parameter: Tensor, slot: Any) -> Any:
    """A slot of a parameter's shape in its parts and its order in memory: a fused optimiser reads both by one index."""
    if not isinstance(slot, Tensor) or slot.shape != parameter.shape:
        return slot
    if isinstance(parameter, DTensor) or slot.stride() == parameter.stride():
        return as_there(slot, parameter)
    return torch.empty_like(parameter, dtype=slot.dtype, device=slot.device).copy_(slot)


def _below(values: Mapping[str, T], prefix: str) -> dict[str, T]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
