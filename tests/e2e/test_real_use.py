"""The three commands as the README has them: JPEG folders, IDX folders, the shipped sample, a run as a teacher."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from commands import SMALL_STUDENT, run, run_json
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distill_cli.data.idx import open_sample

pytestmark = pytest.mark.slow


def test_a_timm_teacher_with_its_weights_on_jpegs(tmp_path):
    source = open_sample("train")
    for index in range(24):
        target = tmp_path / "data" / ("train" if index < 16 else "val") / str(index % 2)
        target.mkdir(parents=True, exist_ok=True)
        source.read(index).resize((50, 40)).save(target / f"{index}.jpg", quality=90)
    torch.manual_seed(0)
    save_file(timm.create_model("resnet18", num_classes=2).state_dict(), tmp_path / "w.safetensors")
    data = ("--data", tmp_path / "data", "--workers", "0")
    teacher = ("--teacher", "resnet18", "--teacher-weights", tmp_path / "w.safetensors", "--image-size", "64")
    written = run_json("teacher-logits", *teacher, *data, "--out", tmp_path / "S")
    assert (written["rows"], written["views"], written["shards"]) == (16, 1, 1)
    out = tmp_path / "R"
    student = ("--student", "tinyvit-5m", "--store", tmp_path / "S")
    trained = run_json("train", *student, *data, "--batch-size", "8", "--set", "train.steps=2", "--out", out)
    assert (trained["status"], trained["steps"]) == ("done", 2)
    scores = run_json("eval", out, *data, "--store", tmp_path / "S")
    assert (scores["images"], scores["rows"], scores["top1"]) == (8, 16, trained["top1"])


def test_tinyvit_21m_takes_a_step_at_224_px(folder, tmp_path):
    out = tmp_path / "run"
    arguments = ("--student", "tinyvit-21m", "--objective", "supervised", "--data", folder / "val", "--batch-size", "2")
    trained = run_json("train", *arguments, "--set", "train.steps=1", "--workers", "0", "--out", out)
    assert trained["steps"] == 1
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["loss"] > 0
    model = timm.create_model("tiny_vit_21m_224.dist_in22k_ft_in1k", num_classes=10)
    model.load_state_dict(load_file(out / "student.safetensors"))


def test_an_idx_folder_from_training_to_evaluation(tmp_path):
    for split, prefix, count in (("train", "train", 60), ("val", "t10k", 30)):
        source = open_sample(split)
        header = b"\0\0\x08\x03" + np.array([count, 28, 28], ">u4").tobytes()
        images = header + source.images[:count].tobytes()
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        labels = b"\0\0\x08\x01" + np.array([count], ">u4").tobytes() + source.labels[:count].astype(np.uint8).tobytes()
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
    out = tmp_path / "run"
    student = (*SMALL_STUDENT, "--image-size", "28", "--workers", "0", "--set", "train.steps=2", "--batch-size", "16")
    run_json("train", *student, "--data", tmp_path, "--objective", "supervised", "--out", out)
    assert run_json("eval", out, "--workers", "0")["images"] == 30


def test_evaluation_counts_every_image_once_whatever_the_batch(teacher, folder):
    scores = [run_json("eval", teacher, "--batch-size", size, "--workers", "0") for size in ("7", "100", "64")]
    assert [score["images"] for score in scores] == [100, 100, 100]
    assert len({score["top1"] for score in scores}) == 1


def test_the_weights_carry_their_lineage(store, folder, tmp_path):
    out = tmp_path / "run"
    run("train", *SMALL_STUDENT, "--store", store, "--data", folder, "--set", "train.steps=2", "--out", out)
    with safe_open(out / "student.safetensors", "pt") as file:
        card = file.metadata()
    plan = json.loads((Path(store) / "plan.json").read_text())
    assert json.loads(card["classes"]) == plan["teacher"]["classes"]
    assert json.loads(card["input"])["mean"] == plan["transform"]["mean"]
    model = timm.create_model(card["student"], num_classes=int(card["num_classes"]), **json.loads(card["arguments"]))
    model.load_state_dict(load_file(out / "student.safetensors"))


def test_a_store_of_other_pixels_is_refused(store, folder, tmp_path):
    """One image of the first shard changes after the store was written: the names fit, the pixels do not."""
    import shutil

    from distill_cli.data import DataConfig, open_train
    from distill_cli.store.reader import Store

    copy = tmp_path / "images"
    shutil.copytree(folder, copy)
    first = int(Store(store).ids(0, 0)[0])
    key = open_train(DataConfig(path=str(copy))).keys[first]
    open_sample("val").read(0).transpose(0).save(copy / "train" / key)
    _, err = run("train", *SMALL_STUDENT, "--store", store, "--data", copy, "--out", tmp_path / "run", code=3)
    assert f"view 0 of {key} does not replay to the pixels that the teacher saw" in err


def test_dry_runs_write_nothing(teacher, store, folder, tmp_path):
    out = tmp_path / "out"
    capture = run_json("teacher-logits", "--teacher", teacher, "--data", folder, "--out", out, "--dry-run")
    assert capture["bill"]["rows"] == 600
    assert capture["origins"]["teacher.name"] == "--teacher"
    student = run_json("train", *SMALL_STUDENT, "--store", store, "--data", folder, "--out", out, "--dry-run")
    assert student["bill"]["steps"] == 300 * (600 // 256)
    assert student["origins"]["data.image_size"] == "store"
    assert run_json("eval", teacher, "--dry-run")["bill"]["images"] == 100
    assert not out.exists()
