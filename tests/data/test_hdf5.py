import io
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from distill_cli.data import open_source
from distill_cli.data.hdf5 import Hdf5Source
from distill_cli.data.idx import ArraySource
from distill_cli.data.sources import UnreadableImage
from distill_cli.errors import UsageError


def _write(path: Path, **datasets: Any) -> Path:
    with h5py.File(path, "w") as file:
        for name, value in datasets.items():
            file[name.replace("__", "/")] = value
    return path


def _open(path: Path, split: str = "train") -> Hdf5Source:
    source = open_source(str(path), split)
    assert isinstance(source, Hdf5Source)
    return source


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def grey(images: ArraySource) -> np.ndarray:
    return np.asarray(images.images[:5])


def test_grey_images_are_given_as_rgb(tmp_path: Path, grey: np.ndarray) -> None:
    source = _open(_write(tmp_path / "x.h5", images=grey, labels=np.arange(5, dtype=np.uint8)))
    assert (list(source.keys), source.classes) == (["0", "1", "2", "3", "4"], None)
    assert (source.labels is not None and source.labels.tolist()) == [0, 1, 2, 3, 4]
    assert np.array_equal(np.asarray(source.read(3)), np.repeat(grey[3][..., None], 3, axis=-1))


def test_one_group_of_images_is_a_train_split_only(tmp_path: Path, grey: np.ndarray) -> None:
    path = _write(tmp_path / "x.h5", images=grey)
    assert _open(path).labels is None
    assert open_source(str(path), "val") is None


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_groups_are_splits(tmp_path: Path, grey: np.ndarray, name: str) -> None:
    path = _write(tmp_path / "x.h5", **{"train__images": grey, f"{name}__images": grey[:2]})
    assert (len(_open(path)), len(_open(path, "val"))) == (5, 2)


@pytest.mark.parametrize("kind", ["vlen", "opaque", "fixed", "strings"])
def test_encoded_images_are_bytes_of_any_kind(tmp_path: Path, images: ArraySource, kind: str) -> None:
    files = [_png(images.read(place)) for place in range(3)]
    with h5py.File(tmp_path / "x.h5", "w") as file:
        if kind == "vlen":
            dataset = file.create_dataset("images", 3, h5py.vlen_dtype(np.uint8))
            for place, content in enumerate(files):
                dataset[place] = np.frombuffer(content, np.uint8)
        elif kind == "strings":
            file.create_dataset("images", data=np.array([f.replace(b"\0", b"\0") for f in files], "S"))
        else:
            most = max(map(len, files))
            file["images"] = np.array(files, f"{'V' if kind == 'opaque' else 'S'}{most}")
    assert [_open(tmp_path / "x.h5").read(place).tobytes() for place in range(3)] == [
        images.read(place).tobytes() for place in range(3)
    ]


def test_an_encoded_image_that_is_none_is_named(tmp_path: Path) -> None:
    source = _open(_write(tmp_path / "x.h5", images=np.array([b"no image", b"neither"])))
    with pytest.raises(UnreadableImage, match=r"x\.h5: images\[1\]: cannot be decoded \(it is empty or no image"):
        source.read(1)


def _read(source: Hdf5Source, sample_id: int) -> bytes:
    return source.read(sample_id).tobytes()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_no_handle_crosses_to_another_process(tmp_path: Path, images: ArraySource, method: str) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=images.images[:64], chunks=(1, 28, 28), compression="gzip")
    source = _open(path)
    expected = [_read(source, place) for place in range(64)]
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context(method)) as pool:
        found = [pool.submit(_read, source, place % 64) for place in range(192)]
        assert [future.result() for future in found] == expected * 3
    assert _read(source, 5) == expected[5]


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ({"pixels": np.zeros(3)}, 'has no dataset "images", nor "train/images"; there is pixels'),
        ({}, "there is nothing"),
        (
            {"images": np.zeros((2, 4, 4), np.float32)},
            r"images: is float32 of shape \(2, 4, 4\); give uint8 \[n, height",
        ),
        ({"images": np.zeros((2, 3, 8, 8), np.uint8)}, r"is uint8 of shape \(2, 3, 8, 8\); give"),
        ({"images": np.uint8(3)}, "is uint8 of shape"),
        ({"images__a": np.zeros(3)}, "images: is a group; give one dataset of images"),
        ({"images": np.zeros((0, 4, 4), np.uint8)}, "no images in it"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.arange(3)}, "3 labels for 2 images"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, -1])}, "labels: label -1; give class ids"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(2)}, r"labels are float64 of shape \(2,\)"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros((2, 3), np.uint8)}, r"of shape \(2, 3\)"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, datasets: dict[str, Any], message: str) -> None:
    _write(tmp_path / "x.h5", **datasets)
    with pytest.raises(UsageError, match=rf"x\.h5.*{message}"):
        _open(tmp_path / "x.h5")


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "header"])
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, grey: np.ndarray, damage: str) -> None:
    path = _write(tmp_path / "x.h5", images=grey)
    content = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "text": b"no", "cut": content[:-500], "header": content[:9] + bytes(60) + content[69:]}[damage]
    )
    with pytest.raises(UsageError, match=r"x\.h5: cannot be read as HDF5 \(.*\); fetch it again") as caught:
        _open(path)
    assert "\n" not in str(caught.value)


def test_a_damaged_chunk_is_an_unreadable_image(tmp_path: Path, grey: np.ndarray) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        images = file.create_dataset("images", data=grey, chunks=(1, 28, 28), fletcher32=True)
        place = images.id.get_chunk_info(2).byte_offset
    content = bytearray(path.read_bytes())
    content[place + 100] ^= 255
    path.write_bytes(content)
    source = _open(path)
    assert source.read(1).size == (28, 28)
    with pytest.raises(UnreadableImage, match=r"images\[2\]: cannot be decoded"):
        source.read(2)
