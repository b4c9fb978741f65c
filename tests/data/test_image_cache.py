import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill_cli.data import image_cache, open_source
from distill_cli.data.batch import Batch
from distill_cli.data.batches import Batches
from distill_cli.data.config import DataConfig
from distill_cli.data.folder import ImageFolder
from distill_cli.data.image_cache import ImageCache, bill, cached
from distill_cli.data.loader import load
from distill_cli.data.orders import TrainingOrder
from distill_cli.data.sources import Source, UnreadableImage, fingerprint
from distill_cli.data.views import resolve_view, train_transform
from distill_cli.distributed import World
from distill_cli.errors import DamagedError, DistillError, MismatchError, Stopped, UsageError
from distill_cli.report import Report
from distill_cli.store.dealing import Dealing

CPU = torch.device("cpu")
QUIET = Report(quiet=True)
Open = Callable[..., ImageCache]
_MODEL = {"input_size": (3, 24, 24), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 1.0}


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four images."""
    monkeypatch.setattr(image_cache, "SHARD_IMAGES", 4)


@pytest.fixture
def folder(image_folder: Path, tmp_path: Path) -> Path:
    """18 images of 40 x 36 in train/, to be changed; sample 3 is of another size."""
    root = Path(shutil.copytree(image_folder, tmp_path / "images"))
    path = root / "train" / _source(root).keys[3]
    Image.open(path).resize((60, 90)).save(path)
    return root


@pytest.fixture
def open_cache(folder: Path, tmp_path: Path) -> Open:
    """The training images from the cache below `tmp_path`."""

    def opened(short_side: int = 0, workers: int = 0, report: Report = QUIET, **config: Any) -> ImageCache:
        asked = DataConfig(cache=str(tmp_path / "cache"), path=str(folder), **config)
        view = resolve_view(DataConfig(short_side=short_side), _MODEL)
        found = cached(_source(folder), asked, "train", view, World(CPU, workers=workers), report)
        assert isinstance(found, ImageCache)
        return found

    return opened


def _source(folder: Path) -> ImageFolder:
    found = open_source(str(folder), "train")
    assert isinstance(found, ImageFolder)
    return found


def _pixels(source: Source) -> list[tuple[tuple[int, int], bytes]]:
    return [(image.size, image.tobytes()) for image in map(source.read, range(len(source)))]


def _files(tmp_path: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((tmp_path / "cache" / "train").iterdir())}


# With and without.


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_has_the_images_of_its_source(open_cache: Open, folder: Path, tmp_path: Path, workers: int) -> None:
    source = _source(folder)
    cache = open_cache(workers=workers)
    assert _pixels(cache) == _pixels(source)
    assert [cache.read_with_crc(i)[1] for i in range(18)] == [source.read_with_crc(i)[1] for i in range(18)]
    assert (cache.classes, len(cache), fingerprint(cache)) == (source.classes, 18, fingerprint(source))
    assert sorted(_files(tmp_path)) == ["cache.json", "manifest.json", *(f"shard-0000{n}.rgb" for n in range(5))]


def test_images_are_kept_as_small_as_asked(open_cache: Open) -> None:
    assert {size for size, _ in _pixels(open_cache(30))} == {(33, 30), (30, 45)}


@pytest.mark.parametrize("short_side", [0, 30])
@pytest.mark.parametrize("views_per_read", [1, 2])
def test_batches_are_bit_for_bit_the_same(open_cache: Open, folder: Path, short_side: int, views_per_read: int) -> None:
    config = DataConfig(augment="rrc", auto_augment="rand-m9-mstd0.5-inc1", reprob=0.5, short_side=short_side)
    transform = train_transform(resolve_view(config, _MODEL))
    order = TrainingOrder(np.arange(18), 4, seed=1, views=2, views_per_read=views_per_read)

    def loaded(source: Source, workers: int) -> list[Batch]:
        batches = Batches(source, transform, order, seed=3, views_per_read=views_per_read, probes=Dealing(18, 18))
        return list(load(batches, range(8), workers, CPU))

    without = loaded(_source(folder), 0)
    for workers in (0, 2):
        for one, other in zip(without, loaded(open_cache(short_side), workers), strict=True):
            assert torch.equal(one.images, other.images)
            assert one.probe_crc == other.probe_crc


def test_it_is_filled_once_and_nothing_is_decoded_again(
    open_cache: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _pixels(open_cache())
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    monkeypatch.setattr(ImageFolder, "decode", lambda *_: pytest.fail("decoded"))
    assert _pixels(open_cache()) == before
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == stamps


def test_it_pickles(open_cache: Open) -> None:
    cache = open_cache()
    assert _pixels(pickle.loads(pickle.dumps(cache))) == _pixels(cache)


def test_without_a_folder_it_is_the_source_itself(folder: Path) -> None:
    source = _source(folder)
    assert cached(source, DataConfig(), "train", None, World(CPU), QUIET) is source
    assert bill(DataConfig(), (source, "train", None)) == {"cache_bytes": None, "cache_free_bytes": None}


def test_a_bill_says_what_is_still_to_be_written(open_cache: Open, folder: Path, tmp_path: Path) -> None:
    config = DataConfig(cache=str(tmp_path / "cache"))

    def asked() -> int:
        need, free = bill(config, (_source(folder), "train", None), (None, "val", None)).values()
        assert need is not None
        assert free is not None
        assert free > 2**20
        return need

    # The mean of all images, rounded down.
    assert asked() == 18 * (3 * (17 * 40 * 36 + 60 * 90) // 18)
    assert not (tmp_path / "cache").exists()
    open_cache()
    assert asked() == 0
    (tmp_path / "cache/train/shard-00001.rgb").unlink()
    assert asked() == 4 * (3 * 40 * 36)


# Images that do not decode.


def test_an_unreadable_image_ends_the_filling_and_what_was_whole_stays(
    open_cache: Open, folder: Path, tmp_path: Path
) -> None:
    path = folder / "train" / _source(folder).keys[9]
    content = path.read_bytes()
    path.write_bytes(b"")
    for workers in (0, 2):
        with pytest.raises(UnreadableImage, match=re.escape(f"{path}: cannot be decoded (")):
            open_cache(workers=workers)
    assert {"shard-00000.rgb", "shard-00001.rgb"} <= _files(tmp_path).keys()
    assert not {"shard-00002.rgb", "manifest.json"} & _files(tmp_path).keys()
    path.write_bytes(content)
    assert _pixels(open_cache()) == _pixels(_source(folder))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_skipped_image_is_remembered_with_what_was_said(open_cache: Open, folder: Path, workers: int) -> None:
    source = _source(folder)
    (folder / "train" / source.keys[9]).write_bytes(b"")
    cache = open_cache(skip_unreadable=True, workers=workers)
    with pytest.raises(UnreadableImage) as expected:
        source.read(9)
    shutil.copy(folder / "train" / source.keys[8], folder / "train" / source.keys[9])
    for again in (cache, open_cache()):
        with pytest.raises(UnreadableImage) as caught:
            again.read(9)
        assert str(caught.value) == str(expected.value)
    assert cache.read(10).tobytes() == source.read(10).tobytes()


# Other caches.


def test_a_cache_of_another_size_is_refused(open_cache: Open) -> None:
    open_cache()
    with pytest.raises(
        MismatchError, match=r"/cache/train: is a cache of other images \(short_side: 0, 30: there, asked"
    ):
        open_cache(30)


def test_a_cache_of_other_names_is_refused(open_cache: Open, folder: Path) -> None:
    open_cache()
    path = folder / "train" / _source(folder).keys[0]
    path.rename(path.with_name(f"other{path.suffix}"))
    with pytest.raises(MismatchError, match=r"\(keys_sha256: [0-9a-f]{12}, [0-9a-f]{12}: there, asked\)") as caught:
        open_cache()
    assert caught.value.exit_code == 3


def test_a_cache_by_another_decoder_is_refused(open_cache: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    open_cache()
    monkeypatch.setattr(image_cache, "_decoders", lambda: {"pillow": "9.0.0", "libjpeg": "2.0", "libwebp": "1.0"})
    with pytest.raises(
        MismatchError, match=r"\(libjpeg: \d\S+, 2\.0; libwebp: \d\S+, 1\.0; pillow: \d\S+, 9\.0\.0: there"
    ):
        open_cache()


def test_other_images_of_the_same_names_are_refused(open_cache: Open, folder: Path) -> None:
    open_cache()
    first, other = (folder / "train" / _source(folder).keys[i] for i in (0, 2))
    shutil.copy(other, first)
    with pytest.raises(MismatchError, match=r"its \S+ is not that of the data; give another --cache, or delete this"):
        open_cache()


def test_a_folder_of_something_else_is_refused(open_cache: Open, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache/train").mkdir(parents=True)
    (tmp_path / "cache/train/a.txt").touch()
    with pytest.raises(UsageError, match="is not empty and not a cache of images; choose another --cache"):
        open_cache()
    config = DataConfig(cache=str(folder / "cache"), path=str(folder))
    with pytest.raises(UsageError, match=r"--cache .*: lies in the data, .*, and would be listed with it"):
        cached(_source(folder), config, "train", None, World(CPU), QUIET)
    assert not (folder / "cache").exists()


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"images": 1}'])
def test_an_identity_that_is_none_is_refused(open_cache: Open, tmp_path: Path, content: str) -> None:
    open_cache()
    (tmp_path / "cache/train/cache.json").write_text(content)
    with pytest.raises(DamagedError, match=r"cache\.json: not that of a cache \(.*\); delete the folder"):
        open_cache()


# Damage.


def _flipped(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("place", [5000, -100, -20, -75], ids=["pixel", "index", "checksum", "length"])
def test_damage_is_warned_of_and_made_again(
    open_cache: Open, folder: Path, tmp_path: Path, place: int, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    open_cache()
    before, shard = _files(tmp_path), tmp_path / "cache/train/shard-00002.rgb"
    _flipped(shard, place)
    cache = open_cache()
    order = TrainingOrder(np.arange(18), 18, seed=0, views=1)
    transform = train_transform(resolve_view(DataConfig(augment="none"), _MODEL))
    (found,), (expected,) = (
        list(load(Batches(source, transform, order), range(1), workers, CPU)) for source in (cache, _source(folder))
    )
    assert torch.equal(found.images, expected.images)
    said = capfd.readouterr().err
    assert said.startswith(f"warning: {shard}: damaged")
    assert said.endswith("; its images are decoded anew, and the next start makes it again\n")
    assert said.count("\n") == 1
    assert not shard.exists()
    open_cache()
    assert _files(tmp_path) == before


def test_a_shard_is_read_again_only_where_it_is_right(open_cache: Open, tmp_path: Path) -> None:
    """Its pixels are looked at once in a process."""
    cache = open_cache()
    before = cache.read(8).tobytes()
    _flipped(tmp_path / "cache/train/shard-00002.rgb", 0)
    assert cache.read(8).tobytes() != before
    assert pickle.loads(pickle.dumps(replace(cache))).read(8).tobytes() == before


@pytest.mark.parametrize("damage", ["cut", "missing", "of another place", "empty", "no manifest", "bad manifest"])
def test_what_a_start_finds_wrong_is_made_again(open_cache: Open, tmp_path: Path, damage: str) -> None:
    open_cache()
    before, root = _files(tmp_path), tmp_path / "cache/train"
    shard = root / "shard-00001.rgb"
    if damage == "cut":
        os.truncate(shard, 3000)
    elif damage == "missing":
        shard.unlink()
    elif damage == "of another place":
        shutil.copy(root / "shard-00000.rgb", shard)
    elif damage == "empty":
        shard.write_bytes(b"")
    elif damage == "no manifest":
        (root / "manifest.json").unlink()
    else:
        (root / "manifest.json").write_text("[]")
    open_cache()
    assert _files(tmp_path) == before


def test_a_shard_that_goes_while_it_is_read_is_done_without(
    open_cache: Open, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = open_cache()
    cache.read(4)
    (tmp_path / "cache/train/shard-00001.rgb").unlink()
    assert _pixels(cache) == _pixels(_source(folder))
    assert capfd.readouterr().err.count("cannot be read (No such file or directory); its images") == 1


# Filling, disturbed.


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    open_cache: Open, folder: Path, tmp_path: Path, workers: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_cache.os, "fsync", _full)
        patch.setattr("distill_cli.files.fsync_directory", lambda _: None)
        patch.setattr(image_cache, "write_json", lambda path, table: path.write_text(json.dumps(table)))
        with pytest.raises(
            DistillError, match=r"cache/train: no space left on device; free some space, or choose anot"
        ):
            open_cache(workers=workers)
    assert list(_files(tmp_path)) == ["cache.json"]
    assert _pixels(open_cache()) == _pixels(_source(folder))


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    open_cache: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_cache, "free_bytes", lambda _: 50_000)
    with pytest.raises(UsageError, match=r"--cache: 18 images in .* take about 0\.0 GB, 0\.0 GB are free; free some"):
        open_cache()
    assert not (tmp_path / "cache").exists()


def _in_child(work: Callable[[], object]) -> int:
    """Start it in a process of its own; gives its pid."""
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            work()
        finally:
            os._exit(0)
    return child


def test_killed_at_many_moments_the_same_command_finishes(open_cache: Open, tmp_path: Path) -> None:
    start = time.monotonic()
    os.waitpid(_in_child(lambda: open_cache(workers=2)), 0)
    undisturbed = time.monotonic() - start
    whole = _files(tmp_path)
    draw, kills = np.random.default_rng(0), 0
    for number in range(20):
        if number % 5 == 0:
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        child = _in_child(lambda: open_cache(workers=2))
        time.sleep(draw.uniform(0, undisturbed))
        os.kill(child, signal.SIGKILL)
        kills += os.waitpid(child, 0)[1] == signal.SIGKILL
        found = _files(tmp_path) if (tmp_path / "cache/train").exists() else {}
        assert {name: content for name, content in found.items() if not name.startswith(".")}.items() <= whole.items()
    # A machine that was busy at first and is not any more leaves fewer of them in time.
    assert kills > 0
    open_cache(workers=2)
    found = _files(tmp_path)
    # Of one that was killed when the work was done.
    found.pop(".lock", None)
    assert found == whole


def test_a_worker_that_dies_is_one_line_and_the_same_command_goes_on(
    open_cache: Open, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, here = ImageFolder.read_with_crc, os.getpid()

    def die(self: ImageFolder, sample_id: int) -> Any:
        if sample_id == 9 and os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, sample_id)

    with monkeypatch.context() as patch:
        patch.setattr(ImageFolder, "read_with_crc", die)
        # RuntimeError where the signal comes while this process gives a shard its name; the command line says the same.
        with pytest.raises((DistillError, RuntimeError), match=r"DataLoader worker .*"):
            open_cache(workers=1)
    assert not {"shard-00002.rgb", "manifest.json"} & _files(tmp_path).keys()
    assert _pixels(open_cache(workers=1)) == _pixels(_source(folder))
    assert not [name for name in _files(tmp_path) if name.startswith(".")]


def test_a_signal_keeps_whole_shards(open_cache: Open, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    read = ImageFolder.read_with_crc

    def signalled(self: ImageFolder, sample_id: int) -> Any:
        if sample_id == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self, sample_id)

    with monkeypatch.context() as patch:
        patch.setattr(ImageFolder, "read_with_crc", signalled)
        with pytest.raises(Stopped, match=r"SIGTERM: .*/cache/train: whole shards are kept; the same command goes on"):
            open_cache()
    assert list(_files(tmp_path)) == ["cache.json", "shard-00000.rgb", "shard-00001.rgb"]
    assert _pixels(open_cache()) == _pixels(_source(folder))


def test_two_processes_share_the_work(open_cache: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_cache()
    whole = _files(tmp_path)
    shutil.rmtree(tmp_path / "cache")
    read, log = ImageFolder.read_with_crc, tmp_path / "log"

    def noted(self: ImageFolder, sample_id: int) -> Any:
        with log.open("a") as file:
            file.write(f"{os.getpid()} {sample_id}\n")
        time.sleep(0.02)
        return read(self, sample_id)

    # What measures and proves reads too.
    monkeypatch.setattr(image_cache, "_mean_bytes", lambda *_: 5000)
    monkeypatch.setattr(image_cache, "PROBES", 0)
    monkeypatch.setattr(ImageFolder, "read_with_crc", noted)
    children = [_in_child(open_cache) for _ in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    lines = [line.split() for line in log.read_text().splitlines()]
    assert sorted(int(sample_id) for _, sample_id in lines) == list(range(18))
    assert len({pid for pid, _ in lines}) > 1
    assert _files(tmp_path) == whole


def test_the_shard_of_a_process_that_is_killed_is_taken_over(
    open_cache: Open, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """… by another that waits for it."""
    read, here = ImageFolder.read_with_crc, os.getpid()
    monkeypatch.setattr(image_cache, "PROBES", 0)
    began = multiprocessing.get_context("fork").Event()

    def hang(self: ImageFolder, sample_id: int) -> Any:
        if sample_id == 9 and os.getpid() != here:
            began.set()
            time.sleep(60)
        return read(self, sample_id)

    monkeypatch.setattr(image_cache, "_mean_bytes", lambda *_: 5000)
    monkeypatch.setattr(ImageFolder, "read_with_crc", hang)
    child = _in_child(open_cache)
    assert began.wait(30)
    killer = _in_child(lambda: (time.sleep(1), os.kill(child, signal.SIGKILL)))
    cache = open_cache()
    os.waitpid(child, 0)
    os.waitpid(killer, 0)
    assert _pixels(cache) == _pixels(_source(folder))
    assert "manifest.json" in _files(tmp_path)
