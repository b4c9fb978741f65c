import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from served import served
from served import write_tar as _write

from distill_cli import server
from distill_cli.data import open_source, tars, webdataset
from distill_cli.data.config import DataConfig
from distill_cli.data.idx import ArraySource
from distill_cli.data.sources import UnreadableImage
from distill_cli.data.tar_names import braces
from distill_cli.data.webdataset import TarSource
from distill_cli.errors import DistillError, UsageError


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _open(pattern: str | Path, split: str = "train", **config: object) -> TarSource:
    source = open_source(f"wds:{pattern}", split, DataConfig(**config))  # type: ignore[arg-type]
    assert isinstance(source, TarSource)
    return source


def _labels(source: TarSource) -> list[int] | None:
    return None if source.labels is None else source.labels.tolist()


@pytest.fixture
def files(images: ArraySource) -> list[bytes]:
    """Four PNG files."""
    return [_png(images.read(place)) for place in range(4)]


@pytest.fixture
def shards(files: list[bytes], tmp_path: Path) -> Path:
    """Three tars of four images and labels."""
    for shard in range(3):
        members = {f"{n}.{kind}": c for n in range(4) for kind, c in (("png", files[n]), ("cls", str(shard)))}
        _write(tmp_path / f"x-{shard:06d}.tar", members)
    return tmp_path


def test_samples_are_in_the_order_of_tars_and_members(shards: Path, files: list[bytes]) -> None:
    source = _open(shards / "x-{000000..000002}.tar")
    assert list(source.keys[:5]) == ["x-000000/0", "x-000000/1", "x-000000/2", "x-000000/3", "x-000001/0"]
    assert _labels(source) == [0] * 4 + [1] * 4 + [2] * 4
    assert [source.read(n).tobytes() for n in range(12)] == [
        Image.open(io.BytesIO(files[n % 4])).convert("RGB").tobytes() for n in range(12)
    ]


@pytest.mark.parametrize("pattern", ["x-*.tar", "x-00000{2,0,1}.tar", "x-{000002..000000}.tar", "x-00000[0-2].tar"])
def test_tars_are_named_by_patterns_and_sorted(shards: Path, pattern: str) -> None:
    assert _open(shards / pattern).keys == _open(shards / "x-{000000..000002}.tar").keys
    assert open_source(f"wds:{shards / pattern}", "val") is None


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a", ["a"]),
        ("a{8..11}", ["a8", "a9", "a10", "a11"]),
        ("{08..10}", ["08", "09", "10"]),
        ("{a,b}{0..1}", ["a0", "a1", "b0", "b1"]),
        ("{a,b{0..1}}", ["a", "b0", "a", "b1"]),
        ("{,x}a", ["a", "xa"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern: str, names: list[str]) -> None:
    assert braces(pattern) == names


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        (["a-train-0.tar", "a-val-0.tar", "a-train-1.tar"], ["a-train-0", "a-train-1"], ["a-val-0"]),
        (["train/0.tar", "validation/1.tar"], ["0"], ["1"]),
        (["a_train.tar", "a_test.tar"], ["a_train"], ["a_test"]),
        (["0.tar", "1.tar"], ["0", "1"], None),
        (["trainer-0.tar"], ["trainer-0"], None),
    ],
)
def test_a_folder_of_tars_is_split_by_their_names(
    tmp_path: Path, files: list[bytes], names: list[str], train: list[str], val: list[str] | None
) -> None:
    for name in names:
        _write(tmp_path / name, {"0.png": files[0]})
    assert list(_open(tmp_path).keys) == [f"{stem}/0" for stem in train]
    if val is None:
        assert open_source(f"wds:{tmp_path}", "val") is None
    else:
        assert list(_open(tmp_path, "val").keys) == [f"{stem}/0" for stem in val]


# Members.


@pytest.mark.parametrize(
    ("members", "label"),
    [
        ({"0.png": "", "0.cls": "7\n"}, "7"),
        ({"0.cls": "cat", "0.png": ""}, "cat"),
        ({"0.png": "", "0.txt": "7"}, "7"),
        ({"0.png": "", "0.txt": "a photo of a cat"}, None),
        ({"0.png": "", "0.json": "7"}, "7"),
        ({"0.png": "", "0.json": '"cat"'}, "cat"),
        ({"0.png": "", "0.json": '{"caption": "x", "label": 7}'}, "7"),
        ({"0.png": "", "0.json": '{"class": "cat"}'}, "cat"),
        ({"0.png": "", "0.json": '{"caption": "x"}'}, None),
        ({"0.png": "", "0.json": "not JSON"}, None),
        ({"0.png": "", "0.json": "true"}, None),
        ({"0.json": "1", "0.txt": "2", "0.cls": "3", "0.png": ""}, "3"),
        ({"0.cls": "3", "0.txt": "2", "0.json": "1", "0.png": ""}, "3"),
        ({"0.png": "", "0.seg.png": "", "0.SEG.cls": "9"}, None),
    ],
)
def test_a_label_is_of_the_first_member_that_has_one(tmp_path: Path, members: dict, label: str | None) -> None:
    index = tars.index_tar(_write(tmp_path / "x.tar", members), "x.tar")
    assert list(index.keys) == ["0"]
    assert (index.labels and list(index.labels)) == (label and [label])


def test_keys_keep_their_folders_and_hidden_members_are_none(tmp_path: Path, files: list[bytes]) -> None:
    members = {"./a/0.PNG": files[0], "a/._0.png": "x", "b/0.jpeg.png": files[1], "b/1.JPEG": files[2], ".x.png": ""}
    assert list(_open(_write(tmp_path / "x.tar", members)).keys) == ["x/a/0", "x/b/1"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_any_format_are_read(tmp_path: Path, files: list[bytes], form: int) -> None:
    name = f"{'folder/' * 15}ä.png"
    with tarfile.open(tmp_path / "x.tar", "w", format=form) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        member = tarfile.TarInfo(name)
        member.size, member.mtime = len(files[0]), 1.5 if form == tarfile.PAX_FORMAT else 1
        tar.addfile(member, io.BytesIO(files[0]))
    source = _open(tmp_path / "x.tar")
    assert list(source.keys) == [f"x/{name.removesuffix('.png')}"]
    assert source.read(0).size == (28, 28)


def test_class_names_are_sorted_over_all_tars(tmp_path: Path, files: list[bytes]) -> None:
    _write(tmp_path / "0.tar", {"0.png": files[0], "0.cls": "dog"})
    _write(tmp_path / "1.tar", {"0.png": files[0], "0.cls": "cat"})
    source = _open(tmp_path)
    assert (_labels(source), source.classes) == ([1, 0], ("cat", "dog"))


# What is refused.


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"../0.png": ""}, r"x\.tar: member \.\./0\.png leaves the tar; write it without \.\."),
        ({"a/../../0.png": ""}, r"member a/\.\./\.\./0\.png leaves the tar"),
        ({"/etc/0.png": ""}, r"member /etc/0\.png leaves the tar"),
        ({"0.png": "", "0.jpg": ""}, "x.tar: 0 has two images; give each a name of its own"),
        ({"0.png": "", "1.png": "", "1.cls": "3"}, "x.tar: 0 has no label, others have"),
        ({"0.png": "", "0.cls": "-3"}, "label -3; give class ids"),
        ({"notes.md": ""}, r"x\.tar: no images"),
        ({}, r"x\.tar: no images"),
        ({"a\nb/../0.png": ""}, r"member a\\nb/\.\./0\.png leaves"),
    ],
)
def test_what_is_wrong_with_a_member_is_said(tmp_path: Path, members: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        _open(_write(tmp_path / "x.tar", members))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        member = tarfile.TarInfo("0.png")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(UsageError, match=r"x\.tar: member 0\.png is no plain file; write links and devices as files"):
        _open(tmp_path / "x.tar")


@pytest.mark.parametrize("where", ["data", "header", "boundary", "end mark"])
def test_a_tar_that_is_cut_is_named_with_where(tmp_path: Path, files: list[bytes], where: str) -> None:
    path = _write(tmp_path / "x.tar", {f"{n}.png": files[n] for n in range(4)})
    with tarfile.open(path) as tar:
        third, fourth = tar.getmembers()[2:]
    end = fourth.offset_data + -(-fourth.size // 512) * 512
    at = {"data": third.offset_data + 10, "header": third.offset + 100, "boundary": third.offset, "end mark": end}
    path.write_bytes(path.read_bytes()[: at[where]])
    last = {"data": "2.png", "end mark": "3.png"}.get(where, "1.png")
    with pytest.raises(UsageError, match=rf"x\.tar: damaged or cut after {last} \(.*\); fetch it again"):
        _open(path)


def test_a_damaged_header_is_no_end(tmp_path: Path, files: list[bytes]) -> None:
    path = _write(tmp_path / "x.tar", {f"{n}.png": files[n] for n in range(4)})
    with tarfile.open(path) as tar:
        place = tar.getmembers()[2].offset
    content = bytearray(path.read_bytes())
    content[place : place + 100] = b"\xff" * 100
    path.write_bytes(content)
    with pytest.raises(UsageError, match=rf"damaged or cut after 1\.png \(byte {place}: no end mark\)"):
        _open(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "damaged or cut after its beginning"), (b"x" * 2000, "damaged or cut"), (b"\x1f\x8b\x08", "is compressed")],
)
def test_what_is_no_tar_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(UsageError, match=rf"x\.tar: {message}"):
        _open(tmp_path / "x.tar")


def test_a_tar_that_was_cut_since_gives_unreadable_images(shards: Path) -> None:
    source = _open(shards / "x-000000.tar")
    os.truncate(shards / "x-000000.tar", int(source.offsets[2]) + 5)
    assert source.read(1).size == (28, 28)
    with pytest.raises(UnreadableImage, match=r"x-000000\.tar: x-000000/2: cannot be decoded \(the tar is shorter"):
        source.read(2)
    (shards / "x-000000.tar").unlink()
    with pytest.raises(UnreadableImage, match="no such file or directory"):
        source.read(1)


def test_a_huge_member_is_not_read(tmp_path: Path) -> None:
    huge = tarfile.TarInfo("1.png")
    huge.size = 2**31
    with (tmp_path / "x.tar").open("wb") as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            tar.addfile(huge)
        file.truncate(512 + huge.size + 10240)
    with pytest.raises(UnreadableImage, match=r"x/1: cannot be decoded \(it has 2,147,483,648 bytes, more than"):
        _open(tmp_path / "x.tar").content(0)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("none-*.tar", r"--data wds:.*none-\*\.tar: no such tars; give a path"),
        ("x-{000002..000003}.tar", r"x-000003\.tar: no such file or directory; give the tars that there are"),
        (".", None),
    ],
)
def test_tars_that_are_not_there_are_named(shards: Path, pattern: str, message: str | None) -> None:
    if message is None:
        (shards / "folder.tar").mkdir()
        pattern, message = "folder.tar", r"folder\.tar: no \.tar files in this folder"
    with pytest.raises(UsageError, match=message):
        _open(shards / pattern)


def test_a_pipe_is_no_tar(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(UsageError, match=r"x\.tar: is no file"):
        _open(tmp_path / "x.tar")


def test_two_tars_of_one_name_are_refused(tmp_path: Path, files: list[bytes]) -> None:
    for folder in ("a", "b"):
        _write(tmp_path / folder / "0.tar", {"0.png": files[0]})
    with pytest.raises(UsageError, match=r"two tars are named 0\.tar; give each a name of its own"):
        _open(tmp_path / "{a,b}/0.tar")


def test_labelled_and_unlabelled_tars_do_not_mix(shards: Path, files: list[bytes]) -> None:
    _write(shards / "y.tar", {"0.png": files[0]})
    with pytest.raises(UsageError, match=r"y\.tar: has no labels, other tars have"):
        _open(shards)


# The kept index, and tars behind URLs.


@pytest.fixture
def indexed(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tars that were indexed, in place of reading their kept index; all are large enough to be kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(webdataset, "KEPT", 1)
    found: list[str] = []

    def counted(path: Path, name: str, count: object) -> tars.TarIndex:
        found.append(name)
        return tars.index_tar(path, name)

    monkeypatch.setattr(webdataset, "index_tar", counted)
    return found


def test_a_tar_is_indexed_once_and_again_when_it_changes(shards: Path, indexed: list[str], files: list[bytes]) -> None:
    first, second = _open(shards), _open(shards)
    assert len(indexed) == 3
    assert (first.keys, _labels(first)) == (second.keys, _labels(second))
    _write(shards / "x-000001.tar", {"new.png": files[0], "new.cls": "5"})
    assert "x-000001/new" in list(_open(shards).keys)
    assert [Path(name).name for name in indexed[3:]] == ["x-000001.tar"]
    _open(shards, cache_listing=False)
    assert len(indexed) == 7


@pytest.fixture
def url(shards: Path, indexed: list[str]) -> Iterator[tuple[str, list[str]]]:
    """The three tars behind a server, and what was asked of it."""
    with served(shards) as found:
        yield found


def test_tars_behind_a_url_are_fetched_whole_and_once(url: tuple[str, list[str]], shards: Path) -> None:
    pattern = f"{url[0]}/x-{{000000..000002}}.tar"
    for _ in range(2):
        source = _open(pattern)
        assert [source.read(n).tobytes() for n in range(12)] == [_open(shards).read(n).tobytes() for n in range(12)]
    assert source.keys == _open(shards).keys
    assert sorted(url[1]) == [f"/x-00000{n}.tar" for n in range(3)]


def test_fetched_tars_are_bounded_and_fetched_again(url: tuple[str, list[str]], shards: Path) -> None:
    size = (shards / "x-000000.tar").stat().st_size
    source = _open(f"{url[0]}/x-{{000000..000002}}.tar", cache_gb=1.5 * size / 1e9)
    assert len(list(source.tars.cache.folder.glob("*.tar"))) == 1
    assert {source.read(n).size for n in range(12)} == {(28, 28)}
    assert len(url[1]) > 3


def test_the_index_of_a_tar_behind_a_url_is_kept_whatever_its_size(
    url: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each start would fetch every tar that the cache has let go of."""
    monkeypatch.setattr(webdataset, "KEPT", 1000)
    for _ in range(2):
        _open(f"{url[0]}/x-{{000000..000002}}.tar", cache_gb=1e-9)
    assert len(url[1]) == 3


def test_a_tar_that_no_server_has_is_named(url: tuple[str, list[str]]) -> None:
    with pytest.raises(UsageError, match=r"http://.*/x-9\.tar: there is no such tar"):
        _open(f"{url[0]}/x-9.tar")


def test_a_server_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "WAIT_S", 0)
    with pytest.raises(DistillError, match=r"http://127\.0\.0\.1:9/x\.tar: cannot be read"):
        _open("http://127.0.0.1:9/x.tar")


def test_stars_in_urls_are_asked_of_the_server(shards: Path, indexed: list[str]) -> None:
    assert len(_open(f"file://{shards}/x-*.tar")) == 12


def test_json_labels_may_be_large(tmp_path: Path, files: list[bytes]) -> None:
    text = json.dumps({"caption": "x" * 5000, "label": 3})
    assert _labels(_open(_write(tmp_path / "x.tar", {"0.png": files[0], "0.json": text}))) == [3]
