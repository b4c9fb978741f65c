"""train --views-per-read: several views of an image each time it is decoded."""

import json
from pathlib import Path

import pytest
from command_line import DISTIL, STUDENT, Cli, Made, Refused

from distill_cli.data.folder import ImageFolder


def test_half_the_reads_for_as_many_inputs(
    distill: Cli, folder: Path, store: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, asked = ImageFolder.content, list[str]()

    def counted(self: ImageFolder, sample_id: int) -> bytes:
        asked.append(self.keys[sample_id])
        return content(self, sample_id)

    monkeypatch.setattr(ImageFolder, "content", counted)
    reads = {}
    for views in (1, 2):
        out = tmp_path / f"run-{views}"
        run = (
            *STUDENT,
            "--batch-size",
            "8",
            "--epochs",
            "2",
            "--workers",
            "0",
            "--store",
            store.path,
            "--data",
            folder,
        )
        asked.clear()
        done = distill("train", *run, "--views-per-read", str(views), "--out", out, "--json", "--quiet")
        assert done.code == 0, done
        reads[views] = len(asked)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        # Validated after each of two epochs of five steps: an epoch has as many inputs as ever.
        assert [line["step"] for line in lines if "top1" in line] == [5, 10]
    # 80 inputs of 40 images; the proof and the validations read as much in both.
    assert reads[1] - reads[2] == 40


def test_what_does_not_divide_or_is_not_there(folder: Path, store: Made, tmp_path: Path, refused: Refused) -> None:
    run = ("train", *DISTIL, "--store", store.path, "--data", folder, "--out", tmp_path / "run")
    said = refused(2, *run, "--views-per-read", "3")
    assert said == "--batch-size 8: is global and does not divide by --views-per-read 3 and 1 ranks"
    said = refused(2, *run, "--views-per-read", "4")
    assert said == f"--views-per-read 4: store {store.path} has 2 views; give at most as many"
    assert not (tmp_path / "run").exists()
