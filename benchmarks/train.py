"""What a step of `train` costs: over a bare loop, from a store, and beside a teacher that runs in every step.

    PYTHONPATH=. python benchmarks/train.py [--models tiny_vit_5m_224] [--teacher resnet50] [--batch-size 8]
    PYTHONPATH=. python benchmarks/train.py --device cuda --precision bf16 --batch-size 256 --teacher regnety_160 \
        --models tiny_vit_5m_224 tiny_vit_11m_224 tiny_vit_21m_224 deit_small_patch16_224 [--compile]

Loops over the same batches, which lie on the device before the clock starts; in each round each in turn:

    bare           `bare` below: forward, loss, backward, clipping, AdamW, and the loss of every 20th step
    train, labels  the loop of `train` as it is, with `supervised`
    train, store   the same with `tinyvit`; each step reads its rows from the store, here and not in a loader process
    online         the bare loop with timm's LogitDistillationTask around student and teacher
    teacher        its forward pass alone

1,000 classes, k = 100, weights and rows of noise: what a step takes does not depend on them. What loading takes:
benchmarks/data.py. Peak memory (CUDA) is what a loop adds to the batches.
"""

import argparse
import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import timm
import torch
import torch.nn.functional as F
from data import MODEL, store
from torch import Tensor, nn

try:
    from timm.task import LogitDistillationTask
except ImportError:
    LogitDistillationTask = None

from distill_cli import train
from distill_cli.config import RuntimeConfig
from distill_cli.data import open_train
from distill_cli.data.batch import Batch
from distill_cli.data.idx import open_sample
from distill_cli.data.views import resolve_view
from distill_cli.distributed import World, world
from distill_cli.experiment import Experiment, open_experiment
from distill_cli.metrics import autocast
from distill_cli.recipe import Recipe, load
from distill_cli.replay import SparseRows
from distill_cli.report import Report
from distill_cli.students.build import StudentConfig, constructor_arguments, create
from distill_cli.training_batches import training_batches

CLASSES, TOP_K, LOG_EVERY = 1000, 100, 20
QUIET = Report(quiet=True)
Loop = Callable[[Iterable[Batch]], None]


def bare(student: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], precision: str) -> Loop:
    """What one would write by hand."""
    parameters = list(student.parameters())
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.05, fused=device.type == "cuda")

    def loop(batches: Iterable[Batch]) -> None:
        student.train()
        for step, batch in enumerate(batches, 1):
            optimizer.zero_grad()
            with autocast(device, precision):
                loss = loss_of(batch.images, batch.labels)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
            if step % LOG_EVERY == 0:
                loss.item()

    return loop


class _Enough(Exception):
    """Of the batches."""


def ours(setup: Experiment, here: World) -> Loop:
    """`train` from its first batch on; no epoch ends within them, so nothing is saved or validated."""
    rows = setup.store and SparseRows(setup.store)

    def fed(batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            yield replace(batch, teacher=rows and rows(batch.view, batch.sample_ids).to(here.device))
        raise _Enough

    def loop(batches: Iterable[Batch]) -> None:
        with (
            patch.object(train, "training_batches", lambda *_: fed(batches)),
            # The rows are noise, and of no teacher who saw these pixels.
            patch.object(train, "prove_replay"),
            tempfile.TemporaryDirectory() as out,
            contextlib.suppress(_Enough),
        ):
            train._run(setup, Path(out), here, QUIET)

    return loop


def forward_alone(teacher: nn.Module, device: torch.device, precision: str) -> Loop:
    @torch.no_grad()
    def loop(batches: Iterable[Batch]) -> None:
        for batch in batches:
            with autocast(device, precision):
                teacher(batch.images)

    return loop


def loops(student: str, asked: argparse.Namespace, folder: Path, here: World) -> dict[str, Callable[[], Loop]]:
    """How each loop is built, by name."""

    def compiled(module: nn.Module) -> nn.Module:
        if asked.compile:
            module.compile()
        return module

    def model(name: str) -> nn.Module:
        arguments = constructor_arguments(StudentConfig(name=name), asked.image_size)
        return compiled(create(name, num_classes=CLASSES, arguments=arguments).to(here.device))

    def of_train(**more: object) -> Loop:
        setup = open_experiment(recipe(student, asked, folder, **more), here, QUIET)
        compiled(setup.objective.student)
        return ours(setup, here)

    def by_hand() -> Loop:
        module = model(student)
        return bare(module, lambda images, labels: F.cross_entropy(module(images), labels), asked.precision)

    def online() -> Loop:
        module = model(student)
        task = LogitDistillationTask(module, model(asked.teacher), device=here.device, verbose=False)
        return bare(module, lambda images, labels: task(images, labels)["loss"], asked.precision)

    def teacher() -> Loop:
        return forward_alone(model(asked.teacher).eval(), here.device, asked.precision)

    built = {
        "bare": by_hand,
        "train, labels": of_train,
        "train, store": lambda: of_train(**{"store.path": str(folder / "store")}),
    }
    return built if LogitDistillationTask is None else {**built, "online": online, "teacher": teacher}


def recipe(student: str, asked: argparse.Namespace, folder: Path, **more: object) -> Recipe:
    values = {
        "data.path": str(folder / "images"),
        "data.val": str(folder / "images" / "train"),
        "data.image_size": asked.image_size,
        "student.name": student,
        "train.batch_size": asked.batch_size,
        "train.precision": asked.precision,
        "train.log_every": LOG_EVERY,
        **more,
    }
    return load(None, (), {path: ("benchmark", value) for path, value in values.items()}).recipe


def make(asked: argparse.Namespace, folder: Path) -> None:
    """Class folders of the shipped images, more than an epoch of what is asked for, and a store of one view of them."""
    shipped = open_sample("train")
    count = max(CLASSES, asked.batch_size * (asked.steps + 3))
    for number in range(count):
        path = folder / "images" / "train" / f"{number % CLASSES:04d}" / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shipped.read(number % len(shipped)).save(path)
    config = recipe(asked.models[0], asked, folder).data
    store(folder / "store", open_train(config), resolve_view(config, MODEL), views=1, top_k=TOP_K)


def batches_of(asked: argparse.Namespace, folder: Path, here: World) -> list[Batch]:
    """The first batches of an epoch, of the store's view; one more than are timed."""
    stored = recipe(asked.models[0], asked, folder, **{"store.path": str(folder / "store")})
    setup = open_experiment(stored, replace(here, device=torch.device("cpu")), QUIET)
    loaded = itertools.islice(training_batches(setup, 0, asked.steps + 1, replace(here, workers=0)), asked.steps + 1)
    return [replace(batch, teacher=None) for batch in loaded]


@dataclass(frozen=True)
class Spent:
    wall_s: float
    cpu_s: float
    """Of all threads of this process: what other people on the machine hardly change."""


def timed(loop: Loop, batches: list[Batch], device: torch.device) -> Spent:
    """Over all batches but the first, which pays for the start."""
    marks = []

    def marked() -> Iterator[Batch]:
        yield batches[0]
        marks.append(now(device))
        yield from batches[1:]
        marks.append(now(device))

    loop(marked())
    (wall, cpu), (wall_end, cpu_end) = marks
    return Spent(wall_end - wall, cpu_end - cpu)


def now(device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


def begun(build: Callable[[], Loop], batches: list[Batch], device: torch.device) -> tuple[Loop, str]:
    """A loop that has run, and the MiB that it added at its peak; on a CPU nobody counts them."""
    if device.type != "cuda":
        loop = build()
        loop(batches[:2])
        return loop, "–"
    before = torch.cuda.memory_allocated(device)
    loop = build()
    loop(batches[:2])
    torch.cuda.reset_peak_memory_stats(device)
    loop(batches[:3])
    return loop, f"{(torch.cuda.max_memory_allocated(device) - before) / 2**20:.0f}"


def compare(student: str, asked: argparse.Namespace, folder: Path, batches: list[Batch], here: World) -> None:
    ready = {name: begun(build, batches, here.device) for name, build in loops(student, asked, folder, here).items()}
    spent: dict[str, list[Spent]] = {name: [] for name in ready}
    for number in range(asked.rounds):
        # Whoever is first in one round is second in the next: what comes before is felt.
        for name in (*ready, *ready)[number % len(ready) :][: len(ready)]:
            spent[name].append(timed(ready[name][0], batches, here.device))
    seconds = {
        "wall": {name: [one.wall_s for one in each] for name, each in spent.items()},
        "CPU": {name: [one.cpu_s for one in each] for name, each in spent.items()},
    }
    print(f"\n{student}, {'compiled' if asked.compile else 'eager'}\n")
    print("| loop | images/s | CPU ms a step | peak MiB | over bare, wall | … CPU | over labels, wall | … CPU |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (_, memory) in ready.items():
        images_per_s = asked.batch_size * asked.steps / statistics.median(seconds["wall"][name])
        ratios = [
            ratio(seconds[kind][name], seconds[kind][rival])
            for rival in ("bare", "train, labels")
            for kind in ("wall", "CPU")
        ]
        cpu_ms = 1000 * statistics.median(seconds["CPU"][name]) / asked.steps
        print(f"| {name} | {images_per_s:.1f} | {cpu_ms:.1f} | {memory} | {' | '.join(ratios)} |", flush=True)
    if "online" in spent:
        for kind, by in seconds.items():
            stored = by["train, store"]
            both = [one + other for one, other in zip(stored, by["teacher"], strict=True)]
            saved, forward = ratio(by["online"], stored), ratio(both, stored)
            print(f"{kind}: online over store {saved}; store and the teacher's forward over store {forward}")


def ratio(ours: list[float], theirs: list[float]) -> str:
    """The median over the rounds, with their range."""
    each = sorted(one / other for one, other in zip(ours, theirs, strict=True))
    return "1" if ours is theirs else f"{statistics.median(each):.3f} ({each[0]:.3f} to {each[-1]:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["tiny_vit_5m_224"])
    parser.add_argument("--teacher", default="resnet50")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    asked = parser.parse_args()
    if LogitDistillationTask is None:
        print(f"timm {timm.__version__} has no LogitDistillationTask: online distillation is left out")
    runtime = RuntimeConfig(device=asked.device, threads=asked.threads)
    with tempfile.TemporaryDirectory() as folder, world(runtime) as here:
        make(asked, Path(folder))
        batches = batches_of(asked, Path(folder), here)
        for student in asked.models:
            compare(student, asked, Path(folder), batches, here)


if __name__ == "__main__":
    main()
