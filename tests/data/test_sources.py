import gzip
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill_cli.data import open_source, open_train, open_val
from distill_cli.data.config import DataConfig
from distill_cli.data.folder import ImageFolder
from distill_cli.data.idx import ArraySource
from distill_cli.data.sources import Source, UnreadableImage, check_classes, fingerprint, without_labels
from distill_cli.data.sources import num_classes as classes_of
from distill_cli.errors import MismatchError, UsageError

Draw = Callable[[str], Path]


@pytest.fixture
def draw(tmp_path: Path, picture: Image.Image) -> Draw:
    """Put a real image at a path below `tmp_path`."""

    def at(relative: str) -> Path:
        path = tmp_path / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        return path

    return at


def _open(folder: Path, split: str = "train") -> Source:
    source = open_source(str(folder), split)
    assert source is not None
    return source


def _labels(source: Source) -> list[int]:
    assert source.labels is not None
    return source.labels.tolist()


# Folders.


def test_a_folder_is_listed_by_class_and_name(draw: Draw, tmp_path: Path) -> None:
    for name in ("train/b/2.png", "train/b/10.png", "train/a/z.JPG", "train/c c/1.jpeg"):
        draw(name)
    source = _open(tmp_path)
    assert list(source.keys) == ["a/z.JPG", "b/10.png", "b/2.png", "c c/1.jpeg"]
    assert (_labels(source), source.classes) == ([0, 1, 1, 2], ("a", "b", "c c"))


def test_images_are_found_at_any_depth_and_other_files_are_not(draw: Draw, tmp_path: Path) -> None:
    draw("a/deep/er/1.png")
    draw("a/0.png")
    (tmp_path / "a" / "notes.txt").touch()
    (tmp_path / "README.md").touch()
    assert list(_open(tmp_path).keys) == ["a/0.png", "a/deep/er/1.png"]


@pytest.mark.parametrize("hidden", ["train/.cache/1.png", "train/a/.ipynb_checkpoints/1.png", "train/a/._1.png"])
def test_what_is_hidden_is_no_image(draw: Draw, tmp_path: Path, hidden: str) -> None:
    draw("train/a/1.png")
    draw(hidden)
    assert (list(_open(tmp_path).keys), _open(tmp_path).classes) == (["a/1.png"], ("a",))


def test_hidden_folders_do_not_fill_a_flat_folder(draw: Draw, tmp_path: Path) -> None:
    draw("1.png")
    draw(".thumbnails/1.png")
    assert list(_open(tmp_path).keys) == ["1.png"]


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_the_validation_split_has_three_names(draw: Draw, tmp_path: Path, name: str) -> None:
    draw("train/a/1.png")
    draw(f"{name}/a/2.png")
    assert list(_open(tmp_path, "val").keys) == ["a/2.png"]
    assert list(_open(tmp_path, "train").keys) == ["a/1.png"]


def test_val_is_taken_before_test(draw: Draw, tmp_path: Path) -> None:
    """ImageNet as it is handed out: test/ is flat and has no labels."""
    for name in ("train/a/1.png", "val/a/2.png", "test/3.png"):
        draw(name)
    assert list(_open(tmp_path, "val").keys) == ["a/2.png"]


def test_one_tree_is_a_train_split_only(draw: Draw, tmp_path: Path) -> None:
    draw("a/1.png")
    assert _labels(_open(tmp_path)) == [0]
    assert open_source(str(tmp_path), "val") is None


def test_images_without_class_folders_have_no_labels(draw: Draw, tmp_path: Path) -> None:
    draw("2.png")
    draw("1.png")
    source = _open(tmp_path)
    assert (list(source.keys), source.labels, source.classes) == (["1.png", "2.png"], None, None)
    assert classes_of(source) is None


def test_an_empty_class_folder_is_refused(draw: Draw, tmp_path: Path) -> None:
    draw("a/1.png")
    (tmp_path / "b").mkdir()
    with pytest.raises(UsageError, match="b: no images in this class folder; add some, or remove the folder"):
        _open(tmp_path)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no images .*; give a folder of class folders or of images") as caught:
        _open(tmp_path)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("path", "message"), [("nowhere", "no such folder or file"), ("a.png", "is a file"), ("hf:x", "no such folder")]
)
def test_what_is_no_folder_is_refused(
    draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    draw("a.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"--data {path}: {message}"):
        open_source(path, "train")


def test_data_without_a_train_split_is_refused(draw: Draw, tmp_path: Path) -> None:
    draw("val/a/1.png")
    with pytest.raises(UsageError, match="has no train split; name its folder directly"):
        open_train(DataConfig(path=str(tmp_path)))
    with pytest.raises(UsageError, match="--data is missing"):
        open_train(DataConfig())


def test_validation_images_may_lie_elsewhere(draw: Draw, tmp_path: Path) -> None:
    draw("one/train/a/1.png")
    draw("two/a/2.png")
    source = open_val(DataConfig(path=str(tmp_path / "one"), val=str(tmp_path / "two")))
    assert source is not None
    assert list(source.keys) == ["a/2.png"]
    assert open_val(DataConfig(path=str(tmp_path / "two"))) is None


def test_an_image_is_read_as_rgb(image_folder: Path) -> None:
    source = _open(image_folder)
    assert {(source.read(i).mode, source.read(i).size) for i in range(len(source))} == {("RGB", (40, 36))}


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_an_image_of_any_mode_is_read_as_rgb(picture: Image.Image, tmp_path: Path, mode: str) -> None:
    path = tmp_path / f"a.{'tif' if mode == 'CMYK' else 'png'}"
    picture.convert(mode).save(path)
    image = _open(tmp_path).read(0)
    assert image.mode == "RGB"
    assert image.tobytes() == picture.convert(mode).convert("RGB").tobytes()


def test_a_palette_with_transparency_is_read_without_a_warning(picture: Image.Image, tmp_path: Path) -> None:
    picture.convert("P").save(tmp_path / "a.png", transparency=bytes(range(10)))
    assert _open(tmp_path).read(0).mode == "RGB"


def test_an_image_of_16_bits_keeps_its_tones(images: ArraySource, tmp_path: Path) -> None:
    """Pillow's own conversion makes all but the darkest 256 of the 65,536 tones white."""
    Image.fromarray(images.images[0].astype(np.uint16) * 257).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(_open(tmp_path).read(0))[..., 0], images.images[0])


@pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff\xe0 JFIF", b"GIF89a"])
def test_what_is_no_image_is_named_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(
        UnreadableImage, match=r"bad.jpg: cannot be decoded \(.*\); replace it, or .*--skip-un"
    ) as caught:
        _open(tmp_path).read(0)
    assert "\n" not in str(caught.value)
    assert str(caught.value).count(str(tmp_path)) == 1


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png"])
def test_an_image_cut_short_is_named(draw: Draw, tmp_path: Path, name: str) -> None:
    path = draw(name)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UnreadableImage, match=f"{name}: cannot be decoded"):
        _open(tmp_path).read(0)


def test_an_image_that_is_gone_is_named(draw: Draw, tmp_path: Path) -> None:
    source = _open(draw("a/1.png").parent.parent)
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(UnreadableImage, match=r"a/1\.png: cannot be decoded"):
        source.read(0)


def test_a_name_that_is_not_unicode_is_a_name(picture: Image.Image, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    picture.save(folder / "1.png")
    source = _open(tmp_path)
    assert source.read(0).size == picture.size
    assert len(fingerprint(source)["keys_sha256"] or "") == 64


# What every source has.


def test_a_fingerprint_stands_for_names_and_labels_wherever_the_folder_stands(draw: Draw, tmp_path: Path) -> None:
    draw("one/a/1.png")
    draw("one/b/2.png")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    one, two = _open(tmp_path / "one"), _open(tmp_path / "two")
    assert fingerprint(one) == fingerprint(two)
    (tmp_path / "two" / "b" / "2.png").rename(tmp_path / "two" / "b" / "3.png")
    assert fingerprint(_open(tmp_path / "two"))["keys_sha256"] != fingerprint(one)["keys_sha256"]
    assert fingerprint(_open(tmp_path / "two"))["labels_sha256"] == fingerprint(one)["labels_sha256"]


@pytest.mark.parametrize("kind", ["folder", "sample"])
def test_a_source_pickles_and_can_leave_its_labels_out(image_folder: Path, kind: str) -> None:
    source = open_source(str(image_folder) if kind == "folder" else "sample", "val")
    assert source is not None
    copy = pickle.loads(pickle.dumps(source))
    assert fingerprint(copy) == fingerprint(source)
    bare = without_labels(copy)
    assert (bare.labels, bare.classes, fingerprint(bare)["labels_sha256"]) == (None, None, None)
    assert bare.read(1).tobytes() == source.read(1).tobytes()


@pytest.mark.parametrize(
    ("count", "classes", "message"),
    [
        (4, None, "teacher x: has 4 classes, the data 3"),
        (3, ("boot", "dress", "shirt"), 'teacher x: class 1 is "dress", that of the data "coat"'),
    ],
)
def test_other_classes_are_refused(
    image_folder: Path, count: int, classes: tuple[str, ...] | None, message: str
) -> None:
    with pytest.raises(MismatchError, match=message):
        check_classes(_open(image_folder), "teacher x", count, classes)


def test_equal_or_unnamed_classes_are_taken(image_folder: Path) -> None:
    check_classes(_open(image_folder), "teacher x", 3, ("boot", "coat", "shirt"))
    check_classes(_open(image_folder), "teacher x", 3, None)
    check_classes(without_labels(_open(image_folder)), "teacher x", 1000, None)


# IDX files.


def _idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def idx(tmp_path: Path, images: ArraySource) -> Path:
    """7 + 3 images of the sample as MNIST's files, the training ones zipped."""
    assert images.labels is not None
    labels = images.labels.astype(np.uint8)
    for prefix, part in (("train", slice(0, 7)), ("t10k", slice(7, 10))):
        for name, array in (("images-idx3", images.images[part]), ("labels-idx1", labels[part])):
            content = _idx(array)
            zipped = prefix == "train"
            path = tmp_path / f"{prefix}-{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(content) if zipped else content)
    return tmp_path


@pytest.mark.parametrize(("split", "start", "count"), [("train", 0, 7), ("val", 7, 3)])
def test_idx_files_give_their_images_and_labels(
    idx: Path, images: ArraySource, split: str, start: int, count: int
) -> None:
    source = _open(idx, split)
    assert images.labels is not None
    assert _labels(source) == images.labels[start : start + count].tolist()
    assert list(source.keys) == [str(i) for i in range(count)]
    for i in range(count):
        assert source.read(i).tobytes() == images.read(start + i).tobytes()


def test_idx_images_alone_have_no_labels(idx: Path) -> None:
    (idx / "t10k-labels-idx1-ubyte").unlink()
    assert _open(idx, "val").labels is None


def test_an_idx_folder_of_one_split_has_no_other(idx: Path) -> None:
    for path in idx.glob("t10k*"):
        path.unlink()
    assert open_source(str(idx), "val") is None


def test_an_idx_source_pickles(idx: Path) -> None:
    source = _open(idx, "val")
    assert pickle.loads(pickle.dumps(source)).read(2).tobytes() == source.read(2).tobytes()


HEADER = bytes([0, 0, 8, 3])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as an IDX file"),
        (b"\0\0", "not an IDX file of uint8 with 3 dims"),
        (bytes([0, 0, 13, 3]) + bytes(100), r"not an IDX file of uint8 with 3 dims \(starts with"),
        (bytes([0, 0, 8, 1]) + bytes(100), "not an IDX file of uint8 with 3 dims"),
        (HEADER + struct.pack(">3I", 3, 28, 28) + bytes(100), r"116 bytes where its header \(3, 28, 28\) needs 2368"),
        (HEADER + struct.pack(">3I", 1, 2, 2) + bytes(5), r"21 bytes where its header \(1, 2, 2\) needs 20"),
        (HEADER + struct.pack(">3I", 2**31, 2**31, 4), r"16 bytes where its header .* needs"),
        (HEADER + struct.pack(">3I", 0, 28, 28), "no images"),
    ],
    ids=["empty", "two bytes", "doubles", "one dim", "cut short", "too long", "overflowing", "no images"],
)
def test_a_damaged_idx_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(UsageError, match=f"train-images-idx3-ubyte: {message}"):
        _open(tmp_path)


@pytest.mark.parametrize("damage", ["not zipped", "cut short", "bits flipped"])
def test_a_damaged_idx_gz_is_refused(idx: Path, damage: str) -> None:
    path = idx / "train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    flipped = content[:100] + bytes(10) + content[110:]
    path.write_bytes({"not zipped": b"abc", "cut short": content[:-50], "bits flipped": flipped}[damage])
    with pytest.raises(UsageError, match=r"cannot be read as an IDX file .*; fetch it again"):
        _open(idx)


def test_labels_of_other_images_are_refused(idx: Path) -> None:
    shutil.copy(idx / "train-labels-idx1-ubyte.gz", idx / "t10k-labels-idx1-ubyte.gz")
    (idx / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UsageError, match="7 labels for the 3 images of t10k-images-idx3-ubyte"):
        _open(idx, "val")


# The sample.


@pytest.mark.parametrize(("split", "each"), [("train", 1000), ("val", 200)])
def test_the_sample_has_ten_balanced_classes(split: str, each: int) -> None:
    source = open_source("sample", split)
    assert isinstance(source, ArraySource)
    assert len(source) == 10 * each
    assert np.bincount(_labels(source)).tolist() == [each] * 10
    assert len(set(source.classes or ())) == 10
    assert source.images.shape[1:] == (28, 28)


def test_the_samples_splits_share_no_image() -> None:
    train, val = (open_source("sample", split) for split in ("train", "val"))
    assert isinstance(train, ArraySource)
    assert isinstance(val, ArraySource)
    assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in val.images}


def test_a_folder_source_knows_where_it_stands(image_folder: Path) -> None:
    source = _open(image_folder, "val")
    assert isinstance(source, ImageFolder)
    assert all((source.root / key).is_file() for key in source.keys)
