"""Capture and training over tars behind a URL, with room for a part of them: each tar is fetched once."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from served import served, write_tar

from distill_cli.capture import Capture, fill, shards_of
from distill_cli.data import DataConfig, open_source
from distill_cli.data.batches import Batches
from distill_cli.data.idx import ArraySource
from distill_cli.data.loader import load
from distill_cli.data.orders import TrainingOrder
from distill_cli.data.sources import fingerprint
from distill_cli.data.views import resolve_view, train_transform
from distill_cli.data.webdataset import TarSource
from distill_cli.distributed import World
from distill_cli.errors import UsageError
from distill_cli.locks import shared
from distill_cli.recipe import Recipe
from distill_cli.report import Report
from distill_cli.store.plan import Plan
from distill_cli.store.reader import Store
from distill_cli.store.writer import StoreWriter

MODEL = {"input_size": (3, 24, 24), "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic", "crop_pct": 1.0}
VIEW = resolve_view(DataConfig(augment="rrc"), MODEL)
SIZES = (6, 1, 9, 6, 6, 12, 6, 5, 7, 6, 6, 6) * 2


@dataclass
class Remote:
    """Twenty-four tars behind a server."""

    url: str
    asked: list[str]
    tar_bytes: int
    """Of each."""

    def open(self, tars: float) -> TarSource:
        """With room for so many tars; what opening asks of the server is forgotten."""
        config = DataConfig(cache_gb=tars * self.tar_bytes / 1e9)
        source = open_source(f"wds:{self.url}/x-{{00..23}}.tar", "train", config)
        assert isinstance(source, TarSource)
        for path in source.tars.cache.folder.glob("*"):
            path.unlink()
        self.asked.clear()
        return source

    @property
    def fetched(self) -> Counter[str]:
        return Counter(self.asked)


EACH_ONCE = Counter(f"/x-{number:02d}.tar" for number in range(24))


@pytest.fixture
def remote(images: ArraySource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    picture = tmp_path / "picture.png"
    for number, size in enumerate(SIZES):
        members: dict[str, bytes | str] = {}
        for sample in range(size):
            images.read(number * 12 + sample).save(picture)
            members |= {f"{sample}.png": picture.read_bytes(), f"{sample}.cls": str(sample % 3)}
        # A tar is a multiple of 10,240 bytes: of five here.
        used = sum(512 + -(-len(content) // 512) * 512 for content in members.values())
        write_tar(tmp_path / "tars" / f"x-{number:02d}.tar", {**members, "fill.bin": bytes(45_000 - used)})
    sizes = {path.stat().st_size for path in (tmp_path / "tars").iterdir()}
    assert len(sizes) == 1
    with served(tmp_path / "tars") as (url, asked):
        yield Remote(url, asked, sizes.pop())


class Teacher(torch.nn.Module):
    """The mean of each channel, as logits of three classes."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))


@pytest.fixture
def captured(make_plan: Callable[..., Plan], tmp_path: Path) -> Callable[..., Store]:
    """A store of two views over a source."""

    def capture(source: TarSource, workers: int = 0, order: str | None = None, name: str = "store") -> Store:
        recipe = Recipe(store={"batch_size": 4, "order": order})  # type: ignore[arg-type]
        values = {"samples": len(source), "views": 2, "data": fingerprint(source), "top_k": 2}
        plan = make_plan(3, **values, **shards_of(recipe, source))
        teacher: Any = SimpleNamespace(name="mean", model=Teacher())
        made = Capture(recipe, {}, teacher, source, VIEW, plan)
        world = World(torch.device("cpu"), workers=workers)
        with shared(tmp_path / name) as claims:
            writer = StoreWriter(tmp_path / name, plan, source.labels)
            fill(made, writer, claims, list(plan.every_shard()), world, Report(quiet=True))
            writer.finish()
        return Store(tmp_path / name)

    return capture


@pytest.mark.parametrize("workers", [0, 2])
def test_a_capture_of_two_views_fetches_each_tar_once(
    remote: Remote, captured: Callable[..., Store], workers: int
) -> None:
    store = captured(remote.open(tars=5), workers)
    assert remote.fetched == EACH_ONCE
    assert [entry.rows for entry in store.manifests[0].shards] == [*SIZES, *SIZES]
    assert store.shard(1, 5).sample_id.tolist() == list(range(28, 40))  # type: ignore[union-attr]


def test_dealt_samples_are_fetched_again_and_again_and_taught_the_same(
    remote: Remote, captured: Callable[..., Store]
) -> None:
    source = remote.open(tars=3)
    dealt = captured(source, order="dealt", name="dealt")
    assert sum(remote.fetched.values()) > 2 * len(SIZES)
    ids, over_tars = np.random.default_rng(0).permutation(len(source)), captured(source)
    for name in ("class_id", "log_prob", "log_tail"):
        assert np.array_equal(getattr(dealt.rows(1, ids), name), getattr(over_tars.rows(1, ids), name))


def _epochs(source: TarSource, window: int, workers: int, epochs: range) -> list[int]:
    order = TrainingOrder(np.arange(len(source)), 4, 0, 1, tars=source.parts, window=window)
    steps = order.steps_per_epoch
    numbers = range(epochs.start * steps, epochs.stop * steps)
    loaded = load(Batches(source, train_transform(VIEW), order), numbers, workers, torch.device("cpu"))
    return [sample_id for batch in loaded for sample_id in batch.sample_ids.tolist()]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_epoch_fetches_each_tar_once(remote: Remote, workers: int) -> None:
    """Two windows and what two workers have ahead need seven tars at most, in whatever order the workers run."""
    source = remote.open(tars=8)
    assert sorted(_epochs(source, 2, workers, range(1))) == list(range(sum(SIZES)))
    assert remote.fetched == EACH_ONCE


def test_a_shuffle_of_all_tars_fetches_them_again_and_again(remote: Remote) -> None:
    _epochs(remote.open(tars=8), 0, 0, range(1))
    assert sum(remote.fetched.values()) > 2 * len(SIZES)


def test_epochs_one_behind_the_other_fetch_no_tar_more_often_than_once_each(remote: Remote) -> None:
    _epochs(remote.open(tars=6), 2, 0, range(3))
    assert max(remote.fetched.values()) <= 3


# What a recipe may ask.


def _recipe(**store: object) -> Recipe:
    return Recipe(store=store, data={"path": "photos"})  # type: ignore[arg-type]


def test_shards_follow_tars_unless_their_rows_are_given(remote: Remote) -> None:
    source = remote.open(tars=24)
    following = {"shard_rows": 12, "shard_sizes": SIZES}
    assert shards_of(_recipe(), source) == shards_of(_recipe(order="tars"), source) == following
    assert shards_of(_recipe(order="dealt"), source) == {"shard_rows": 16384}
    assert shards_of(_recipe(shard_rows=5), source) == shards_of(_recipe(shard_rows=5, order="dealt"), source)
    with pytest.raises(UsageError, match=r"--shard-rows 5: store\.order is tars, and shards end where these end"):
        shards_of(_recipe(order="tars", shard_rows=5), source)


def test_data_without_tars_is_dealt(images: ArraySource) -> None:
    assert shards_of(_recipe(), images) == {"shard_rows": 16384}
    with pytest.raises(UsageError, match=r"store\.order tars: --data photos is no tars; give wds:PATTERN"):
        shards_of(_recipe(order="tars"), images)


def test_tars_without_labels_are_tars_too(remote: Remote) -> None:
    assert replace(remote.open(tars=24), labels=None, classes=None).parts == SIZES
