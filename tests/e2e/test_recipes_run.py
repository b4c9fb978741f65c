"""Every shipped recipe runs, made small."""

from pathlib import Path

import pytest
from commands import SMALL_TEACHER, run_json
from served import write_tar

from distill_cli.shipped import recipes

pytestmark = pytest.mark.slow

TINYVIT = "student.kwargs={depths=[1,1,1,1],embed_dims=[16,32,32,32],num_heads=[1,2,2,2]}"
SMALL_VIT = ("student.depth=1", "student.embed_dim=48", "student.num_heads=3", "student.patch_size=4")
SMALL_DEIT = ("student.depth=1", "student.embed_dim=48", "student.num_heads=3", "student.patch_size=7")
GRID = "objective.teacher_layer=layer2"
"""The last stage of the small teacher has one token."""
SMALL = {
    "tinyvit-21m-in1k": (TINYVIT,),
    "tinyvit-21m-in22k": (TINYVIT, "teacher.num_classes=10"),
    "tinyvit-21m-in22k-to-in1k": (TINYVIT,),
    "tinyvit-21m-384": (TINYVIT,),
    "deit-small-in1k": SMALL_DEIT,
    "deit-small-in1k-wds": SMALL_DEIT,
    "fashion-teacher": (),
    "fashion-scratch": (),
    "deit-tinyvit-5m-in1k": (TINYVIT,),
    "fkd-deit-tiny-in1k": SMALL_DEIT,
    "fashion-tinyvit": (),
    "fashion-fkd": (),
    "fashion-deit": (),
    "fashion-tinymim": (GRID,),
    "fashion-tinymim-labels": ("objective.terms.tinymim.teacher_layer=layer2",),
    "fashion-finetune": (),
    "tinymim-base-in1k": (*SMALL_DEIT, GRID),
    "tinymim-base-in1k-finetune": SMALL_DEIT,
    "dmae-base-in1k": (*SMALL_VIT, "objective.blocks=[[1,1]]", "objective.decoder={depth=1,width=48,heads=3}"),
    "dmae-base-in1k-finetune": SMALL_VIT,
    "fashion-dmae": (),
    "fashion-features": (),
    "fashion-tinyvit-features": (),
    "mgd-resnet18-in1k": SMALL_TEACHER[1:2],
    "quickstart-teacher": (),
    "quickstart-student": (),
}


def test_the_list_is_all_that_is_shipped():
    assert SMALL.keys() == recipes().keys()


FROM_LABELS = ("fashion-teacher", "fashion-scratch", "quickstart-teacher")
FROM_LAYERS = ("fashion-features", "fashion-tinyvit-features", "fashion-tinymim-labels", "mgd-resnet18-in1k")
"""From the layers of a teacher beside the student …"""
WITH_STORE = ("fashion-tinyvit-features",)
"""… and from a store besides."""
FINE_TUNING = ("tinyvit-21m-in22k-to-in1k", "tinyvit-21m-384")
"""From labels, and from the weights of another run."""
PRETRAINING = {
    "fashion-finetune": "fashion-tinymim",
    "tinymim-base-in1k-finetune": "tinymim-base-in1k",
    "dmae-base-in1k-finetune": "dmae-base-in1k",
}
"""Beside a live teacher and without a store: the recipe that each of these goes on from."""
BESIDE_A_VIT = ("fashion-dmae", "dmae-base-in1k")
"""… and the teacher is a ViT with patches of 4."""


@pytest.fixture(scope="module")
def begun(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small TinyViT with the windows of 224 px."""
    out = tmp_path_factory.mktemp("begun") / "run"
    student = ("--student", "tinyvit-21m", "--set", TINYVIT, "--image-size", "28", "--workers", "0")
    run_json("train", *student, "--data", folder, "--batch-size", "32", "--set", "train.steps=2", "--out", out)
    return out


@pytest.fixture(scope="module")
def vit(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small ViT with patches of 4 at 28 px."""
    out = tmp_path_factory.mktemp("vit") / "run"
    small = ("--set", "student.depth=2", "--set", "train.steps=2", "--batch-size", "32", "--workers", "0")
    run_json("train", "--recipe", "fashion-scratch", *small, "--data", folder, "--out", out)
    return out


def in_tars(folder, root):
    """The images in tars named as the recipe has them, but fewer: `--data`, and `--set` for those to validate on."""
    for split, name, count in (("train", "imagenet1k-train-000{}.tar", 3), ("val", "imagenet1k-validation-0{}.tar", 2)):
        files = sorted((folder / split).glob("*/*"))
        for number in range(count):
            members = {}
            for file in files[number::count]:
                members |= {file.name: file.read_bytes(), f"{file.stem}.cls": file.parent.name}
            write_tar(root / name.format(number), members)
    val = f"data.val=wds:{root}/imagenet1k-validation-{{00..01}}.tar"
    return f"wds:{root}/imagenet1k-train-{{0000..0002}}.tar", "--set", val


def in_flags(name):
    return [word for text in SMALL[name] for word in ("--set", text)]


@pytest.mark.parametrize("name", sorted(SMALL))
def test_recipe(name, teacher, begun, vit, folder, tmp_path):
    sets = in_flags(name)
    data = in_tars(folder, tmp_path / "tars") if name.endswith("-wds") else (folder,)
    common = ("--recipe", name, "--data", *data, "--image-size", "28", "--workers", "0", *sets)
    rest = ("--teacher", teacher) if name in FROM_LAYERS else ()
    if name in FINE_TUNING:
        (tmp_path / "map.txt").write_text("9 8 7 6 5 4 3 2 -1 0")
        rest = ("--init-from", begun, "--set", f"student.class_map={tmp_path / 'map.txt'}")
    elif name in BESIDE_A_VIT:
        rest = ("--teacher", vit)
    elif name in PRETRAINING.values():
        rest = ("--teacher", teacher)
    elif name in PRETRAINING:
        before = PRETRAINING[name]
        rest = ("--init-from", tmp_path / "pretrained")
        first = ("--recipe", before, "--data", *data, "--image-size", "28", "--workers", "0", *in_flags(before))
        live = ("--teacher", vit if before in BESIDE_A_VIT else teacher)
        few = ("--batch-size", "32", "--set", "train.steps=1", "--out", tmp_path / "pretrained")
        assert run_json("train", *first, *live, *few)["top1"] is None
    elif name not in FROM_LABELS + FROM_LAYERS or name in WITH_STORE:
        views = 4 if "fkd" in name else 2
        teach = ("--teacher", teacher, "--views", str(views), "--top-k", "3", "--precision", "fp32")
        assert run_json("teacher-logits", *common, *teach, "--out", tmp_path / "store")["rows"] == 600 * views
        rest += ("--store", tmp_path / "store")
    train = ("--batch-size", "32", "--set", "train.steps=2")
    assert run_json("train", *common, *rest, *train, "--out", tmp_path / "run")["steps"] == 2
