"""`distill bench data`."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Cli, Made, Refused, Result

from distill_cli.bench import Stage, _bottleneck

TINY = ("--image-size", "28", "--batch-size", "8", "--batches", "1", "--workers", "0")


def _bench(distill: Cli, *arguments: str | Path) -> Result:
    result = distill("bench", "data", *TINY, *arguments)
    assert result.code == 0, result
    return result


def test_the_stages_add_up_to_a_worker(folder: Path, distill: Cli) -> None:
    said = _bench(distill, "--data", folder, "--json").json
    assert [stage["name"] for stage in said["stages"]] == ["read", "decode", "augment", "collate", "copy"]
    assert sum(stage["share"] for stage in said["stages"][:-1]) == pytest.approx(100, abs=0.5)
    assert said["stages"][-1]["share"] is None
    ms = sum(stage["ms"] for stage in said["stages"][:-1])
    assert said["worker_images_per_s"] == pytest.approx(1000 / ms, rel=0.01)
    assert (said["workers"], said["batch_size"], said["view"]["image_size"]) == (0, 8, 28)
    assert said["images_per_s"] > 0


def test_a_stores_views_and_rows_are_timed(folder: Path, store: Made, distill: Cli) -> None:
    said = _bench(distill, "--data", folder, "--store", store.path, "--json").json
    assert [stage["name"] for stage in said["stages"]] == ["read", "decode", "augment", "rows", "collate", "copy"]
    assert said["view"]["augment"] == "pad-crop"


@pytest.mark.parametrize("decode", ["full", "reduced", "torch"])
def test_every_way_of_decoding_has_its_own_stage(decode: str, folder: Path, distill: Cli) -> None:
    said = _bench(distill, "--data", folder, "--set", "data.augment=rrc", "--decode", decode, "--json").json
    assert said["view"].get("decode", "full") == decode
    assert {stage["name"]: stage["ms"] > 0 for stage in said["stages"]}["decode"]


def test_a_cache_leaves_nothing_to_decode(folder: Path, tmp_path: Path, distill: Cli) -> None:
    said = _bench(distill, "--data", folder, "--cache", tmp_path / "cache", "--json").json
    assert {stage["name"]: stage["ms"] > 0 for stage in said["stages"] if stage["name"] in ("read", "decode")} == {
        "read": True,
        "decode": False,
    }


def test_mixed_images_are_timed_as_they_are_trained_on(folder: Path, distill: Cli) -> None:
    said = _bench(distill, "--data", folder, "--set", "data.mixup=0.8", "--json").json
    assert said["view"]["mixup"] == 0.8
    assert said["images_per_s"] > 0


def test_the_table_is_plain_in_a_pipe(folder: Path, distill: Cli) -> None:
    result = _bench(distill, "--data", folder)
    assert re.search(r"^decode +[\d.]+ +[\d,]+ +\d+$", result.out, re.MULTILINE)
    assert re.search(r"^bottleneck +\w+: ", result.out, re.MULTILINE)
    assert re.search(r"^advice +\S", result.out, re.MULTILINE)
    assert "timing the loader with 0 workers" in result.err


def test_what_was_tried_is_what_is_advised(folder: Path, distill: Cli) -> None:
    advice = _bench(distill, "--data", folder, "--json").json["advice"]
    tried = r"(--workers \d+|data\.resize=torch|data\.decode=reduced|--views-per-read 4)"
    gains = re.fullmatch(rf"{tried}: (\d+) instead of (\d+) images/s here", advice)
    if gains:
        assert int(gains[2]) > int(gains[3])
    else:
        assert re.fullmatch(rf"nothing that was tried gives more \({tried}(, {tried})*\)", advice)


def test_what_bounds_is_the_slowest_of_a_worker_or_the_main_process() -> None:
    stages = (Stage("read", 1, 1000, 25), Stage("decode", 3, 333, 75), Stage("copy", 1, 1000, None))
    assert _bottleneck(stages, 4, 480, 2) == "decode: 75 % of a worker's time; 2 workers give 480 images/s"
    assert _bottleneck(stages, 4, 240, 0) == "decode: 75 % of a worker's time; one process gives 240 images/s"
    assert _bottleneck(stages, 4, 900, 8).startswith("copy: the main process is slower than its workers; 8 workers")


@pytest.mark.parametrize(
    ("code", "arguments", "line"),
    [
        (2, ("--batches", "0"), "--batches, --seconds: give more than 0"),
        (2, ("--seconds", "nan"), "--batches, --seconds: give more than 0"),
        (
            2,
            ("--decode", "cuda", "--device", "cpu"),
            "data.decode=cuda: decodes on a GPU, the work is done on cpu; give",
        ),
        (2, ("--decode", "half"), "--decode: data.decode: input should be 'full', 'reduced', 'torch' or 'cuda'"),
        (2, ("--data", "nowhere"), "--data nowhere: "),
        (
            3,
            ("--store", "STORE", "--set", "data.resize=torch"),
            "data.resize: torch asked, the store has pillow; leave",
        ),
    ],
)
def test_bad_input_is_one_line(
    code: int, arguments: tuple[str, ...], line: str, folder: Path, store: Made, refused: Refused
) -> None:
    given = [str(store.path) if one == "STORE" else one for one in arguments]
    data = () if "--data" in given else ("--data", folder)
    assert refused(code, "bench", "data", *data, *given).startswith(line)


def test_an_unreadable_image_is_one_line_or_skipped(copied: Path, distill: Cli, refused: Refused) -> None:
    for path in sorted((copied / "train" / "bag").iterdir())[::2]:
        path.write_bytes(b"")
    assert "cannot be decoded" in refused(1, "bench", "data", *TINY, "--batch-size", "40", "--data", copied)
    assert _bench(distill, "--data", copied, "--skip-unreadable", "--json").json["images_per_s"] > 0


def test_images_of_which_none_decodes_are_one_line(copied: Path, refused: Refused) -> None:
    for path in (copied / "train").rglob("*.png"):
        path.write_bytes(b"")
    line = refused(1, "bench", "data", *TINY, "--data", copied, "--skip-unreadable")
    assert line.endswith("; no image of its batch could be decoded")


@pytest.mark.slow
def test_ctrl_c_ends_it(folder: Path) -> None:
    command = [sys.executable, "-m", "distill_cli", "bench", "data", "--data", str(folder), "--seconds", "600"]
    process = subprocess.Popen(
        [*command, "--image-size", "28", "--workers", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("timing the stages"):
            break
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err == "distill: SIGINT: stopped; the same command goes on\n"
