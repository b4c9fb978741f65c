"""How a student is made ready for the machine that trains it; none of it changes a weight's name."""

from timm.layers import convert_sync_batchnorm
from torch import nn

from distill_cli.distributed import World
from distill_cli.errors import UsageError
from distill_cli.recipe import Recipe


def check_engine(recipe: Recipe, world: World) -> None:
    """Refuse what this machine cannot do, before the data is opened.

    Raises:
        UsageError: it is asked for.
    """
    if recipe.train.sync_bn and world.size > 1 and world.device.type == "cpu":
        raise UsageError("train.sync_bn: torch has no SyncBatchNorm on the CPU; leave it out, or train on CUDA")


def prepare(student: nn.Module, recipe: Recipe, world: World) -> nn.Module:
    """The student as it is trained here, before anything hooks into it.

    With `train.sync_bn` on several ranks every BatchNorm, timm's with an activation too, becomes the synchronised one.
    """
    if recipe.train.sync_bn and world.size > 1:
        student = convert_sync_batchnorm(student)
    return student
