"""A student's logits against a teacher's rows: by cross-entropy, or by what may stand in its place."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from distill_cli.by_rows import by_rows
from distill_cli.config import section
from distill_cli.data.batch import Batch
from distill_cli.objectives.base import TermConfig
from distill_cli.objectives.dist import DISTConfig, inter, intra
from distill_cli.objectives.dkd import DKDConfig, dkd
from distill_cli.objectives.jsd import JSDConfig, jsd
from distill_cli.objectives.ramps import Temperature, is_one
from distill_cli.objectives.standardise import deviation, row_deviation, with_tail
from distill_cli.objectives.tails import Tail, bucket_cross_entropy, bucket_entropy, renormalised
from distill_cli.sparse import SparseLogits, SparseTarget, cooled, cross_entropy, entropy, soften


@section
class CrossEntropyConfig:
    name: Literal["cross-entropy"] = "cross-entropy"


@section
class KLConfig:
    name: Literal["kl"] = "kl"


def _named(value: Any) -> Any:
    """A divergence by its name alone."""
    return {"name": value} if isinstance(value, str) else value


Divergence = Annotated[
    CrossEntropyConfig | KLConfig | JSDConfig | DKDConfig | DISTConfig,
    Field(discriminator="name"),
    BeforeValidator(_named),
]


@section
class LogitsConfig(TermConfig):
    """What the objectives that learn from logits have in common."""

    temperature: Temperature = 1.0
    """Of both sides; the loss is multiplied by its square."""
    divergence: Divergence = field(default_factory=CrossEntropyConfig)
    """`cross-entropy`, `kl` (that less the teacher's entropy: the same gradient), `jsd`, `dkd`, `dist`."""
    tail: Tail = "uniform"
    """What becomes of the classes outside a row's entries: see `tails`."""
    standardise: bool = False
    """Divide the logits of both sides by their standard deviation first: see `standardise`."""

    @model_validator(mode="after")
    def _needs_a_tail(self) -> Self:
        other = "standardise" if self.standardise else self.divergence.name
        if self.tail != "uniform" and other not in OF_ANY_TAIL:
            given = {"tail": self.tail, "other": other}
            raise PydanticCustomError("settings", "tail {tail}: {other} is of all classes; give uniform", given)
        return self

    @property
    def relates_images(self) -> bool:
        """Whether the divergence is one of images of a batch together."""
        return isinstance(self.divergence, DISTConfig) and self.divergence.intra != 0

    def beyond_samples(self) -> tuple[str, str] | None:
        if self.divergence.name not in OF_ANY_TAIL:
            return f"divergence: {self.divergence.name} needs the teacher's distribution", "give cross-entropy"
        if self.standardise:
            return "standardise: needs the logits of all classes", "leave it out"
        if not is_one(self.temperature):
            return f"temperature: {self.temperature} needs the probabilities themselves", "leave it at 1"
        return None


OF_ANY_TAIL = ("cross-entropy", "kl")
"""The divergences that are sums over the entries, and so do with any tail, and with rows right in expectation only."""


@dataclass(frozen=True)
class RowLoss:
    """A divergence of each row, as `by_rows` calls it; without T^2."""

    config: LogitsConfig
    temperature: float | Tensor

    def __call__(self, logits: Tensor, rows: SparseLogits, label: Tensor | None = None) -> Tensor:
        """
        Args:
            logits: the student's, `[batch, classes]`; half precisions are taken in float32.
            label: of `dkd`, int64 `[batch]`.
        """
        logits, rows, target = self.at_temperature(logits, rows)
        divergence, bucket = self.config.divergence, self.config.tail == "bucket"
        if isinstance(divergence, JSDConfig):
            return jsd(logits, target)
        if isinstance(divergence, DKDConfig):
            assert label is not None
            return dkd(logits, target, label, divergence.alpha, divergence.beta)
        if isinstance(divergence, DISTConfig):
            return inter(logits, target)
        crossed = bucket_cross_entropy(logits, rows, target) if bucket else cross_entropy(logits, target)
        if divergence.name == "cross-entropy":
            return crossed
        return crossed - (bucket_entropy(rows, target) if bucket else entropy(target))

    def at_temperature(self, logits: Tensor, rows: SparseLogits) -> tuple[Tensor, SparseLogits, SparseTarget]:
        """The student's logits, the rows with the tail that is asked for, and these as a distribution."""
        logits = cooled(logits)
        classes, ours, theirs = logits.shape[-1], self.temperature, self.temperature
        if self.config.tail == "renormalise":
            rows = renormalised(rows)
        if self.config.standardise:
            rows = with_tail(rows, classes)
            ours, theirs = ours * deviation(logits), theirs * row_deviation(rows, classes)
        return cooled(logits, ours), rows, soften(rows, classes, theirs)


def soft_loss(
    logits: Tensor, rows: SparseLogits, config: LogitsConfig, temperature: float | Tensor, batch: Batch | None = None
) -> Tensor:
    """T^2 times the divergence of a student from a teacher's rows, a mean over the batch.

    Of all but `dist`'s intra-class part, temporaries of batch x classes are no more than the logits' gradient.

    Args:
        logits: the student's, `[batch, classes]`.
        batch: for its labels, which `dkd` needs; of mixed images lam times that of the label, and 1 - lam times that
            of the partner's.
    """
    loss, divergence = RowLoss(config, temperature), config.divergence
    if isinstance(divergence, DKDConfig):
        assert batch is not None
        value = by_rows(loss, logits, rows, batch.labels)
        if batch.mixed is not None:
            value = batch.mixed.lam * value + (1 - batch.mixed.lam) * by_rows(loss, logits, rows, batch.mixed.partner)
        return temperature**2 * value.mean()
    value = by_rows(loss, logits, rows).mean()
    if isinstance(divergence, DISTConfig):
        value = divergence.inter * value
        if divergence.intra:
            at_temperature, _, target = loss.at_temperature(logits, rows)
            value = value + divergence.intra * intra(at_temperature, target)
    return temperature**2 * value
