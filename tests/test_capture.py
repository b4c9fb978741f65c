import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from distill_cli import capture
from distill_cli.capture import QUEUED_BATCHES, Capture, CaptureOrder, Taught, _Sink, fill, join, teach
from distill_cli.data import DataConfig, open_source
from distill_cli.data.loader import Batch
from distill_cli.data.sources import Source, fingerprint
from distill_cli.data.views import resolve_view
from distill_cli.distributed import World
from distill_cli.errors import DistillError, Stopped
from distill_cli.locks import Claims, shared
from distill_cli.randomness import derive
from distill_cli.recipe import Recipe
from distill_cli.report import Report
from distill_cli.sparse import sampling_uniforms, top_k
from distill_cli.store.dealing import Dealing
from distill_cli.store.plan import Plan
from distill_cli.store.reader import Store
from distill_cli.store.writer import StoreWriter

MakePlan = Callable[..., Plan]
CPU = World(torch.device("cpu"))
MODEL = {"input_size": (3, 24, 24), "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic", "crop_pct": 1.0}


class Teacher(torch.nn.Module):
    """The mean of each channel, as logits of three classes."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))


@pytest.fixture
def source(image_folder: Path) -> Source:
    found = open_source(str(image_folder), "train")
    assert found is not None
    return found


@pytest.fixture
def make_capture(source: Source, make_plan: MakePlan) -> Callable[..., Capture]:
    """A capture of 18 images in 2 views, shards of 6 rows and batches of 4; any field of its plan can be given."""

    def make(**changes: object) -> Capture:
        view = resolve_view(DataConfig(augment="rrc"), MODEL)
        values = {"samples": 18, "views": 2, "shard_rows": 6, "data": fingerprint(source), "top_k": 2, **changes}
        recipe = Recipe(store={"batch_size": 4})  # type: ignore[arg-type]
        teacher: Any = SimpleNamespace(name="mean", model=Teacher())
        return Capture(recipe, {}, teacher, source, view, make_plan(3, **values))

    return make


@pytest.fixture
def write(make_capture: Callable[..., Capture], tmp_path: Path) -> Callable[..., StoreWriter]:
    """Fill a store, `pieces` of it or all, and finish it if all are there."""

    def fill_it(name: str = "store", pieces: list[tuple[int, int]] | None = None, **changes: object) -> StoreWriter:
        capture = make_capture(**changes)
        with shared(tmp_path / name) as claims:
            writer = StoreWriter(tmp_path / name, capture.plan, capture.source.labels)
            fill(capture, writer, claims, pieces or list(capture.plan.every_shard()), CPU, Report())
            if not list(writer.missing()):
                writer.finish()
        return writer

    return fill_it


def _contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# Orders.


def test_a_batch_never_crosses_shards_and_each_sample_comes_once() -> None:
    dealing = Dealing(17, 5)
    order = CaptureOrder(dealing, 4, 2)
    for piece in [(0, 0), (1, 2), (1, 3)]:
        batches = [order(number) for number in order.numbers(piece)]
        assert {view for view, _ in batches} == {piece[0]}
        assert np.concatenate([ids for _, ids in batches]).tolist() == dealing.sample_ids(piece[1]).tolist()
        assert len(batches) == order.batches(piece)
        assert all(0 < len(ids) <= 2 for _, ids in batches)


@pytest.mark.parametrize("kind", [{}, {"keep_mass": 0.6}, {"sample": 3, "top_k": 1}])
def test_a_store_has_the_teacher_s_rows_whatever_was_there_before(
    write: Callable[..., StoreWriter], tmp_path: Path, kind: dict[str, Any]
) -> None:
    writer = write(**kind)
    write("parts", [(1, 0), (0, 2)], **kind)
    write("parts", **kind)
    assert _contents(tmp_path / "parts") == _contents(tmp_path / "store")
    assert Store(tmp_path / "store").manifests[0].rows == writer.plan.rows == 36
    assert Store(tmp_path / "store").manifests[0].top1 is not None


@pytest.mark.parametrize("kind", [{"keep_mass": 0.6}, {"sample": 2, "top_k": 1}])
def test_a_row_is_what_the_teacher_s_row_is_in_any_batch(
    write: Callable[..., StoreWriter], make_capture: Callable[..., Capture], tmp_path: Path, kind: dict[str, Any]
) -> None:
    write(**kind)
    made, ids = make_capture(**kind), np.array([11, 4, 17])
    batch = next(capture.batches_of(made, lambda _: (1, ids), iter([0]), CPU))  # type: ignore[arg-type]
    taught = join([teach(made, batch, CPU)], made.plan)
    rows = Store(tmp_path / "store").rows(1, ids)
    assert np.array_equal(rows.count, taught.count)
    assert np.array_equal(rows.class_id, taught.class_id)
    assert np.array_equal(rows.log_prob, taught.log_prob.astype(np.float16))
    assert np.array_equal(rows.log_tail, taught.log_tail)


def test_uniforms_are_of_each_sample_alone() -> None:
    assert sampling_uniforms(1, 2, np.array([7, 3]))[1] == (derive("sample", 1, 2, 3) >> 10) / 2**53


def test_what_waits_to_be_written_does_not_hold_on_to_the_images(make_capture: Callable[..., Capture]) -> None:
    made = make_capture()
    batch = Batch(torch.rand(4, 3, 24, 24), torch.zeros(4), np.arange(4), (0,))
    assert teach(made, batch, CPU).batch.images.untyped_storage().nbytes() == 0


# The thread that writes.


class Slow(StoreWriter):
    """A writer that waits for leave."""

    leave = threading.Event()

    def write(self, *_: object, **__: object) -> None:
        self.leave.wait(30)


class Full(StoreWriter):
    def write(self, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "shard")


Sinks = Callable[..., _Sink]


@pytest.fixture
def make_sink(make_capture: Callable[..., Capture], tmp_path: Path) -> Sinks:
    return lambda kind=StoreWriter: _Sink(make_capture(), kind(tmp_path, make_capture().plan), Claims(None))


def _taught(finite: bool = True) -> Taught:
    rows = top_k(torch.zeros(4, 3), 2)
    return Taught(rows, torch.full((4,), finite), Batch(torch.empty(0), torch.zeros(4), np.arange(4), (0,)), None)


def _hand_over(sink: _Sink, *parts: Taught | None, after: Callable[[], object] = lambda: None) -> None:
    with sink:
        for part in parts:
            sink.put((0, 0), part)
        after()


def test_an_error_of_the_thread_comes_out_with_its_own_type_while_the_teacher_works(make_sink: Sinks) -> None:
    handed = []

    def work() -> None:
        for number in range(1000):
            sink.put((0, 1), _taught())
            handed.append(number)
            time.sleep(0.01)

    sink = make_sink(Full)
    with pytest.raises(OSError, match="No space left"):
        _hand_over(sink, _taught(), None, after=work)
    assert len(handed) < 100
    assert not sink._thread.is_alive()


@pytest.mark.parametrize("flush", [True, False])
def test_an_error_at_the_very_end_comes_out_too(make_sink: Sinks, flush: bool) -> None:
    sink = make_sink(Full)
    with pytest.raises(OSError, match="No space left"):
        _hand_over(sink, _taught(), None, after=sink.flush if flush else lambda: None)


def test_an_output_that_is_not_finite_names_its_image(make_sink: Sinks, source: Source, tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=r"teacher mean: output for .* is not finite") as caught:
        _hand_over(make_sink(), _taught(finite=False), None)
    assert source.keys[0] in str(caught.value)
    assert list(tmp_path.rglob("*.h5")) == []


def test_the_teacher_waits_for_a_slow_writer(make_sink: Sinks, monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[int] = []

    def work() -> None:
        for number in range(100):
            sink.put((0, 1), _taught())
            handed.append(number)

    monkeypatch.setattr(Slow, "leave", threading.Event())
    teacher = threading.Thread(target=work)
    with make_sink(Slow) as sink:
        sink.put((0, 0), _taught())
        sink.put((0, 0), None)
        teacher.start()
        time.sleep(0.5)
        assert len(handed) == QUEUED_BATCHES
        Slow.leave.set()
        teacher.join()
    assert len(handed) == 100


def test_an_error_elsewhere_is_the_one_that_comes_out(make_sink: Sinks, monkeypatch: pytest.MonkeyPatch) -> None:
    """… without waiting for what is still queued."""

    def fail() -> None:
        raise RuntimeError("elsewhere")

    sink = make_sink(Full)
    arrived: list[Taught] = []
    monkeypatch.setattr(sink, "_arrived", lambda taught: time.sleep(0.2) or arrived.append(taught))
    with pytest.raises(RuntimeError, match="elsewhere"):
        _hand_over(sink, *[_taught()] * QUEUED_BATCHES, after=fail)
    assert len(arrived) < QUEUED_BATCHES
    assert not sink._thread.is_alive()


# The loop.


def test_a_signal_keeps_the_finished_shards(
    write: Callable[..., StoreWriter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("whole")
    real, calls = capture.teach, []

    def signalled(*arguments: Any) -> Taught:
        calls.append(arguments)
        if len(calls) == 6:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(capture, "teach", signalled)
    with pytest.raises(Stopped, match=r"SIGTERM: .*: finished shards are kept; the same command goes on") as caught:
        write()
    assert caught.value.exit_code == 143
    kept = {name: content for name, content in _contents(tmp_path / "store").items() if name.endswith("h5")}
    whole = _contents(tmp_path / "whole")
    assert len(kept) >= 2
    assert kept.items() <= whole.items()
    write()
    assert _contents(tmp_path / "store") == whole


def test_a_teacher_that_fails_leaves_whole_shards_and_no_thread(
    write: Callable[..., StoreWriter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("whole")
    real, calls = Teacher.forward, []

    def fail(self: Teacher, images: torch.Tensor) -> torch.Tensor:
        calls.append(images)
        return real(self, images) if len(calls) < 6 else real(self, images) / 0

    monkeypatch.setattr(Teacher, "forward", fail)
    with pytest.raises(DistillError, match="is not finite"):
        write()
    monkeypatch.undo()
    assert "store-writer" not in {thread.name for thread in threading.enumerate()}
    assert not (tmp_path / "store" / ".lock").exists()
    write()
    assert _contents(tmp_path / "store") == _contents(tmp_path / "whole")
