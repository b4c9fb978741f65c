"""--cache: the same bytes with and without, and what is said about it."""

import re
import shutil
from pathlib import Path

import pytest
from command_line import DISTIL, TRAIN, Cli, Made, Refused, capture

SMALL = ("--set", "data.short_side=20")


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("small", [(), SMALL], ids=["as they are", "short side"])
def test_every_command_does_the_same_with_and_without(
    distill: Cli, folder: Path, run: Made, tmp_path: Path, small: tuple[str, ...]
) -> None:
    def work(name: str, *cache: str | Path) -> None:
        store, student = tmp_path / name / "store", tmp_path / name / "run"
        more = ("--data", folder, "--workers", "1", "--quiet", *cache)
        for command in (
            (*capture(run.path, folder, store), *small, *cache, "--quiet"),
            ("store", "extend", store, "--teacher", run.path, "--views", "3", *more),
            ("train", *DISTIL, "--store", store, "--out", student, *more),
            ("store", "check", store, "--teacher", run.path, *more),
        ):
            result = distill(*command)
            assert result.code == 0, result
        found = distill("eval", student, "--store", store, *more, "--json").json
        assert found.pop("model") == str(student)
        results[name] = {key: value for key, value in found.items() if key not in ("images_per_s", "wall_s")}

    results: dict[str, dict[str, object]] = {}
    work("without")
    work("with", "--cache", tmp_path / "cache")
    assert _files(tmp_path / "with/store") == _files(tmp_path / "without/store")
    students = [(tmp_path / name / "run/student.safetensors").read_bytes() for name in ("with", "without")]
    assert students[0] == students[1]
    assert results["with"] == results["without"]
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"train", "val"}


def test_a_student_of_another_short_side_is_refused(
    distill: Cli, refused: Refused, folder: Path, run: Made, store: Made, tmp_path: Path
) -> None:
    assert distill(*capture(run.path, folder, tmp_path / "s"), *SMALL, "--quiet").code == 0
    command = ("train", *DISTIL, "--data", folder, "--out", tmp_path / "r", "--set", "data.short_side=24")
    for path, there in ((tmp_path / "s", 20), (store.path, 0)):
        said = refused(3, *command, "--store", path)
        assert f"data.short_side: 24 asked, the store has {there}; leave it out" in said


def test_a_dry_run_says_what_the_cache_takes_and_writes_nothing(
    distill: Cli, folder: Path, run: Made, tmp_path: Path
) -> None:
    cache = ("--cache", tmp_path / "cache", "--dry-run", "--json", "--quiet")
    train = ("train", *TRAIN, "--data", folder, "--out", tmp_path / "r")
    pixels = 3 * 28 * 28
    for command, images in (
        (capture(run.path, folder, tmp_path / "s"), 40),
        (train, 60),
        (("eval", run.path, "--data", folder), 20),
    ):
        bill = distill(*command, *cache).json["bill"]
        assert bill["cache_bytes"] == images * pixels
        assert bill["cache_free_bytes"] > 2**20
    assert not (tmp_path / "cache").exists()
    assert distill(*train, "--dry-run", "--json", "--quiet").json["bill"]["cache_bytes"] is None


def test_what_it_takes_is_said_and_the_same_cache_elsewhere_is_the_same_run(
    distill: Cli, folder: Path, tmp_path: Path
) -> None:
    command = ("train", *TRAIN, "--data", folder, "--out", tmp_path / "r", "--cache")
    said = distill(*command, tmp_path / "cache").err
    for part, images in (("train", 40), ("val", 20)):
        assert re.search(rf"caching: {images} images in .*/{part} take about \d\.\d GB, .* GB are free\n", said)
    assert "cache: 40/40 images" in said
    assert distill(*command, tmp_path / "other", "--json", "--quiet").json["status"] == "already_done"
    assert not (tmp_path / "other").exists()


def test_a_cache_of_another_size_is_refused(
    distill: Cli, refused: Refused, folder: Path, run: Made, tmp_path: Path
) -> None:
    cache = ("--cache", tmp_path / "cache")
    assert distill(*capture(run.path, folder, tmp_path / "s"), *cache, "--quiet").code == 0
    said = refused(3, *capture(run.path, folder, tmp_path / "small"), *cache, *SMALL)
    assert said == (
        f"{tmp_path}/cache/train: is a cache of other images (short_side: 0, 20: there, asked); "
        "give another --cache, or delete it"
    )
    said = refused(2, *capture(run.path, folder, tmp_path / "other"), "--cache", folder / "train")
    assert said == f"--cache {folder}/train: lies in the data, {folder}, and would be listed with it; give another"


def test_unreadable_images_are_skipped_from_a_cache_as_without(
    distill: Cli, refused: Refused, copied: Path, run: Made, tmp_path: Path
) -> None:
    bad = sorted((copied / "train").glob("*/*"))[5]
    bad.write_bytes(b"")
    command = (*capture(run.path, copied, tmp_path / "s"), "--cache", tmp_path / "cache")
    assert refused(1, *command).startswith(f"{bad}: cannot be decoded (")
    result = distill(*command, "--skip-unreadable", "--json", "--quiet")
    assert (result.code, result.json["skipped"], result.json["rows"]) == (0, 1, 78), result
    plain = (*capture(run.path, copied, tmp_path / "plain"), "--skip-unreadable", "--quiet")
    assert distill(*plain).code == 0
    assert _files(tmp_path / "s") == _files(tmp_path / "plain")


def test_changed_files_are_named_without_a_teacher(
    distill: Cli, copied: Path, run: Made, store: Made, tmp_path: Path
) -> None:
    check = ("store", "check", store.path, "--data", copied, "--files", "--workers", "1", "--json", "--quiet")
    result = distill(*check)
    assert (result.code, result.json["status"], result.json["files"], result.json["changed"]) == (0, "ok", 40, 0)
    first, *others = sorted((copied / "train").glob("*/*"))
    shutil.copy(others[0], first)
    result = distill(*check)
    key = str(first.relative_to(copied / "train"))
    assert (result.code, result.json["first_changed"]) == (3, [key])
    assert result.err == (
        f"distill: store {store.path}: 1 of 40 files are not those that the teacher saw ({key}); "
        "restore them, or write a new store\n"
    )


@pytest.mark.parametrize("decode", ["reduced", "torch"])
def test_a_cache_beside_a_view_that_decodes_for_each_crop_is_refused(
    decode: str, folder: Path, run: Made, tmp_path: Path, refused: Refused
) -> None:
    command = capture(run.path, folder, tmp_path / "store")
    augment = ("--set", "data.augment=rrc", "--set", f"data.decode={decode}")
    said = refused(2, *command, *augment, "--cache", tmp_path / "cache")
    assert said == f"--cache: keeps decoded images, and data.decode={decode} decodes for each crop; leave one out"
