"""Rows of adaptive size, sampled rows, and what the bill says of them."""

from pathlib import Path

import numpy as np
import pytest
from command_line import DISTIL, Cli, Made, Refused, capture

from distill_cli.store.reader import Store


@pytest.fixture(scope="module")
def sampled(distill: Cli, folder: Path, run: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "sampled"
    result = distill(*capture(run.path, folder, out), "--top-k", "1", "--sample", "3", "--quiet")
    assert result.code == 0, result
    return out


def test_rows_of_adaptive_size_keep_the_mass_that_was_asked_for(
    distill: Cli, folder: Path, run: Made, tmp_path: Path
) -> None:
    result = distill(*capture(run.path, folder, tmp_path / "s"), "--top-k", "3", "--keep-mass", "0.6", "--quiet")
    assert result.code == 0, result
    store = Store(tmp_path / "s")
    rows = store.rows(1, store.sample_ids)
    assert rows.count is not None
    assert set(rows.count.tolist()) <= {1, 2, 3}
    mass = np.exp(rows.log_prob.astype(np.float64)).cumsum(axis=1)
    at = np.arange(len(rows))
    assert (mass[at, rows.count - 1] > 0.6 - 1e-3).all()
    assert (mass[at, np.maximum(0, rows.count - 2)] < 0.6 + 1e-3)[rows.count > 1].all()
    np.testing.assert_allclose(mass[:, -1] + np.exp(rows.log_tail), 1, atol=1e-3)


def test_sampled_rows_are_whole_distributions_and_a_student_learns_from_them(
    distill: Cli, folder: Path, sampled: Path, tmp_path: Path
) -> None:
    rows = Store(sampled).rows(0, np.arange(20))
    np.testing.assert_allclose(np.exp(rows.log_prob.astype(np.float64)).sum(axis=1), 1, atol=1e-3)
    assert (rows.log_tail == -np.inf).all()
    trained = distill("train", *DISTIL, "--data", folder, "--store", sampled, "--out", tmp_path / "r", "--quiet")
    assert trained.code == 0, trained
    found = distill("eval", tmp_path / "r", "--store", sampled, "--json", "--quiet").json
    assert found["kl"] is None
    assert found["agreement"] is not None


def test_sampled_rows_are_refused_where_they_mislead(
    refused: Refused, folder: Path, sampled: Path, tmp_path: Path
) -> None:
    train = ("train", *DISTIL, "--data", folder, "--store", sampled, "--out", tmp_path / "r")
    assert refused(3, *train, "--set", "objective.name=tinyvit", "--set", "objective.temperature=2.0") == (
        f"objective.temperature: 2.0 needs the probabilities themselves, the rows of store {sampled} are sampled; "
        "leave it at 1, or write a store without --sample"
    )
    hard = ("--student", "deit-tiny", "--set", "objective.name=deit", "--set", "objective.distillation=hard")
    train = ("train", *hard, "--data", folder, "--store", sampled, "--out", tmp_path / "r")
    assert "hard needs the teacher's most probable class" in refused(3, *train, "--set", "student.patch_size=7")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--top-k", "0"), "--top-k 0: keeps nothing of a row; give at least 1, or --sample N with it"),
        (("--keep-mass", "0.9", "--sample", "2"), "--keep-mass and --sample: a sampled row keeps all of its mass al"),
        (("--keep-mass", "0.9", "--min-k", "3"), "--min-k 3: is more than --top-k 2; give at most that"),
        (("--min-k", "2"), "--min-k 2: is of --keep-mass P only; give both, or neither"),
        (("--set", "store.bits=8"), "store.bits 8: is of --codec compact only; give both, or neither"),
        (("--shards", "2"), "--shards 2: not of the form A:B, as in 0:10"),
        (("--shards", "3:9"), "--shards 3:9: the store has shards 0:4"),
    ],
)
def test_options_of_rows_that_do_not_fit_are_refused(
    refused: Refused, folder: Path, run: Made, tmp_path: Path, options: tuple[str, ...], line: str
) -> None:
    assert refused(2, *capture(run.path, folder, tmp_path / "s"), *options).startswith(line)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("options", [(), ("--keep-mass", "0.6"), ("--sample", "1"), ("--codec", "compact")])
def test_the_bill_is_what_the_store_costs(
    distill: Cli, folder: Path, run: Made, tmp_path: Path, options: tuple[str, ...]
) -> None:
    command = (*capture(run.path, folder, tmp_path / "s"), *options, "--json", "--quiet")
    bill = distill(*command, "--dry-run").json["bill"]
    assert not (tmp_path / "s").exists()
    made = distill(*command).json
    assert bill["bytes"] == pytest.approx(made["bytes"], rel=0.02)
    assert (bill["rows"], bill["shards"]) == (made["rows"], made["shards"])


def test_the_bill_says_what_half_would_be(distill: Cli, folder: Path, run: Made, tmp_path: Path) -> None:
    command = capture(run.path, folder, tmp_path / "s")
    bill = distill(*command, "--top-k", "3", "--dry-run", "--json", "--quiet").json["bill"]
    assert bill["half_views"] == 1
    # Of shards this small, what a shard has besides its rows is most: no k halves them.
    assert bill["half_top_k"] is None
    assert bill["mass"] == pytest.approx(1, abs=1e-3)
