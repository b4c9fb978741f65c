import os
from pathlib import Path

import pytest
from PIL import Image

from distill_cli.data import open_source
from distill_cli.data.config import DataConfig
from distill_cli.data.folder import ImageFolder
from distill_cli.data.sources import UnreadableImage
from distill_cli.errors import UsageError


def _open(path: Path, split: str = "train", root: Path | None = None) -> ImageFolder | None:
    source = open_source(str(path), split, DataConfig(root=root and str(root)))
    assert source is None or isinstance(source, ImageFolder)
    return source


def _listed(path: Path, text: str, split: str = "train", root: Path | None = None) -> ImageFolder:
    path.write_text(text, errors="surrogateescape")
    source = _open(path, split, root)
    assert source is not None
    return source


def _labels(source: ImageFolder) -> list[int] | None:
    return None if source.labels is None else source.labels.tolist()


@pytest.mark.parametrize(
    "text",
    [
        "path,label\nb.png,dog\na.png,cat\n",
        "Label, Image\ndog,b.png\ncat,a.png\n",
        "class;x,file\ndog,b.png\ncat,a.png\n",
        "filename,target\nb.png,dog\na.png,cat\n",
        "b.png,dog\na.png,cat",
        "\ufeffpath,label\r\nb.png,dog\r\n\r\na.png,cat\r\n",
        "id,path,x,label\n0,b.png,1,dog\n1,a.png,1, cat \n",
    ],
    ids=["named", "other order", "one name", "no names", "no header", "from Windows", "more columns"],
)
def test_columns_are_found_by_name_or_place(tmp_path: Path, text: str) -> None:
    source = _listed(tmp_path / "x.csv", text)
    assert list(source.keys) == ["a.png", "b.png"]
    if "class;x" not in text:
        assert (_labels(source), source.classes) == ([0, 1], ("cat", "dog"))


def test_integers_are_class_ids(tmp_path: Path) -> None:
    source = _listed(tmp_path / "x.tsv", "path\tlabel\nb.png\t7\na.png\t012\n")
    assert (_labels(source), source.classes) == ([12, 7], None)


@pytest.mark.parametrize("text", ["path\na.png\n", "a.png\n", "path,width\na.png,3\n"])
def test_a_list_without_labels_is_unlabelled(tmp_path: Path, text: str) -> None:
    assert _labels(_listed(tmp_path / "x.csv", text)) is None


def test_splits_agree_in_their_classes(tmp_path: Path) -> None:
    text = "path,label,split\n1.png,cat,train\n2.png,dog,validation\n3.png,dog,test\n4.png,eel,train\n"
    train, val = (_listed(tmp_path / "x.csv", text, split) for split in ("train", "val"))
    assert (list(train.keys), _labels(train), train.classes) == (["1.png", "4.png"], [0, 2], ("cat", "dog", "eel"))
    assert (list(val.keys), _labels(val), val.classes) == (["2.png"], [1], ("cat", "dog", "eel"))


def test_a_list_of_one_split_has_no_other(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("path,split\n1.png,train\n")
    assert _open(tmp_path / "x.csv", "val") is None
    (tmp_path / "y.csv").write_text("path\n1.png\n")
    assert _open(tmp_path / "y.csv", "val") is None


def test_paths_are_of_the_lists_folder_or_of_the_root(picture: Image.Image, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    picture.save(tmp_path / "images/a.png")
    assert _listed(tmp_path / "x.csv", "path\nimages/a.png\n").read(0).tobytes() == picture.tobytes()
    inside = _listed(tmp_path / "y.csv", f"path\n{tmp_path}/images/a.png\n", root=tmp_path / "images")
    assert (list(inside.keys), inside.read(0).size) == (["a.png"], picture.size)


def test_names_are_quoted_as_csv_has_it_and_any_bytes(picture: Image.Image, tmp_path: Path) -> None:
    names = ['two\nlines, and "quotes".png', os.fsdecode(b"caf\xe9.png"), " spaces .png"]
    for name in names:
        picture.save(tmp_path / name)
    text = "path\n" + "".join('"{}"\n'.format(name.replace('"', '""')) for name in names)
    source = _listed(tmp_path / "x.csv", text)
    assert list(source.keys) == sorted(names)
    assert all(source.read(place).size == picture.size for place in range(3))


def test_a_file_that_is_not_there_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match=r"none\.png: cannot be decoded \(no such file or directory\)"):
        _listed(tmp_path / "x.csv", "path\nnone.png\n").read(0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"x\.csv: no rows; give a list"),
        ("path,label\n", r"x\.csv: no rows"),
        ("path\na.png\n../b.png\n", r"x\.csv: row 3: \.\./b\.png is no path below .*; write it without \.\."),
        ("path\na/../../../etc/passwd.png\n", r"row 2: a/\.\./\.\./\.\./etc/passwd\.png is no path below"),
        ("path\n/etc/passwd.png\n", r"row 2: /etc/passwd\.png is outside of .*; name its folder by data\.root"),
        ("path,label\n,1\n", "row 2: an empty path is no path below"),
        ("path\na.png\n./a.png\n", r"a\.png is there twice; a path may be listed once"),
        ("path\na\na\n", "a is there twice"),
        ("path,label\na.png,1\nb.png\n", "row 3 has 1 of 2 columns; complete it"),
        ("path,label\na.png,1\nb.png,\n", "row 3 has no label; give one to every row, or to none"),
        ("path,label\na.png,1\nb.png,-1\n", r"x\.csv: label -1; give class ids from 0 on"),
        ("path,label\na.png,99999999999999999999\n", "label 99999999999999999999; give class ids"),
        ("path,split\na.png,holdout\n", 'row 2: split "holdout"; give train, val, validation, test'),
        ("path\n" + "a" * 200_000 + "\n", "cannot be read as a list .*field larger than field limit"),
        ("path,path\na.png,b\n\n", None),
    ],
)
def test_what_is_wrong_with_a_list_is_said(tmp_path: Path, text: str, message: str | None) -> None:
    if message is None:
        assert list(_listed(tmp_path / "x.csv", text).keys) == ["a.png"]
        return
    with pytest.raises(UsageError, match=message) as caught:
        _listed(tmp_path / "x.csv", text)
    assert "\n" not in str(caught.value)


def test_a_million_rows_are_no_objects(tmp_path: Path) -> None:
    text = "path,label\n" + "".join(f"{n % 10}/{n}.png,{n % 10}\n" for n in range(20_000))
    source = _listed(tmp_path / "x.csv", text)
    assert len(source.keys) == 20_000
    assert type(source.keys).__name__ == "Keys"


# Parquet.


def test_a_parquet_list_may_have_numbers_as_labels(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"path": ["b.png", "a.png"], "label": [1, 0]}), tmp_path / "x.parquet")
    source = _open(tmp_path / "x.parquet")
    assert source is not None
    assert (list(source.keys), _labels(source), source.classes) == (["a.png", "b.png"], [0, 1], None)


def test_a_parquet_list_with_a_missing_label_is_refused(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"path": ["b", "a"], "label": [None, "x"]}), tmp_path / "x.parquet")
    with pytest.raises(UsageError, match="row 1 has no label"):
        _open(tmp_path / "x.parquet")


@pytest.mark.parametrize("content", [b"", b"PAR1 no parquet PAR1", b"path,label\n"])
def test_a_damaged_parquet_list_is_refused(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(UsageError, match=r"x\.parquet: cannot be read as a list \(.*\); give columns path and label"):
        _open(tmp_path / "x.parquet")


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "x.parquet").touch()
    with pytest.raises(UsageError, match=r"pip install 'distill-cli\[parquet\]', or write it as CSV"):
        _open(tmp_path / "x.parquet")
