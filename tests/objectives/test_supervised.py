from dataclasses import replace

import pytest
import torch
from small import SETTING, make_batch, make_student
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy

from distill_cli.data.batch import MixedLabels
from distill_cli.objectives.supervised import Supervised, SupervisedConfig


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_it_is_the_dense_cross_entropy_with_smoothed_labels(smoothing: float) -> None:
    objective, batch = (
        Supervised(make_student(), SupervisedConfig(label_smoothing=smoothing), SETTING).train(),
        make_batch(),
    )
    log_q = objective.student(batch.images).double().log_softmax(-1)
    classes = log_q.shape[-1]
    target = torch.full_like(log_q, smoothing / classes)
    target[range(len(batch)), batch.labels] += 1 - smoothing
    torch.testing.assert_close(objective(batch).total.double(), -(target * log_q).sum(-1).mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_of_mixed_images_it_is_timm_s_soft_cross_entropy(smoothing: float) -> None:
    """… by the labels mixed in float64."""
    objective, batch = (
        Supervised(make_student(), SupervisedConfig(label_smoothing=smoothing), SETTING).train(),
        make_batch(),
    )
    lam = torch.rand(len(batch) // 2).repeat(2).reshape(2, -1)
    lam = torch.cat([lam[0], lam[0].flip(0)])
    mixed = replace(batch, mixed=MixedLabels(batch.labels.flip(0), lam))
    logits = objective.student(batch.images).double()
    target = mixup_target(batch.labels, logits.shape[-1], lam.double()[:, None], smoothing)
    expected = SoftTargetCrossEntropy()(logits, target)
    torch.testing.assert_close(objective(mixed).total.double(), expected, rtol=1e-5, atol=0)


def test_a_student_with_a_token_trains_on_the_mean_of_its_heads_as_it_is_evaluated() -> None:
    objective, batch = Supervised(make_student(), SupervisedConfig(), SETTING), make_batch()
    torch.testing.assert_close(objective.train()(batch).total, objective.eval()(batch).total)
