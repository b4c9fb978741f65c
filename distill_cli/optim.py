"""[train], and the optimiser of a student: its settings, its groups."""

import inspect
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers, param_groups_layer_decay
from timm.optim import get_optimizer_info as timm_info
from torch import nn
from torch.optim import Optimizer

from distill_cli.config import (
    Fraction,
    Natural,
    NonNegative,
    Positive,
    PositiveFloat,
    Precision,
    Seed,
    Time,
    section,
)
from distill_cli.errors import UsageError, nearest
from distill_cli.objectives import Objective

BASE_LR, BASE_BATCH = 5e-4, 512
"""DeiT and TinyViT alike, with AdamW: lr = 5e-4 x global batch / 512."""
BOUNDS = {"norm": 5.0, "agc": 0.01}
"""Of gradients, by clip mode: TinyViT's, and those of LeViT and NFNet."""
OPTIMIZERS = [str(name) for name in list_optimizers(exclude_filters=["fused*", "bnb*", "adahessian", "kron*"])]
"""Of timm, but for those of Apex and bitsandbytes, one of second order, and one whose state is no tensor."""
FUSED = ("adamw", "adam", "sgd")
"""torch's own, which have one CUDA kernel for all parameters."""


def _known(name: str) -> str:
    if name not in OPTIMIZERS:
        near = nearest(name, OPTIMIZERS) or "; adamw, lamb, sgd and muon are among timm's"
        raise PydanticCustomError("unknown_name", "no such optimizer, '{name}'{near}", {"name": name, "near": near})
    return name


@section
class TrainConfig:
    epochs: Positive = 300
    steps: Positive | None = None
    """Optimiser steps in all; wins over `epochs`."""
    batch_size: Positive = 256
    """Global, over all ranks. What does not fill an epoch's last batch waits for another epoch's shuffle."""
    views_per_read: Positive = 1
    """`--views-per-read`: views that a sample is seen by each time it is decoded, all in one step: N times less
    reading, decoding and seeking for as many inputs. `batch_size` counts inputs, and divides by it."""
    accumulate: Positive = 1
    """Parts into which a rank cuts its batch, one forward and backward pass each; the step is the same."""
    init_from: str | None = None
    """`--init-from`: a finished run or a weights file that the student begins from."""
    opt: Annotated[str, AfterValidator(_known)] = "adamw"
    """A name of timm's."""
    momentum: Fraction | None = None
    """By default 0.9, as timm has it, where the optimiser has one."""
    betas: Annotated[tuple[Fraction, ...], Field(min_length=2, max_length=3)] | None = None
    eps: PositiveFloat | None = None
    """Like `betas`, by default the optimiser's own; AdamW: (0.9, 0.999) and 1e-8."""
    opt_kwargs: dict[str, Any] | None = None
    """Further arguments of timm's optimiser."""
    lr: PositiveFloat | None = None
    """Peak learning rate, as it is; by default 5e-4 x batch_size / 512 with AdamW."""
    schedule: Literal["cosine", "linear", "step", "wsd", "constant"] = "cosine"
    min_lr: NonNegative = 1e-5
    """At the last step; not of `step` and `constant`."""
    warmup_lr: NonNegative = 1e-6
    """At the first step, rising linearly."""
    warmup_epochs: NonNegative | None = None
    """By default a twentieth of the epochs."""
    warmup_prefix: bool = True
    """The schedule begins after the warm-up; False: at step 0, unseen behind it, as in the code of DeiT and TinyViT.
    `wsd` and `linear` always begin after it."""
    decay_epochs: PositiveFloat = 30
    """`step`: between two decays."""
    decay_rate: Fraction = 0.1
    """`step`: factor of a decay."""
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """`wsd`: share of the steps after the warm-up in which the rate falls to `min_lr`, the last ones."""
    weight_decay: NonNegative = 0.05
    """Not on biases, norms, tokens, positions and attention biases."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Learning rate of a layer over that of the one above it, by timm's layers; the head has `lr`."""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """What is bounded: the norm of all gradients, each component, or a unit's norm over that of its weights."""
    clip_grad: NonNegative | None = None
    """The bound; 0 does not clip. By default 5 with `norm`, 0.01 with `agc`."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of an exponential moving average of the weights; 0 keeps none."""
    ema_warmup: bool = False
    """The average's decay rises with the steps, to `ema_decay`."""
    freeze_bn: bool = False
    """BatchNorm normalises by the statistics that the student began with."""
    sync_bn: bool = False
    """BatchNorm of the student normalises by what all ranks see, not by a rank's slice; needs CUDA."""
    shuffle_tars: Natural | None = None
    """Where the data is tars: those that a shuffled epoch reads from at a time; by default 16. 0: from all."""
    precision: Precision = "fp32"
    seed: Seed = 0
    log_every: Positive = 20
    """Steps between lines of metrics.jsonl."""
    save_every: Positive | Time | None = None
    """Steps between checkpoints, or a time such as `15min`; one at the end of an epoch in any case."""
    keep: Positive = 2
    """Checkpoints that stay: so many of the newest, and the best."""
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Who is told beside metrics.jsonl and TensorBoard; each is an extra, and offline by default."""


def settle(config: TrainConfig) -> dict[str, Any]:
    """What the optimiser and clipping decide where the recipe leaves it open.

    Raises:
        UsageError: there is no default, or the optimiser has no such setting.
    """
    if config.lr is None and config.opt != "adamw":
        raise UsageError(f"train.lr is missing: its default is AdamW's; give the rate of {config.opt}")
    bound = BOUNDS.get(config.clip_mode) if config.clip_grad is None else config.clip_grad
    if bound is None:
        raise UsageError("train.clip_grad is missing: clip_mode value has no default; give the largest component")
    lr = config.lr or BASE_LR * config.batch_size / BASE_BATCH
    return {**optimizer_settings(config), "lr": lr, "clip_grad": bound}


def optimizer_settings(config: TrainConfig) -> dict[str, Any]:
    """Momentum, betas and eps where the optimiser has them: the recipe's, else its own.

    Raises:
        UsageError: the recipe gives one that the optimiser does not have.
    """
    info, parameters = timm_info(config.opt), inspect.signature(get_optimizer_class(config.opt)).parameters
    own = {name: parameters[name].default for name in ("betas", "eps") if name in parameters}
    # timm's factory gives 0.9 to all, whatever an optimiser's own default is.
    own["momentum"] = 0.9
    has = {"momentum": info.has_momentum, "betas": info.has_betas, "eps": info.has_eps}
    for name in has:
        if getattr(config, name) is not None and not (has[name] and name in own):
            raise UsageError(f"train.{name}: {config.opt} has none; leave it out")
    if config.betas is not None and len(config.betas) != len(own["betas"]):
        raise UsageError(f"train.betas: {config.opt} has {len(own['betas'])}, not {len(config.betas)}")
    asked = {name: own[name] if getattr(config, name) is None else getattr(config, name) for name in own if has[name]}
    return {name: value for name, value in asked.items() if value is not None}


def build_optimizer(objective: Objective, config: TrainConfig) -> Optimizer:
    """timm's optimiser of everything of the objective that is trained.

    Raises:
        UsageError: the optimiser does not take these settings.
    """
    groups = parameter_groups(objective, config)
    arguments = optimizer_settings(config) | (config.opt_kwargs or {})
    if config.opt in FUSED and all(parameter.is_cuda for group in groups for parameter in group["params"]):
        arguments = {"fused": True, **arguments}
    try:
        return create_optimizer_v2(groups, opt=config.opt, lr=config.lr, weight_decay=0.0, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        reason = " ".join(str(error).split())[:160]
        raise UsageError(f"train.opt: timm cannot build {config.opt} with {given} ({reason})") from error


def parameter_groups(objective: Objective, config: TrainConfig) -> list[dict[str, Any]]:
    """Parameters by their share of the learning rate (`lr_scale`), each with and without weight decay.

    Those without decay take AdamW where the optimiser is Muon (`use_fallback`), as does, by timm's rule, all that is
    no matrix.

    Raises:
        UsageError: `layer_decay` for a student without layers.
    """
    exempt = {f"student.{name}" for name in _names_without_decay(objective.student)}
    scales = {} if config.layer_decay is None else _layer_scales(objective.student, config.layer_decay)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or name in exempt
            scale = scales.get(parameter, 1.0)
            decay = 0.0 if plain else config.weight_decay
            group = {"params": [], "weight_decay": decay, "lr_scale": scale, "use_fallback": plain}
            groups.setdefault((scale, plain), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def _layer_scales(student: nn.Module, decay: float) -> Mapping[nn.Parameter, float]:
    """The share of the learning rate of each of a student's parameters, by timm."""
    groups = param_groups_layer_decay(student, layer_decay=decay)
    scales = {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}
    if len(set(scales.values())) == 1 and decay < 1:
        raise UsageError(f"train.layer_decay: timm knows no layers of {type(student).__name__}; leave it out")
    return scales


def _names_without_decay(student: nn.Module) -> set[str]:
    """What timm's models say of themselves: tokens and positions by name, attention biases by a part of their name."""
    names = set(getattr(student, "no_weight_decay", set)())
    parts = {"attention_biases", "relative_position_bias_table"}
    parts |= set(getattr(student, "no_weight_decay_keywords", set)())
    return names | {name for name, _ in student.named_parameters() if any(part in name for part in parts)}
