"""Features: layers of the student held against layers of a live teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from distill_cli.config import Fraction, section
from distill_cli.data.batch import Batch
from distill_cli.errors import UsageError
from distill_cli.objectives.base import (
    Losses,
    Need,
    Objective,
    Outputs,
    Setting,
    TermConfig,
    as_evaluated,
    beside_teacher,
    label_cross_entropy,
)
from distill_cli.objectives.feature_pairs import CLASSIFIER, PAIRS, AnyPairConfig, PooledConfig
from distill_cli.objectives.ramps import Weight, at
from distill_cli.students.taps import INPUT, Taps, find_module, glimpse

LABEL = "label"
"""What the loss of the labels is logged as."""


@section
class FeaturesConfig(TermConfig):
    name: Literal["features"] = "features"
    pairs: Annotated[dict[str, AnyPairConfig], Field(min_length=1)] = field(
        default_factory=lambda: {"last": PooledConfig()}
    )
    """Of layers, by the name that their loss is logged under; without a `loss` of its own a pair is `pooled`."""
    label_weight: Weight = 1.0
    """Of a cross-entropy with the labels, added; 0: none, and no labels are needed."""
    label_smoothing: Fraction = 0.1
    """Of that cross-entropy."""

    @field_validator("pairs", mode="before")
    @classmethod
    def _loss(cls, pairs: Any) -> Any:
        if not isinstance(pairs, dict):
            return pairs
        if LABEL in pairs:
            what = "{name} is what the loss of the labels is called; call the pair otherwise"
            raise PydanticCustomError("taken_name", what, {"name": LABEL})
        return {key: {"loss": "pooled", **pair} if isinstance(pair, dict) else pair for key, pair in pairs.items()}


class Features(Objective):
    """Layers of the student held against layers of a live teacher, beside a cross-entropy with the labels.

        L = sum_i w_i L_i(s_i, t_i) + w CE(label, q),    w_i = w = 1

    Each L_i is one of `pooled` (vectors), `dense` (places of a grid), `masked` (the same, of a student's features that
    have gaps), `attention` (where a layer is active), `similarity` and `relation` (images of the batch among each
    other). Their equations, each with its paper, are in `feature_losses`, MGD's in `feature_pairs.Masked`.

    A mean over the images, but for `similarity` and `relation`: see `relates_images`.

    Projections, and the block by which MGD generates, are trained besides the student. The layers are read as the
    student passes; in a sum of objectives that pass is shared.

    Paper: Romero et al. 2014, arXiv:1412.6550 (FitNets); Zagoruyko and Komodakis 2016, arXiv:1612.03928 (AT); Tung and
    Mori 2019, arXiv:1907.09682 (SPKD); Park et al. 2019, arXiv:1904.05068 (RKD); Yang et al. 2022, arXiv:2205.01529
    (MGD); Wei et al. 2022, arXiv:2205.14141 (FD).
    Differs: what the papers sum over channels and places is a mean, so that a weight means the same for any layer.
    FitNets trains up to the hint first; here all is trained at once, and a weight may be a ramp. AT, RKD and MGD are
    beside no loss of logits unless `terms` adds one.
    """

    needs = frozenset({"teacher"})

    def __init__(self, student: nn.Module, config: FeaturesConfig, setting: Setting) -> None:
        """
        Raises:
            UsageError: student or teacher has no such layer, or two layers cannot be compared; the pair is named.
        """
        super().__init__(student, setting)
        self.config = config
        self.needs = self.needs_of(config)
        models = student, self.teacher.model
        self.layers = {
            name: (
                _resolved(f"{name}.student", pair.student, student),
                _resolved(f"{name}.teacher", pair.teacher, self.teacher.model),
            )
            for name, pair in config.pairs.items()
        }
        ours, theirs = zip(*self.layers.values(), strict=True)
        self.teacher.tap(*theirs)
        seen, taught = self._shapes(ours, theirs)
        self.pairs = nn.ModuleList()
        for number, (name, pair) in enumerate(config.pairs.items()):
            values = seen[ours[number]], taught[theirs[number]]
            try:
                self.pairs.append(PAIRS[pair.loss](pair, models, *values, seed=(setting.seed, number)))
            except UsageError as error:
                raise UsageError(f"objective.pairs.{name}: {error}") from None
        self.relates_images = any(pair.relates_images for pair in self.pairs)
        # Of passes in training alone: those of a validation would stay here until the next step.
        self.taps = Taps(student, ours, only_in_training=True)

    def _shapes(self, ours: Sequence[str], theirs: Sequence[str]) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """What the layers of both sides make of a blank image."""
        size = self.setting.image_size
        try:
            return glimpse(self.student, ours, torch.zeros(1, 3, size, size)), self.teacher.glimpse(theirs, size)
        except UsageError as error:
            raise UsageError(f"objective.pairs: {error}") from None

    @classmethod
    def needs_of(cls, config: TermConfig) -> frozenset[Need]:
        assert isinstance(config, FeaturesConfig)
        return cls.needs | frozenset[Need]({"labels"} if config.label_weight != 0 else ())

    def losses(self, outputs: Outputs, batch: Batch) -> Losses:
        ours, theirs = self.taps.take(), self.teacher.inside(batch.images)
        parts: dict[str, Tensor] = {}
        total: Tensor | float = 0.0
        for (name, config), pair in zip(self.config.pairs.items(), self.pairs, strict=True):
            our_layer, their_layer = self.layers[name]
            loss = pair(ours[our_layer], theirs[their_layer], batch)
            total = total + at(config.weight, self.progress) * loss
            parts[name] = loss.detach()
        assert isinstance(total, Tensor)
        if not self.trains_classifier:
            return Losses(total, parts)
        logits = as_evaluated(outputs)
        label = label_cross_entropy(logits, batch, self.config.label_smoothing)
        total = total + at(self.config.label_weight, self.progress) * label
        return Losses(total, {LABEL: label.detach(), **parts}, beside_teacher(logits, batch))

    def after_step(self, step: int) -> None:
        """Let go of what another objective's pass of the student may have left."""
        self.taps.take()


def _resolved(path: str, name: str, model: nn.Module) -> str:
    """A layer as the model names it.

    Raises:
        UsageError: it has no such layer.
    """
    try:
        if name == CLASSIFIER:
            return f"{_classifier(model)}{INPUT}"
        find_module(model, name.removesuffix(INPUT))
    except UsageError as error:
        raise UsageError(f"objective.pairs.{path}: {error}") from None
    return name


def _classifier(model: Any) -> str:
    """The name of a timm model's classifier; of two, as DeiT has with a distillation token, the first."""
    found = model.get_classifier() if hasattr(model, "get_classifier") else None
    first = found[0] if isinstance(found, tuple | list) else found
    for name, module in model.named_modules():
        if module is first:
            return str(name)
    raise UsageError(f"{type(model).__name__} names no module as its classifier; name a layer")
