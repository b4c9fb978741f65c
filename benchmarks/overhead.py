"""What the commands cost over bare loops, as ratios of runs in turn, and how fast `--help` answers.

    python benchmarks/overhead.py TEACHER_RUN

Capture: `teacher-logits` against the same teacher called on the same batches of the same loader: the given teacher on
the shipped sample, and a ResNet-18 of 1,000 classes on 64 px, k = 100.
Training: benchmarks/train.py.
"""

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from distill_cli.capture import CaptureOrder, batches_of, fill, open_capture
from distill_cli.config import RuntimeConfig
from distill_cli.data.idx import open_sample
from distill_cli.distributed import World, world
from distill_cli.locks import shared
from distill_cli.recipe import Recipe, load
from distill_cli.report import Report
from distill_cli.store.writer import StoreWriter

ROUNDS, LARGE_IMAGES = 5, 1024
QUIET = Report(quiet=True)


def capture(recipe: Recipe, here: World) -> tuple[Callable[[], None], Callable[[], None]]:
    """`teacher-logits` over the same teacher, called on the same batches of the same loader."""
    opened = open_capture(recipe, here, QUIET)
    pieces = list(opened.plan.every_shard())

    def ours() -> None:
        folder = Path(tempfile.mkdtemp())
        with shared(folder) as claims:
            writer = StoreWriter(folder, opened.plan, opened.source.labels)
            fill(opened, writer, claims, pieces, here, QUIET)
            writer.finish()
        shutil.rmtree(folder)

    @torch.inference_mode()
    def bare() -> None:
        order = CaptureOrder(opened.plan.dealing, opened.plan.shards, recipe.store.batch_size)
        numbers = (number for piece in pieces for number in order.numbers(piece))
        for batch in batches_of(opened, order, numbers, here):
            opened.teacher.model(batch.images)

    return ours, bare


def large_teacher(folder: Path) -> Recipe:
    """A ResNet-18 of 1,000 classes, with weights as they are drawn, on 64 px: k = 100, no labels."""
    weights = folder / "resnet18.safetensors"
    save_file(timm.create_model("resnet18").state_dict(), weights)
    images = open_sample("train")
    for number in range(LARGE_IMAGES):
        images.read(number).save(folder / f"{number:05d}.png")
    values = {"teacher.name": "resnet18", "teacher.weights": str(weights), "data.path": str(folder)}
    values |= {"data.image_size": 64, "data.augment": "rrc", "store.top_k": 100, "store.shard_rows": 512}
    return load(None, (), {path: ("benchmark", value) for path, value in values.items()}).recipe


def ratio(ours: Callable[[], None], bare: Callable[[], None]) -> str:
    """Time of ours over time of bare, in turn."""
    ours(), bare()
    pairs = [(timed(ours), timed(bare)) for _ in range(ROUNDS)]
    ratios = sorted(mine / theirs for mine, theirs in pairs)
    return f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"


def timed(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def help_time(command: list[str]) -> str:
    times = sorted(timed(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in range(11))
    return f"{statistics.median(times):.3f} s ({times[0]:.3f} to {times[-1]:.3f})"


def main(teacher: str) -> None:
    flags = {"teacher.name": ("--teacher", teacher), "store.views": ("--views", 1)}
    with world(RuntimeConfig()) as here:
        print("teacher-logits / bare loop:", ratio(*capture(load("quickstart-student", (), flags).recipe, here)))
        with tempfile.TemporaryDirectory() as folder:
            print("  … of a ResNet-18, k = 100: ", ratio(*capture(large_teacher(Path(folder)), here)))
    print("distill --help:            ", help_time([sys.executable, "-m", "distill_cli", "--help"]))
    print("python -c pass:            ", help_time([sys.executable, "-c", "pass"]))


if __name__ == "__main__":
    main(sys.argv[1])
