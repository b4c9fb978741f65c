"""The objectives, one file each, named after its paper.

To add one: write `objectives/NAME.py` (config, equations, module), enter it in the two lines below, and add it to
the contract suite's list in `tests/objectives/test_contract.py`. CONTRIBUTING.md has the five steps.
"""

from typing import Annotated

from pydantic import Field
from torch import nn

from distill_cli.objectives.base import Losses, Objective
from distill_cli.objectives.deit import DeiT, DeiTConfig
from distill_cli.objectives.supervised import Supervised, SupervisedConfig
from distill_cli.objectives.tinyvit import TinyViT, TinyViTConfig

OBJECTIVES = {"supervised": Supervised, "tinyvit": TinyViT, "deit": DeiT}
ObjectiveConfig = Annotated[SupervisedConfig | TinyViTConfig | DeiTConfig, Field(discriminator="name")]

__all__ = ["OBJECTIVES", "Losses", "Objective", "ObjectiveConfig", "build"]


def build(config: SupervisedConfig | TinyViTConfig | DeiTConfig, student: nn.Module) -> Objective:
    """The objective that a recipe names, around a student.

    Raises:
        UsageError: student and objective do not fit.
    """
    objective: Objective = OBJECTIVES[config.name](student, config)
    return objective
