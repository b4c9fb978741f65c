"""Whatever is wrong with what a command is given: its exit code, and one line that says where, what, and what to do."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from command_line import DISTIL, TRAIN, Cli, Made, Refused, capture
from PIL import Image

from distill_cli.data.batch import Batch
from distill_cli.locks import locked
from distill_cli.objectives import Losses
from distill_cli.objectives.supervised import Supervised
from distill_cli.store.reader import Store
from distill_cli.store.writer import StoreWriter
from distill_cli.students.build import create

TINY = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
KWARGS = ("--set", "teacher.kwargs={layers=[1,1,1,1],channels=[8,8,8,8]}")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where nothing is yet."""
    return tmp_path / "out"


@pytest.fixture
def spoilt(store: Made, tmp_path: Path) -> Path:
    """A copy of the store, to be damaged."""
    return Path(shutil.copytree(store.path, tmp_path / "store"))


def weights(path: Path, num_classes: int = 3, fill: float | None = None) -> Path:
    """Of the small ResNet; all of one value if it is given."""
    tensors = create("resnet18", num_classes=num_classes, arguments=TINY).state_dict()
    if fill is not None:
        tensors["fc.bias"].fill_(fill)
    safetensors.torch.save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["train", "--out", "x", "--bach-size", "8"], "No such option: --bach-size"),
        (["train"], "Missing option '--out'"),
        (["train", "--out", "x", "--epochs", "many"], "Invalid value for '--epochs'"),
        (["recipes", "show"], "Missing argument"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], said: str, distill: Cli) -> None:
    result = distill(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"distill: {said}")
    assert result.err.endswith('--help"\n')
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epochs", "0"], "--epochs: train.epochs: input should be greater than 0, not 0"),
        (["--batch-size", "-8"], "--batch-size: train.batch_size: input should be greater than 0, not -8"),
        (["--precision", "fp16"], "--precision: train.precision: input should be 'fp32' or 'bf16', not 'fp16'"),
        (["--set", "train.bach_size=8"], "--set: train.bach_size: unknown key; did you mean train.batch_size"),
        (["--set", "train=8"], "--set train=8: not of the form section.key=VALUE"),
        (["--recipe", "none"], "--recipe none: no such recipe or file"),
        (
            ["--objective", "dino"],
            "objective.name: no such objective, 'dino'; there are supervised, tinyvit, fkd, deit, features",
        ),
        (["--student", "tinyvit-12m"], "tinyvit-12m: no such model; did you mean tinyvit-21m, tinyvit-11m, tinyvit-5m"),
        (["--student", "resnet18", "--set", "student.patch_size=4"], "timm cannot build it with patch_size=4"),
        (["--device", "gpu"], "--device gpu: not a device; give auto, cpu, cuda or cuda:N"),
        (["--data", "wds:shards/{0..9}.tar"], "shards/0.tar: no such file or directory; give the tars that there are"),
        (["--data", "/nowhere"], "--data /nowhere: no such folder or file; give a folder of images"),
        (["--data", __file__], f"--data {__file__}: is a file; give a folder of images"),
        (["--objective", "tinyvit"], "objective tinyvit: learns from a store; give --store, or --teacher with --live"),
        (["--objective", "deit"], "objective deit: learns from a store; give --store, or --teacher with --live"),
        (["--live"], "--live: objective supervised learns from no teacher; leave it out"),
        (["--objective", "deit", "--live"], "--teacher is missing: give a run directory, or a timm name with its"),
        (["--set", "student.img_size=32"], "image size: data.image_size 28, student.img_size 32"),
    ],
)
def test_a_wrong_recipe(arguments: list[str], said: str, folder: Path, out: Path, refused: Refused) -> None:
    assert said in refused(2, "train", *TRAIN, "--data", folder, "--out", out, *arguments)
    assert not out.exists()


@pytest.mark.parametrize("missing", ["--data", "--student"])
def test_what_train_cannot_do_without(missing: str, folder: Path, out: Path, refused: Refused) -> None:
    given = {"--data": str(folder), "--student": "resnet18"}
    del given[missing]
    arguments = [word for pair in given.items() for word in pair]
    assert refused(2, "train", *arguments, "--out", out).startswith(f"{missing} is missing: give ")


def test_an_unknown_key_in_a_recipe_file(tmp_path: Path, out: Path, refused: Refused) -> None:
    (tmp_path / "mine.toml").write_text("[data]\nbatch_size = 8\n")
    said = refused(2, "train", "--recipe", tmp_path / "mine.toml", "--out", out)
    assert said.startswith(f"recipe {tmp_path / 'mine.toml'}: data.batch_size: unknown key; did you mean ")
    assert "train.batch_size" in said


def test_a_class_folder_without_images(copied: Path, out: Path, refused: Refused) -> None:
    (copied / "train" / "empty").mkdir()
    said = refused(2, "train", *TRAIN, "--data", copied, "--out", out)
    assert said == f"{copied}/train/empty: no images in this class folder; add some, or remove the folder"


def test_a_folder_without_images(tmp_path: Path, out: Path, refused: Refused) -> None:
    assert f"{tmp_path}: no images" in refused(2, "train", *TRAIN, "--data", tmp_path, "--out", out)


@pytest.fixture
def corrupt(copied: Path) -> Path:
    """A JPEG that breaks off, the first of the training images."""
    path = copied / "train" / "bag" / "00000.jpg"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:500])
    return path


ALL_AT_ONCE = ("--batch-size", "41", "--set", "train.steps=1")


def test_train_names_an_image_that_does_not_decode(copied: Path, corrupt: Path, out: Path, refused: Refused) -> None:
    said = refused(1, "train", *TRAIN, *ALL_AT_ONCE, "--data", copied, "--out", out)
    assert said.startswith(f"{corrupt}: cannot be decoded (")
    assert said.endswith("); replace it, or go on without it by --skip-unreadable")


def test_teacher_logits_names_an_image_that_does_not_decode(
    copied: Path, corrupt: Path, run: Made, out: Path, refused: Refused
) -> None:
    assert refused(1, *capture(run.path, copied, out)).startswith(f"{corrupt}: cannot be decoded (")
    assert not (out / "manifest.json").exists()


@pytest.mark.usefixtures("corrupt")
def test_an_image_that_does_not_decode_is_counted_when_skipped(
    copied: Path, run: Made, out: Path, tmp_path: Path, distill: Cli
) -> None:
    skipping = ("--skip-unreadable", "--json", "--quiet")
    captured = distill(*capture(run.path, copied, out), "--views", "1", *skipping).json
    assert (captured["rows"], captured["skipped"]) == (40, 1)
    trained = distill("train", *TRAIN, *ALL_AT_ONCE, "--data", copied, "--out", tmp_path / "run", *skipping).json
    assert trained["skipped"] == 1


def test_eval_counts_what_it_skipped(copied: Path, run: Made, refused: Refused, distill: Cli) -> None:
    bad = copied / "val" / "bag" / "00000.png"
    bad.write_bytes(b"no image")
    arguments = ("eval", run.path, "--data", copied, "--workers", "0")
    assert refused(1, *arguments).startswith(f"{bad}: cannot be decoded (")
    said = distill(*arguments, "--skip-unreadable", "--json", "--quiet").json
    assert (said["images"], said["skipped"]) == (20, 1)


def test_data_of_other_classes_than_the_store(copied: Path, store: Made, out: Path, refused: Refused) -> None:
    for split in ("train", "val"):
        (copied / split / "boot").rename(copied / split / "brogue")
    said = refused(3, "train", *DISTIL, "--store", store.path, "--data", copied, "--out", out)
    assert 'class 1 is "boot", that of the data "brogue"' in said


def test_data_of_another_number_of_classes(copied: Path, store: Made, run: Made, out: Path, refused: Refused) -> None:
    for split in ("train", "val"):
        shutil.rmtree(copied / split / "boot")
    for command in (
        ("train", *DISTIL, "--store", store.path, "--out", out),
        ("teacher-logits", "--teacher", run.path, "--out", out),
        ("eval", run.path),
    ):
        assert "has 3 classes, the data 2; give the data of these classes" in refused(3, *command, "--data", copied)


def test_data_of_other_images_than_the_store(copied: Path, store: Made, out: Path, refused: Refused) -> None:
    first = next((copied / "train" / "bag").iterdir())
    first.rename(first.with_name("renamed.png"))
    arguments = ("train", *DISTIL, "--store", store.path, "--data", copied, "--out", out)
    assert "keys fingerprint " in refused(3, *arguments)
    (copied / "train" / "bag" / "renamed.png").unlink()
    assert "is of 40 images, the data has 39" in refused(3, *arguments)


def test_data_with_other_pixels_than_the_store(copied: Path, store: Made, out: Path, refused: Refused) -> None:
    for path in (copied / "train").rglob("*.png"):
        Image.new("RGB", (28, 28)).save(path)
    said = refused(3, "train", *DISTIL, "--store", store.path, "--data", copied, "--out", out)
    assert "does not replay to the pixels that the teacher saw; the library versions are the store's" in said


def test_a_student_of_another_number_of_classes(folder: Path, out: Path, refused: Refused) -> None:
    said = refused(3, "train", *TRAIN, "--data", folder, "--set", "student.num_classes=4", "--out", out)
    assert said == "student.num_classes: 4 asked, the data has 3; leave it out"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--set", "data.padding=3"], "data.padding: 3 asked, the store has 2; leave it out"),
        (["--set", "data.hflip=0.25"], "data.hflip: 0.25 asked, the store has 0.5; leave it out"),
    ],
)
def test_another_view_than_the_store_has(
    asked: list[str], said: str, folder: Path, store: Made, out: Path, refused: Refused
) -> None:
    assert said in refused(3, "train", *DISTIL, "--store", store.path, "--data", folder, "--out", out, *asked)


@pytest.mark.parametrize(
    "command",
    [
        ("train", *DISTIL, "--store", "STORE", "--data", "DATA", "--out", "OUT"),
        ("eval", "RUN", "--store", "STORE", "--data", "DATA"),
        ("store", "check", "STORE", "--teacher", "RUN", "--data", "DATA"),
        ("store", "extend", "STORE", "--views", "4", "--teacher", "RUN", "--data", "DATA"),
        ("bench", "data", "--store", "STORE", "--data", "DATA"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_store_of_what_a_gpu_decoded_without_one(
    command: tuple[str, ...],
    store: Made,
    run: Made,
    folder: Path,
    tmp_path: Path,
    refused: Refused,
    fill_store: Callable[..., StoreWriter],
) -> None:
    plan = Store(store.path).plan
    fill_store(tmp_path / "gpu", replace(plan, transform={**plan.transform, "augment": "rrc", "decode": "cuda"}))
    places = {"STORE": tmp_path / "gpu", "RUN": run.path, "DATA": folder, "OUT": tmp_path / "out"}
    line = refused(3, *(places.get(one, one) for one in command), "--device", "cpu")
    assert line.startswith(f"store {tmp_path / 'gpu'}: its teacher saw what a GPU decoded (data.decode cuda), which ")


def test_decoding_on_a_gpu_without_one(folder: Path, run: Made, out: Path, refused: Refused) -> None:
    given = ("--data", folder, "--out", out, "--decode", "cuda", "--set", "data.augment=rrc", "--device", "cpu")
    for command in (("teacher-logits", "--teacher", run.path), ("train", *TRAIN)):
        assert refused(2, *command, *given).startswith("data.decode=cuda: decodes on a GPU, the work is done on cpu;")
    assert not out.exists()


def test_a_store_without_its_manifest(spoilt: Path, folder: Path, out: Path, refused: Refused) -> None:
    (spoilt / "manifest.json").unlink()
    (spoilt / "view-001" / "shard-00000.h5").unlink()
    arguments = ("train", *DISTIL, "--store", spoilt, "--data", folder, "--out", out)
    assert refused(4, *arguments) == (
        f'{spoilt}: 1 of 4 shards missing; run the same "distill teacher-logits" command again to finish it'
    )


def test_a_store_with_a_damaged_shard(spoilt: Path, folder: Path, out: Path, refused: Refused) -> None:
    shard = spoilt / "view-000" / "shard-00001.h5"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert str(shard) in refused(4, "train", *DISTIL, "--store", spoilt, "--data", folder, "--out", out)


def test_a_folder_that_is_no_store(folder: Path, out: Path, refused: Refused) -> None:
    said = refused(4, "train", *DISTIL, "--store", folder, "--data", folder, "--out", out)
    assert f"{folder}: no plan.json; this is not a store" in said


@pytest.mark.parametrize("command", ["train", "teacher-logits"])
def test_an_out_that_is_somebody_elses(
    command: str, folder: Path, run: Made, tmp_path: Path, out: Path, refused: Refused
) -> None:
    arguments = TRAIN if command == "train" else ("--teacher", run.path)
    (tmp_path / "precious.txt").write_text("mine")
    what = "run" if command == "train" else "store"
    said = refused(2, command, *arguments, "--data", folder, "--out", tmp_path)
    assert said == f"{tmp_path}: is not empty and not a {what}; choose another --out"
    out.write_text("mine")
    assert f"{out}: is a file" in refused(2, command, *arguments, "--data", folder, "--out", out)
    assert (tmp_path / "precious.txt").read_text() == out.read_text() == "mine"


def test_an_out_below_a_file(folder: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("mine")
    said = refused(1, "train", *TRAIN, "--data", folder, "--out", tmp_path / "file" / "run")
    assert said.startswith(f"{tmp_path / 'file'}")
    assert "not a directory" in said


HOLD = """
import sys, time
from distill_cli.locks import *
with locked(Path(sys.argv[1])):
    print(flush=True)
    time.sleep(60)
"""


def test_an_out_that_another_process_holds(folder: Path, out: Path, run: Made, refused: Refused) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, out], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        for command in (("train", *TRAIN, "--data", folder, "--out", out), capture(run.path, folder, out)):
            assert f"{out}: held by pid {holder.pid} on " in refused(75, *command)
        holder.kill()


def test_an_out_that_this_process_holds(folder: Path, out: Path, run: Made, refused: Refused) -> None:
    with locked(out):
        assert refused(75, *capture(run.path, folder, out)).startswith(f"{out}: held by this process; wait for it")


@pytest.mark.parametrize("shards", ["4:5", "2:2", "3:1", "0:5"])
def test_shards_that_the_store_does_not_have(shards: str, folder: Path, out: Path, run: Made, refused: Refused) -> None:
    said = refused(2, *capture(run.path, folder, out), "--shards", shards)
    assert said == f"--shards {shards}: the store has shards 0:4"
    assert not out.exists()


@pytest.mark.parametrize("shards", ["1", "a:b", "-1:2", "1:", ":", "1:2:3", "0x1:2"])
def test_shards_that_are_no_range(shards: str, folder: Path, out: Path, run: Made, refused: Refused) -> None:
    said = refused(2, *capture(run.path, folder, out), "--shards", shards)
    assert said == f"--shards {shards}: not of the form A:B, as in 0:10"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--top-k", "0"), "--top-k 0: keeps nothing of a row; give at least 1, or --sample N with it"),
        (("--keep-mass", "0.9", "--sample", "2"), "--keep-mass and --sample: a sampled row keeps all of its mass"),
        (("--keep-mass", "0.9", "--min-k", "3"), "--min-k 3: is more than --top-k 2; give at most that"),
        (("--min-k", "2"), "--min-k 2: is of --keep-mass P only; give both, or neither"),
        (("--keep-mass", "1.5"), "--keep-mass: store.keep_mass"),
        (("--set", "store.bits=8"), "store.bits 8: is of --codec compact only; give both, or neither"),
    ],
)
def test_rows_that_cannot_be(
    options: tuple[str, ...], said: str, folder: Path, out: Path, run: Made, refused: Refused
) -> None:
    assert refused(2, *capture(run.path, folder, out), *options).startswith(said)
    assert not out.exists()


def test_a_run_of_another_recipe(folder: Path, run: Made, refused: Refused) -> None:
    said = refused(3, "train", *TRAIN, "--data", folder, "--out", run.path, "--lr", "0.5", "--seed", "7")
    assert "train.lr: 7.8125e-06, 0.5; train.seed: 0, 7: there, asked" in said


def test_a_run_of_other_data(folder: Path, copied: Path, run: Made, refused: Refused) -> None:
    first = next((copied / "train" / "bag").iterdir())
    first.rename(first.with_name("renamed.png"))
    said = refused(3, "train", *TRAIN, "--data", copied, "--out", run.path)
    assert said.startswith(f"{run.path}: began with another data (")


def test_a_store_of_another_teacher(folder: Path, store: Made, run: Made, refused: Refused) -> None:
    said = refused(3, *capture(run.path, folder, store.path), "--top-k", "1", "--seed", "7")
    assert "seed: 0, 7; top_k: 2, 1: there, asked" in said


def test_more_classes_kept_than_the_teacher_has(folder: Path, run: Made, out: Path, refused: Refused) -> None:
    said = refused(2, *capture(run.path, folder, out), "--top-k", "4")
    assert said == "--top-k 4: the teacher has 3 classes; give at most that"


def test_a_teacher_without_weights(folder: Path, out: Path, refused: Refused) -> None:
    said = refused(2, "teacher-logits", "--teacher", "resnet18", "--data", folder, "--out", out)
    assert "--teacher resnet18: has no weights, and an untrained head cannot teach" in said


def test_weights_that_do_not_fit(folder: Path, out: Path, tmp_path: Path, refused: Refused) -> None:
    path = weights(tmp_path / "w.safetensors")
    arguments = ("teacher-logits", "--teacher", "resnet18", "--teacher-weights", path, "--data", folder, "--out", out)
    assert "does not fit ResNet (missing layer1.1.conv1.weight; " in refused(3, *arguments)


def test_weights_of_another_number_of_classes(folder: Path, out: Path, tmp_path: Path, refused: Refused) -> None:
    path = weights(tmp_path / "w.safetensors", num_classes=5)
    arguments = ("--teacher", "resnet18", *KWARGS, "--teacher-weights", path, "--data", folder, "--out", out)
    assert "has 5 classes, the data 3" in refused(3, "teacher-logits", *arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_teacher_whose_output_is_not_finite(
    value: float, folder: Path, out: Path, tmp_path: Path, refused: Refused
) -> None:
    path = weights(tmp_path / "w.safetensors", fill=value)
    arguments = ("--teacher", "resnet18", *KWARGS, "--teacher-weights", path, "--image-size", "28", "--workers", "0")
    said = refused(1, "teacher-logits", *arguments, "--data", folder, "--out", out)
    assert said.startswith("teacher resnet18: output for ")
    assert ".png (view 0) is not finite" in said
    assert not list(out.rglob("*.h5"))


def test_a_model_whose_output_is_not_finite_has_no_accuracy(folder: Path, tmp_path: Path, refused: Refused) -> None:
    path = weights(tmp_path / "w.safetensors", fill=float("nan"))
    kwargs = ("--set", "student.kwargs={layers=[1,1,1,1],channels=[8,8,8,8]}", "--image-size", "28", "--workers", "0")
    said = refused(1, "eval", "--model", "resnet18", *kwargs, "--weights", path, "--data", folder)
    assert "not finite" in said


EXPLODE = ("--lr", "1e30", "--set", "train.clip_grad=0", "--set", "train.steps=6", "--set", "train.log_every=1")


def test_a_loss_that_is_not_finite_with_nothing_saved(folder: Path, out: Path, refused: Refused) -> None:
    said = refused(1, "train", *TRAIN, *EXPLODE, "--data", folder, "--out", out)
    assert said.startswith(f"{out}: the loss or its gradient is not finite at step 2 (loss nan, ")
    assert "there is no checkpoint yet" in said


def test_a_loss_that_is_not_finite_after_a_checkpoint(folder: Path, out: Path, refused: Refused) -> None:
    said = refused(1, "train", *TRAIN, *EXPLODE, "--set", "train.save_every=1", "--data", folder, "--out", out)
    (saved,) = (out / "checkpoints").iterdir()
    assert f"the last checkpoint is {saved}" in said
    assert not (out / "result.json").exists()


def test_weights_that_explode_in_the_last_step_before_a_validation(folder: Path, out: Path, refused: Refused) -> None:
    once = ("--lr", "1e30", "--set", "train.clip_grad=0", "--set", "train.steps=1")
    said = f"{out}: the student's output is not finite after step 1; lower --lr, in another --out"
    assert refused(1, "train", *TRAIN, *once, "--data", folder, "--out", out) == said
    assert refused(1, "train", *TRAIN, *once, "--data", folder, "--out", out) == said
    assert not (out / "result.json").exists()


def test_a_run_that_fails_closes_its_metrics(folder: Path, out: Path, refused: Refused) -> None:
    refused(1, "train", *TRAIN, *EXPLODE, "--data", folder, "--out", out)
    held = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [path for path in held if path.is_relative_to(out)]


def test_a_gradient_that_is_not_finite_never_reaches_a_checkpoint(
    folder: Path, out: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Supervised, batch: Batch) -> Losses:
        logits = self.student(batch.images)
        return Losses(logits.mean() + (0 * logits.sum()).sqrt(), {})

    monkeypatch.setattr(Supervised, "forward", forward)
    said = refused(1, "train", *TRAIN, "--set", "train.save_every=1", "--data", folder, "--out", out)
    assert "not finite at step 1 " in said
    assert not list((out / "checkpoints").glob("*"))


def test_unlabelled_images_without_a_store(folder: Path, out: Path, refused: Refused) -> None:
    said = refused(2, "train", *TRAIN, "--data", folder / "train" / "bag", "--out", out)
    assert "has no labels; give a --store to learn from, or class folders" in said


def test_labels_left_out_for_an_objective_that_needs_them(
    folder: Path, store: Made, out: Path, refused: Refused
) -> None:
    arguments = (*DISTIL, "--store", store.path, "--data", folder, "--set", "data.labelled=false")
    said = refused(2, "train", *arguments, "--objective", "supervised", "--out", out)
    assert "objective supervised: learns from labels, which --data " in said


def test_nothing_to_evaluate(folder: Path, tmp_path: Path, refused: Refused) -> None:
    assert "nothing to evaluate: give a run directory" in refused(2, "eval", "--data", folder)
    assert "no such run directory" in refused(2, "eval", tmp_path / "none", "--data", folder)
    assert "not a finished run" in refused(4, "eval", tmp_path, "--data", folder)


def test_a_run_and_another_model_at_once(folder: Path, run: Made, refused: Refused) -> None:
    assert "--model" in refused(2, "eval", run.path, "--model", "deit-tiny", "--data", folder, "--workers", "0")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_the_work_has_begun(
    number: signal.Signals, code: int, folder: Path, out: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "manual_seed", lambda _: os.kill(os.getpid(), number))
    said = refused(code, "train", *TRAIN, "--data", folder, "--out", out)
    assert said.startswith(f"{number.name}: stopped")
    assert said.endswith("; the same command goes on")


def test_a_traceback_is_shown_only_to_who_debugs(
    folder: Path, out: Path, distill: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("train", *TRAIN, "--data", "/nowhere", "--out", out, "--quiet")
    plain = distill(*arguments).err
    assert "Traceback" not in plain
    monkeypatch.setenv("DISTILL_DEBUG", "1")
    shown = distill(*arguments).err
    assert shown.startswith("Traceback (most recent call last):")
    assert shown.endswith(plain)


def test_what_nobody_thought_of_is_still_one_line(
    folder: Path, out: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(torch, "manual_seed", fail)
    said = refused(1, "train", *TRAIN, "--data", folder, "--out", out)
    assert said == "unexpected RuntimeError: first line second line; DISTILL_DEBUG=1 shows the traceback"


def test_the_step_that_stopped_a_run_runs_again_by_itself(
    folder: Path, out: Path, refused: Refused, distill: Cli
) -> None:
    said = refused(1, "train", *TRAIN, *EXPLODE, "--data", folder, "--out", out)
    record = out / "nan-2.json"
    assert said.endswith(f'"distill train --replay-step {record}" runs this step again')
    written = json.loads(record.read_text())
    assert (written["step"], written["values"]["loss"], len(written["keys"])) == (2, "nan", len(written["sample_ids"]))
    again = json.loads(distill("train", "--replay-step", record, "--workers", "0", "--json").out)
    assert (again["step"], again["finite"], again["values"]["loss"]) == (2, False, "nan")
    assert again["images"] == len(written["sample_ids"])
    assert again["first_module"].startswith("student.")
    assert again["parameters"] > 0
    # Of a step that was well the numbers are those of the run.
    record.write_text(json.dumps({**written, "step": 1}))
    fine = json.loads(distill("train", "--replay-step", record, "--workers", "0", "--json").out)
    assert (fine["first_module"] is None) == fine["finite"]


def test_a_fused_optimizer_is_stopped_on_its_device_and_the_run_finds_out_later(
    folder: Path, out: Path, refused: Refused, distill: Cli
) -> None:
    """What CUDA has by default; torch's fused AdamW of the CPU listens as well."""
    late = ("--set", "train.log_every=6", "--set", "train.opt_kwargs={fused=true}")
    said = refused(1, "train", *TRAIN, *EXPLODE, *late, "--data", folder, "--out", out)
    assert said.startswith(f"{out}: the loss or its gradient is not finite at step 2 (loss nan, ")
    record = out / "nan-2.json"
    kept = safetensors.torch.load_file(record.with_suffix(".safetensors"))
    weights = {name: value for name, value in kept.items() if name.endswith("weight") and "optimizer" not in name}
    assert all(value.isfinite().all() for value in weights.values())
    again = json.loads(distill("train", "--replay-step", record, "--workers", "0", "--json").out)
    assert (again["step"], again["finite"]) == (2, False)


def test_no_step_to_replay(out: Path, refused: Refused, tmp_path: Path) -> None:
    assert refused(2, "train", "--replay-step", out / "nan-3.json").endswith(
        "give RUN/nan-STEP.json of a run that stopped"
    )
    (tmp_path / "nan-1.json").write_text("{}")
    assert "not what a run writes that stops (lacks its fields)" in refused(
        4, "train", "--replay-step", tmp_path / "nan-1.json"
    )


def test_resume_must_and_never(folder: Path, out: Path, refused: Refused, distill: Cli) -> None:
    arguments = ("train", *TRAIN, "--set", "train.steps=2", "--data", folder, "--out", out)
    assert "has no checkpoint to go on from" in refused(4, *arguments, "--resume", "must")
    assert distill(*arguments, "--resume", "never").code == 0
    assert json.loads(distill(*arguments, "--resume", "never", "--json").out)["status"] == "already_done"
    (out / "result.json").unlink()
    assert "a run is under way at step-00000002" in refused(2, *arguments, "--resume", "never")
    assert distill(*arguments, "--resume", "must").code == 0
