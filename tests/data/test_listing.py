import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distill_cli.data import listing_cache
from distill_cli.data.listing import Listing, list_tree
from distill_cli.data.listing_cache import cached_listing
from distill_cli.errors import UsageError
from distill_cli.report import Report


def _fill(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Large enough to be kept, and settled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listing_cache, "LARGE", 3)
    monkeypatch.setattr(listing_cache, "SETTLED_S", -60)
    _fill(tmp_path / "tree", "a/1.png", "a/deep/2.png", "b/3.png", "b/4.png")
    return tmp_path / "tree"


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The trees that were read, in place of their kept listings."""
    found: list[Path] = []

    def counted(root: Path, count: Callable[[int], None]) -> Listing:
        found.append(root)
        return list_tree(root, count)

    monkeypatch.setattr(listing_cache, "list_tree", counted)
    return found


def _kept(tree: Path) -> Path:
    (path,) = (tree.parent / "cache/distill/listings").glob("*.npz")
    return path


def test_a_large_tree_is_listed_once(tree: Path, listed: list[Path]) -> None:
    first, second = cached_listing(tree), cached_listing(tree)
    assert len(listed) == 1
    assert list(first.keys) == list(second.keys) == ["a/1.png", "a/deep/2.png", "b/3.png", "b/4.png"]
    assert first.classes == second.classes == ("a", "b")
    assert (second.labels is not None and second.labels.tolist()) == [0, 0, 1, 1]


def test_a_tree_without_classes_is_kept_too(tree: Path, listed: list[Path]) -> None:
    _fill(tree / "flat", "1.png", "2.png", "3.png")
    assert cached_listing(tree / "flat").labels is None
    assert cached_listing(tree / "flat").labels is None
    assert len(listed) == 1


@pytest.mark.parametrize("change", ["add", "add deep", "remove", "rename", "new class", "same times"])
def test_a_change_of_the_tree_is_noticed(tree: Path, listed: list[Path], change: str) -> None:
    cached_listing(tree)
    status = (tree / "a").stat()
    if change == "add":
        _fill(tree, "a/0.png")
    elif change == "add deep":
        _fill(tree, "a/deep/0.png")
    elif change == "remove":
        (tree / "b/3.png").unlink()
    elif change == "rename":
        (tree / "b/3.png").rename(tree / "b/5.png")
    elif change == "new class":
        _fill(tree, "c/1.png")
    else:
        # As rsync and tar leave it: the folder's time of change is put back.
        _fill(tree, "a/0.png")
        os.utime(tree / "a", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert list(cached_listing(tree).keys) == list(list_tree(tree).keys)
    assert len(listed) == 2


def test_what_changed_just_now_is_not_kept(tree: Path, listed: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another change within the clock's resolution would not be noticed."""
    monkeypatch.setattr(listing_cache, "SETTLED_S", 2.0)
    cached_listing(tree)
    cached_listing(tree)
    assert len(listed) == 2
    assert not (tree.parent / "cache").exists()


def test_small_trees_are_not_kept_nor_where_it_is_not_asked_for(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached_listing(tree, cached=False)
    monkeypatch.setattr(listing_cache, "LARGE", 5)
    cached_listing(tree)
    assert not (tree.parent / "cache").exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "pickle", "folder", "other arrays"])
def test_a_damaged_cache_is_made_again(tree: Path, listed: list[Path], damage: str) -> None:
    expected = list(cached_listing(tree).keys)
    path = _kept(tree)
    content = path.read_bytes()
    middle = content.index(b"a/1.png")
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "pickle":
        np.savez(path, version=1, keys=np.array([{}], object))
    elif damage == "other arrays":
        np.savez(path, version=1, keys=np.zeros(3, np.uint8))
    else:
        flipped = content[:middle] + b"X" + content[middle + 1 :]
        path.write_bytes({"cut": content[:-40], "flipped": flipped, "empty": b"", "text": b"no zip"}[damage])
    assert list(cached_listing(tree).keys) == expected
    assert len(listed) == 2


def test_a_cache_that_cannot_be_written_is_done_without(tree: Path) -> None:
    (tree.parent / "cache").touch()
    assert len(cached_listing(tree).keys) == 4


def test_listings_are_kept_by_their_place(tree: Path, listed: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    cached_listing(tree)
    monkeypatch.chdir(tree.parent)
    cached_listing(Path("tree"))
    assert len(listed) == 1
    tree.rename(tree.parent / "other")
    cached_listing(Path("other"))
    assert len(listed) == 2


def test_any_names_are_kept(tree: Path, listed: list[Path]) -> None:
    _fill(tree, "a/two\nlines.png", os.fsdecode(b"b/caf\xe9.png"), "猫 猫/1.png")
    assert cached_listing(tree).keys == cached_listing(tree).keys
    assert len(listed) == 1


def test_a_long_listing_shows_its_progress(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[int] = []

    class Bar:
        def advance(self, count: int, note: str = "") -> None:
            said.append(count)

    class Spoken(Report):
        def progress(self, *arguments: object, **options: object):  # type: ignore[no-untyped-def]
            import contextlib

            said.append(len(arguments))
            return contextlib.nullcontext(Bar())

    cached_listing(tree, report=Spoken())
    assert said[0] == 2
    assert sum(said[1:]) == 4


# What is refused.


@pytest.mark.parametrize("link", ["a/loop", "loop"])
def test_a_link_that_makes_a_loop_is_refused(tmp_path: Path, link: str) -> None:
    _fill(tmp_path, "a/1.png")
    (tmp_path / link).symlink_to(tmp_path)
    with pytest.raises(UsageError, match=rf"{link}: links back to .*, which it is in; remove the link"):
        list_tree(tmp_path)


def test_a_link_to_another_folder_is_followed(tmp_path: Path) -> None:
    _fill(tmp_path, "elsewhere/1.png", "tree/a/0.png")
    (tmp_path / "tree/b").symlink_to(tmp_path / "elsewhere")
    assert list(list_tree(tmp_path / "tree").keys) == ["a/0.png", "b/1.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_folder_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    _fill(tmp_path, "a/1.png")
    (tmp_path / "a").chmod(0)
    with pytest.raises(UsageError, match=r"a/: cannot be listed \(permission denied\); make it readable"):
        list_tree(tmp_path)
