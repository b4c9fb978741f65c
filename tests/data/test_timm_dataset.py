import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from distill_cli.data import open_source
from distill_cli.data.config import DataConfig
from distill_cli.data.idx import ArraySource
from distill_cli.data.sources import Source, UnreadableImage
from distill_cli.data.timm_dataset import TimmSource
from distill_cli.errors import UsageError


def _open(name: str, root: Path | None, split: str = "train") -> Source:
    source = open_source(f"timm:{name}", split, DataConfig(root=root and str(root)))
    assert source is not None
    return source


@pytest.fixture
def cifar10(tmp_path: Path, images: ArraySource) -> Path:
    """The files of CIFAR-10 with six images in each, which are not those that torchvision's checksums are of."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.zeros((6, 3, 32, 32), np.uint8)
    pixels[:, :, 2:30, 2:30] = images.images[:6, None]
    batch = {"data": pixels.reshape(6, -1), "labels": [0, 1, 2, 3, 4, 5]}
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    return tmp_path


def test_data_sets_of_torchvision_are_read(cifar10: Path, monkeypatch: pytest.MonkeyPatch, images: ArraySource) -> None:
    from torchvision.datasets import CIFAR10, cifar

    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: os.path.isfile(path))  # noqa: PTH113
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    source, val = _open("torch/cifar10", cifar10), _open("torch/cifar10", cifar10, "val")
    assert isinstance(source, TimmSource)
    assert (len(source), len(val), source.classes, source.keys[29]) == (30, 6, tuple("abcdefghij"), "29")
    assert source.labels is not None
    assert source.labels.tolist() == list(range(6)) * 5
    assert np.array_equal(np.asarray(source.read(7))[2:30, 2:30, 1], images.images[1])
    assert pickle.loads(pickle.dumps(source)).read(7).tobytes() == source.read(7).tobytes()


@pytest.mark.parametrize(
    "name", ["torch/cifar10", "torch/mnist", "torch/imagenet", "torch/inaturalist", "torch/qmnist"]
)
def test_what_would_be_downloaded_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=rf"--data timm:{name}: cannot be opened in .*; nothing is downl") as caught:
        _open(name, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["hfds/cifar10", "hfids/x", "tfds/cifar10", "wds/x", "HFDS/cifar10"])
def test_what_streams_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=rf"--data timm:{name}: streams or downloads; give "):
        _open(name, tmp_path)


@pytest.mark.parametrize("name", ["torch/none", "torch/image_folder", ""])
def test_what_is_not_there_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=f"--data timm:{name}: "):
        _open(name, tmp_path / "none")
    with pytest.raises(UsageError, match=r"data\.root is missing; say where it is by --set data\.root=DIR"):
        _open(name, None)


@pytest.mark.parametrize("name", ["torch/image_folder", ""])
def test_a_tree_without_a_validation_split_has_none(image_folder: Path, name: str) -> None:
    """timm takes the whole tree for each of its splits."""
    config = DataConfig(root=str(image_folder / "train"))
    assert open_source(f"timm:{name}", "val", config) is None


@pytest.mark.parametrize("name", ["torch/image_folder", ""])
def test_an_image_that_does_not_decode_is_named(image_folder: Path, tmp_path: Path, name: str) -> None:
    """timm goes on with the next image."""
    root = Path(shutil.copytree(image_folder, tmp_path / "x"))
    (root / "train/boot/00.jpg").write_bytes(b"")
    with pytest.raises(UnreadableImage, match=r"boot/00\.jpg: cannot be decoded"):
        _open(name, root).read(0)


def test_inaturalist_is_sorted(image_folder: Path, tmp_path: Path) -> None:
    """torchvision has it in the order of the directory."""
    folder = tmp_path / "2021_train" / "00000_Kingdom_Phylum_Class_Order_Family_Genus_species"
    folder.mkdir(parents=True)
    for name in ("c.jpg", "a.jpg", "b.jpg"):
        shutil.copy(image_folder / "train/boot/00.jpg", folder / name)
    source = _open("torch/inaturalist", tmp_path)
    assert list(source.keys) == [f"{folder.name}/{name}.jpg" for name in "abc"]
    assert (source.classes, source.read(0).size) == ((folder.name,), (40, 36))


@pytest.mark.parametrize("name", ["torch/image_folder", ""])
def test_the_root_may_be_relative(image_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(image_folder.parent)
    source = _open(name, Path(image_folder.name))
    assert (source.keys[0], source.read(0).size) == ("boot/00.jpg", (40, 36))
