"""Several objectives at once: a weighted sum over one pass of the student."""

from collections.abc import Mapping

from torch import Tensor, nn

from distill_cli.data.batch import Batch
from distill_cli.objectives.base import Losses, Need, Objective, Setting
from distill_cli.objectives.ramps import Ramp, at


class Terms(Objective):
    """The sum of other objectives, each times its weight.

        L = sum_i w_i(progress) L_i

    The student looks at a batch once for all terms whose loss is a function of its outputs and layers. A term with a
    forward pass of its own, as of masked images, adds that pass.
    """

    def __init__(
        self, student: nn.Module, terms: Mapping[str, Objective], weights: Mapping[str, float | Ramp], setting: Setting
    ) -> None:
        """
        Args:
            terms: by the name that their losses are logged under, around the same student.
            weights: by the same names.
        """
        super().__init__(student, setting)
        for term in terms.values():
            # The student is the sum's: under a second name every checkpoint would hold it twice.
            del term.student
            object.__setattr__(term, "student", student)
        self.terms: Mapping[str, Objective] = nn.ModuleDict(terms)  # type: ignore[assignment]
        self.weights = dict(weights)
        self.needs = frozenset[Need]().union(*(term.needs for term in terms.values()))
        self.relates_images = any(term.relates_images for term in terms.values())

    def forward(self, batch: Batch) -> Losses:
        batch = self.taught(batch)
        shares = not all(term.own_forward for term in self.terms.values())
        outputs = self.student(batch.images) if shares else None
        total: Tensor | float = 0.0
        parts: dict[str, Tensor] = {}
        seen: dict[str, Tensor] = {}
        # Those of the shared pass first: what its layers gave is theirs until another pass goes through them.
        for name, term in sorted(self.terms.items(), key=lambda each: each[1].own_forward):
            losses = term(batch) if term.own_forward or outputs is None else term.losses(outputs, batch)
            total = total + at(self.weights[name], self.progress) * losses.total
            parts |= _named(name, losses)
            seen |= losses.seen
        assert isinstance(total, Tensor)
        return Losses(total, parts, seen)

    def go_to(self, progress: float) -> None:
        super().go_to(progress)
        for term in self.terms.values():
            term.go_to(progress)

    def after_step(self, step: int) -> None:
        for term in self.terms.values():
            term.after_step(step)


def _named(name: str, losses: Losses) -> dict[str, Tensor]:
    """A term's parts as a sum logs them: a single one by the term's name."""
    if len(losses.parts) == 1:
        return {name: losses.total.detach()}
    return {f"{name}.{part}": value for part, value in losses.parts.items()}
