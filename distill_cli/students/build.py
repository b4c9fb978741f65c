"""The model that a recipe describes, built by timm."""

from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

from distill_cli.config import Fraction, Positive, section
from distill_cli.data.views import SMALL
from distill_cli.errors import DistillError, UsageError, nearest
from distill_cli.students.aliases import ALIASES
from distill_cli.students.second_head import second_head


@section
class StudentConfig:
    """The student; a field left out is the architecture's own."""

    name: str | None = None
    """`--student`: an alias (`distill models ls`) or any timm name."""
    pretrained: bool = False
    """Start from timm's pretrained weights."""
    class_map: str | None = None
    """A file with the class in the weights of `train.init_from` for each class of the student, -1 for a new one."""
    num_classes: Positive | None = None
    """By default the store's, else the data's."""
    img_size: Positive | None = None
    """Pixels of a side; must be `data.image_size` where both are given."""
    patch_size: Positive | None = None
    embed_dim: Positive | None = None
    depth: Positive | None = None
    num_heads: Positive | None = None
    drop_path: Fraction | None = None
    """Stochastic depth of the last block, rising linearly from 0."""
    kwargs: dict[str, Any] | None = None
    """Further arguments of the timm constructor."""


def timm_name(name: str) -> str:
    """The timm name behind an alias, or a timm name as it is.

    Raises:
        UsageError: timm knows no such model; the nearest names are given.
    """
    full = ALIASES.get(name, name)
    if not timm.is_model(full):
        known = [*ALIASES, *timm.list_models()]
        raise UsageError(f'{name}: no such model{nearest(name, known)}; "distill models ls" lists them')
    architecture, _, tag = full.partition(".")
    tagged = timm.list_pretrained(f"{architecture}.*") if tag else []
    if tag and full not in tagged:
        raise UsageError(f"{name}: timm has no such weights of {architecture}; it has {', '.join(tagged) or 'none'}")
    return full


def constructor_arguments(config: StudentConfig, image_size: int | None = None) -> dict[str, Any]:
    """The arguments of the timm constructor that a student's section asks for, the class count excepted.

    Args:
        image_size: given to architectures whose parameters depend on it; others take any.
    """
    given = {name: getattr(config, name) for name in ("patch_size", "embed_dim", "depth", "num_heads")}
    given["drop_path_rate"] = config.drop_path
    given["img_size"] = image_size if _has_fixed_input(timm_name(config.name or "")) else None
    return {name: value for name, value in given.items() if value is not None} | (config.kwargs or {})


def create(name: str, *, num_classes: int, arguments: Mapping[str, Any], pretrained: bool = False) -> nn.Module:
    """Build a timm model.

    Args:
        name: alias or timm name.
        num_classes: outputs of the head.
        arguments: further constructor arguments.

    Raises:
        UsageError: no such model, or it does not take these arguments.
        DistillError: its pretrained weights cannot be fetched.
    """
    full = timm_name(name)
    try:
        return timm.create_model(full, pretrained=pretrained, num_classes=num_classes, **arguments)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        if pretrained and not isinstance(error, TypeError):
            raise DistillError(
                f"{name}: its pretrained weights could not be fetched ({reason}); give a weights file"
            ) from error
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise UsageError(f"{name}: timm cannot build it with {given or 'these settings'} ({reason})") from error


def freeze_batch_norm(model: nn.Module) -> None:
    """Let BatchNorm normalise by its running statistics, and keep them, in a model that trains."""
    for module in _batch_norms(model):
        module.eval()


def has_batch_norm(model: nn.Module) -> bool:
    return any(True for _ in _batch_norms(model))


def _batch_norms(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))


def input_config(model: nn.Module, image_size: int | None = None) -> dict[str, Any]:
    """The input of a fresh model: timm's `input_size`, `mean`, `std`, `interpolation`, `crop_pct`.

    The size is the one that a ViT or the like was built for, which need not be that of its pretrained weights. A small
    image is evaluated whole: the usual centre crop would cut off what the model learnt from.
    """
    config = resolve_model_data_config(model)
    built = getattr(getattr(model, "patch_embed", None), "img_size", None) or config["input_size"]
    size = image_size or int(built[-1])
    crop = {"crop_pct": 1.0} if size <= SMALL else {}
    return {**config, "input_size": (3, size, size), **crop}


def parameters_in_millions(model: nn.Module) -> float:
    """Without a second head, which is not delivered."""
    second = second_head(model)
    extra = 0 if second is None else sum(parameter.numel() for parameter in second.parameters())
    return round((sum(parameter.numel() for parameter in model.parameters()) - extra) / 1e6, 3)


def _has_fixed_input(full: str) -> bool:
    config = timm.get_pretrained_cfg(full)
    return bool(config and config.fixed_input_size)


def check_forward(model: nn.Module, name: str, image_size: int) -> None:
    """Refuse an input size that the architecture cannot take, before any work is done.

    Raises:
        UsageError: the forward pass of one blank image fails.
    """
    training = model.training
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, image_size, image_size, device=next(model.parameters()).device))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{name}: does not take {image_size} px images ({reason}); set data.image_size") from error
    finally:
        model.train(training)
