"""How a student is made ready for the machine that trains it; none of it changes a weight's name."""

import importlib.util
import os
import shutil
import sys

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn

from distill_cli.config import RuntimeConfig
from distill_cli.distributed import World
from distill_cli.errors import UsageError
from distill_cli.objectives import OBJECTIVES, singles
from distill_cli.recipe import Recipe
from distill_cli.sharding import check_sharding


def check_engine(recipe: Recipe, world: World) -> None:
    """Refuse what this machine cannot do, before the data is opened.

    Raises:
        UsageError: it is asked for.
    """
    kind = world.device.type
    if recipe.train.sync_bn and world.size > 1 and kind == "cpu":
        raise UsageError("train.sync_bn: torch has no SyncBatchNorm on the CPU; leave it out, or train on CUDA")
    if recipe.runtime.compile == "cuda-graphs" and kind != "cuda":
        raise UsageError("runtime.compile: cuda-graphs needs CUDA; give --compile, or train on CUDA")
    if recipe.runtime.compile:
        _check_passes(recipe, "--compile")
        _check_compiler(kind)
    if recipe.runtime.fsdp:
        _check_passes(recipe, "runtime.fsdp")
        check_sharding(recipe)


def _check_passes(recipe: Recipe, asked: str) -> None:
    """Of what makes something of the student's whole forward pass."""
    for each in () if recipe.objective is None else singles(recipe.objective):
        if not OBJECTIVES[each.name].whole_pass:
            raise UsageError(
                f"{asked}: objective {each.name} makes no whole pass of the student; leave one of them out"
            )


def _check_compiler(kind: str) -> None:
    """torch.compile makes C++ for the processor, and on CUDA Triton's kernels with starters in C."""
    if kind == "cuda" and importlib.util.find_spec("triton") is None:
        raise UsageError("--compile: torch.compile needs triton on CUDA; pip install triton, or leave it out")
    variable, usual = ("CC", ("gcc", "clang")) if kind == "cuda" else ("CXX", (_CXX,))
    asked = os.environ.get(variable)
    names = (asked.split()[0],) if asked else usual
    if not any(map(shutil.which, names)):
        raise UsageError(
            f"--compile: torch.compile needs a compiler, and there is no {' or '.join(names)}; "
            f"install one, name it in {variable}, or leave --compile out"
        )


_CXX = "clang++" if sys.platform == "darwin" else "g++"


def prepare(student: nn.Module, recipe: Recipe, world: World) -> nn.Module:
    """The student as it is trained here, before anything hooks into it.

    With `train.sync_bn` on several ranks every BatchNorm, timm's with an activation too, becomes the synchronised one.
    By `runtime.channels_last` the weights of convolutions lie channels last, which makes their outputs lie so too.
    """
    if recipe.train.sync_bn and world.size > 1:
        student = convert_sync_batchnorm(student)
    if _channels_last(student, recipe.runtime, world):
        student = student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return student


def _channels_last(student: nn.Module, config: RuntimeConfig, world: World) -> bool:
    if config.channels_last != "auto" or config.fsdp:
        return config.channels_last is True
    # One cuts the patches of a ViT, whose tokens have no channels to be last.
    convolutions = sum(isinstance(each, nn.Conv2d) for each in student.modules())
    return world.device.type == "cuda" and convolutions > 1


def compile_forward(model: nn.Module, config: RuntimeConfig) -> None:
    """Compile a model's forward pass in place, as `runtime.compile` asks.

    What hooks into its layers is compiled with it. What hooks into the model itself, as a second head does, is not, and
    neither are the losses. A batch of another size than the first makes a graph for every size; the average of the
    weights and an evaluation have graphs of their own.
    """
    if config.compile:
        mode = "reduce-overhead" if config.compile == "cuda-graphs" else None
        model.forward = torch.compile(model.forward, mode=mode)  # type: ignore[method-assign]
