"""The options that change how fast pixels are made, and which: `data.resize`, `data.decode`."""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from distill_cli.data import open_source
from distill_cli.data.batch import Batch
from distill_cli.data.batches import Batches
from distill_cli.data.config import DataConfig, View
from distill_cli.data.crops import TORCHS, RandomResizedCrop, reduction, resize, resize_by_torch, resized
from distill_cli.data.images import Encoded, UnreadableImage
from distill_cli.data.loader import load
from distill_cli.data.orders import ListingOrder, TrainingOrder
from distill_cli.data.pixels import Pixels
from distill_cli.data.sources import Source, fingerprint
from distill_cli.data.tensors import Undecoded
from distill_cli.data.views import check_decoder, read_view, resolve_view, stored_view, train_transform
from distill_cli.errors import MismatchError, UsageError
from distill_cli.randomness import preserved, seed_everything
from distill_cli.replay import prove_replay
from distill_cli.software import versions
from distill_cli.store.dealing import Dealing
from distill_cli.store.plan import Plan
from distill_cli.store.reader import Store
from distill_cli.store.rows import Rows
from distill_cli.store.writer import StoreWriter

CPU = torch.device("cpu")
SIZE = 48
MODEL = {
    "input_size": (3, SIZE, SIZE),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.25),
    "interpolation": "bicubic",
    "crop_pct": 0.9,
}

DEALING = Dealing(100, 100)


@pytest.fixture(autouse=True)
def _generators() -> Iterator[None]:
    with preserved():
        yield


def _view(**asked: Any) -> View:
    return resolve_view(DataConfig(augment="rrc", **asked), MODEL)


def _photograph(number: int, size: tuple[int, int]) -> Image.Image:
    """Smooth, with a little grain."""
    rng = np.random.default_rng(number)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = rng.normal(0, 6, (*size[::-1], 3))
    return Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8))


def _jpeg(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 images, large and small; not to be written to. JPEGs of every kind, but 3 and 4, a PNG and a CMYK one."""
    root = tmp_path_factory.mktemp("jpegs")
    (root / "a").mkdir()
    sizes = [(401, 300), (90, 120), (640, 480)] * 4
    for number, size in enumerate(sizes):
        picture, path = _photograph(number, size), root / "a" / f"{number:02d}.jpg"
        if number == 3:
            picture.save(path.with_suffix(".png"))
        elif number == 4:
            path.write_bytes(_jpeg(picture.convert("CMYK")))
        else:
            picture = picture.convert("L") if number == 5 else picture
            path.write_bytes(_jpeg(picture, subsampling=number % 3, progressive=number % 2 == 0))
    return root


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    found = open_source(str(folder), "train")
    assert found is not None
    return found


@pytest.fixture
def cut(folder: Path, tmp_path: Path) -> Source:
    """The images, sample 1 of which ends too early, after a good header."""
    (tmp_path / "a").mkdir()
    for path in (folder / "a").iterdir():
        (tmp_path / "a" / path.name).write_bytes(path.read_bytes())
    found = open_source(str(tmp_path), "train")
    assert found is not None
    path = tmp_path / found.keys[1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return found


# Resizing by torch.


@pytest.mark.parametrize("resampling", TORCHS)
@pytest.mark.parametrize("size", [(48, 48), (31, 77), (300, 200), (97, 64)])
def test_torch_resizes_as_pillow_does_to_a_level_or_two(resampling: Image.Resampling, size: tuple[int, int]) -> None:
    image = _photograph(0, (97, 64))
    theirs, ours = (np.asarray(by(image, *size, resampling)).astype(int) for by in (resize, resize_by_torch))
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 2
    assert (ours != theirs).mean() < 0.02


@pytest.mark.parametrize("resampling", TORCHS)
def test_floats_are_resized_as_bytes_are_to_a_level(resampling: Image.Resampling) -> None:
    """A GPU has no filters for bytes."""
    pixels = torch.from_numpy(np.array(_photograph(0, (97, 64)))).permute(2, 0, 1)[None]
    whole, floats = (resized(one, 40, 50, resampling) for one in (pixels, pixels.float()))
    assert (whole.dtype, floats.dtype, floats.shape) == (torch.uint8, torch.uint8, (1, 3, 50, 40))
    assert (whole.int() - floats.int()).abs().max() <= 1


@pytest.mark.parametrize("asked", [{"resize": "torch"}, {"decode": "torch"}], ids=str)
def test_the_crops_are_those_of_pillow(asked: dict[str, Any], source: Source) -> None:
    """Of the images that both decode to the same pixels: those of Pillow."""
    plain, other = (train_transform(_view(**more, vflip=0.5)) for more in ({}, asked))
    ids = list(range(len(source)))
    images = [source.read(i) for i in ids]
    theirs, ours = (transform.draw(images, 3, 1, ids) for transform in (plain, other))
    assert isinstance(theirs, Pixels)
    assert isinstance(ours, Pixels)
    assert (theirs.images.int() - ours.images.int()).abs().max() <= 3


# Decoding a JPEG at a part of its size.


@given(st.floats(0, 1000), st.floats(0, 1000), st.floats(1, 3000), st.floats(1, 3000), st.integers(8, 500))
def test_the_largest_reduction_is_taken_that_leaves_enough(
    left: float, top: float, width: float, height: float, size: int
) -> None:
    by = reduction((left, top, left + width, top + height), size)
    least = min(width, height)
    assert by == 1 or least + 1e-3 >= by * size
    assert by == 8 or least - 1e-3 < 2 * by * size


@given(st.integers(8, 700), st.integers(8, 700), st.sampled_from([1, 2, 4, 8]))
def test_a_jpeg_is_reduced_by_what_was_asked(width: int, height: int, by: int) -> None:
    encoded = Encoded(_jpeg(Image.new("RGB", (width, height))), "x")
    assert encoded.decoded(by).size == (-(-width // by), -(-height // by))


def _reductions(source: Source, view: View, monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """By what each image is reduced in eight views."""
    found: dict[int, list[int]] = {i: [] for i in range(len(source))}
    plain = Encoded.decoded

    def spy(self: Encoded, by: int = 1) -> Image.Image:
        found[place].append(by)
        return plain(self, by)

    monkeypatch.setattr(Encoded, "decoded", spy)
    transform = train_transform(view)
    for place in found:
        for number in range(8):
            transform.draw([transform.read(source, place)], 0, number, [place])
    return found


def test_what_is_decoded_depends_on_the_crop(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    reduced = _reductions(source, _view(decode="reduced"), monkeypatch)
    assert {by for number in (0, 2, 5) for by in reduced[number]} >= {2, 4, 8}
    assert set(reduced[1]) <= {1, 2}
    assert {len(views) for views in reduced.values()} == {8}
    monkeypatch.undo()
    assert {by for views in _reductions(source, _view(), monkeypatch).values() for by in views} == {1}


@pytest.mark.parametrize("augment", ["rrc", "src", "pad-crop"])
@pytest.mark.parametrize("resize", ["pillow", "torch"])
def test_a_reduced_image_shows_the_same_crop(augment: str, resize: str, source: Source) -> None:
    """To half a pixel; measured after a blur."""
    view = replace(_view(decode="reduced", resize=resize), augment=augment)
    reduced, full = train_transform(view), train_transform(replace(view, decode="full"))
    for number in range(24):
        i = number % len(source)
        seen = [one.pixels_of(source, 5, number, i).images for one in (reduced, full)]
        small = [torch.nn.functional.avg_pool2d(one.float(), 8) for one in seen]
        assert (small[0] - small[1]).abs().mean() < 8
        if i == 3:
            assert torch.equal(*seen)


def test_a_view_of_its_own_size_sees_the_same_box_reduced(source: Source) -> None:
    """A student's, which may reduce an image further than its teacher does."""
    taught = _view(decode="reduced")
    theirs, ours = train_transform(taught), train_transform(taught, replace(taught, image_size=24))
    for i in range(len(source)):
        seen = [one.pixels_of(source, 5, 2, i).images.float() for one in (theirs, ours)]
        small = [torch.nn.functional.interpolate(one, 6, mode="area") for one in seen]
        assert (small[0] - small[1]).abs().mean() < 8


# Whatever the work is cut into.


@pytest.mark.parametrize(
    "asked", [{"decode": "reduced"}, {"decode": "reduced", "resize": "torch"}, {"decode": "torch"}]
)
@pytest.mark.parametrize("workers", [0, 2])
def test_several_views_of_a_batch_are_each_as_alone(asked: dict[str, Any], workers: int, source: Source) -> None:
    transform = train_transform(_view(**asked, reprob=0.5))
    order = TrainingOrder(np.arange(len(source)), 8, seed=0, views=4, views_per_read=2)
    batches = Batches(source, transform, order, seed=3, views_per_read=2)
    for number, batch in enumerate(load(batches, range(4), workers, CPU)):
        first, ids = order(number)
        alone = [
            Batches(source, transform, lambda _, v=view, i=[i]: (v, np.array(i)), seed=3).load(0).images  # type: ignore[misc]
            for view in (first, first + 1)
            for i in ids
        ]
        assert torch.equal(batch.images, torch.cat(alone))


@pytest.mark.parametrize("decode", ["full", "reduced", "torch"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_fails_late_is_one_line_or_skipped(decode: str, workers: int, cut: Source) -> None:
    transform, order = train_transform(_view(decode=decode)), ListingOrder(np.arange(4), 4)
    with pytest.raises(UnreadableImage, match=f"{cut.keys[1]}: cannot be decoded .* by --skip-unreadable") as caught:
        list(load(Batches(cut, transform, order), range(1), workers, CPU))
    assert "\n" not in str(caught.value)
    (batch,) = load(Batches(cut, transform, order, skip_unreadable=True, probes=DEALING), range(1), workers, CPU)
    assert (batch.sample_ids.tolist(), len(batch.skipped), len(batch.probe_crc)) == ([0, 2, 3], 1, 3)
    whole = Batches(cut, transform, lambda _: (0, np.array([0, 2, 3])), probes=DEALING).load(0)
    assert torch.equal(batch.images, whole.images)
    assert batch.probe_crc == whole.probe_crc


# Part of the replay identity.


def test_the_defaults_are_not_in_a_plan_and_the_others_are() -> None:
    assert not {"resize", "decode"} & _view().table.keys()
    table = json.loads(json.dumps(_view(resize="torch", decode="reduced").table))
    assert (table["resize"], table["decode"]) == ("torch", "reduced")
    assert read_view(table) == _view(resize="torch", decode="reduced")


@pytest.mark.parametrize(("name", "value", "has"), [("resize", "torch", "pillow"), ("decode", "reduced", "full")])
def test_another_value_than_the_stores_is_refused(name: str, value: str, has: str) -> None:
    line = f"^data.{name}: {value} asked, the store has {has}; leave it out, or write a store with it$"
    with pytest.raises(MismatchError, match=line):
        stored_view(DataConfig(**{name: value}), _view().table)


@pytest.mark.parametrize("other", [{"resize": "torch"}, {"decode": "reduced"}, {"decode": "torch"}], ids=str)
def test_the_proof_tells_the_pixels_apart(
    other: dict[str, Any],
    source: Source,
    tmp_path: Path,
    make_plan: Callable[..., Plan],
    make_rows: Callable[..., Rows],
) -> None:
    view = _view(**other, reprob=0.5)
    plan = make_plan(
        data=fingerprint(source), transform=view.table, samples=len(source), shard_rows=12, seed=2, software=versions()
    )
    writer = StoreWriter(tmp_path, plan)
    ids = plan.dealing.sample_ids(0)
    found = Batches(source, train_transform(view), lambda _: (0, ids), seed=2, probes=plan.dealing).load(0).probe_crc
    writer.write(0, 0, make_rows(plan, 0, 0), np.array([found[i] for i in ids[:4].tolist()], np.uint32))
    writer.finish()
    assert prove_replay(Store(tmp_path), source, train_transform(view)) == 4
    with pytest.raises(MismatchError, match="does not replay to the pixels"):
        prove_replay(Store(tmp_path), source, train_transform(replace(view, resize="pillow", decode="full")))


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"resize": "torch", "augment": "none"}, "data.resize=torch: is of training views, and data.augment is none"),
        ({"decode": "reduced", "augment": "none"}, "data.decode=reduced: is of training views"),
        ({"decode": "cuda", "augment": "src"}, "data.decode=cuda: has augment rrc, .* not augment src; leave that out"),
        ({"decode": "torch", "auto_augment": "augmix-m3-w3"}, "data.decode=torch: .*, not auto_augment augmix-m3-w3;"),
        ({"decode": "torch", "color_jitter": 0.3, "resize": "torch"}, ".* not color_jitter 0.3, resize torch; leave"),
    ],
)
def test_what_does_not_go_together_is_one_line(asked: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError, match=f"^{line}") as caught:
        resolve_view(DataConfig(**{"augment": "rrc", **asked}), MODEL)
    assert "\n" not in str(caught.value)


def test_a_filter_that_torch_lacks_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^data.resize=torch: torch has no filter 'lanczos'; give data.interpolation"):
        resolve_view(DataConfig(augment="rrc", resize="torch"), {**MODEL, "interpolation": "lanczos"})


# On a GPU.


def test_what_a_gpu_decodes_is_refused_elsewhere() -> None:
    view = _view(decode="cuda")
    with pytest.raises(
        UsageError, match=r"^data.decode=cuda: decodes on a GPU, the work is done on cpu; give"
    ) as usage:
        check_decoder(view, CPU)
    with pytest.raises(MismatchError, match=r"^store S: its teacher saw what a GPU decoded") as mismatch:
        check_decoder(view, CPU, "S")
    assert (usage.value.exit_code, mismatch.value.exit_code) == (2, 3)
    check_decoder(view, torch.device("cuda"))
    check_decoder(_view(decode="torch"), CPU, "S")


def _both(source: Source, **more: Any) -> tuple[list[Batch], list[Batch]]:
    """What a GPU would do, done here, and `decode = "torch"`: two views, two batches."""
    found = []
    for decode in ("cuda", "torch"):
        transform = train_transform(_view(decode=decode, auto_augment="trivial", reprob=0.5, vflip=0.3))
        order = TrainingOrder(np.arange(len(source)), 8, seed=0, views=4, views_per_read=2)
        batches = Batches(source, transform, order, seed=3, views_per_read=2, probes=DEALING, **more)
        found.append([*load(batches, range(2), 0, CPU), *load(batches, range(2, 4), 2, CPU)])
    return found[0], found[1]


def test_the_work_of_the_device_is_that_of_a_loader_process(source: Source) -> None:
    """But for the decoder all of it is the same code: JPEGs, grey, CMYK, a PNG, erased boxes, checksums."""
    for one, other in zip(*_both(source), strict=True):
        assert torch.equal(one.images, other.images)
        assert (one.sample_ids.tolist(), one.probe_crc) == (other.sample_ids.tolist(), other.probe_crc)
        assert torch.equal(one.labels, other.labels)


def test_an_image_that_the_device_cannot_decode_is_one_line_or_skipped(cut: Source) -> None:
    with pytest.raises(UnreadableImage, match=f"{cut.keys[1]}: cannot be decoded") as caught:
        _both(cut)
    assert "\n" not in str(caught.value)
    seen = _both(cut, skip_unreadable=True)
    assert sum(len(batch.skipped) for batch in seen[0]) > 0
    for one, other in zip(*seen, strict=True):
        assert torch.equal(one.images, other.images)
        assert (one.sample_ids.tolist(), one.skipped, one.probe_crc) == (
            other.sample_ids.tolist(),
            other.skipped,
            other.probe_crc,
        )


def test_what_crosses_to_the_device_is_the_files(source: Source) -> None:
    transform = train_transform(_view(decode="cuda"))
    drawn = transform.draw([transform.read(source, i) for i in range(3)], 0, 0, range(3))
    assert isinstance(drawn, Undecoded)
    assert drawn.given.numpy().tobytes() == b"".join(source.content(i) for i in range(3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: nvJPEG decodes on a GPU alone")
def test_a_gpu_decodes_what_libjpeg_does_to_a_few_levels(source: Source) -> None:
    transform = train_transform(_view(decode="cuda"))
    here = train_transform(_view(decode="torch"))
    device = torch.device("cuda")
    batches, expected = (
        Batches(source, one, ListingOrder(np.arange(len(source)), 12), probes=DEALING) for one in (transform, here)
    )
    (batch,) = load(batches, range(1), 2, device)
    assert batch.images.device.type == "cuda"
    difference = (batch.images.cpu() - expected.load(0).images).abs()
    assert difference.mean() < 0.05
    again = transform.pixels_of(source, 0, 0, 0)
    assert again.checksum(0) == batch.probe_crc[0]


def test_a_crop_reads_the_size_alone() -> None:
    """And draws the same from a header as from an image."""
    crop = RandomResizedCrop(48, (0.1, 1.0), (0.7, 1.3), "random")
    encoded = Encoded(_jpeg(_photograph(1, (200, 150))), "x")
    drawn = []
    for image in (encoded.header, encoded.decoded()):
        seed_everything(4)
        drawn.append(crop.draw(image))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"decode": "reduced", "short_side": 32}, "data.decode=reduced: decodes for each crop, and data.short_side"),
        ({"decode": "cuda", "mixup": 0.8}, "data.decode=cuda: does not mix images; give data.decode=torch"),
    ],
)
def test_what_decodes_late_is_not_resized_before_and_on_a_gpu_not_mixed(asked: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        _view(**asked)
