"""Data of every kind on the command line: the same work, and the faults in it."""

import io
import os
import shutil
import signal
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from command_line import DISTIL, TRAIN, Cli, Made, Refused, capture
from PIL import Image
from torch.utils.data import get_worker_info

from distill_cli.data.folder import ImageFolder

CORRUPT = b"\xff\xd8\xff\xe0 no JPEG"


def _files(root: Path) -> list[Path]:
    return sorted(root.glob("*/*"))


def _list(images: Path, path: Path) -> Path:
    rows = [f"{file.relative_to(images / 'train')},{file.parent.name}\n" for file in _files(images / "train")]
    path.write_text("".join(["path,label\n", *rows]))
    return path


def _tar(images: Path, path: Path, bad: bool = False) -> Path:
    with tarfile.open(path, "w") as tar:
        for number, file in enumerate(_files(images / "train")):
            content = CORRUPT if bad and number == 0 else file.read_bytes()
            for name, part in ((file.name, content), (f"{file.stem}.cls", file.parent.name.encode())):
                member = tarfile.TarInfo(f"{file.parent.name}/{name}")
                member.size = len(part)
                tar.addfile(member, io.BytesIO(part))
    return path


def _hdf5(images: Path, path: Path, bad: bool = False) -> Path:
    files = _files(images / "train")
    with h5py.File(path, "w") as file:
        stored = file.create_dataset("images", len(files), h5py.vlen_dtype(np.uint8))
        for number, image in enumerate(files):
            stored[number] = np.frombuffer(CORRUPT if bad and number == 0 else image.read_bytes(), np.uint8)
        file["labels"] = [image.parent.name for image in files]
    return path


def test_a_store_of_folders_serves_the_same_files_in_a_list(
    distill: Cli, folder: Path, store: Made, tmp_path: Path
) -> None:
    path = _list(folder, tmp_path / "list.csv")
    root = ("--set", f"data.root={folder}/train", "--set", f"data.val={folder}/val", "--workers", "1")
    command = ("train", *DISTIL, "--data", path, *root, "--store", store.path, "--out", tmp_path / "r")
    result = distill(*command, "--json", "--quiet")
    assert (result.code, result.json["status"]) == (0, "done"), result
    result = distill("eval", tmp_path / "r", "--json", "--quiet")
    assert (result.code, result.json["images"]) == (0, 20), result


@pytest.mark.parametrize("kind", ["tar", "hdf5"])
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_store_of_other_kinds_of_data(
    distill: Cli, folder: Path, run: Made, tmp_path: Path, kind: str, workers: str
) -> None:
    data = f"wds:{_tar(folder, tmp_path / 'x.tar')}" if kind == "tar" else _hdf5(folder, tmp_path / "x.h5")
    result = distill(*capture(run.path, Path(data), tmp_path / "s"), "--workers", workers, "--json", "--quiet")
    assert (result.code, result.json["rows"]) == (0, 80), result
    command = ("train", *DISTIL, "--data", data, "--store", tmp_path / "s", "--out", tmp_path / "r")
    assert distill(*command, "--workers", workers, "--quiet").code == 0


@pytest.mark.parametrize("kind", ["folder", "list", "tar", "hdf5"])
def test_unreadable_images_are_named_or_skipped_and_counted(
    distill: Cli, refused: Refused, copied: Path, run: Made, tmp_path: Path, kind: str
) -> None:
    bad = kind in ("tar", "hdf5")
    data: dict[str, str | Path] = {
        "folder": copied,
        "list": _list(copied, copied / "train/list.csv"),
        "tar": f"wds:{_tar(copied, tmp_path / 'x.tar', bad)}",
        "hdf5": _hdf5(copied, tmp_path / "x.h5", bad),
    }
    _files(copied / "train")[0].write_bytes(CORRUPT)
    command = capture(run.path, Path(data[kind]), tmp_path / "s")
    said = refused(1, *command)
    assert ": cannot be decoded (" in said
    assert said.endswith("replace it, or go on without it by --skip-unreadable")
    result = distill(*command, "--skip-unreadable", "--json", "--quiet")
    assert (result.code, result.json["skipped"], result.json["rows"]) == (0, 1, 78), result


def test_faulty_images_together_are_skipped_and_counted(distill: Cli, copied: Path, run: Made, tmp_path: Path) -> None:
    files = _files(copied / "train")
    files[0].write_bytes(b"")
    files[1].write_bytes(files[1].read_bytes()[:-30])
    files[2].unlink()
    files[2].symlink_to("nowhere.png")
    files[3].unlink()
    os.mkfifo(files[3])
    Image.new("CMYK", (20_000, 3)).save(files[4], "TIFF")
    Image.new("I;16", (30, 30), 30_000).save(files[5])
    files[6].rename(files[6].with_name("two\nlines, \udcff.png"))
    out = tmp_path / "s"
    result = distill(*capture(run.path, copied, out), "--workers", "1", "--skip-unreadable", "--json", "--quiet")
    assert (result.code, result.json["skipped"], result.json["rows"]) == (0, 4, 72), result
    assert result.err == f"warning: {out}: 4 images could not be decoded and have no rows\n"


def test_a_loader_process_that_is_killed(
    distill: Cli, refused: Refused, folder: Path, run: Made, store: Made, tmp_path: Path
) -> None:
    content = ImageFolder.content

    def die(self: ImageFolder, sample_id: int) -> bytes:
        if get_worker_info() is not None and sample_id == 30:
            os.kill(os.getpid(), signal.SIGKILL)
        return content(self, sample_id)

    command = (*capture(run.path, folder, tmp_path / "s"), "--workers", "2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageFolder, "content", die)
        said = refused(1, *command)
    assert said.startswith("DataLoader worker")
    assert said.endswith("Run the same command again to go on")
    assert distill(*command, "--quiet").code == 0
    for path in store.path.rglob("*"):
        if path.is_file():
            assert (tmp_path / "s" / path.relative_to(store.path)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("path,label\n../a.png,0\n", 2, "row 2: ../a.png is no path below"),
        ("path,label\n/etc/a.png,0\n", 2, "row 2: /etc/a.png is outside of"),
        ("path,label\na.png,0\na.png,1\n", 2, "a.png is there twice"),
        ("path,label\na.png,3\n", 3, "has 3 classes, the data has label 3; give the data of these classes"),
        ("path,label\na.png,-1\n", 2, "label -1; give class ids from 0 on"),
    ],
)
def test_a_list_that_does_not_fit(refused: Refused, run: Made, tmp_path: Path, text: str, code: int, said: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    assert said in refused(code, *capture(run.path, tmp_path / "x.csv", tmp_path / "s"))
    assert not (tmp_path / "s").exists()


def test_labels_beyond_the_teachers_classes_may_be_left_out(
    distill: Cli, folder: Path, run: Made, tmp_path: Path
) -> None:
    shutil.copy(_files(folder / "train")[0], tmp_path / "a.png")
    (tmp_path / "x.csv").write_text("path,label\na.png,3\n")
    command = capture(run.path, tmp_path / "x.csv", tmp_path / "s")
    result = distill(*command, "--set", "data.labelled=false", "--json", "--quiet")
    assert (result.code, result.json["rows"]) == (0, 2), result


def test_a_tar_with_members_outside(refused: Refused, run: Made, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("../0.png"))
    said = refused(2, *capture(run.path, Path(f"wds:{tmp_path}/x.tar"), tmp_path / "s"))
    assert "member ../0.png leaves the tar" in said


def test_a_tar_that_is_cut(refused: Refused, folder: Path, run: Made, tmp_path: Path) -> None:
    path = _tar(folder, tmp_path / "x.tar")
    os.truncate(path, 9000)
    said = refused(2, *capture(run.path, Path(f"wds:{path}"), tmp_path / "s"))
    assert f"{path}: damaged or cut after bag/" in said


def test_a_link_loop_in_the_tree(refused: Refused, copied: Path, tmp_path: Path) -> None:
    (copied / "train/bag/again").symlink_to(copied / "train")
    said = refused(2, "train", *TRAIN, "--data", copied, "--out", tmp_path / "r")
    assert said == f"{copied}/train/bag/again: links back to {copied}/train, which it is in; remove the link"


def test_a_loader_process_that_is_killed_while_the_teacher_works(
    refused: Refused, folder: Path, run: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch raises in the midst of it."""

    def killed(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr("distill_cli.capture.teach", killed)
    said = refused(1, *capture(run.path, folder, tmp_path / "s"))
    assert said == "DataLoader worker (pid 7) is killed by signal: Killed. Run the same command again to go on"
