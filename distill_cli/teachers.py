"""Teachers: a frozen model, the classes it knows, and the input it was made for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from distill_cli.config import Positive, section
from distill_cli.errors import DamagedError, MismatchError, UsageError
from distill_cli.students.build import create, input_config, timm_name
from distill_cli.students.weights import Card, digest, fill, read_card, read_weights, run_weights


@section
class TeacherConfig:
    name: str | None = None
    """`--teacher`: a run directory of ours, an alias, or any timm name."""
    weights: str | None = None
    """`--teacher-weights`: a safetensors file or torch checkpoint."""
    pretrained: bool = False
    """`--pretrained`: timm's own weights."""
    num_classes: Positive | None = None
    """The class count that is expected; what the weights say decides."""
    kwargs: dict[str, Any] | None = None
    """Further arguments of the timm constructor."""
    live: bool = False
    """`--live`: in training it looks at every batch, in place of a store."""


@dataclass(frozen=True)
class Frozen:
    """A trained model in evaluation mode, without gradients."""

    name: str
    model: nn.Module
    weights_sha256: str
    num_classes: int
    classes: tuple[str, ...] | None
    card: Card | None = None
    """Of a run of ours."""

    def input(self, image_size: int | None) -> Mapping[str, Any]:
        """timm's `input_size`, `mean`, `std`, `interpolation`, `crop_pct` of its evaluation: a run says them itself."""
        return self.card.input if self.card else input_config(self.model, image_size)


def load_frozen(config: TeacherConfig, flag: str = "--teacher", pretrained: str = "--pretrained") -> Frozen:
    """Load a trained model: a run, a weights file for a timm architecture, or timm's pretrained weights.

    Args:
        flag, pretrained: what the command calls the fields of `config`.

    Raises:
        UsageError: nothing, or nothing trained, is named: a random head never teaches.
        MismatchError: the weights are of another model, or of another class count than `num_classes`.
        DamagedError: the run is not finished, or its file is damaged.
    """
    if config.name is None:
        raise UsageError(f"{flag} is missing: give a run directory, or a timm name with its weights")
    if Path(config.name).is_dir():
        if config.weights is not None or config.pretrained or config.kwargs:
            raise UsageError(f"{flag} {config.name}: is a run, with weights and settings of its own; give no others")
        return _from_run(Path(config.name), config)
    if config.weights is not None:
        return _from_weights(config.name, Path(config.weights), config)
    if not config.pretrained:
        timm_name(config.name)
        raise UsageError(
            f"{flag} {config.name}: has no weights, and an untrained head cannot teach; "
            f"give {'--weights' if flag == '--model' else '--teacher-weights'} FILE or {pretrained}, or a run directory"
        )
    full = timm_name(config.name)
    known = timm.get_pretrained_cfg(full)
    count = known.num_classes if known else 1000
    model = create(full, num_classes=count, arguments=config.kwargs or {}, pretrained=True)
    return _frozen(full, model, model.state_dict(), count, config)


def check_classifier(frozen: Frozen, where: str) -> None:
    """
    Args:
        where: what the user named it by.

    Raises:
        MismatchError: the model has no classifier, or is of a run whose objective trains none: its logits say nothing.
    """
    if frozen.num_classes == 0:
        raise MismatchError(f"{where}: has no logits, as these weights have no classifier; give others, or a run")
    if frozen.card is not None and not frozen.card.trained_classifier:
        raise MismatchError(
            f"{where}: has no logits, as objective {frozen.card.objective} trains no classifier; "
            "fine-tune it first, by distill train --init-from"
        )


def _from_run(run: Path, config: TeacherConfig) -> Frozen:
    path = run_weights(run)
    card = read_card(path)
    if card is None:
        raise DamagedError(f"{path}: carries no card of a run; restore it from a copy")
    return _from_card(card, read_weights(path), path, config)


def _from_weights(name: str, path: Path, config: TeacherConfig) -> Frozen:
    weights = read_weights(path)
    card = read_card(path)
    full = timm_name(name)
    if card is not None and card.student == full:
        return _from_card(card, weights, path, config)
    count = _classes_of(full, weights, path)
    model = create(full, num_classes=count, arguments=config.kwargs or {})
    fill(model, weights, path)
    return _frozen(full, model, weights, count, config)


def _from_card(card: Card, weights: Mapping[str, Tensor], path: Path, config: TeacherConfig) -> Frozen:
    for key, asked in (config.kwargs or {}).items():
        if card.arguments.get(key) != asked:
            raise MismatchError(f"{path}: was built with {key} {card.arguments.get(key)}, {asked} asked; leave it out")
    model = create(card.student, num_classes=card.num_classes, arguments=card.arguments)
    fill(model, weights, path)
    return _frozen(card.student, model, weights, card.num_classes, config, card)


def _frozen(
    name: str,
    model: nn.Module,
    weights: Mapping[str, Tensor],
    count: int,
    config: TeacherConfig,
    card: Card | None = None,
) -> Frozen:
    if config.num_classes is not None and config.num_classes != count:
        raise MismatchError(
            f"{config.name}: its weights have {count} classes, teacher.num_classes says {config.num_classes}; "
            "give the weights of the right teacher, or leave the number out"
        )
    model.eval().requires_grad_(False)
    return Frozen(
        name=name,
        model=model,
        weights_sha256=digest(weights),
        num_classes=count,
        classes=card.classes if card else None,
        card=card,
    )


def _classes_of(full: str, weights: Mapping[str, Tensor], path: Path) -> int:
    """The rows of the classifier in a weights file; 0 of a model that timm has without one, as MAE's are."""
    known = timm.get_pretrained_cfg(full)
    if known and known.num_classes == 0:
        return 0
    classifier = known.classifier if known else None
    names = [classifier] if isinstance(classifier, str) else list(classifier or ())
    for name in names:
        if f"{name}.weight" in weights:
            return int(weights[f"{name}.weight"].shape[0])
    raise MismatchError(
        f"{path}: has no {' or '.join(f'{name}.weight' for name in names) or 'classifier'}, the head of {full}; "
        "give the weights of this model with its classifier"
    )
