"""Beginning from other weights: those of another run or model, for other classes or another input size."""

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table_levit
from torch import Tensor, nn

from distill_cli.class_maps import NEW, read_class_map
from distill_cli.errors import MismatchError, UsageError
from distill_cli.files import canonical_json, sha256
from distill_cli.report import Report
from distill_cli.students.weights import digest, fill, read_card, read_weights, run_weights


def check_begin(source: str | None, class_map: str | None, pretrained: bool) -> None:
    """
    Raises:
        UsageError: a class map without weights, or two kinds of weights to begin from.
    """
    if class_map is not None and source is None:
        raise UsageError(f"student.class_map {class_map}: there are no weights to take rows from; give --init-from")
    if source is not None and pretrained:
        raise UsageError(f"--init-from {source}: the student is pretrained already; give one of them")


def begin_from(
    student: nn.Module, source: str | None, class_map: str | None, classes: Sequence[str] | None, report: Report
) -> dict[str, str | None]:
    """Fill a student with weights, if any are named; gives the sha256 of what they were: `init_from` and `class_map`.

    Args:
        source: a finished run, or a weights file.
        class_map: a file, see `read_class_map`; `NEW` is a class that the weights do not know.
        classes: the student's, where they have names.

    Raises:
        UsageError, MismatchError, DamagedError: there are no such weights, or they do not fit.
    """
    if source is None:
        return {"init_from": None, "class_map": None}
    path = run_weights(Path(source)) if Path(source).is_dir() else Path(source)
    weights, card = read_weights(path), read_card(path)
    chosen = None if class_map is None else read_class_map(Path(class_map), "student.class_map")
    untrained = card is not None and not card.trained_classifier
    if untrained and chosen is not None:
        raise MismatchError(f"student.class_map {class_map}: the classifier of {path} was never trained; leave it out")
    if untrained:
        rows, how = None, "its classifier was never trained"
    elif chosen is None:
        rows, how = _rows(student, weights, classes, card.classes if card else None)
    else:
        _check_map(chosen, student, weights, f"student.class_map {class_map}")
        rows, how = [*chosen], f"gathered by {class_map}, {chosen.count(NEW)} of them the mean of all"
    fill(student, fit_input(student, weights) | fit_head(student, weights, rows), path)
    if untrained:
        report.stage(f"beginning from {path}; {how}, the student's begins anew")
    elif rows is None:
        report.warn(f"{path}: {how}; the student's classifier begins anew")
    else:
        report.stage(f"beginning from {path}, its classifier's rows {how}")
    return {"init_from": digest(weights), "class_map": sha256(canonical_json(chosen)) if chosen else None}


def fit_head(student: nn.Module, weights: Mapping[str, Tensor], rows: Sequence[int] | None) -> dict[str, Tensor]:
    """The tensors of the student's classifiers, their rows taken from the weights.

    Args:
        rows: by class of the student; `NEW` is the mean of all rows, as in TinyViT's code. None: the student's own.
    """
    own = {name: tensor for name, tensor in student.state_dict().items() if name in _heads(student)}
    return own if rows is None else {name: _gather(weights[name], rows) for name in own if name in weights}


def fit_input(student: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of another input size brought to the student's, the classifiers left out.

    By timm's converter of the architecture, then, as some converters know nothing of them, by timm's functions for
    position embeddings and LeViT's attention biases. What does not fit comes back as it was.
    """
    own, fitted = _without_heads(student, student.state_dict()), _without_heads(student, weights)
    if {name: tensor.shape for name, tensor in fitted.items()} == {name: tensor.shape for name, tensor in own.items()}:
        return fitted
    converter = getattr(inspect.getmodule(type(student)), "checkpoint_filter_fn", None)
    # What a converter meets in weights of another model has no list; `fill` will name what does not fit.
    with contextlib.suppress(Exception):
        # All of the weights, since some converters know by the classifier whose they are.
        fitted = _without_heads(student, converter(dict(weights), student)) if converter else fitted
    for name in fitted.keys() & own.keys():
        if fitted[name].shape != own[name].shape:
            with contextlib.suppress(Exception):
                fitted[name] = _resample(name, fitted[name], own[name], student)
    return fitted


def _resample(name: str, tensor: Tensor, own: Tensor, student: nn.Module) -> Tensor:
    if name.endswith("attention_biases"):
        return resize_rel_pos_bias_table_levit(tensor.T, own.shape[::-1]).T
    if name == "pos_embed":
        grid: tuple[int, int] = student.get_submodule("patch_embed").grid_size  # type: ignore[assignment]
        prefix = own.shape[1] - grid[0] * grid[1]
        return resample_abs_pos_embed(tensor, new_size=list(grid), num_prefix_tokens=prefix)
    return tensor


def _heads(student: nn.Module) -> set[str]:
    """The tensors of a timm model's classifiers: one, or two where there is a distillation token."""
    named = getattr(student, "pretrained_cfg", {}).get("classifier") or ()
    return {f"{name}.{part}" for name in ((named,) if isinstance(named, str) else named) for part in ("weight", "bias")}


def _without_heads(student: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    heads = _heads(student)
    return {name: tensor for name, tensor in weights.items() if name not in heads}


def _class_count(student: nn.Module, weights: Mapping[str, Tensor]) -> int | None:
    """Of the weights; None where they have no classifier."""
    return next((len(weights[name]) for name in sorted(_heads(student)) if name in weights), None)


def _rows(
    student: nn.Module, weights: Mapping[str, Tensor], ours: Sequence[str] | None, theirs: Sequence[str] | None
) -> tuple[list[int] | None, str]:
    """Which rows of the classifier to take, and how that is said; None and why, where classes are others."""
    count, there = int(student.num_classes), _class_count(student, weights)  # type: ignore[arg-type]
    if there is None:
        return None, "has no classifier"
    if there != count:
        return None, f"has {there} classes, the student {count}, and there is no student.class_map"
    if ours is None or theirs is None or list(ours) == list(theirs):
        return list(range(count)), "copied"
    if sorted(ours) != sorted(theirs):
        name = next(name for name in ours if name not in theirs)
        return None, f"has other classes than the student (no {name!r}), and there is no student.class_map"
    return [theirs.index(name) for name in ours], "put in the order of the student's classes"


def _check_map(rows: Sequence[int], student: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """
    Raises:
        MismatchError: the map is not of these two lists of classes.
    """
    there = _class_count(student, weights)
    if there is None:
        raise MismatchError(f"{where}: the weights have no classifier to take rows from; leave it out")
    if len(rows) != student.num_classes:
        raise MismatchError(
            f"{where}: is of {len(rows)} classes, the student has {student.num_classes}; give one for each"
        )
    if max(rows) >= there:
        raise MismatchError(f"{where}: has class {max(rows)}, the weights have {there} classes; give ids below that")


def _gather(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    index = torch.tensor(rows)
    gathered = tensor[index.clamp(min=0)]
    gathered[index == NEW] = tensor.float().mean(dim=0).to(tensor.dtype)
    return gathered
