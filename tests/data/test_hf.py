import io
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distill_cli.data import open_source
from distill_cli.data.hf import HfSource
from distill_cli.data.sources import UnreadableImage
from distill_cli.errors import UsageError

datasets = pytest.importorskip("datasets")


def _open(path: Path, split: str = "train") -> HfSource:
    source = open_source(f"hf:{path}", split)
    assert isinstance(source, HfSource)
    return source


def _dataset(picture: Image.Image, **columns: Any) -> Any:
    """Three images, and other columns: (values, feature)."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    features = {"picture": datasets.Image(), **{name: kind for name, (_, kind) in columns.items()}}
    values = {name: value for name, (value, _) in columns.items()}
    rows = {"picture": [{"bytes": buffer.getvalue(), "path": None}] * 3, **values}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def test_one_data_set_is_a_train_split_only(picture: Image.Image, tmp_path: Path) -> None:
    _dataset(picture).save_to_disk(str(tmp_path / "x"))
    source = _open(tmp_path / "x")
    assert (list(source.keys), source.labels, source.read(2).tobytes()) == (["0", "1", "2"], None, picture.tobytes())
    assert open_source(f"hf:{tmp_path / 'x'}", "val") is None


@pytest.mark.parametrize(
    ("column", "kind", "values", "labels", "classes"),
    [
        ("breed", "ClassLabel", [1, 0, 1], [1, 0, 1], ("b", "a")),
        ("label", "int64", [4, 5, 4], [4, 5, 4], None),
        ("labels", "string", ["y", "x", "y"], [1, 0, 1], ("x", "y")),
        ("width", "int64", [4, 5, 4], None, None),
    ],
)
def test_labels_are_found_by_type_and_name(
    picture: Image.Image, tmp_path: Path, column: str, kind: str, values: list, labels: list | None, classes: Any
) -> None:
    feature = datasets.ClassLabel(names=["b", "a"]) if kind == "ClassLabel" else datasets.Value(kind)
    _dataset(picture, **{column: (values, feature)}).save_to_disk(str(tmp_path / "x"))
    source = _open(tmp_path / "x")
    assert (None if source.labels is None else source.labels.tolist(), source.classes) == (labels, classes)


def test_a_folder_of_parquet_files_without_split_names_is_train(picture: Image.Image, tmp_path: Path) -> None:
    (tmp_path / "x/data").mkdir(parents=True)
    for number in range(2):
        _dataset(picture).to_parquet(str(tmp_path / f"x/data/{number}.parquet"))
    assert len(_open(tmp_path / "x")) == 6


def test_images_that_are_paths_are_not_followed(picture: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "a.png")
    rows = {"image": [{"bytes": None, "path": str(tmp_path / "a.png")}, None]}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image(decode=False)}))
    source = _open_memory(data)
    for place in (0, 1):
        with pytest.raises(UnreadableImage, match=rf"x\[{place}\]: cannot be decoded \(its bytes are not in the data"):
            source.read(place)


def _open_memory(data: Any) -> HfSource:
    return HfSource("x", data, None, None)


def test_an_image_that_does_not_decode_is_named(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = {"image": [{"bytes": b"no image", "path": None}]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "x"))
    with pytest.raises(UnreadableImage, match=r"hf:.*x\[0\]: cannot be decoded \(it is empty or no image"):
        _open(tmp_path / "x").read(0)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": ([0, None, 1], "int64")}, "column label: row 1 has no label"),
        ({"label": ([0, 1, -1], "int64")}, "label -1; give class ids"),
        ({"label": ([0.5, 1, 1], "float64")}, "labels are float64"),
        ({"mask": ([None] * 3, "Image")}, "2 columns of images among picture, mask; save it with one"),
    ],
)
def test_what_is_wrong_with_a_data_set_is_said(
    picture: Image.Image, tmp_path: Path, columns: dict[str, tuple[list, str]], message: str
) -> None:
    kinds = {
        name: (values, datasets.Image() if kind == "Image" else datasets.Value(kind))
        for name, (values, kind) in columns.items()
    }
    _dataset(picture, **kinds).save_to_disk(str(tmp_path / "x"))
    with pytest.raises(UsageError, match=message):
        _open(tmp_path / "x")


def test_other_folders_are_refused(picture: Image.Image, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--data hf:.*none: no such folder; download the dataset and give its folder"):
        _open(tmp_path / "none")
    with pytest.raises(UsageError, match=r"neither state\.json nor dataset_dict\.json nor parquet files"):
        _open(tmp_path)
    datasets.DatasetDict({"extra": _dataset(picture)}).save_to_disk(str(tmp_path / "x"))
    with pytest.raises(UsageError, match="has splits extra; name the folder of one"):
        _open(tmp_path / "x")


@pytest.mark.parametrize("damage", ["state", "arrow", "parquet"])
def test_a_damaged_data_set_is_named_in_one_line(picture: Image.Image, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x"
    if damage == "parquet":
        path.mkdir()
        (path / "0.parquet").write_bytes(b"PAR1 no PAR1")
    else:
        _dataset(picture).save_to_disk(str(path))
        damaged = path / "state.json" if damage == "state" else next(path.glob("*.arrow"))
        damaged.write_bytes(damaged.read_bytes()[:20])
    with pytest.raises(UsageError, match=r"--data hf:.*x: cannot be read as a dataset \(.*\); save or") as caught:
        _open(path)
    assert "\n" not in str(caught.value)


def test_without_datasets_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"needs datasets .*; pip install 'distill-cli\[hf\]'"):
        _open(tmp_path)
