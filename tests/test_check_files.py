import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_check import HERE, QUIET, recipe, rewrite, teacher

from distill_cli.capture import open_capture
from distill_cli.check_files import Summary, check_files, check_unchanged
from distill_cli.data import open_source
from distill_cli.errors import MismatchError
from distill_cli.recipe import Recipe, update
from distill_cli.store.merge import merge
from distill_cli.store.plan import Generation
from distill_cli.store.reader import Store
from distill_cli.store.shard import CONTENT_CRC
from distill_cli.store.trim import trim
from distill_cli.teacher_logits import teacher_logits, write_generation


@pytest.fixture
def folder(image_folder: Path, tmp_path: Path) -> Path:
    """18 images, to be changed."""
    return Path(shutil.copytree(image_folder, tmp_path / "images"))


@pytest.fixture
def write(folder: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Write a store of two views in shards of 8; gives the recipe."""

    def written(name: str = "store", **rows: object) -> Recipe:
        asked = recipe(teacher(tmp_path / "teacher.safetensors", 0), folder, tmp_path / name, **rows)
        asked = update(asked, {"data.skip_unreadable": True})
        teacher_logits(asked, tmp_path / name, HERE, QUIET)
        return asked

    return written


def _file(folder: Path, sample_id: int) -> Path:
    source = open_source(str(folder), "train")
    assert source is not None
    return folder / "train" / source.keys[sample_id]


def _kept(store: Store, view: int) -> dict[int, int]:
    shards = range(store.plan.shards)
    return {
        sample_id: crc
        for shard in shards
        for sample_id, crc in zip(
            store.ids(view, shard).tolist(), store.shard(view, shard).extra[CONTENT_CRC].tolist(), strict=True
        )
    }


def _checked(asked: Recipe, store: Path | None = None, workers: int = 0) -> Summary:
    asked = asked if store is None else update(asked, {"store.path": str(store)})
    return check_files(asked, replace(HERE, workers=workers), QUIET)


@pytest.mark.parametrize("rows", [{}, {"codec": "compact"}, {"keep_mass": 0.8}])
def test_a_store_keeps_the_checksum_of_each_file_once(
    write: Callable[..., Recipe], folder: Path, tmp_path: Path, rows: dict[str, object]
) -> None:
    _file(folder, 5).write_bytes(b"")
    write(**rows)
    store = Store(tmp_path / "store")
    assert _kept(store, 0) == {i: zlib.crc32(_file(folder, i).read_bytes()) for i in range(18) if i != 5}
    assert all(CONTENT_CRC not in store.shard(1, shard).extra for shard in range(3))


@pytest.mark.parametrize("workers", [0, 2])
def test_files_that_changed_or_are_gone_are_named(write: Callable[..., Recipe], folder: Path, workers: int) -> None:
    asked = write()
    found = _checked(asked, workers=workers)
    assert (found.status, found.files, found.changed, found.first_changed) == ("ok", 18, 0, ())
    check_unchanged(found)
    changed = [_file(folder, i) for i in (2, 11, 3)]
    changed[0].write_bytes(changed[0].read_bytes() + b"\0")
    changed[1].write_bytes(b"")
    changed[2].unlink()
    changed[2].symlink_to("nowhere")
    keys = sorted(str(path.relative_to(folder / "train")) for path in changed)
    found = _checked(asked, workers=workers)
    assert (found.status, found.files, found.changed, sorted(found.first_changed)) == ("changed", 18, 3, keys)
    with pytest.raises(MismatchError, match=r"3 of 18 files are not those that the teacher saw \(.*\); restore them"):
        check_unchanged(found)


def test_of_many_the_first_are_named(write: Callable[..., Recipe], folder: Path) -> None:
    asked = write()
    for sample_id in range(18):
        _file(folder, sample_id).write_bytes(b"")
    with pytest.raises(MismatchError, match=r"18 of 18 files .* \((\S+, ){5}…\)") as caught:
        check_unchanged(_checked(asked))
    assert str(_file(folder, 0).relative_to(folder / "train")) in str(caught.value)


def test_a_file_that_changed_between_two_captures_is_found(
    write: Callable[..., Recipe], folder: Path, tmp_path: Path
) -> None:
    asked = write()
    path = _file(folder, 7)
    before = path.read_bytes()
    path.write_bytes(before + b"\0")
    capture = open_capture(update(asked, {"store.views": 1, "store.first_view": 2}), HERE, QUIET)
    write_generation(capture, Generation(1, capture.plan, 2), tmp_path / "store", HERE, QUIET, 0.0)
    assert _checked(asked).changed == 1
    path.write_bytes(before)
    assert _checked(asked).changed == 1


def test_stores_made_of_others_keep_them(write: Callable[..., Recipe], folder: Path, tmp_path: Path) -> None:
    asked = write("one")
    write("two", first_view=2)
    merge([tmp_path / "one", tmp_path / "two"], tmp_path / "both", QUIET)
    trim(Store(tmp_path / "both"), tmp_path / "small", top_k=1, codec="compact", report=QUIET)
    for name in ("one", "two", "both", "small"):
        assert _checked(asked, tmp_path / name).files == 18
    _file(folder, 0).write_bytes(b"")
    assert _checked(asked, tmp_path / "small").changed == 1


def test_a_store_without_them_says_so(write: Callable[..., Recipe], tmp_path: Path) -> None:
    asked = write()
    rewrite(tmp_path / "store", lambda view, shard, rows: rows)
    with pytest.raises(MismatchError, match=r"store: keeps no checksums of its files, .* by --teacher instead"):
        _checked(asked)


def test_rows_are_the_same_whatever_the_batches(write: Callable[..., Recipe], tmp_path: Path) -> None:
    write("one")
    write("two", batch_size=5)
    one, two = (Store(tmp_path / name) for name in ("one", "two"))
    assert _kept(one, 0) == _kept(two, 0)
    assert np.array_equal(one.rows(0, np.arange(18)).class_id, two.rows(0, np.arange(18)).class_id)


def test_no_teacher_is_needed(write: Callable[..., Recipe]) -> None:
    asked = update(write(), {"teacher.name": "no-such-model"})
    assert check_files(asked, HERE, QUIET).status == "ok"
