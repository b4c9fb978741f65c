"""The objectives, one file each, named after its paper.

To add one: write `objectives/NAME.py` (config, equations, module), enter it in the two lines below, and add it to
the contract suite's list in `tests/objectives/test_contract.py`. CONTRIBUTING.md has the five steps.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from torch import nn

from distill_cli.config import section
from distill_cli.errors import UsageError
from distill_cli.objectives.base import Losses, Need, Objective, Setting
from distill_cli.objectives.deit import DeiT, DeiTConfig
from distill_cli.objectives.dmae import DMAE, DMAEConfig
from distill_cli.objectives.features import Features, FeaturesConfig
from distill_cli.objectives.fkd import FKD, FKDConfig
from distill_cli.objectives.supervised import Supervised, SupervisedConfig
from distill_cli.objectives.terms import Terms
from distill_cli.objectives.tinymim import TinyMIM, TinyMIMConfig
from distill_cli.objectives.tinyvit import TinyViT, TinyViTConfig

OBJECTIVES: dict[str, Any] = {
    "supervised": Supervised,
    "tinyvit": TinyViT,
    "fkd": FKD,
    "deit": DeiT,
    "features": Features,
    "tinymim": TinyMIM,
    "dmae": DMAE,
}
SingleConfig = SupervisedConfig | TinyViTConfig | FKDConfig | DeiTConfig | FeaturesConfig | TinyMIMConfig | DMAEConfig


@section
class TermsConfig:
    name: Literal["terms"] = "terms"
    terms: Annotated[dict[str, Annotated[SingleConfig, Field(discriminator="name")]], Field(min_length=1)]
    """By any name; without a `name` of its own a term is the objective that it is called by."""

    @field_validator("terms", mode="before")
    @classmethod
    def _name(cls, terms: Any) -> Any:
        if not isinstance(terms, dict):
            return terms
        return {key: {"name": key, **term} if isinstance(term, dict) else term for key, term in terms.items()}


ObjectiveConfig = Annotated[SingleConfig | TermsConfig, Field(discriminator="name")]

__all__ = [
    "OBJECTIVES",
    "Losses",
    "Objective",
    "ObjectiveConfig",
    "Setting",
    "SingleConfig",
    "build",
    "needs_of",
    "singles",
]


def singles(config: SingleConfig | TermsConfig) -> list[SingleConfig]:
    """The objective that a recipe names, or each of its terms."""
    return list(config.terms.values()) if isinstance(config, TermsConfig) else [config]


def needs_of(config: SingleConfig | TermsConfig) -> frozenset[Need]:
    """What the objective that a recipe names learns from."""
    return frozenset[Need]().union(*(OBJECTIVES[each.name].needs_of(each) for each in singles(config)))


def build(config: SingleConfig | TermsConfig, student: nn.Module, setting: Setting) -> Objective:
    """The objective that a recipe names, around a student.

    Raises:
        UsageError: student, teacher and objective do not fit.
    """
    if isinstance(config, TermsConfig):
        terms = {name: _build(term, student, setting) for name, term in config.terms.items()}
        return Terms(student, terms, {name: term.weight for name, term in config.terms.items()}, setting)
    if config.weight != 1:
        raise UsageError("objective.weight: there is no sum; put the objective into [objective.terms], or leave it out")
    return _build(config, student, setting)


def _build(config: SingleConfig, student: nn.Module, setting: Setting) -> Objective:
    objective: Objective = OBJECTIVES[config.name](student, config, setting)
    return objective
