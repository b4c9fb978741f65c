import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from distill_cli.data import open_source
from distill_cli.data.folder import ImageFolder
from distill_cli.data.sources import Source, fingerprint, without_labels
from distill_cli.data.views import DataConfig, View, resolve_view, stored_view, train_transform
from distill_cli.errors import MismatchError
from distill_cli.randomness import preserved, seed_everything
from distill_cli.replay import SparseRows, check_data, prove_replay
from distill_cli.software import versions
from distill_cli.sparse import SparseLogits
from distill_cli.store.plan import PROBES, Plan
from distill_cli.store.reader import Store
from distill_cli.store.rows import Rows
from distill_cli.store.writer import StoreWriter

MODEL = {"input_size": (3, 24, 24), "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic", "crop_pct": 1.0}
MakePlan = Callable[..., Plan]
MakeRows = Callable[..., Rows]
Capture = Callable[..., Store]


@pytest.fixture(scope="module")
def view() -> View:
    return resolve_view(DataConfig(augment="rrc", auto_augment="rand-m9-mstd0.5-inc1"), MODEL)


@pytest.fixture
def source(image_folder: Path, tmp_path: Path) -> ImageFolder:
    """18 images of 3 classes, the test's own."""
    shutil.copytree(image_folder, tmp_path / "images")
    found = open_source(str(tmp_path / "images"), "train")
    assert isinstance(found, ImageFolder)
    return found


@pytest.fixture
def capture(tmp_path: Path, view: View, make_plan: MakePlan, make_rows: MakeRows) -> Capture:
    """Write the store of a source: 2 views of 3 shards, with the checksums of their true inputs."""

    def write(source: Source, skip: tuple[int, ...] = (), **changes: object) -> Store:
        values = {
            "data": fingerprint(source),
            "transform": asdict(view),
            "samples": len(source),
            "software": versions(),
        }
        plan = make_plan(num_classes=3, views=2, shard_rows=6, **{**values, **changes})
        (tmp_path / "store").mkdir()
        writer = StoreWriter(tmp_path / "store", plan)
        transform = train_transform(stored_view(DataConfig(), plan.transform))
        for number, shard in plan.every_shard():
            rows = make_rows(plan, number, shard, skip)
            first = rows.sample_id[:PROBES].tolist()
            with preserved():
                pixels = transform.draw([source.read(i) for i in first], plan.seed, number, first)
            writer.write(number, shard, rows, np.array([*map(pixels.checksum, range(len(first)))], np.uint32))
        writer.finish()
        return Store(tmp_path / "store")

    return write


def test_the_heads_of_the_first_and_the_last_shard_are_proven(
    source: ImageFolder, view: View, capture: Capture
) -> None:
    assert prove_replay(capture(source, seed=5), source, train_transform(view)) == 2 * PROBES


def test_a_proof_goes_past_skipped_samples(source: ImageFolder, view: View, capture: Capture) -> None:
    store = capture(source, skip=(0,))
    (source.root / source.keys[0]).unlink()
    assert prove_replay(store, source, train_transform(view)) == 2 * PROBES


def test_a_proof_leaves_the_generators_alone(source: ImageFolder, view: View, capture: Capture) -> None:
    store = capture(source)
    with preserved():
        seed_everything(1)
        before = random.getstate(), torch.get_rng_state()
        prove_replay(store, source, train_transform(view))
        assert random.getstate() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])


def test_changed_pixels_are_found_and_their_image_named(source: ImageFolder, view: View, capture: Capture) -> None:
    store = capture(source)
    proven, other = store.ids(0, 0)[:2].tolist()
    shutil.copy(source.root / source.keys[other], source.root / source.keys[proven])
    with pytest.raises(MismatchError) as caught:
        prove_replay(store, source, train_transform(view))
    assert f"view 0 of {source.keys[proven]} does not replay to the pixels that the teacher saw" in str(caught.value)
    assert f'have changed: "distill store check {store} --data DATA --files" names them; restore' in str(caught.value)
    assert caught.value.exit_code == 3


def test_another_transform_is_found(source: ImageFolder, view: View, capture: Capture) -> None:
    with pytest.raises(MismatchError, match="does not replay"):
        prove_replay(capture(source), source, train_transform(replace(view, scale=(0.5, 1.0))))


def test_other_library_versions_are_named_where_pixels_differ(
    source: ImageFolder, view: View, capture: Capture
) -> None:
    store = capture(source, software={**versions(), "pillow": "9.0.0"})
    assert prove_replay(store, source, train_transform(view)) > 0
    with pytest.raises(MismatchError, match=r"versions differ: pillow 9.0.0 there, \d+.* here; install those"):
        prove_replay(store, source, train_transform(replace(view, hflip=1.0)))


@pytest.mark.parametrize(
    "asked",
    [
        DataConfig(augment="rrc", auto_augment="trivial", interpolation="bilinear"),
        DataConfig(augment="src", auto_augment="3a", color_jitter=0.3),
        DataConfig(augment="rrc", auto_augment="augmix-m3-w3", interpolation="random"),
    ],
    ids=["trivial", "deit iii", "augmix"],
)
def test_every_policy_is_proven_and_torchvisions_version_is_named(
    source: ImageFolder, capture: Capture, asked: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = resolve_view(asked, MODEL)
    store = capture(source, transform=view.table, software={**versions(), "torchvision": "0.1.0"})
    assert prove_replay(store, source, train_transform(stored_view(DataConfig(), store.plan.transform))) == 2 * PROBES
    draw = random.random
    monkeypatch.setattr(random, "random", lambda: 1 - draw())
    monkeypatch.setattr(torch, "randint", lambda *arguments, **_: torch.zeros(arguments[-1], dtype=torch.int64))
    with pytest.raises(
        MismatchError, match=r"does not replay .*; versions differ: torchvision 0\.1\.0 there, \d.* here"
    ):
        prove_replay(store, source, train_transform(view))


def test_the_data_of_a_store_is_taken_with_and_without_its_labels(source: ImageFolder, capture: Capture) -> None:
    store = capture(source)
    check_data(store, source)
    check_data(store, without_labels(source))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": ["a/1.png"]}, "is of 18 images, the data has 1; give the data that the store was written from"),
        ({"keys": [f"{i}.png" for i in range(18)]}, "keys fingerprint [0-9a-f]{12}, that of the data [0-9a-f]{12};"),
        ({"labels": np.zeros(18, np.int64)}, "labels fingerprint [0-9a-f]{12}, that of the data"),
        ({"labels": np.full(18, 3), "classes": None}, "has 3 classes, the data has label 3"),
        ({"classes": ("boot", "coat", "shirt", "tie")}, "has 3 classes, the data 4"),
    ],
)
def test_other_data_is_refused(source: ImageFolder, capture: Capture, change: dict[str, object], message: str) -> None:
    with pytest.raises(MismatchError, match=message) as caught:
        check_data(capture(source), replace(source, **change))  # type: ignore[arg-type]
    assert caught.value.exit_code == 3


def test_a_stores_rows_are_tensors_and_pickle(source: ImageFolder, capture: Capture) -> None:
    store = capture(source)
    rows, ids = pickle.loads(pickle.dumps(SparseRows(store))), np.array([7, 2, 7])
    sparse, stored = rows(1, ids), store.rows(1, ids)
    assert (sparse.class_id.dtype, sparse.log_prob.dtype, sparse.log_tail.dtype) == (
        torch.int64,
        torch.float32,
        torch.float32,
    )
    assert sparse.class_id.tolist() == stored.class_id.tolist()
    assert sparse.log_prob.tolist() == stored.log_prob.tolist()
    assert sparse.log_tail.tolist() == stored.log_tail.tolist()


class Lookup(Dataset[SparseLogits]):
    def __init__(self, rows: SparseRows, ids: np.ndarray) -> None:
        self.rows, self.ids = rows, ids

    def __len__(self) -> int:
        return 6

    def __getitem__(self, number: int) -> SparseLogits:
        return self.rows(number % 2, self.ids[number::6])


@pytest.mark.parametrize(
    ("context", "kind"),
    [("fork", {}), ("fork", {"keep_mass": 0.9}), ("fork", {"sample": 2, "top_k": 1}), ("spawn", {"keep_mass": 0.9})],
)
def test_loader_workers_read_the_rows_of_the_main_process(
    source: ImageFolder, capture: Capture, kind: dict[str, object], context: str
) -> None:
    """… which has its shards open when they come."""
    ids = np.random.default_rng(0).permutation(np.arange(36) % 18)
    lookup = Lookup(SparseRows(capture(source, **kind)), ids)
    here = [lookup[number] for number in range(6)]
    loader = DataLoader(lookup, batch_size=None, num_workers=1, multiprocessing_context=context)
    for one, other in zip(here, loader, strict=True):
        assert torch.equal(one.class_id, other.class_id)
        assert torch.equal(one.log_prob, other.log_prob)
        assert torch.equal(one.log_tail, other.log_tail)
        assert torch.equal(one.counts, other.counts)
        assert (one.count is None) == (kind == {})
