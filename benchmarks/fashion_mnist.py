"""Full Fashion-MNIST through the three commands: teacher, store, and the student from labels, hard and soft.

    python benchmarks/fashion_mnist.py usr/share/datasets/fashion-mnist OUT

Every job is a command that can be interrupted and run again: so can this script. Jobs of different seeds run side
by side, one thread each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

STUDENTS = {
    "student, from labels": ("--objective", "supervised"),
    "student, deit hard": ("--set", "objective.distillation=hard", "--set", "objective.alpha=0.5"),
    "student, deit soft": (),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    with ThreadPoolExecutor(given.jobs) as pool:
        results = list(
            pool.map(lambda seed: one_seed(given.data, given.out / str(seed), seed, given.epochs), given.seeds)
        )
    print("| model | top1, mean | standard deviation | seeds |\n|---|---|---|---|")
    for name in results[0]:
        top1 = [result[name] for result in results]
        print(f"| {name} | {statistics.mean(top1):.2f} | {statistics.stdev(top1):.2f} | {', '.join(map(str, top1))} |")


def one_seed(data: Path, out: Path, seed: int, epochs: int) -> dict[str, float]:
    """Every model of one seed: name -> top1."""
    common = ("--data", data, "--seed", seed, "--workers", 0)
    teacher = distill("train", "--recipe", "quickstart-teacher", *common, "--epochs", 3, "--out", out / "teacher")
    distill(
        "teacher-logits", "--recipe", "quickstart-student", "--teacher", out / "teacher", *common,
        "--views", 2, "--shard-rows", 15000, "--out", out / "store",
    )  # fmt: skip
    top1 = {"teacher": teacher["top1"]}
    for name, arguments in STUDENTS.items():
        store = () if "supervised" in arguments else ("--store", out / "store")
        run = out / name.rpartition(" ")[2]
        student = ("train", "--recipe", "quickstart-student", *common, *store, *arguments, "--epochs", epochs)
        top1[name] = distill(*student, "--out", run)["top1"]
    return top1


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


if __name__ == "__main__":
    main()
