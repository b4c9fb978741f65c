"""Weights on disk: a run's `student.safetensors` with its lineage, and other people's files. Nothing is unpickled."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import load_state_dict
from torch import Tensor, nn

from distill_cli.checkpoint import RESULT
from distill_cli.errors import DamagedError, MismatchError, UsageError
from distill_cli.files import canonical_json
from distill_cli.students.second_head import timm_weights
from distill_cli.tensors import save_tensors, whole

STUDENT, PLAIN, BEST = "student.safetensors", "student-plain.safetensors", "student-best.safetensors"
"""A run's weights: the average of them where it keeps one, and then the plain ones beside it; and those of the best
validation."""
TEXTS = ("student", "recipe_sha256", "data_fingerprint", "objective", "teacher", "store", "init_from")
"""The fields of a card that are strings."""


@dataclass(frozen=True)
class Card:
    """What a run's weights say of themselves, kept as the metadata of their file.

    The file is timm's as it stands:

        model = timm.create_model(card["student"], num_classes=…, **json.loads(card["arguments"]))
        model.load_state_dict(safetensors.torch.load_file("student.safetensors"))
    """

    student: str
    """timm name, tag included."""
    arguments: Mapping[str, Any]
    """Of the timm constructor, besides `num_classes`."""
    num_classes: int
    classes: tuple[str, ...] | None
    input: Mapping[str, Any]
    """timm's `input_size`, `mean`, `std`, `interpolation`, `crop_pct` of the evaluation transform."""
    recipe_sha256: str
    data_fingerprint: str
    objective: str
    teacher: str | None = None
    store: str | None = None
    """The store's id; of several, as `teacher`, with a comma between."""
    averaging: Mapping[str, Any] | None = None
    """`weights` and `average` of several stores, the sha256 of `class_maps` where there are any."""
    init_from: str | None = None
    """The sha256 of the weights that the run began from."""
    ema_decay: float | None = None
    """Of the average that these weights are."""
    trained_classifier: bool = True
    """False: it is as random as it began, and gives no logits."""
    top1: float | None = None
    top5: float | None = None
    software: Mapping[str, str] | None = None


def save_student(path: Path, model: nn.Module, card: Card, write: bool = True) -> None:
    """Write a model's weights as it is evaluated, with their card, atomically.

    Args:
        write: False on the ranks that only give their parts of a model that is in parts.
    """
    weights = {name: whole(tensor) for name, tensor in timm_weights(model).items()}
    if not write:
        return
    metadata = {
        key: value if isinstance(value, str) else canonical_json(value)
        for key, value in asdict(card).items()
        if value is not None
    }
    save_tensors(path, weights, metadata)


def read_card(path: Path) -> Card | None:
    """The card of a weights file, or None where the file is somebody else's.

    Raises:
        DamagedError: the file cannot be read as safetensors.
    """
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"{path}: not a readable safetensors file ({error}); restore it from a copy") from error
    if "recipe_sha256" not in metadata:
        return None
    try:
        values = {name: _from_text(name, metadata[name]) for name in Card.__dataclass_fields__ if name in metadata}
        classes = values.get("classes")
        return Card(**{**values, "classes": None if classes is None else tuple(classes)})
    except (TypeError, ValueError) as error:
        raise DamagedError(f"{path}: its card is not one ({error}); restore it from a copy") from error


def run_weights(run: Path) -> Path:
    """The weights file of a finished run.

    Raises:
        DamagedError: it is not finished, or has lost its file.
    """
    path = run / STUDENT
    if not (run / RESULT).is_file() or not path.is_file():
        raise DamagedError(f"{run}: not a finished run; run its distill train command again to finish it")
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a torch checkpoint (`state_dict`, `model` and the like unwrapped).

    Raises:
        UsageError: there is no such file.
        DamagedError: it cannot be read, or would run code.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such weights file")
    try:
        weights = load_file(path) if path.suffix == ".safetensors" else load_state_dict(str(path), weights_only=True)
    except Exception as error:  # What a parser meets in other people's bytes has no list.
        reason = " ".join(str(error).split())[:160]
        raise DamagedError(f"{path}: cannot be read as weights ({reason}); save it as safetensors") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise DamagedError(f"{path}: holds no weights, but {type(weights).__name__}; save a state dict as safetensors")
    return weights


def fill(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Load weights into a model; every tensor must have its place and its shape.

    Raises:
        MismatchError: keys are missing, unknown or of another shape; they are named.
    """
    own = model.state_dict()
    problems = [f"missing {key}" for key in own if key not in weights]
    problems += [f"unknown {key}" for key in weights if key not in own]
    problems += [
        f"{key} is {list(weights[key].shape)}, not {list(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise MismatchError(f"{path}: does not fit {type(model).__name__} ({shown}); give the weights of this model")
    model.load_state_dict(dict(weights))


def digest(weights: Mapping[str, Tensor]) -> str:
    """The sha256 of weights: of names, types, shapes and bytes in the order of names, whatever file they came in."""
    state = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def _from_text(name: str, text: str) -> Any:
    """Strings stand in the metadata as they are, all else as JSON."""
    return text if name in TEXTS else json.loads(text)
