import pytest
import torch
from small import make_batch, make_student

from distill_cli.objectives.supervised import Supervised, SupervisedConfig


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_it_is_the_dense_cross_entropy_with_smoothed_labels(smoothing: float) -> None:
    objective, batch = Supervised(make_student(), SupervisedConfig(label_smoothing=smoothing)).train(), make_batch()
    log_q = objective.student(batch.images).double().log_softmax(-1)
    classes = log_q.shape[-1]
    target = torch.full_like(log_q, smoothing / classes)
    target[range(len(batch)), batch.labels] += 1 - smoothing
    torch.testing.assert_close(objective(batch).total.double(), -(target * log_q).sum(-1).mean(), rtol=1e-5, atol=0)


def test_a_student_with_a_token_trains_on_the_mean_of_its_heads_as_it_is_evaluated() -> None:
    objective, batch = Supervised(make_student(), SupervisedConfig()), make_batch()
    torch.testing.assert_close(objective.train()(batch).total, objective.eval()(batch).total)
