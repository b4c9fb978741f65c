"""`distill train` with an average, accumulated parts, any optimiser, and other weights to begin from."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from command_line import STUDENT, TRAIN, Cli, Made, Refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distill_cli import train

VIT = (
    "--student", "deit-tiny", "--set", "student.patch_size=7", "--set", "student.embed_dim=48", "--set",
    "student.depth=2", "--set", "student.num_heads=3", "--set", "student.drop_path=0", "--image-size", "28",
    "--batch-size", "10", "--workers", "0", "--lr", "1e-3", "--set", "train.log_every=1",
)  # fmt: skip
"""Without BatchNorm and, as it stands, without anything drawn."""


def sets(*texts: str) -> list[str]:
    return [word for text in texts for word in ("--set", text)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def trained(distill: Cli, folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Train under a name; gives the run."""

    def run(name: str, *arguments: str | Path) -> Path:
        result = distill("train", *arguments, "--data", folder, "--out", tmp_path / name, "--quiet")
        assert result.code == 0, result
        return tmp_path / name

    return run


def lines(run: Path, key: str) -> list[dict[str, Any]]:
    """Those of metrics.jsonl that have a key, without what the machine decides."""
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    measured = ("images_per_s", "data_wait", "memory_mb")
    return [{name: value for name, value in line.items() if name not in measured} for line in found if key in line]


def same_weights(one: Path, other: Path) -> bool:
    first, second = load_file(one / "student.safetensors"), load_file(other / "student.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_the_student_is_the_average_and_the_plain_one_lies_beside_it(
    distill: Cli, folder: Path, trained: Callable[..., Path]
) -> None:
    run = trained("run", *TRAIN, *sets("train.ema_decay=0.5", "train.steps=10", "train.lr=0.01"))
    (*_, last) = lines(run, "top1")
    result = json.loads((run / "result.json").read_text())
    assert {"top1", "top5", "nll", "ece", "ema_top1", "ema_top5", "ema_nll", "ema_ece"} <= last.keys()
    assert (result["top1"], result["nll"], result["plain_top1"]) == (last["ema_top1"], last["ema_nll"], last["top1"])
    assert last["nll"] != last["ema_nll"]
    by_class = json.loads((run / "validation.json").read_text())
    assert (by_class["step"], by_class["nll"]) == (last["step"], last["ema_nll"])
    for name, top1, nll, decay in (
        ("student", last["ema_top1"], last["ema_nll"], "0.5"),
        ("student-plain", last["top1"], last["nll"], None),
    ):
        with safe_open(run / f"{name}.safetensors", "pt") as file:
            assert json.loads(file.metadata()["top1"]) == top1
            assert file.metadata().get("ema_decay") == decay
        model = ("--model", "resnet18", "--weights", run / f"{name}.safetensors")
        scores = distill("eval", *model, "--data", folder, "--workers", "0", "--json", "--quiet").json
        assert (scores["top1"], scores["nll"]) == (top1, nll)


def test_an_average_is_validated_by_the_attention_biases_that_it_has_by_then(
    distill: Cli, folder: Path, trained: Callable[..., Path]
) -> None:
    """LeViT keeps its biases from one evaluation to the next; here the second one is compared with `eval`."""
    small = ("--student", "levit_128s", "--image-size", "64", "--batch-size", "8", "--workers", "0", "--lr", "0.01")
    run = trained("run", *small, *sets("train.steps=10", "train.ema_decay=0.5"))
    first, second = lines(run, "top1")
    scores = distill("eval", run, "--data", folder, "--workers", "0", "--json", "--quiet").json
    assert scores["nll"] == second["ema_nll"] != first["ema_nll"]


def test_the_plain_weights_are_those_of_a_run_without_an_average(trained: Callable[..., Path]) -> None:
    averaged, plain = trained("averaged", *TRAIN, *sets("train.ema_decay=0.9")), trained("plain", *TRAIN)
    assert (averaged / "student-plain.safetensors").read_bytes() != (averaged / "student.safetensors").read_bytes()
    one, other = load_file(averaged / "student-plain.safetensors"), load_file(plain / "student.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert not (plain / "student-plain.safetensors").exists()


@pytest.mark.parametrize("parts", [2, 3, 10])
def test_accumulated_parts_train_the_weights_of_whole_batches(parts: int, trained: Callable[..., Path]) -> None:
    # The biases of keys have no gradient but rounding, which AdamW would otherwise bring to the size of all others.
    same = sets("train.steps=6", "train.eps=1e-6")
    whole, cut = trained("whole", *VIT, *same), trained(f"cut{parts}", *VIT, *same, *sets(f"train.accumulate={parts}"))
    one, other = load_file(whole / "student.safetensors"), load_file(cut / "student.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-5)
    for before, after in zip(lines(whole, "loss"), lines(cut, "loss"), strict=True):
        assert after == pytest.approx(before, rel=1e-4)


RESUMED = {
    "averaged parts": ("train.ema_decay=0.8", "train.ema_warmup=true", "train.accumulate=3", "student.drop_path=0.2"),
    "lamb by layers": ("train.opt=lamb", "train.layer_decay=0.7", "train.clip_mode=agc", "train.schedule=wsd"),
    "muon": ("train.opt=muon", "train.schedule=linear"),
    "sgd": ("train.opt=sgd", "train.schedule=step", "train.decay_epochs=1", "train.clip_mode=value",
            "train.clip_grad=0.1", "train.ema_decay=0.5"),
}  # fmt: skip


@pytest.mark.parametrize("case", RESUMED)
def test_a_stopped_run_ends_in_the_bytes_of_an_undisturbed_one(
    case: str, distill: Cli, folder: Path, trained: Callable[..., Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (*VIT, *sets("train.steps=9", *RESUMED[case]))
    undisturbed = trained("undisturbed", *arguments)
    backward = train.backward
    passes = 0

    def stop_in_the_sixth(*given: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return backward(*given)

    monkeypatch.setattr(train, "backward", stop_in_the_sixth)
    stopped = distill("train", *arguments, "--data", folder, "--out", out, "--quiet")
    assert stopped.code == 143, stopped
    assert "saved at step 6 of 9" in stopped.err
    resumed = distill("train", *arguments, "--data", folder, "--out", out)
    assert resumed.code == 0, resumed
    assert "going on from step-00000006" in resumed.err
    for path in undisturbed.glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert lines(out, "step") == lines(undisturbed, "step")


def test_the_statistics_of_batch_norm_stay_as_they_began_and_its_weights_are_trained(
    run: Made, trained: Callable[..., Path]
) -> None:
    tuned = trained("tuned", *TRAIN, "--init-from", run.path, *sets("train.freeze_bn=true", "train.lr=0.01"))
    before, after = load_file(run.path / "student.safetensors"), load_file(tuned / "student.safetensors")
    frozen = [name for name in before if "running_" in name or "num_batches" in name]
    assert frozen
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["bn1.weight"], after["bn1.weight"])


def test_freezing_what_is_not_there_is_said(distill: Cli, folder: Path, out: Path) -> None:
    result = distill("train", *VIT, *sets("train.steps=1", "train.freeze_bn=true"), "--data", folder, "--out", out)
    assert "warning: train.freeze_bn: deit-tiny has no BatchNorm to freeze\n" in result.err


def test_a_run_begins_from_the_weights_of_another(run: Made, trained: Callable[..., Path]) -> None:
    """With a rate of nothing, it ends where it began."""
    still = sets("train.lr=1e-30", "train.freeze_bn=true")
    begun = trained("begun", *TRAIN, "--init-from", run.path, *still)
    assert same_weights(begun, run.path)
    assert json.loads((begun / "result.json").read_text())["top1"] == run.said["top1"]
    by_file = trained("by-file", *TRAIN, "--init-from", run.path / "student.safetensors", *still)
    assert (by_file / "student.safetensors").read_bytes() == (begun / "student.safetensors").read_bytes()


def test_the_weights_are_known_by_what_they_are_and_not_by_their_place(
    run: Made, distill: Cli, refused: Refused, folder: Path, trained: Callable[..., Path], tmp_path: Path
) -> None:
    begun = trained("begun", *TRAIN, "--init-from", run.path)
    moved = shutil.copy(run.path / "student.safetensors", tmp_path / "moved.safetensors")
    asked = ("train", *TRAIN, "--data", folder, "--out", begun)
    assert distill(*asked, "--init-from", moved, "--json", "--quiet").json["status"] == "already_done"
    weights = load_file(moved)
    weights["fc.bias"] += 1
    save_file(weights, tmp_path / "other.safetensors")
    said = refused(3, *asked, "--init-from", tmp_path / "other.safetensors")
    assert said.startswith(f"{begun}: began with another init_from (")
    assert refused(3, *asked).startswith(f"{begun}: began with another init_from (")


def test_a_class_map_is_a_part_of_what_the_run_is(
    run: Made, refused: Refused, folder: Path, trained: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "map.txt"
    path.write_text("2 1 -1")
    begin = (*TRAIN, "--init-from", run.path, "--set", f"student.class_map={path}")
    begun = trained("begun", *begin)
    path.write_text("2 1 0")
    said = refused(3, "train", *begin, "--data", folder, "--out", begun)
    assert said.startswith(f"{begun}: began with another class_map (")


def test_more_classes_begin_a_new_classifier_with_a_warning(
    distill: Cli, folder: Path, tmp_path: Path, out: Path
) -> None:
    arguments = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
    save_file(timm.create_model("resnet18", num_classes=7, **arguments).state_dict(), tmp_path / "w.safetensors")
    begin = ("train", *TRAIN, "--data", folder, "--init-from", tmp_path / "w.safetensors", "--out", out, "--quiet")
    result = distill(*begin)
    assert result.code == 0
    assert result.err == (
        f"warning: {tmp_path}/w.safetensors: has 7 classes, the student 3, and there is no student.class_map; "
        "the student's classifier begins anew\n"
    )


@pytest.mark.parametrize(
    ("code", "arguments", "said"),
    [
        (2, ["--set", "train.opt=adamv"], "--set: train.opt: no such optimizer, 'adamv'; did you mean adam"),
        (2, ["--set", "train.opt=sgd"], "train.lr is missing: its default is AdamW's; give the rate of sgd"),
        (
            2,
            ["--set", "train.opt=sgd", "--lr", "1", "--set", "train.eps=1e-6"],
            "train.eps: sgd has none; leave it out",
        ),
        (2, ["--set", "train.opt_kwargs.nesterow=true"], "train.opt: timm cannot build adamw with "),
        (2, ["--set", "train.clip_mode=value"], "train.clip_grad is missing: clip_mode value has no default; give the"),
        (2, ["--set", "train.accumulate=9"], "train.accumulate: 9 parts of 8 images a rank; give fewer, or a larger"),
        (2, ["--init-from", "none.safetensors"], "none.safetensors: no such weights file"),
        (4, ["--init-from", "."], ".: not a finished run; run its distill train command again to finish it"),
        (
            2,
            ["--set", "student.class_map=map.txt"],
            "student.class_map map.txt: there are no weights to take rows from",
        ),
        (2, ["--init-from", "x", "--pretrained"], "--init-from x: the student is pretrained already; give one of them"),
    ],
)
def test_what_does_not_go_together_is_refused(
    code: int, arguments: list[str], said: str, refused: Refused, folder: Path, out: Path
) -> None:
    assert refused(code, "train", *TRAIN, "--data", folder, "--out", out, *arguments).startswith(said)
    assert not out.exists()


def test_weights_of_another_student_are_refused_by_name(run: Made, refused: Refused, folder: Path, out: Path) -> None:
    said = refused(3, "train", *VIT, "--data", folder, "--init-from", run.path, "--out", out)
    assert said.startswith(f"{run.path}/student.safetensors: does not fit VisionTransformerDistilled (missing ")


def test_a_dry_run_bills_the_average_and_what_the_optimizer_keeps(distill: Cli, folder: Path, out: Path) -> None:
    def checkpoint_bytes(*texts: str) -> int:
        plan = distill("train", *STUDENT, "--image-size", "28", "--batch-size", "8", "--workers", "0", "--lr", "1e-3",
                       *sets(*texts), "--data", folder, "--out", out, "--dry-run", "--json", "--quiet")  # fmt: skip
        return int(plan.json["bill"]["checkpoint_bytes"])

    momentum, adam = checkpoint_bytes("train.opt=sgd"), checkpoint_bytes()
    averaged = checkpoint_bytes("train.ema_decay=0.9")
    assert adam == pytest.approx(1.5 * momentum, rel=0.02)
    assert averaged == pytest.approx(2 * momentum, rel=0.02)
    assert not out.exists()


def test_a_dry_run_says_who_settled_the_optimizers_settings(distill: Cli, folder: Path, out: Path) -> None:
    arguments = (*TRAIN, *sets("train.opt=lamb", "train.lr=1e-3"), "--data", folder, "--out", out)
    plan = distill("train", *arguments, "--dry-run", "--json", "--quiet").json
    assert (plan["recipe"]["train.eps"], plan["origins"]["train.eps"]) == (1e-6, "optimizer")
    assert plan["recipe"]["train.clip_grad"] == 5.0
    assert "train.momentum" not in plan["recipe"]
