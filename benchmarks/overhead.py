"""What the commands cost over bare loops, as ratios of runs in turn, and how fast `--help` answers.

    python benchmarks/overhead.py TEACHER_RUN STORE

Capture: `teacher-logits` on the shipped sample against the same teacher called on the same batches of the same loader.
Training: the steps of `train` with a store against a bare loop over the same batches with the same student and AdamW.
"""

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from distill_cli import teacher_logits, train
from distill_cli.config import RuntimeConfig
from distill_cli.distributed import World, world
from distill_cli.experiment import open_experiment
from distill_cli.optim import build_optimizer
from distill_cli.recipe import Recipe, load
from distill_cli.report import Report
from distill_cli.store.writer import StoreWriter

ROUNDS, STEPS = 5, 150
QUIET = Report(quiet=True)


def capture(recipe: Recipe, here: World) -> tuple[Callable[[], None], Callable[[], None]]:
    opened = teacher_logits._open(recipe, here, QUIET)

    def ours() -> None:
        folder = Path(tempfile.mkdtemp())
        writer = StoreWriter(folder, opened.plan, opened.source.labels)
        teacher_logits._capture(opened, writer, here, QUIET)
        writer.finish()
        shutil.rmtree(folder)

    @torch.inference_mode()
    def bare() -> None:
        missing = tuple(opened.plan.every_shard())
        order = teacher_logits.CaptureOrder(opened.plan.dealing, missing, recipe.store.batch_size)
        for batch in teacher_logits._loaded(opened, order, order.numbers(), here):
            opened.teacher.model(batch.images)

    return ours, bare


def training(recipe: Recipe, here: World) -> tuple[Callable[[], None], Callable[[], None]]:
    setup = open_experiment(recipe, here, QUIET)
    optimizer = build_optimizer(setup.objective, setup.recipe.train)

    def ours() -> None:
        for step, batch in enumerate(train._training_batches(setup, 0, STEPS, here)):
            train._step(setup.objective, optimizer, batch, step, setup, here)

    def bare() -> None:
        student = setup.objective.student
        plain = torch.optim.AdamW(student.parameters(), lr=1e-3)
        student.train()
        for batch in train._training_batches(setup, 0, STEPS, here):
            logits, _ = student(batch.images)
            loss = F.cross_entropy(logits, batch.labels)
            plain.zero_grad()
            loss.backward()
            plain.step()

    return ours, bare


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


def main(teacher: str, store: str) -> None:
    flags = {"teacher.name": ("--teacher", teacher), "store.views": ("--views", 1)}
    with world(RuntimeConfig()) as here:
        print("teacher-logits / bare loop:", ratio(*capture(load("quickstart-student", (), flags).recipe, here)))
        stored = {"store.path": ("--store", store)}
        print("train step / bare step:    ", ratio(*training(load("quickstart-student", (), stored).recipe, here)))
    print("distill --help:            ", help_time([sys.executable, "-m", "distill_cli", "--help"]))
    print("python -c pass:            ", help_time([sys.executable, "-c", "pass"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
