import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from distill_cli import capture
from distill_cli.capture import QUEUED_BATCHES, Capture, CaptureOrder, Taught, _Sink, fill, join, teach
from distill_cli.data import DataConfig, open_source
from distill_cli.data.batch import Batch
from distill_cli.data.mixing import DrawnPartners
from distill_cli.data.sources import Source, fingerprint
from distill_cli.data.views import resolve_view, train_transform
from distill_cli.distributed import World
from distill_cli.errors import DistillError, MismatchError, Stopped
from distill_cli.locks import Claims, shared
from distill_cli.randomness import derive
from distill_cli.recipe import Recipe
from distill_cli.replay import StoredPartners, prove_replay
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
    """A capture of 18 images in 2 views, shards of 6 rows and batches of 4; any field of its plan can be given, what is
    mixed, and images of its own."""

    def make(
        batch_size: int = 4, mixed: dict[str, float] | None = None, images: Source = source, **changes: object
    ) -> Capture:
        view = resolve_view(DataConfig(augment="rrc", **(mixed or {})), MODEL)  # type: ignore[arg-type]
        values = {"samples": 18, "views": 2, "shard_rows": 6, "data": fingerprint(images), "top_k": 2, **changes}
        recipe = Recipe(store={"batch_size": batch_size}, data={"skip_unreadable": True})  # type: ignore[arg-type]
        teacher: Any = SimpleNamespace(name="mean", model=Teacher())
        return Capture(recipe, {}, teacher, images, view, make_plan(3, transform=view.table, **values))

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
    order = CaptureOrder(dealing, 2)
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


MIXED = {"mixup": 0.8, "cutmix": 1.0}


@pytest.mark.parametrize("shard_rows", [6, 7])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 16])
def test_a_mixing_store_has_the_same_bytes_by_any_batches(
    write: Callable[..., StoreWriter], tmp_path: Path, batch_size: int, shard_rows: int
) -> None:
    write(mixed=MIXED, shard_rows=shard_rows)
    write("parts", [(1, 0), (0, 2)], mixed=MIXED, shard_rows=shard_rows, batch_size=batch_size)
    write("parts", mixed=MIXED, shard_rows=shard_rows, batch_size=batch_size)
    assert _contents(tmp_path / "parts") == _contents(tmp_path / "store")


def test_a_batch_of_a_mixing_view_holds_both_of_each_pair(make_capture: Callable[..., Capture]) -> None:
    made = make_capture(mixed=MIXED, shard_rows=7)
    for batch_size, even in ((1, 2), (2, 2), (5, 4), (64, 64)):
        order = CaptureOrder.of(made.plan, made.view, batch_size)
        partners = DrawnPartners(made.plan.dealing, made.plan.seed)
        for piece in made.plan.every_shard():
            batches = [order(number) for number in order.numbers(piece)]
            assert len(batches) == order.batches(piece)
            assert np.array_equal(
                np.sort(np.concatenate([ids for _, ids in batches])), np.sort(made.plan.dealing.sample_ids(piece[1]))
            )
            for view, ids in batches:
                found = partners(view, ids)
                assert len(ids) <= even
                assert set(found[found >= 0]) <= set(ids)


def test_a_mixing_store_is_proven_and_counts_the_label_of_the_larger_share(
    write: Callable[..., StoreWriter], make_capture: Callable[..., Capture], tmp_path: Path
) -> None:
    write(mixed=MIXED)
    made, store = make_capture(mixed=MIXED), Store(tmp_path / "store")
    assert prove_replay(store, made.source, train_transform(made.view)) == 8
    assert made.source.labels is not None
    hits = mixed = 0
    for view in range(2):
        for sample_id in range(18):
            one: Any = lambda _, v=view, i=sample_id: (v, np.array([i]))  # noqa: E731
            batch = next(capture.batches_of(made, one, iter([0]), CPU))
            assert batch.mixed is not None
            lam = batch.mixed.lam.item()
            label = batch.labels if lam >= 0.5 else batch.mixed.partner
            hits += int((teach(made, batch, CPU).rows.top1 == label).item())
            mixed += lam < 1
    assert mixed > 20
    assert store.manifests[0].top1 == round(100 * hits / 36, 3)


def test_another_lambda_is_found_by_the_probes(
    write: Callable[..., StoreWriter], make_capture: Callable[..., Capture], tmp_path: Path
) -> None:
    """… though the pixels of each image alone are the same."""
    write(mixed=MIXED)
    store = Store(tmp_path / "store")
    for other in ({"mixup": 0.4, "cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0, "mixup_prob": 0.5}, {}):
        made = make_capture(mixed=other)
        with pytest.raises(MismatchError, match="does not replay to the pixels"):
            prove_replay(store, made.source, train_transform(made.view))


def test_the_partner_of_a_skipped_image_is_unmixed_in_the_capture_and_in_every_replay(
    source: Source, write: Callable[..., StoreWriter], make_capture: Callable[..., Capture], tmp_path: Path
) -> None:
    made = make_capture(mixed=MIXED)
    partners = DrawnPartners(made.plan.dealing, made.plan.seed)
    # One whose partner is mixed with it in both views, and which is among the first of a shard.
    skipped = int(made.plan.dealing.sample_ids(0)[1])
    alone = [int(partners(view, np.array([skipped]))[0]) for view in (0, 1)]
    spoilt = tmp_path / "spoilt"
    shutil.copytree(source.root, spoilt)  # type: ignore[attr-defined]
    content = (spoilt / source.keys[skipped]).read_bytes()
    (spoilt / source.keys[skipped]).write_bytes(b"")
    write(mixed=MIXED, images=replace(source, root=spoilt))  # type: ignore[type-var]
    (spoilt / source.keys[skipped]).write_bytes(content)
    store = Store(tmp_path / "store")
    assert store.manifests[0].skipped == (skipped,)
    assert prove_replay(store, source, train_transform(made.view)) == 8
    plain = train_transform(make_capture().view)
    for view, sample_id in enumerate(alone):
        inputs = plain([source.read(sample_id)], *made.plan.drawn[view], [sample_id])
        taught = top_k(Teacher()(inputs), 2)
        assert np.array_equal(store.rows(view, np.array([sample_id])).log_prob, taught.log_prob.numpy().astype("f2"))
        assert StoredPartners(store)(view, np.array([sample_id])) == [-1]


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
    batch = Batch(
        torch.empty(0),
        torch.zeros(4),
        np.arange(4),
        (0,),
        probe_crc=dict.fromkeys(range(4), 0),
        content_crc=dict.fromkeys(range(4), 0),
    )
    return Taught(rows, torch.full((4,), finite), batch.labels, batch, None)


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
