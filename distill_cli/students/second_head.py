"""A second classifier beside a student's own, for students without a distillation token."""

import copy
from typing import Any, Literal

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill_cli.errors import UsageError

NAME = "head_dist"
AtEvaluation = Literal["average", "drop"]


class Dropped(tuple[Tensor, Tensor]):
    """The logits of both heads of a student that is evaluated by the first alone."""


def add_second_head(student: nn.Module, at_evaluation: AtEvaluation, image_size: int) -> None:
    """Give a student a second classifier on the same features.

    In training it then gives the logits of both, as timm's models with a distillation head do. In evaluation the
    second is dropped, or averaged with the first: as both are linear on the same features, one layer of the mean
    weights, which is what `timm_weights` delivers. It begins as a copy of the first, so that a student that begins
    from other weights begins as it was evaluated.

    It is `student.head_dist`, so optimiser, average and checkpoints hold it as they hold the rest.

    Raises:
        UsageError: the student's logits are not what one linear classifier gives.
    """
    classifier = _classifier(student)
    if (
        type(classifier) not in (nn.Linear, timm.layers.Linear)
        or hasattr(student, NAME)
        or not _is_last(classifier, student, image_size)
    ):
        raise UsageError(
            f"{type(student).__name__} has no distillation head, and no single linear classifier for a second beside it"
        )
    setattr(student, NAME, copy.deepcopy(classifier))
    # Hooks that know no module by themselves: the average of the weights is a copy of the student with the same ones.
    student.second_head_at_evaluation = at_evaluation  # type: ignore[assignment]
    classifier.register_forward_pre_hook(_keep_features)
    student.register_forward_hook(_both)


def second_head(student: nn.Module) -> nn.Module | None:
    """The classifier that was added to a student."""
    return student.get_submodule(NAME) if hasattr(student, "second_head_at_evaluation") else None


def timm_weights(student: nn.Module) -> dict[str, Tensor]:
    """A student's weights as it is evaluated, under timm's names: without a second head, or with the mean of both."""
    weights = student.state_dict()
    second = second_head(student)
    if second is None:
        return weights
    classifier = _classifier(student)
    name = next(name for name, module in student.named_modules() if module is classifier)
    for part, value in zip(("weight", "bias"), _evaluated(student), strict=True):
        weights.pop(f"{NAME}.{part}", None)
        if value is not None:
            weights[f"{name}.{part}"] = value.detach()
    return weights


def _classifier(student: nn.Module) -> Any:
    return getattr(student, "get_classifier", lambda: None)()


@torch.no_grad()
def _is_last(classifier: nn.Module, student: nn.Module, image_size: int) -> bool:
    """Whether a student's logits are what its classifier gives; VOLO's are the sum of two classifiers."""
    found: list[Tensor] = []
    handle = classifier.register_forward_hook(lambda module, inputs, output: found.append(output))
    training = student.training
    logits = student.eval()(torch.zeros(1, 3, image_size, image_size))
    student.train(training)
    handle.remove()
    return len(found) == 1 and torch.equal(logits, found[0])


def _keep_features(classifier: Any, inputs: tuple[Tensor, ...]) -> None:
    classifier.features = inputs[0]


def _both(student: Any, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    classifier = _classifier(student)
    features = classifier.features
    del classifier.features
    if not student.training:
        return F.linear(features, *_evaluated(student))
    both = logits, getattr(student, NAME)(features)
    return Dropped(both) if student.second_head_at_evaluation == "drop" else both


def _evaluated(student: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the linear layer that a student with two heads is evaluated by."""
    first, second = _classifier(student), getattr(student, NAME)
    if student.second_head_at_evaluation == "drop":
        return first.weight, first.bias
    bias = None if first.bias is None else (first.bias + second.bias) / 2
    return (first.weight + second.weight) / 2, bias
