"""A compiled student: eager's weights under eager's names, with whatever hooks into it, and no graph for each size."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
import timm
import torch
import torch._dynamo
from small import CLASSES, SETTING, make_batch, make_live, make_plain, make_student
from torch import Tensor, nn

from distill_cli.config import RuntimeConfig
from distill_cli.engine import compile_forward
from distill_cli.objectives import Objective, ObjectiveConfig, build, needs_of
from distill_cli.objectives.deit import DeiTConfig
from distill_cli.objectives.features import FeaturesConfig
from distill_cli.objectives.tinyvit import TinyViTConfig
from distill_cli.students.taps import Taps

COMPILE = RuntimeConfig(compile=True)
LIMIT = 6
"""Graphs of a function: training and evaluation, by the first size and by any, and what an evaluation keeps."""


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are taken and differentiated as ever, but not made into kernels, which takes a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def a_few_steps(objective: Objective, sizes: Sequence[int]) -> dict[str, Tensor]:
    """The weights after a step on a batch of each size, each followed by an evaluation of an odd size."""
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    for number, size in enumerate(sizes):
        batch = make_batch(size, seed=number)
        objective.train()
        optimizer.zero_grad()
        objective(batch).total.backward()
        optimizer.step()
        with torch.inference_mode():
            objective.student.train().eval()(batch.images[: size - 1])
    return {name: value.clone() for name, value in objective.state_dict().items()}


def make_tiny_vit() -> nn.Module:
    torch.manual_seed(0)
    small = {"embed_dims": (16, 16, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "drop_path_rate": 0.0}
    return timm.create_model("tiny_vit_5m_224", num_classes=CLASSES, **small)


LIVE = replace(SETTING, teacher=make_live())
COMPILED = {
    "features": (make_plain, FeaturesConfig()),
    "deit": (make_student, DeiTConfig()),
    "deit, a second head averaged": (make_plain, DeiTConfig()),
    "deit, a second head dropped": (make_plain, DeiTConfig(second_head="drop")),
    "tinyvit": (make_tiny_vit, TinyViTConfig()),
}


def made(student: nn.Module, config: ObjectiveConfig) -> Objective:
    torch.manual_seed(0)
    return build(config, student, LIVE if "teacher" in needs_of(config) else SETTING)


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("case", COMPILED)
def test_a_compiled_student_has_the_weights_of_an_eager_one(case: str) -> None:
    make, config = COMPILED[case]
    eager, compiled = (made(make(), config) for _ in range(2))
    compile_forward(compiled.student, COMPILE)
    with patch.multiple(torch._dynamo.config, recompile_limit=LIMIT, fail_on_recompile_limit_hit=True):
        found = a_few_steps(compiled, (8, 8, 5, 7, 6, 3, 4, 8))
    expected = a_few_steps(eager, (8, 8, 5, 7, 6, 3, 4, 8))
    assert list(found) == list(expected)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.usefixtures("without_inductor")
def test_taps_see_what_a_compiled_student_makes_and_gradients_reach_through_them() -> None:
    eager, compiled = make_plain(), make_plain()
    taps = [Taps(each, ["blocks.0", "head:input"]) for each in (eager, compiled)]
    compile_forward(compiled, COMPILE)
    found = []
    for student, tapped in zip((eager, compiled), taps, strict=True):
        for size in (4, 3):
            student.zero_grad()
            student(make_batch(size).images)
            inside = tapped.take()
            sum(value.square().mean() for value in inside.values()).backward()  # type: ignore[union-attr]
        # Of what is not reached, here the classifier, a compiled graph has a gradient of 0.
        reached = {name: p.grad for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
        found.append((inside, reached))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
