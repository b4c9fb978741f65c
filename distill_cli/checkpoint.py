"""Checkpoints: one safetensors file a step, holding weights, optimiser and what it continues. Nothing is pickled."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from distill_cli.errors import DamagedError
from distill_cli.files import canonical_json
from distill_cli.tensors import save_tensors

FOLDER = "checkpoints"
RECIPE, RESULT = "recipe.toml", "result.json"
"""The first and the last file of a run."""


def save_checkpoint(run: Path, step: int, model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> Path:
    """Write the checkpoint of a step, then delete those of earlier steps.

    Args:
        state: JSON values that `load_checkpoint` gives back.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in slots.items()}
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:08d}.safetensors"
    save_tensors(path, tensors, {"state": canonical_json({**state, "step": step})})
    for older in checkpoints(run):
        if older != path:
            older.unlink()
    return path


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((run / FOLDER).glob("step-*.safetensors"))


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Load a checkpoint into a model and its optimiser; gives back the saved state with `step` in it.

    Raises:
        DamagedError: the file is cut short, or not a checkpoint of this model.
    """
    try:
        with safe_open(path, "pt") as file:
            state: dict[str, Any] = json.loads((file.metadata() or {})["state"])
        tensors = load_file(path)
        model.load_state_dict(_below(tensors, "model."))
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _below(tensors, "optimizer.").items():
            index, slot = name.split(".", 1)
            slots.setdefault(int(index), {})[slot] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DamagedError(f"{path}: not a readable checkpoint ({reason}); delete it to begin the run again") from error
    return state


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
