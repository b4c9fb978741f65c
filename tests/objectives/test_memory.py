"""Bytes of the losses on logits, counted; benchmarks/memory.py has the table at full size."""

import runpy
from pathlib import Path

import pytest
import torch

from distill_cli.objectives.logits import LogitsConfig
from distill_cli.objectives.tinymim import relation_divergence

measure = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/memory.py"))
whole = measure["whole_divergence"]
SHAPE = 1024, 21841, 100, torch.device("cpu")


@pytest.mark.parametrize(
    "config",
    [LogitsConfig(), LogitsConfig(temperature=2.0), LogitsConfig(tail="bucket")],
    ids=["uniform", "temperature", "bucket"],
)
def test_a_loss_and_its_gradient_take_little_more_than_twice_the_logits(config: LogitsConfig) -> None:
    """Logits and gradient are 2; what is beyond are pieces."""
    assert 2 <= measure["loss_ratio"](config, *SHAPE, torch.float32) < 2.2


def test_relations_and_their_gradient_are_never_whole_maps() -> None:
    """What there is are the gradients of queries and keys, and the pieces; a whole map is 1."""
    shape = 16, 16, 197, torch.device("cpu")
    assert measure["relation_ratio"](relation_divergence, *shape) < 1.5 < 4 < measure["relation_ratio"](whole, *shape)


def test_the_measure_counts_what_a_dense_target_takes() -> None:
    assert measure["dense_ratio"](*SHAPE, torch.float32) > 4
