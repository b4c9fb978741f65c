"""What more than one test file needs: real images, plans, rows, stores, and one other process."""

import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from distill_cli.data.idx import ArraySource, open_sample
from distill_cli.store.plan import PROBES, Plan
from distill_cli.store.rows import Rows
from distill_cli.store.writer import StoreWriter

settings.register_profile("distill", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("distill")

CLASSES = ("boot", "coat", "shirt")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from or written to the cache of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hf")))
        yield


@pytest.fixture(scope="session")
def images() -> ArraySource:
    """The shipped sample's 2,000 validation images."""
    source = open_sample("val")
    assert source is not None
    return source


@pytest.fixture(scope="session")
def picture(images: ArraySource) -> Image.Image:
    """One real image, RGB, 28 x 28."""
    return images.read(0)


@pytest.fixture(scope="session")
def image_folder(images: ArraySource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 images in train/ and 6 in val/ of three classes, PNG and JPEG in turn; not to be written to."""
    root = tmp_path_factory.mktemp("images")
    for number in range(24):
        split, within = ("train", number) if number < 18 else ("val", number - 18)
        path = root / split / CLASSES[within % 3] / f"{within:02d}{'.png' if number % 2 else '.jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        images.read(number).resize((40, 36)).save(path)
    return root


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., Plan]:
    """A small plan: 10 samples in 3 shards of at most 4 rows, 5 classes, 3 kept; any field can be given."""

    def make(num_classes: int = 5, **changes: object) -> Plan:
        values = {
            "teacher": {"name": "vit", "weights_sha256": "0" * 64, "num_classes": num_classes, "classes": None},
            "data": {"keys_sha256": "1" * 64, "labels_sha256": None},
            "transform": {"image_size": 32, "mean": [0.5, 0.5, 0.5]},
            "samples": 10,
            "views": 1,
            "top_k": 3,
            "shard_rows": 4,
            "seed": 0,
            "precision": "fp32",
            "software": {"torch": "2.7.0"},
        }
        return Plan(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., Rows]:
    """The rows of a shard: a function of (view, sample), so that two writers agree; `skip` leaves samples out.

    Where the plan has ragged rows, sample i has 1 + i mod width entries.
    """

    def make(plan: Plan, view: int, shard: int, skip: tuple[int, ...] = ()) -> Rows:
        ids = np.array([i for i in plan.dealing.sample_ids(shard) if i not in skip], np.int64)
        logits = [np.random.default_rng((view, int(i))).normal(0, 3, plan.num_classes) for i in ids]
        prob = np.exp(np.array(logits).reshape(len(ids), plan.num_classes))
        prob /= prob.sum(axis=1, keepdims=True)
        class_id = np.argsort(-prob, axis=1)[:, : plan.form.width]
        kept = np.take_along_axis(prob, class_id, axis=1)
        count = 1 + ids % plan.form.width if plan.form.ragged else None
        if count is not None:
            padding = np.arange(plan.form.width) >= count[:, None]
            kept, class_id = np.where(padding, 0, kept), np.where(padding, 0, class_id)
        with np.errstate(divide="ignore"):
            return Rows(ids, class_id, np.log(kept), np.log(np.maximum(0, 1 - kept.sum(axis=1))), count)

    return make


@pytest.fixture(scope="session")
def fill_store(make_rows: Callable[..., Rows]) -> Callable[..., StoreWriter]:
    """Write the missing shards of a store (`only` so many of them), and its manifest if all are there."""

    def fill(
        path: Path, plan: Plan, labels: np.ndarray | None = None, only: int | None = None, skip: tuple[int, ...] = ()
    ) -> StoreWriter:
        path.mkdir(exist_ok=True)
        writer = StoreWriter(path, plan, labels)
        for view, shard in itertools.islice(list(writer.missing()), only):
            rows = make_rows(plan, view, shard, skip)
            writer.write(view, shard, rows, np.arange(min(PROBES, len(rows)), dtype=np.uint32))
        if not list(writer.missing()):
            writer.finish()
        return writer

    return fill


@pytest.fixture(scope="session")
def other_process() -> Iterator[ProcessPoolExecutor]:
    """A fresh interpreter that functions can be sent to."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool
