import json
import os
from pathlib import Path

import pytest

from distill_cli.errors import UsageError
from distill_cli.files import (
    canonical_json,
    check_ours,
    free_bytes,
    remove_temporaries,
    sha256,
    sha256_file,
    write_atomic,
    write_json,
)


def test_a_written_file_holds_all_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", "text é")
    assert (tmp_path / "a").read_bytes() == "text é".encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failed_write_keeps_the_former_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    (tmp_path / "a").write_text("former")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "a", "new")
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("a", "former")]


def test_equal_values_are_equal_json_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"b": [1], "a": "é"})
    write_json(tmp_path / "b", dict(sorted({"b": [1], "a": "é"}.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_json_has_no_nan() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"loss": float("nan")})


def test_json_of_a_name_that_is_not_unicode_can_be_written(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    write_json(tmp_path / "a", [name])
    assert json.loads((tmp_path / "a").read_bytes()) == [name]


def test_a_file_and_its_content_have_one_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == sha256(b"abc") == sha256("abc")
    assert sha256("abc").startswith("ba7816bf")


def test_temporaries_are_removed_at_any_depth_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "view-000").mkdir()
    for name in (".tmp-plan.json", "view-000/.tmp-shard", "view-000/shard"):
        (tmp_path / name).touch()
    remove_temporaries(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["shard"]


def test_free_space_is_told_for_a_folder_that_is_not_made_yet(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") > 0


@pytest.mark.parametrize("names", [(), ("plan.json", "x"), (".lock",), (".tmp-plan.json",)])
def test_our_own_or_an_empty_folder_is_taken(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).touch()
    check_ours(tmp_path, ("plan.json",), "store")
    check_ours(tmp_path / "new", ("plan.json",), "store")


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match="is not empty and not a store; choose another --out"):
        check_ours(tmp_path, ("plan.json",), "store")
    with pytest.raises(UsageError, match="is a file; --out names the directory of a run"):
        check_ours(tmp_path / "thesis.tex", ("recipe.toml",), "run")
