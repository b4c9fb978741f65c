"""The readers in docs/, which do without the package, read what its own reader reads."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from distill_cli.store.plan import Plan
from distill_cli.store.reader import Store
from distill_cli.store.writer import StoreWriter

DOCS = Path(__file__).parents[1] / "docs"
KINDS = {"fixed": {}, "adaptive": {"keep_mass": 0.8}, "sampled": {"sample": 3}}
KINDS["over tars"] = {"shard_rows": 60, "shard_sizes": (42, 1, 60)}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(DOCS))
    return __import__


@pytest.fixture
def store(
    tmp_path: Path, make_plan: Callable[..., Plan], fill_store: Callable[..., StoreWriter]
) -> Callable[..., Store]:
    """103 samples of 60 classes in two views; two of them were skipped."""

    def write(codec: str, kind: str) -> Store:
        values = {"top_k": 12, "samples": 103, "shard_rows": 40, "views": 2, "num_classes": 60, **KINDS[kind]}
        plan = make_plan(codec=codec, bits=8 if codec == "compact" else None, **values)
        fill_store(tmp_path, plan, skip=(7, 80))
        return Store(tmp_path)

    return write


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("codec", ["exact", "compact"])
def test_a_reader_without_the_package_reads_every_row(
    store: Callable[..., Store], module: Callable[[str], ModuleType], codec: str, kind: str
) -> None:
    opened = store(codec, kind)
    decode = {"exact": module("read_store").exact, "compact": module("read_compact").compact}[codec]
    found = list(module("read_store").rows(str(opened), 1, decode))
    assert sorted(int(sample) for sample, *_ in found) == opened.sample_ids.tolist()
    ours = opened.rows(1, np.array([int(sample) for sample, *_ in found]))
    for row, (_, class_id, log_prob, log_tail) in enumerate(found):
        count = len(class_id)
        assert count == (ours.class_id.shape[1] if ours.count is None else ours.count[row])
        assert np.array_equal(class_id, ours.class_id[row, :count])
        np.testing.assert_allclose(np.array(log_prob, np.float64), ours.log_prob[row, :count], atol=2e-5)
        np.testing.assert_allclose(log_tail, ours.log_tail[row], atol=1e-6)


@pytest.mark.parametrize("codec", ["exact", "compact"])
def test_the_readers_are_programs(store: Callable[..., Store], codec: str) -> None:
    opened = store(codec, "fixed")
    program = DOCS / ("read_store.py" if codec == "exact" else "read_compact.py")
    out = subprocess.run([sys.executable, program, str(opened), "1"], capture_output=True, text=True, check=True).stdout
    assert out.count("\n") == 101
