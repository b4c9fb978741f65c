from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objectives.dense import some
from torch import Tensor, nn

from distill_cli.data.batch import Batch, MixedLabels
from distill_cli.distributed import World
from distill_cli.errors import DistillError
from distill_cli.metrics import (
    Accuracy,
    Agreement,
    calibration,
    compare,
    expected_error,
    measure_accuracy,
    measure_agreement,
)
from distill_cli.report import Report
from distill_cli.sparse import SparseLogits, keep_mass, sample_tail, top_k

WORLD = World(torch.device("cpu"))


def batches(logits: Tensor, labels: Tensor, size: int, rows: SparseLogits | None = None) -> Iterator[Batch]:
    """Batches whose images are the logits, for a model that gives back its input."""
    for start in range(0, len(logits), size):
        part = slice(start, start + size)
        teacher = rows and some(rows, part)
        yield Batch(logits[part], labels[part], np.arange(len(logits))[part], views=(0,), teacher=teacher)


def accuracy(logits: Tensor, labels: Tensor, size: int = 1000) -> Accuracy:
    with Report(quiet=True).progress("", 0) as progress:
        return measure_accuracy(nn.Identity(), batches(logits, labels, size), logits.shape[1], WORLD, "fp32", progress)


def agreement(logits: Tensor, rows: SparseLogits, size: int = 1000, sampled: bool = False) -> Agreement:
    labels = torch.zeros(len(logits), dtype=torch.long)
    with Report(quiet=True).progress("", 0) as progress:
        return measure_agreement(nn.Identity(), batches(logits, labels, size, rows), WORLD, "fp32", progress, sampled)


@st.composite
def outcomes(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Logits of 2 to 12 classes for 1 to 60 images, and their labels."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    images, classes = draw(st.integers(1, 60)), draw(st.integers(2, 12))
    spread = draw(st.sampled_from([0.1, 2.0, 10.0]))
    logits = spread * torch.randn(images, classes, generator=generator)
    return logits, torch.randint(classes, (images,), generator=generator)


def naive_ece(confidence: np.ndarray, hit: np.ndarray) -> float:
    """Guo et al. 2017, eq. 3: the gap between confidence and accuracy by bin, weighed by the bin's images."""
    gap = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            gap += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    return gap


@given(outcomes())
def test_they_are_those_of_a_naive_reference(outcome: tuple[Tensor, Tensor]) -> None:
    logits, labels = (values.numpy() for values in outcome)
    probs = np.exp(logits.astype(float) - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    place = np.array([list(np.argsort(-row)).index(label) for row, label in zip(probs, labels, strict=True)])
    found = accuracy(*outcome)
    assert found.images == len(labels)
    assert found.top1 == pytest.approx(100 * np.mean(place == 0), abs=1e-3)
    assert found.top5 == pytest.approx(100 * np.mean(place < 5), abs=1e-3)
    assert found.nll == pytest.approx(-np.log(probs[range(len(labels)), labels]).mean(), rel=1e-5, abs=2e-6)
    assert found.ece == pytest.approx(naive_ece(probs.max(1), place == 0), abs=1e-5)


@given(outcomes(), st.integers(1, 60))
def test_they_do_not_depend_on_the_batches(outcome: tuple[Tensor, Tensor], size: int) -> None:
    one, many = accuracy(*outcome), accuracy(*outcome, size)
    assert (one.images, one.top1, one.top5, one.per_class) == (many.images, many.top1, many.top5, many.per_class)
    assert (one.nll, one.ece) == pytest.approx((many.nll, many.ece), abs=2e-6)


def test_top1_by_class_is_none_where_there_are_no_images() -> None:
    logits = torch.eye(4)[[0, 0, 1, 3]]
    assert accuracy(logits, torch.tensor([0, 1, 1, 3])).per_class == (100.0, 50.0, None, 100.0)


def test_fewer_than_five_classes_are_all_in_the_top5() -> None:
    assert accuracy(torch.randn(7, 3), torch.zeros(7, dtype=torch.long)).top5 == 100


def test_a_certain_and_right_model_is_calibrated_and_costs_nothing() -> None:
    found = accuracy(100 * torch.eye(6), torch.arange(6))
    assert (found.top1, found.nll, found.ece) == (100, 0, 0)


def test_a_certain_and_wrong_model_is_as_far_from_calibrated_as_can_be() -> None:
    assert accuracy(100 * torch.eye(6), (torch.arange(6) + 1) % 6).ece == 1


def test_images_that_were_skipped_are_counted_and_not_judged() -> None:
    batch = Batch(torch.eye(3), torch.arange(3), np.arange(3), views=(0,), skipped=("one", "two"))
    empty = Batch(torch.empty(0), torch.empty(0, dtype=torch.long), np.arange(0), views=(0,), skipped=("three",))
    with Report(quiet=True).progress("", 0) as progress:
        found = measure_accuracy(nn.Identity(), [batch, empty], 3, WORLD, "fp32", progress)
    assert (found.images, found.skipped, found.top1) == (3, 3, 100)


def test_no_image_at_all_is_an_error_and_not_a_division_by_zero() -> None:
    with pytest.raises(DistillError, match="no image could be read"):
        accuracy(torch.empty(0, 3), torch.empty(0, dtype=torch.long))


def test_outputs_that_are_not_finite_are_an_error_and_not_a_score() -> None:
    with pytest.raises(DistillError, match="not finite"):
        accuracy(torch.full((2, 3), torch.nan), torch.tensor([0, 1]))


@given(outcomes(), st.integers(1, 60))
def test_agreement_and_kl_are_those_of_the_dense_teacher(outcome: tuple[Tensor, Tensor], size: int) -> None:
    logits = outcome[0]
    teacher = logits.roll(1, 0) + logits.flip(1)
    p, log_q = teacher.double().log_softmax(1), logits.double().log_softmax(1)
    found = agreement(logits, top_k(teacher, logits.shape[1]), size)
    assert found.rows == len(logits)
    assert found.agreement == pytest.approx(100 * (p.argmax(1) == log_q.argmax(1)).double().mean().item(), abs=1e-3)
    assert found.kl == pytest.approx((p.exp() * (p - log_q)).sum(1).mean().item(), rel=1e-4, abs=1e-5)


def test_a_student_that_is_its_teacher_agrees() -> None:
    logits = torch.randn(9, 6)
    assert agreement(logits, top_k(logits, 6)) == Agreement(agreement=100, kl=pytest.approx(0, abs=2e-6), rows=9)


def test_a_student_of_the_same_head_and_a_uniform_tail_agrees_with_ragged_rows() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0, 0.0, 0.0], [0.0, 5.0, 0.0, 0.0, 0.0]])
    rows = keep_mass(top_k(logits, 4), 0.8, min_k=1)
    assert rows.counts.tolist() == [2, 1]
    assert agreement(logits, rows) == Agreement(agreement=100, kl=pytest.approx(0, abs=2e-6), rows=2)


def test_sampled_rows_have_an_agreement_and_no_kl() -> None:
    logits = torch.randn(9, 6)
    rows = sample_tail(logits, 1, 4, torch.rand(9, dtype=torch.float64))
    assert agreement(logits, rows, sampled=True) == Agreement(agreement=100, kl=None, rows=9)


@given(outcomes())
def test_the_bins_of_confidence_give_the_calibration_error(outcome: tuple[Tensor, Tensor]) -> None:
    logits, labels = outcome
    found = accuracy(*outcome)
    assert sum(images for images, *_ in found.calibration) == len(labels)
    assert expected_error(found.calibration) == pytest.approx(found.ece, abs=1e-5)
    confidence, first = logits.float().softmax(1).double().max(1)
    assert calibration(confidence.numpy(), (first == labels).numpy()) == found.calibration


def test_of_a_mixed_image_the_label_of_the_larger_share_is_compared() -> None:
    logits, labels = torch.randn(3, 5), torch.tensor([0, 1, 2])
    (batch,) = batches(logits, labels, 3, top_k(logits, 2))
    batch = replace(batch, mixed=MixedLabels(torch.tensor([4, 3, 2]), torch.tensor([0.4, 0.6, 1.0])))
    with Report(quiet=True).progress("", 0) as progress:
        assert compare(nn.Identity(), [batch], WORLD, progress).labels.tolist() == [4, 1, 2]


def test_no_image_has_no_calibration_error() -> None:
    assert expected_error([(0, 0.0, 0.0)]) is None


@given(outcomes(), st.integers(1, 60))
def test_row_by_row_it_is_what_agreement_and_kl_are_the_means_of(outcome: tuple[Tensor, Tensor], size: int) -> None:
    logits, labels = outcome
    rows = keep_mass(top_k(logits.roll(1, 0) + logits.flip(1), min(4, logits.shape[1])), 0.8, min_k=1)
    with Report(quiet=True).progress("", 0) as progress:
        found = compare(nn.Identity(), batches(logits, labels, size, rows), WORLD, progress)
    whole = agreement(logits, rows)
    assert 100 * found.agreed.mean() == pytest.approx(whole.agreement, abs=1e-3)
    assert found.kl.mean() == pytest.approx(whole.kl, rel=1e-4, abs=1e-5)
    assert found.labels.tolist() == labels.tolist()
    assert (found.student == logits.argsort(1, descending=True)[:, :3].numpy()).all()
    entries = np.minimum(rows.counts.numpy(), 3)
    assert ((found.teacher_prob > 0).sum(1) == entries).all()
