"""Settings that change with the progress of a run."""

import math

import pytest
import torch
from small import SETTING, make_batch, make_student

from distill_cli.objectives import TermsConfig, build
from distill_cli.objectives.ramps import PositiveRamp, Ramp, at, is_one
from distill_cli.objectives.supervised import SupervisedConfig
from distill_cli.objectives.terms import Terms
from distill_cli.objectives.tinyvit import TinyViTConfig


@pytest.mark.parametrize(
    ("ramp", "values"),
    [
        (Ramp(start=0, end=1), {0: 0, 0.25: 0.25, 1: 1}),
        (Ramp(start=4, end=1, shape="cosine"), {0: 4, 0.5: 2.5, 1: 1, 0.25: 4 - 3 * (1 - math.cos(math.pi / 4)) / 2}),
        (Ramp(start=0, end=2, until=0.1), {0: 0, 0.05: 1, 0.1: 2, 0.9: 2}),
        (Ramp(start=1, end=3, since=0.5), {0: 1, 0.5: 1, 0.75: 2, 1: 3}),
        (Ramp(start=1, end=3, since=0.5, until=0.5), {0.4: 1, 0.6: 3}),
    ],
)
def test_a_ramp_goes_from_start_to_end(ramp: Ramp, values: dict[float, float]) -> None:
    for progress, value in values.items():
        assert float(at(ramp, torch.tensor(float(progress)))) == pytest.approx(value, abs=1e-6)


def test_a_constant_stays_a_number() -> None:
    assert at(2.5, torch.tensor(0.3)) == 2.5
    assert is_one(1.0)
    assert is_one(PositiveRamp(start=1, end=1))
    assert not is_one(PositiveRamp(start=1, end=2))


def test_a_temperature_that_falls_is_at_each_progress_that_temperature() -> None:
    batch, falling = make_batch(), TinyViTConfig(temperature=PositiveRamp(start=4, end=1))
    objective = build(falling, make_student(), SETTING).eval()
    for progress in (0.0, 0.5, 1.0):
        objective.go_to(progress)
        constant = build(TinyViTConfig(temperature=4 - 3 * progress), objective.student, SETTING).eval()
        torch.testing.assert_close(objective(batch).total, constant(batch).total)


def test_a_sum_is_the_weighted_sum_of_its_terms_at_each_progress() -> None:
    batch, ramp = make_batch(), Ramp(start=0, end=2)
    configs = {"label": SupervisedConfig(weight=0.3), "soft": TinyViTConfig(name="tinyvit", weight=ramp)}
    objective = build(TermsConfig(terms=configs), make_student(), SETTING).eval()
    alone = [
        build(config, objective.student, SETTING).eval()(batch) for config in (SupervisedConfig(), TinyViTConfig())
    ]
    for progress in (0.0, 0.5, 1.0):
        objective.go_to(progress)
        losses = objective(batch)
        torch.testing.assert_close(losses.total, 0.3 * alone[0].total + 2 * progress * alone[1].total)
        assert losses.parts.keys() == {"label", "soft"}


def test_a_sum_holds_its_student_once() -> None:
    objective = build(TermsConfig(terms={"a": SupervisedConfig(), "b": TinyViTConfig()}), make_student(), SETTING)
    assert isinstance(objective, Terms)
    assert objective.state_dict().keys() == {f"student.{name}" for name in objective.student.state_dict()}
    assert all(term.student is objective.student for term in objective.terms.values())
