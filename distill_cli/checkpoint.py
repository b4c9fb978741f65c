"""Checkpoints: one safetensors file a step, holding weights, optimiser and what it continues. Nothing is pickled."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from distill_cli.errors import DamagedError
from distill_cli.files import canonical_json
from distill_cli.tensors import save_tensors

T = TypeVar("T")

FOLDER = "checkpoints"
RECIPE, RESULT = "recipe.toml", "result.json"
"""The first and the last file of a run."""


def save_checkpoint(
    run: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    state: Mapping[str, Any],
    ema: nn.Module | None = None,
) -> Path:
    """Write the checkpoint of a step, then delete those of earlier steps.

    Args:
        state: JSON values that `load_checkpoint` gives back.
        ema: the average of the weights, where there is one.
    """
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:08d}.safetensors"
    # Some of timm's optimisers count in Python's numbers, whose powers are float64 where those of a tensor are float32.
    plain = {name: slot for name, slot in _slots(optimizer).items() if not isinstance(slot, Tensor)}
    metadata = {"state": canonical_json({**state, "step": step}), "optimizer": canonical_json(plain)}
    save_tensors(path, checkpoint_tensors(model, optimizer, ema), metadata)
    for older in checkpoints(run):
        if older != path:
            older.unlink()
    return path


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
        DamagedError: the file is cut short, or not a checkpoint of this model.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        state: dict[str, Any] = json.loads(metadata["state"])
        tensors = load_file(path)
        model.load_state_dict(_below(tensors, "model."))
        if ema is not None:
            ema.load_state_dict(_below(tensors, "ema."))
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
    state: dict[int, dict[str, Any]] = {}
    for name, slot in slots.items():
        if not name.startswith("group."):
            index, kind = name.split(".", 1)
            state.setdefault(int(index), {})[kind] = slot
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    for name, step in _below(slots, "group.").items():
        optimizer.param_groups[int(name.removesuffix(".step"))]["step"] = step


def _below(values: Mapping[str, T], prefix: str) -> dict[str, T]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
