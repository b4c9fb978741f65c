"""A ViT that is pretrained beside another one, and fine-tuned: what is kept, and what is dropped."""

import json
from pathlib import Path

import timm
from command_line import Cli, Refused
from safetensors.torch import load_file

VIT = (
    "--student", "vit_tiny_patch16_224", "--set", "student.patch_size=7", "--set", "student.embed_dim=24",
    "--set", "student.num_heads=2", "--image-size", "28", "--batch-size", "8", "--workers", "0",
)  # fmt: skip
DMAE = ("--objective", "dmae", "--set", "objective.decoder={depth=1,width=16,heads=2}")


def test_pretrained_without_labels_then_fine_tuned(
    folder: Path, tmp_path: Path, distill: Cli, refused: Refused
) -> None:
    def train(*arguments: str | Path) -> None:
        result = distill("train", *VIT, *arguments, "--data", folder, "--quiet")
        assert result.code == 0, result

    teacher, run, tuned = (tmp_path / name for name in ("teacher", "run", "tuned"))
    train("--set", "student.depth=3", "--set", "train.steps=1", "--out", teacher)
    bare = ("--set", "data.labelled=false")
    steps = ("--set", "student.depth=2", "--set", "train.steps=2", "--set", "train.log_every=1")
    train(*DMAE, *bare, *steps, "--teacher", teacher, "--out", run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all({"reconstruct", "distill"} <= line.keys() for line in lines if "loss" in line)

    weights = load_file(run / "student.safetensors")
    shape = {"img_size": 28, "patch_size": 7, "embed_dim": 24, "num_heads": 2, "depth": 2, "num_classes": 1}
    timm.create_model("vit_tiny_patch16_224", **shape).load_state_dict(weights)
    kept = load_file(max((run / "checkpoints").iterdir()))
    assert {name.split(".")[1] for name in kept if name.startswith("model.")} == {"student", "projections", "decoder"}

    train(*steps, "--init-from", run, "--set", "train.lr=1e-12", "--out", tuned)
    after = load_file(tuned / "student.safetensors")
    assert (after["blocks.1.mlp.fc1.weight"] - weights["blocks.1.mlp.fc1.weight"]).abs().max() < 1e-6

    alone = tmp_path / "alone"
    train(*DMAE, "--set", "objective.alpha=0", "--set", "data.labelled=false", *steps, "--out", alone)
    train(*steps, "--init-from", alone, "--out", tmp_path / "from-alone")

    other = ("--set", "student.patch_size=4", "--data", folder, "--out", tmp_path / "other")
    said = refused(2, "train", *VIT, *DMAE, *other, "--teacher", teacher)
    assert said.startswith("teacher vit_tiny_patch16_224: has 4 x 4 patches, the student 7 x 7, and objective dmae ")
