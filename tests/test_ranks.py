"""`train` on several ranks, each a fork of this process: the same batches, losses and weights as on one."""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from small_runs import RESNET, VIT, small_recipe
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from distill_cli import train
from distill_cli.distributed import World
from distill_cli.errors import UsageError
from distill_cli.evaluate import evaluate
from distill_cli.experiment import open_experiment
from distill_cli.recipe import Recipe
from distill_cli.report import Report
from distill_cli.students.build import create

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")


def recipe(folder: Path, **values: Any) -> Recipe:
    settings = {name.replace("__", "."): value for name, value in values.items()}
    return small_recipe(folder, {**VIT, "train.save_every": 7, **settings})


def work_as_rank(rank: int, ranks: int, asked: Recipe, out: Path, meet: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meet}", rank=rank, world_size=ranks)
    train.train(asked, out, World(CPU, rank, ranks), Report(quiet=True))
    dist.destroy_process_group()


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., Path]:
    """Train a recipe on so many ranks; gives the run."""

    def run(asked: Recipe, ranks: int, out: str = "") -> Path:
        path, meet = tmp_path / (out or f"run{ranks}"), tmp_path / f"meet-{ranks}-{len(list(tmp_path.iterdir()))}"
        if ranks == 1:
            train.train(asked, path, World(CPU), Report(quiet=True))
        else:
            method = "spawn" if torch.cuda.is_available() else "fork"
            given = (ranks, asked, path, str(meet))
            torch.multiprocessing.start_processes(work_as_rank, given, nprocs=ranks, start_method=method)
        return path

    return run


@pytest.fixture
def seventeen(image_folder: Path, tmp_path: Path) -> Path:
    """Images that neither two nor three ranks can share, and five to validate on."""
    folder = Path(shutil.copytree(image_folder, tmp_path / "images"))
    for split in ("train", "val"):
        next((folder / split).rglob("*.png")).unlink()
    return folder


def lines(run: Path) -> list[dict[str, float]]:
    """Of metrics.jsonl, without what the machine decides."""
    measured = ("images_per_s", "data_wait", "memory_mb")
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in measured} for line in found]


def check_same(one: Path, other: Path, *names: str) -> None:
    """The same losses and weights, and the same images validated."""
    assert len(lines(one)) == len(lines(other))
    for mine, theirs in zip(lines(one), lines(other), strict=True):
        assert theirs == pytest.approx(mine, rel=1e-4, abs=1e-5)
    for name in ("student", *names):
        weights, there = (load_file(run / f"{name}.safetensors") for run in (one, other))
        for key, value in weights.items():
            torch.testing.assert_close(there[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_have_the_losses_and_weights_of_one_process(
    ranks: int, image_folder: Path, trained: Callable[..., Path]
) -> None:
    """18 images in batches of 12: what is left of an epoch waits for another shuffle."""
    asked = recipe(image_folder, train__batch_size=12)
    check_same(trained(asked, 1), trained(asked, ranks))


@pytest.mark.parametrize("ranks", [2, 3])
def test_uneven_slices_weigh_by_their_images(ranks: int, seventeen: Path, trained: Callable[..., Path]) -> None:
    """One batch of all 17: 9 and 8, or 6, 6 and 5, in parts that are uneven too; the average goes with them."""
    asked = recipe(seventeen, train__batch_size=18, train__accumulate=4, train__ema_decay=0.8)
    check_same(trained(asked, 1), trained(asked, ranks), "student-plain")


def test_images_that_one_rank_cannot_read_are_missing_for_all(
    image_folder: Path, tmp_path: Path, trained: Callable[..., Path]
) -> None:
    folder = Path(shutil.copytree(image_folder, tmp_path / "images"))
    next((folder / "train").rglob("*.jpg")).write_bytes(b"no JPEG")
    asked = recipe(folder, train__batch_size=12, data__skip_unreadable=True)
    one, two = trained(asked, 1), trained(asked, 2)
    check_same(one, two)
    skipped = [json.loads((run / "result.json").read_text())["skipped"] for run in (one, two)]
    assert skipped[0] == skipped[1] > 0


def test_ranks_validate_by_the_statistics_that_are_delivered(image_folder: Path, trained: Callable[..., Path]) -> None:
    """BatchNorm's of rank 0, not those that each rank has of its own slices."""
    asked = recipe(image_folder, **{**RESNET, "train.batch_size": 12, "train.ema_decay": 0.5})
    run = trained(asked, 2)
    (*_, last) = (line for line in lines(run) if "top1" in line)
    for name, nll in (("student", last["ema_nll"]), ("student-plain", last["nll"])):
        weights = replace(asked.eval, weights=str(run / f"{name}.safetensors"))
        found = evaluate(replace(asked, eval=weights), None, World(CPU), Report(quiet=True))
        assert found.nll == pytest.approx(nll, abs=1e-6)


def test_a_run_goes_on_on_another_number_of_ranks(image_folder: Path, trained: Callable[..., Path]) -> None:
    asked = recipe(image_folder, train__batch_size=12, train__ema_decay=0.8)
    alone = trained(asked, 1)
    run = trained(asked, 2, "moved")
    for ranks in (3, 1):
        for name in ("result.json", "student.safetensors"):
            (run / name).unlink()
        newest = max((run / "checkpoints").iterdir())
        newest.unlink()
        trained(asked, ranks, "moved")
    check_same(alone, run, "student-plain")


def test_channels_last_changes_no_more_than_rounding(image_folder: Path, trained: Callable[..., Path]) -> None:
    student = {"student.name": "test_convnext", "student.kwargs": {}, "data.image_size": 64}
    asked = recipe(image_folder, **student, train__batch_size=12)
    last = replace(asked, runtime=replace(asked.runtime, channels_last=True))
    run = trained(last, 1, "last")
    (run / "result.json").unlink()
    max((run / "checkpoints").iterdir()).unlink()
    trained(last, 1, "last")
    check_same(trained(asked, 1), run)


# runtime.fsdp.

SHARDED = {
    "averaged parts": {"train.accumulate": 3, "train.ema_decay": 0.8, "train.clip_grad": 0.5},
    "sgd by value": {"train.opt": "sgd", "train.eps": None, "train.clip_mode": "value", "train.clip_grad": 0.05},
    "lion by layers": {"train.opt": "lion", "train.eps": None, "train.layer_decay": 0.7, "train.lr": 1e-6},
    "another head": {"student.name": "vit_tiny_patch16_224", "objective.name": "deit", "train.ema_decay": 0.8},
    "no blocks": {**RESNET, "train.ema_decay": 0.8, "train.steps": 3},
}


def sharded(asked: Recipe) -> Recipe:
    return replace(asked, runtime=replace(asked.runtime, fsdp=True))


@pytest.mark.parametrize("case", SHARDED)
def test_weights_in_parts_are_trained_as_whole_ones(
    case: str, seventeen: Path, teacher: dict[str, Any], trained: Callable[..., Path]
) -> None:
    """Rank 0 has three images to validate on, and so a batch more than rank 1."""
    live = teacher if "objective.name" in SHARDED[case] else {}
    asked = recipe(seventeen, **{"train.batch_size": 18, "eval.batch_size": 2, **SHARDED[case], **live})
    averaged = ("student-plain",) if "train.ema_decay" in SHARDED[case] else ()
    check_same(trained(asked, 2), trained(sharded(asked), 2, "sharded"), "student-best", *averaged)


@pytest.fixture
def teacher(tmp_path: Path) -> dict[str, Any]:
    """A live one."""
    small = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
    torch.manual_seed(7)
    save_file(create("resnet18", num_classes=3, arguments=small).state_dict(), tmp_path / "teacher.safetensors")
    weights = str(tmp_path / "teacher.safetensors")
    return {"teacher.name": "resnet18", "teacher.kwargs": small, "teacher.weights": weights, "teacher.live": True}


def test_a_run_in_parts_goes_on_whole_and_in_other_parts(image_folder: Path, trained: Callable[..., Path]) -> None:
    asked = recipe(image_folder, train__batch_size=12, train__ema_decay=0.8)
    alone, run = trained(asked, 1), trained(sharded(asked), 2, "moved")
    for ranks, form in ((1, asked), (3, sharded(asked))):
        (run / "result.json").unlink()
        max((run / "checkpoints").iterdir()).unlink()
        trained(form, ranks, "moved")
    check_same(alone, run, "student-plain")


def test_the_ranks_have_parts(image_folder: Path, tmp_path: Path) -> None:
    """Of every parameter, of its average and of what the optimiser keeps; each of the blocks is a unit."""
    asked = sharded(recipe(image_folder, train__batch_size=12, train__ema_decay=0.8))
    torch.multiprocessing.start_processes(look_at_parts, (asked, str(tmp_path)), nprocs=2, start_method="fork")
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert found["units"] == ["", "student.blocks.0", "student.blocks.1"]
        assert found["share"] == pytest.approx(0.5, abs=0.02)
        assert found["of the average"] == pytest.approx(0.5, abs=0.02)
        assert found["of the optimiser"] == pytest.approx(1.0, abs=0.04)


def look_at_parts(rank: int, asked: Recipe, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    setup = open_experiment(asked, World(CPU, rank, 2), Report(quiet=True))
    assert setup.ema is not None
    parameters = list(setup.objective.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    setup.optimizer.step()
    slots = [slot for each in setup.optimizer.state.values() for slot in each.values() if isinstance(slot, DTensor)]

    def held(tensors: Iterable[Any]) -> int:
        return sum(tensor.to_local().numel() for tensor in tensors)

    whole = sum(parameter.numel() for parameter in parameters)
    found = {
        "units": [name for name, module in setup.objective.named_modules() if isinstance(module, FSDPModule)],
        "share": held(parameters) / whole,
        "of the average": held(setup.ema.module.parameters()) / whole,
        "of the optimiser": held(slots) / whole,
    }
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("train.opt", "lamb", "lamb looks at whole tensors; take one of adamw, adam, sgd, momentum, lion, or leave"),
        ("train.opt", "muon", "muon looks at whole tensors; take one of adamw, adam, sgd, momentum, lion, or leave"),
        ("train.clip_mode", "agc", "clip_mode agc looks at whole tensors; give norm or value, or leave it out"),
        ("objective.name", "tinymim", "objective tinymim makes no whole pass of the student; leave one of them out"),
        ("runtime.compile", True, "gathers weights between graphs, which is not compiled here; leave one of them out"),
        ("runtime.channels_last", True, "takes no weights that lie channels last; leave out runtime.channels_last"),
    ],
)
def test_what_looks_at_whole_tensors_is_refused(setting: str, value: Any, said: str, tmp_path: Path) -> None:
    asked = sharded(recipe(tmp_path / "none", **{setting: value}))
    with pytest.raises(UsageError, match=f"^runtime.fsdp: {said}"):
        train.train(asked, tmp_path / "run", World(CPU), Report(quiet=True))


def test_more_ranks_than_images_are_refused(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"18 images for 19 ranks; take fewer ranks"):
        train.train(recipe(image_folder, train__batch_size=19), tmp_path / "run", World(CPU, 0, 19), Report(quiet=True))


LIVE = {
    "features": {
        "objective.pairs.last.loss": "pooled",
        "objective.pairs.grid.loss": "dense",
        "objective.pairs.grid.student": "blocks.0",
        "objective.pairs.grid.teacher": "blocks.1",
    },
    "tinymim": {},
    "dmae": {"objective.decoder": {"depth": 1, "width": 24, "heads": 3}},
}


@pytest.mark.parametrize(("name", "fsdp"), [*((name, False) for name in LIVE), ("features", True)])
def test_ranks_beside_a_live_teacher_have_the_weights_of_one_process(
    name: str, fsdp: bool, image_folder: Path, trained: Callable[..., Path]
) -> None:
    teacher = trained(recipe(image_folder, **{"train.batch_size": 12, "train.steps": 1}), 1, "teacher")
    live = {"objective.name": name, "teacher.name": str(teacher), "train.batch_size": 12, **LIVE[name]}
    asked = recipe(image_folder, **live)
    two = recipe(image_folder, **{**live, "runtime.fsdp": fsdp})
    check_same(trained(asked, 1), trained(two, 2))
