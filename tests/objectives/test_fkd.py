import math

import pytest
import torch
from dense import Example, examples, whole
from hypothesis import given
from hypothesis import strategies as st
from small import SETTING, make_batch, make_student

from distill_cli.objectives import build
from distill_cli.objectives.fkd import FKDConfig, soft_label
from distill_cli.objectives.tinyvit import TinyViTConfig
from distill_cli.sparse import top_k


@given(examples(), st.integers(1, 70))
def test_each_label_type_is_the_dense_one(example: Example, k: int) -> None:
    classes = example.classes
    for label_type in ("marginal-smoothing", "marginal-renorm", "smoothing", "hard"):
        ours = whole(soft_label(example.rows, classes, label_type, k))
        for row, count in enumerate(example.rows.counts):
            kept = min(int(count), 1 if label_type in ("smoothing", "hard") else k)
            ids = example.rows.class_id[row, :kept]
            p = example.rows.log_prob[row].exp()
            rest = p[kept:].sum() + example.rows.log_tail[row].exp()
            if label_type in ("marginal-renorm", "hard"):
                rest = torch.zeros(())
            dense = torch.full((classes,), float(rest) / max(classes - kept, 1), dtype=torch.float64)
            dense[ids] = p[:kept]
            # What the example's own rows lack of one, where they lost their tail.
            torch.testing.assert_close(ours[row], dense / dense.sum(), rtol=1e-9, atol=1e-12)


def test_the_temperature_is_of_the_student_alone_and_not_squared() -> None:
    objective, batch = build(FKDConfig(temperature=3.0), make_student(), SETTING).eval(), make_batch()
    assert batch.teacher is not None
    target = whole(soft_label(batch.teacher, 5, "marginal-smoothing"))
    log_q = (objective.student(batch.images) / 3).log_softmax(-1)
    torch.testing.assert_close(objective(batch).total, -(target * log_q).sum(-1).mean())


def test_by_default_it_is_tinyvit_s_loss() -> None:
    student, batch = make_student(), make_batch()
    ours, theirs = (build(config, student, SETTING).eval()(batch).total for config in (FKDConfig(), TinyViTConfig()))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("label_type", ["marginal-smoothing", "smoothing"])
def test_a_uniform_teacher_gives_a_uniform_label(label_type: str) -> None:
    target = whole(soft_label(top_k(torch.zeros(2, 8), 8), 8, label_type))
    torch.testing.assert_close(target, torch.full((2, 8), 1 / 8))


def test_hard_is_the_cross_entropy_with_the_first_class() -> None:
    objective, batch = build(FKDConfig(label_type="hard"), make_student(), SETTING).eval(), make_batch()
    assert batch.teacher is not None
    expected = torch.nn.functional.cross_entropy(objective.student(batch.images), batch.teacher.top1)
    torch.testing.assert_close(objective(batch).total, expected)


def test_a_certain_row_leaves_nothing_to_smooth() -> None:
    rows = top_k(torch.tensor([[0.0, -math.inf, -math.inf]]), 1)
    assert whole(soft_label(rows, 3, "smoothing")).tolist() == [[1.0, 0.0, 0.0]]
