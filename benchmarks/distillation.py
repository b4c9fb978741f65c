"""Does each objective make a student better? Full Fashion-MNIST, one teacher, one student, the same steps.

    python benchmarks/distillation.py usr/share/datasets/fashion-mnist WORK

Every job is a `distill` command that can be interrupted and run again, and so can this script. What a finished job gave
is kept in benchmarks/distillation.json, so that a table that was broken off goes on on another machine: a job is run
again only where another one needs its weights. A result counts as long as its command, its recipe, and those of
the jobs that it needs, are what they were. A job that fails leaves out those that need it. `--table` prints
the table of what is there.

`--pace`, on a machine that does nothing else, has a hundred steps of each row in turn, for images/s.

The student is a ViT of 0.68 M parameters, 28 px, patches of 4; with a distillation token for `deit`. Objectives that
train no classifier are followed by the same supervised epochs as `scratch` (their row). DMAE needs a ViT for a teacher:
it is the tinyvit student of the same seed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from distill_cli.files import canonical_json, sha256, write_json
from distill_cli.shipped import recipes

KEPT = Path(__file__).with_suffix(".json")
TOP_K = (10, 3, 1)
LABELS = ("--recipe", "fashion-scratch")


@dataclass(frozen=True)
class Job:
    """A command whose result is a directory."""

    name: str
    arguments: tuple[str, ...]
    """Without data, seed and `--out`; `{NAME}` is the directory of another job, which is done before."""
    needs: tuple[str, ...] = ()
    row: str = ""
    """What the table calls it; jobs of one row differ by their seed."""
    seed: int = 0
    paces: bool = False
    """Whether it is there for its images/s alone."""

    def identity(self, every: dict[str, "Job"]) -> str:
        """The sha256 of all that its result depends on."""
        names = [name for flag, name in zip(self.arguments, self.arguments[1:], strict=False) if flag == "--recipe"]
        values = [tomllib.loads(recipes()[name].read_text()) for name in names]
        needs = [every[need].identity(every) for need in self.needs]
        return sha256(canonical_json([self.arguments, self.seed, values, needs]))


def jobs(seeds: list[int], epochs: int) -> list[Job]:
    """All jobs, each after those that it needs."""
    teacher = Job("teacher", ("train", "--recipe", "fashion-teacher"), row="teacher: ResNet of 1.8 M")
    views = str(epochs)
    stores = [
        Job(
            "store-10",
            ("teacher-logits", "--recipe", "fashion-tinyvit", "--teacher", "{teacher}", "--views", views),
            ("teacher",),
        ),
        Job("store-crops", ("teacher-logits", "--recipe", "fashion-fkd", "--teacher", "{teacher}"), ("teacher",)),
    ]
    stores += [
        Job(f"store-{k}", ("store", "trim", "{store-10}", "--top-k", str(k)), ("store-10",)) for k in TOP_K if k != 10
    ]
    return [teacher, *stores, *(job for seed in seeds for job in students(seed, epochs))]


def paces(jobs: Iterable[Job], rounds: int) -> Iterator[Job]:
    """A hundred steps of each, all of them in every round."""
    steps = ("--set", "train.steps=100")
    for number, job in product(range(rounds), jobs):
        yield replace(job, name=f"pace/{number}/{job.name}", arguments=(*job.arguments, *steps), paces=True)


def students(seed: int, epochs: int) -> list[Job]:
    """The rows of one seed."""
    live = ("--teacher", "{teacher}")

    def train(row: str, *arguments: str, needs: tuple[str, ...] = (), epochs: int = epochs) -> Job:
        name = f"{seed}/{row.replace(' ', '-').replace(',', '')}"
        return Job(name, ("train", *arguments, "--epochs", str(epochs)), needs, row, seed)

    def by(divergence: str, *settings: str) -> Job:
        """`tinyvit` with another divergence, as its authors weigh it."""
        words = (word for setting in settings for word in ("--set", f"objective.{setting}"))
        store = ("--recipe", "fashion-tinyvit", "--store", "{store-10}")
        return train(f"tinyvit, {divergence}", *store, *words, needs=("store-10",))

    def tuned(row: str, pretrained: str) -> Job:
        start = f"{seed}/{pretrained}"
        return train(row, "--recipe", "fashion-finetune", "--init-from", f"{{{start}}}", needs=(start,))

    return [
        train("scratch", *LABELS),
        train("scratch, twice the steps", *LABELS, epochs=2 * epochs),
        train("scratch, four crops a read", *LABELS, "--views-per-read", "4"),
        *(
            train(f"tinyvit k={k}", "--recipe", "fashion-tinyvit", "--store", f"{{store-{k}}}", needs=(f"store-{k}",))
            for k in TOP_K
        ),
        by("JSD", "divergence=jsd"),
        by("DKD", 'divergence={name="dkd", alpha=1, beta=0.5}', "label_weight=1"),
        by("DIST", "divergence=dist", "label_weight=1"),
        by("standardised", "standardise=true", "temperature=2", "label_weight=0.011"),
        train("tinymim beside labels", "--recipe", "fashion-tinymim-labels", *live, needs=("teacher",)),
        train("fkd", "--recipe", "fashion-fkd", "--store", "{store-crops}", needs=("store-crops",)),
        train("deit hard", "--recipe", "fashion-deit", "--store", "{store-10}", needs=("store-10",)),
        train(
            "deit soft",
            *("--recipe", "fashion-deit", "--set", "objective.distillation=soft"),
            *("--set", "objective.alpha=0.9", "--set", "objective.temperature=2", "--store", "{store-10}"),
            needs=("store-10",),
        ),
        train("features", "--recipe", "fashion-features", *live, needs=("teacher",)),
        train(
            "tinyvit + features",
            *("--recipe", "fashion-tinyvit-features", *live, "--store", "{store-10}"),
            needs=("teacher", "store-10"),
        ),
        train("pretraining tinymim", "--recipe", "fashion-tinymim", *live, needs=("teacher",)),
        tuned("tinymim, fine-tuned", "pretraining-tinymim"),
        train(
            "pretraining dmae",
            *("--recipe", "fashion-dmae", "--teacher", f"{{{seed}/tinyvit-k=10}}"),
            needs=(f"{seed}/tinyvit-k=10",),
        ),
        tuned("dmae, fine-tuned", "pretraining-dmae"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[], help="rows")
    parser.add_argument("--side-by-side", type=int, default=2, help="jobs at once, each with one thread of a CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pace", action="store_true", help="images/s instead of accuracies")
    parser.add_argument("--rounds", type=int, default=3, help="of --pace")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    every = {job.name: job for job in jobs(given.seeds, given.epochs)}
    first = [job for job in every.values() if job.row and job.seed == given.seeds[0]]
    every |= {job.name: job for job in paces(first, given.rounds)}
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    here = f"{given.epochs} epochs, {given.device}"
    identities = {name: job.identity(every) for name, job in every.items()}
    mine = {name: found for name, found in kept.get(here, {}).items() if found.get("identity") == identities.get(name)}
    if not given.table:
        rows = (job for job in every.values() if job.row and job.paces == given.pace)
        asked = [job.name for job in rows if job.name not in mine]
        asked = [name for name in asked if not given.only or every[name].row in given.only]
        for name, result in Runner(every, given).run(asked):
            mine[name] = {**result, "identity": identities[name]}
            write_json(KEPT, {**kept, here: mine})
    print_table(every, mine)


class Runner:
    """Runs jobs, each once, after those that it needs."""

    def __init__(self, every: dict[str, Job], given: argparse.Namespace) -> None:
        self.every, self.given = every, given
        self.started: dict[str, Future[tuple[str, dict[str, Any]]]] = {}
        self.pool = ThreadPoolExecutor(given.side_by_side)

    def run(self, names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The results of some jobs, as they come."""
        with self.pool:
            # In the order of the list, so that what a job needs is always begun before it and no thread waits in vain.
            needed = {need for name in names for need in self.needs(name)}
            for name in self.every:
                if name in needed:
                    self.started[name] = self.pool.submit(self.do, self.every[name])
            for future in as_completed(self.started[name] for name in names):
                if future.exception() is None:
                    yield future.result()
                else:
                    print(f"failed: {future.exception()}", file=sys.stderr, flush=True)

    def needs(self, name: str) -> set[str]:
        """A job and all that it needs."""
        return {name}.union(*(self.needs(need) for need in self.every[name].needs))

    def do(self, job: Job) -> tuple[str, dict[str, Any]]:
        for need in job.needs:
            self.started[need].result()
        places = {f"{{{name}}}": str(self.given.work / name) for name in job.needs}
        arguments = [places.get(argument, argument) for argument in job.arguments]
        out = str(self.given.work / job.name)
        threads = 1 if self.given.device == "cpu" else None
        data = ("--data", str(self.given.data), "--seed", str(job.seed))
        if job.arguments[0] == "store":
            distill(*arguments, "--out", out, threads=threads)
            return job.name, {}
        here = ("--device", self.given.device, "--workers", "0" if self.given.device == "cpu" else "4")
        summary = distill(*arguments, *data, *here, "--out", out, threads=threads)
        if arguments[0] != "train":
            return job.name, {}
        if job.paces:
            return job.name, {"images_per_s": summary["images_per_s"]}
        lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
        return job.name, {
            "top1": summary["top1"],
            "steps": summary["steps"],
            "parameters_m": summary["parameters_m"],
            "extra_m": max(0.0, round(extra_parameters(Path(out), summary["parameters_m"]), 3)),
            "memory_mb": max(line["memory_mb"] for line in lines if "memory_mb" in line),
        }


def distill(*arguments: Any, threads: int | None = 1) -> dict[str, Any]:
    """Run a command and give its JSON.

    Args:
        threads: of torch; None leaves it to the command.
    """
    words = [sys.executable, "-m", "distill_cli", *map(str, arguments), "--json", "--quiet"]
    print("distill", *words[3:-2], file=sys.stderr, flush=True)
    environment = os.environ if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    values: dict[str, Any] = json.loads(done.stdout)
    return values


def extra_parameters(run: Path, of_student: float) -> float:
    """What was trained besides the student, in millions, by the run's last checkpoint."""
    tensors = load_file(max((run / "checkpoints").iterdir()))
    return sum(value.numel() for name, value in tensors.items() if name.startswith("model.")) / 1e6 - of_student


def print_table(every: dict[str, Job], results: dict[str, dict[str, Any]]) -> None:
    """A row for each kind of job: mean and standard deviation over its seeds, and what it costs beside `scratch`."""
    rows: dict[str, list[dict[str, Any]]] = {}
    paced: dict[str, list[dict[str, Any]]] = {}
    for job in every.values():
        if job.row and job.name in results:
            (paced if job.paces else rows).setdefault(job.row, []).append(results[job.name])
    base = rows.get("scratch", [])
    print("| | top1 | seeds | over scratch | images/s, ratio | extra parameters, M | memory, MB |")
    print("|---|---|---|---|---|---|---|")
    for row, found in rows.items():
        top1 = [each["top1"] for each in found if each["top1"] is not None]
        spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        reached, gain, pace = "", "", ""
        if top1:
            reached = f"{statistics.mean(top1):.2f}{spread}"
            gain = f"{statistics.mean(top1) - statistics.mean(each['top1'] for each in base):+.2f}"
        if row in paced and "scratch" in paced:
            pace = f"{median(paced[row], 'images_per_s') / median(paced['scratch'], 'images_per_s'):.2f}"
        print(
            f"| {row} | {reached} | {', '.join(f'{each:.2f}' for each in top1)} | {gain} "
            f"| {pace} | {median(found, 'extra_m'):.2f} | {median(found, 'memory_mb'):.0f} |"
        )


def median(found: list[dict[str, Any]], name: str) -> float:
    return statistics.median(each[name] for each in found)


if __name__ == "__main__":
    main()
