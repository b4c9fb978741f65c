"""`distill store merge|trim|import|export` on stores of sixty real images."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import DISTIL, Cli, Made, Refused, capture

from distill_cli.errors import Stopped
from distill_cli.locks import locked
from distill_cli.store.writer import StoreWriter

K = 2
FOLDER = "logits_top2_epoch{}"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def save(folder: Path, epoch: int, rank: int, keys: list[str], first_seed: int = 0, top: float = 0.75) -> None:
    """Records as TinyViT saves them; key number i has class i mod 3 first, and adds up to more than 1 if i is 4."""
    path = folder / FOLDER.format(epoch)
    path.mkdir(parents=True, exist_ok=True)
    (path / f"rank{rank}-keys.txt").write_text("".join(f"{key}\n" for key in keys))
    values = [
        struct.pack("<i2h2e", first_seed + i, i % 3, (i + 1) % 3, top, 0.5 if i == 4 else 0.125)
        for i in range(len(keys))
    ]
    (path / f"rank{rank}-values.bin").write_bytes(b"".join(values))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Epochs 0, 1 and 3 of the 40 training images, by index, in order, of one rank."""
    for epoch in (0, 1, 3):
        save(tmp_path / "saved", epoch, 0, [str(i) for i in range(40)], first_seed=1000 * epoch)
    return tmp_path / "saved"


def test_views_captured_apart_are_merged_trained_from_trimmed_and_exported(
    distill: Cli, store: Made, run: Made, folder: Path, tmp_path: Path
) -> None:
    later = tmp_path / "later"
    assert distill(*capture(run.path, folder, later), "--set", "store.first_view=2", "--quiet").code == 0
    merged = distill("store", "merge", store.path, later, "--out", tmp_path / "all", "--json", "--quiet")
    assert (merged.code, merged.err) == (0, "")
    assert merged.json | {"wall_s": 0, "store": "", "store_id": "", "bytes": 0} == {
        "status": "done", "store": "", "rows": 160, "views": 4, "shards": 8, "bytes": 0, "plans": 2, "linked": 8,
        "copied": 0, "wall_s": 0, "store_id": "",
    }  # fmt: skip
    trained = distill(
        "train", *DISTIL, "--store", tmp_path / "all", "--data", folder, "--out", tmp_path / "run", "--quiet"
    )
    assert trained.code == 0, trained
    trimmed = distill(
        "store", "trim", tmp_path / "all", "--top-k", "1", "--views", "3", "--out", tmp_path / "one", "--json"
    )
    assert (trimmed.json["status"], trimmed.json["views"]) == ("done", 3)
    assert trimmed.json["bytes"] < trimmed.json["bytes_before"] == merged.json["bytes"]
    trained = distill("train", *DISTIL, "--store", tmp_path / "one", "--data", folder, "--out", tmp_path / "r", "-q")
    assert trained.code == 0, trained
    written = distill("store", "export", "parquet", tmp_path / "one", "--out", tmp_path / "x.parquet", "--json", "-q")
    assert (written.json["rows"], written.json["files"]) == (120, 1)
    given = distill("store", "export", "tinyvit", tmp_path / "one", "--out", tmp_path / "tinyvit", "--json", "-q")
    assert (given.json["rows"], given.json["epochs"]) == (120, 3)


def test_a_part_merged_is_finished_by_the_other(
    distill: Cli, refused: Refused, store: Made, run: Made, folder: Path, tmp_path: Path
) -> None:
    for name, part in (("a", "0:3"), ("b", "3:4")):
        assert distill(*capture(run.path, folder, tmp_path / name), "--shards", part, "--quiet").code == 0
    line = refused(4, "store", "merge", tmp_path / "a", "--out", tmp_path / "all")
    assert line.endswith("all: 1 of 4 shards are in none of these stores; the others are kept: run it again with the "
                         "stores that have them")  # fmt: skip
    assert distill("store", "merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "all", "--quiet").code == 0
    assert files(tmp_path / "all") == files(store.path)


def test_what_was_imported_is_given_back_to_the_byte(distill: Cli, saved: Path, folder: Path, tmp_path: Path) -> None:
    into = ("store", "import", "tinyvit", saved, "--data", folder, "--shard-rows", "16", "--out", tmp_path / "store")
    done = distill(*into, "--json")
    assert done.code == 0, done
    wanted = {
        "status": "done", "rows": 120, "views": 3, "shards": 9, "epochs": [0, 1, 3], "gaps": [2], "missing": 0,
        "duplicates": 0, "negative_tails": 3, "top5": None,
    }  # fmt: skip
    assert {name: done.json[name] for name in wanted} == wanted
    assert 20 < done.json["top1"] < 50
    assert f"warning: {saved}: has no epoch 2 between 0 and 3\n" in done.err
    assert distill(*into, "--json", "--quiet").json["status"] == "already_done"
    back = tmp_path / "back"
    assert distill("store", "export", "tinyvit", tmp_path / "store", "--out", back, "--quiet").code == 0
    (back / "export.json").unlink()
    assert files(back) == files(saved)


def test_stems_are_keys_too(distill: Cli, folder: Path, tmp_path: Path) -> None:
    stems = [path.stem for name in ("bag", "boot", "coat") for path in sorted((folder / "train" / name).iterdir())]
    save(tmp_path / "saved", 7, 0, stems)
    out = tmp_path / "store"
    assert distill("store", "import", "tinyvit", tmp_path / "saved", "--data", folder, "--out", out, "-q").code == 0
    assert json.loads((out / "plan.json").read_text())["first_view"] == 7
    back = ("--out", tmp_path / "back", "--quiet")
    assert distill("store", "export", "tinyvit", out, "--keys", "stem", "--data", folder, *back).code == 0
    (tmp_path / "back/export.json").unlink()
    assert files(tmp_path / "back") == files(tmp_path / "saved")


def test_an_imported_store_is_not_trained_from(
    distill: Cli, refused: Refused, saved: Path, folder: Path, run: Made, tmp_path: Path
) -> None:
    out = tmp_path / "store"
    assert distill("store", "import", "tinyvit", saved, "--data", folder, "--out", out, "--quiet").code == 0
    train = ("train", *DISTIL, "--store", out, "--data", folder, "--out", tmp_path / "run")
    evaluate = ("eval", run.path, "--data", folder, "--store", out, "--workers", "0")
    extend = ("store", "extend", out, "--views", "9", "--teacher", run.path, "--data", folder)
    for command in (train, evaluate, extend):
        assert refused(3, *command) == (
            f"store {out}: was imported; its views are drawn by TinyViT's own code, and cannot be replayed here; "
            'write a store with "distill teacher-logits", or give it back by "distill store export tinyvit"'
        )


def test_the_last_record_of_a_key_counts_and_stale_ranks_are_seen(
    distill: Cli, folder: Path, saved: Path, tmp_path: Path
) -> None:
    for epoch in (1, 3):
        for path in (saved / FOLDER.format(epoch)).iterdir():
            path.unlink()
        path.parent.rmdir()
    save(saved, 0, 1, ["7", "8", "8"], first_seed=500)
    save(saved, 0, 3, ["39"], first_seed=900)
    out = tmp_path / "store"
    done = distill("store", "import", "tinyvit", saved, "--data", folder, "--out", out, "--json")
    assert done.json["duplicates"] == 4
    where = saved / FOLDER.format(0)
    assert f"warning: {where}: 2 keys of rank1 are also in rank0; the higher rank counts; a few pad the " in done.err
    assert f"warning: {where}: 1 keys of rank3 are also in rank0; the higher rank counts; a few pad the " in done.err
    distill("store", "export", "tinyvit", out, "--out", tmp_path / "back", "--quiet")
    seeds = np.fromfile(tmp_path / "back" / FOLDER.format(0) / "rank0-values.bin", "<i4")[::3]
    assert seeds.tolist() == [*range(7), 500, 502, *range(9, 39), 900]


def test_samples_without_a_record_have_no_row(distill: Cli, folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "saved", 0, 0, [str(i) for i in range(40) if i not in (3, 30)])
    into = ("store", "import", "tinyvit", tmp_path / "saved", "--data", folder, "--out", tmp_path / "store")
    done = distill(*into, "--json")
    assert (done.json["missing"], done.json["rows"]) == (2, 38)
    assert "2 of 40 samples had no record and have no rows" in done.err
    assert json.loads((tmp_path / "store/manifest.json").read_text())["skipped"] == [3, 30]
    distill("store", "export", "tinyvit", tmp_path / "store", "--out", tmp_path / "back", "--quiet")
    (tmp_path / "back/export.json").unlink()
    assert files(tmp_path / "back") == files(tmp_path / "saved")


@pytest.mark.parametrize(
    ("keys", "options", "code", "line"),
    [
        (
            ["1", "40", "41"],
            (),
            3,
            "rank0-keys.txt: 2 keys are no indices of the 40 samples (40, 41); give the data that",
        ),
        (["1", "x"], ("--keys", "index"), 3, "rank0-keys.txt: 2 keys are no indices of the 40 samples (1, x); give"),
        (["n1", "n2", "n3", "n4"], (), 3, "4 keys are no file stems of the 40 samples (n1, n2, n3 and 1 more); give"),
        (["1"], ("--keys", "name"), 2, "--keys name: no such kind of key; there are auto, index, stem"),
        (
            ["1"],
            ("--num-classes", "4"),
            3,
            "--num-classes 4: has 4 classes, the data 3; give the data of these classes",
        ),
    ],
)
def test_keys_of_other_data_are_refused(
    keys: list[str], options: tuple[str, ...], code: int, line: str, refused: Refused, folder: Path, tmp_path: Path
) -> None:
    save(tmp_path / "saved", 0, 0, keys)
    into = ("store", "import", "tinyvit", tmp_path / "saved", "--data", folder, "--out", tmp_path / "out")
    assert line in refused(code, *into, *options)
    assert not (tmp_path / "out").exists()


def test_what_is_no_record_is_refused(refused: Refused, folder: Path, saved: Path, tmp_path: Path) -> None:
    into = ("store", "import", "tinyvit", saved, "--data", folder, "--out", tmp_path / "out")
    values = saved / FOLDER.format(1) / "rank0-values.bin"
    content = values.read_bytes()
    values.write_bytes(content[:-1])
    assert "39 records and 11 bytes of 12 bytes, rank0-keys.txt has 40 keys" in refused(4, *into)
    assert not (tmp_path / "out").exists()
    values.write_bytes(content[:4] + struct.pack("<h", -3) + content[6:])
    assert "logits_top2_epoch1: the record of sample 0 has a class above 2; give" in refused(4, *into)
    assert not (tmp_path / "out/manifest.json").exists()


def test_decimal_stems_need_a_word(refused: Refused, distill: Cli, copied: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted((copied / "train").rglob("*.png"))):
        path.rename(path.with_name(f"{39 - number}.png"))
    save(tmp_path / "saved", 0, 0, [str(i) for i in range(40)])
    into = ("store", "import", "tinyvit", tmp_path / "saved", "--data", copied, "--out", tmp_path / "out")
    assert "its keys can be indices or stems, and sample 0 is bag/26.png; give --keys index" in refused(2, *into)
    assert distill(*into, "--keys", "stem", "--quiet").code == 0


def test_two_files_of_one_stem_are_refused(refused: Refused, copied: Path, tmp_path: Path) -> None:
    for name in ("bag", "coat"):
        first = min((copied / "train" / name).iterdir())
        first.rename(first.with_name("same.png"))
    save(tmp_path / "saved", 0, 0, ["same"])
    into = ("store", "import", "tinyvit", tmp_path / "saved", "--data", copied, "--out", tmp_path / "out")
    assert "--keys stem: bag/same.png and coat/same.png have the same stem" in refused(2, *into)


def test_another_import_is_refused(refused: Refused, distill: Cli, folder: Path, saved: Path, tmp_path: Path) -> None:
    into = ("store", "import", "tinyvit", saved, "--data", folder, "--out", tmp_path / "out")
    assert distill(*into, "--quiet").code == 0
    assert "out: holds another store (teacher.name: tinyvit, clip: there, asked)" in refused(
        3, *into, "--teacher", "clip"
    )
    save(saved, 3, 0, ["1"])
    assert "out: holds another store (teacher.weights_sha256: " in refused(3, *into)


def test_a_killed_import_is_finished_by_the_same_command(
    refused: Refused, distill: Cli, folder: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    into = ("store", "import", "tinyvit", saved, "--data", folder, "--shard-rows", "16", "--out")
    assert distill(*into, tmp_path / "undisturbed", "--quiet").code == 0
    write, left = StoreWriter.write, iter(range(7))

    def dies(*arguments: Any, **named: Any) -> None:
        if next(left, None) is None:
            raise Stopped("SIGTERM: stopped", 15)
        write(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "write", dies)
        refused(143, *into, tmp_path / "out")
    assert not list((tmp_path / "out").glob("manifest*"))
    done = distill(*into, tmp_path / "out", "--json", "--quiet")
    assert (done.json["status"], done.json["negative_tails"]) == ("done", 3)
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")


def test_one_command_at_a_time(refused: Refused, store: Made, saved: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with locked(out):
        for command in (
            ("merge", store.path), ("trim", store.path, "--top-k", "1"), ("import", "tinyvit", saved, "--data", folder),
            ("export", "tinyvit", store.path), ("export", "parquet", store.path),
        ):  # fmt: skip
            assert refused(75, "store", *command, "--out", out).startswith(f"{out}: held by this process")


def test_business_code_needs_no_torch() -> None:
    modules = ("merge", "trim", "tinyvit", "export_tinyvit", "export_parquet", "derived")
    line = f"import sys, {', '.join(f'distill_cli.store.{name}' for name in modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", line], cwd=Path(__file__).parents[2], timeout=60).returncode == 0
