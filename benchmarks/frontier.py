"""Bytes a row against the KL that they cost: the codec `compact` beside `exact` and what else keeps teachers' outputs.

    python benchmarks/frontier.py LOGITS.npy [--plot docs/frontier.png]

LOGITS.npy is float `[rows, classes]`, at best one shard of 16,384 rows. KL is from the whole teacher to what a reader
gets back, the mass outside the k spread evenly before the temperature; means over rows. "Above" is less that of the k
float64 log-probabilities and tail. The plot needs matplotlib, which is not a dependency.

TinyViT: 4 + 4k bytes and a key of 16; float16 probabilities, what they leave of 1 outside. DistillKit: sorted
log-probabilities, the first in bfloat16, the others by a polynomial of their rank with float32 coefficients, class ids
in ceil(log2 C) bits; the mass outside, which it does not keep, is taken from what the k leave of 1. Linear: class gaps
and log-probabilities in 8 bits between the ends of the shard, zlib over all of it: no row can be read alone. Huffman is
zlib without matches: where many rows are views of few images, matches find the other views of the same image.
"""

import argparse
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_cli.store.codecs import compact
from distill_cli.store.rows import RowFormat, Rows

KS, BITS, TEMPERATURES = (5, 10, 20, 50, 100, 200), (4, 5, 6, 7, 8, 9), (1, 2, 4)
Floats = NDArray[Any]


@dataclass
class Teacher:
    """The rows of a teacher, whole."""

    log_prob: Floats
    """float32 `[rows, classes]`."""

    def __post_init__(self) -> None:
        self.order = np.argsort(-self.log_prob, axis=1, kind="stable").astype(np.int32)
        self.norm, self.negentropy = {}, {}
        for temperature in TEMPERATURES:
            scaled = self.log_prob.astype(np.float64) / temperature
            self.norm[temperature] = norm = np.logaddexp.reduce(scaled, axis=1)[:, None]
            self.negentropy[temperature] = (np.exp(scaled - norm) * (scaled - norm)).sum(axis=1)

    def top(self, k: int) -> Rows:
        class_id = self.order[:, :k]
        values = np.take_along_axis(self.log_prob, class_id, axis=1).astype(np.float64)
        rest = np.take_along_axis(self.log_prob, self.order[:, k:], axis=1).astype(np.float64)
        tail = np.logaddexp.reduce(rest, axis=1, initial=-np.inf)
        return Rows(np.arange(len(class_id)), class_id, values, tail)

    def divergence(self, rows: Rows, temperature: int) -> float:
        """Mean KL(teacher || rows) at a temperature, in nats."""
        others = self.log_prob.shape[1] - rows.class_id.shape[1]
        kept = rows.log_prob.astype(np.float64) / temperature
        one = (np.maximum(rows.log_tail.astype(np.float64), -60) - np.log(max(others, 1))) / temperature
        total = np.log(np.exp(kept).sum(axis=1) + others * np.exp(one))
        log_prob = np.take_along_axis(self.log_prob, rows.class_id.astype(np.int64), axis=1) / temperature
        prob = np.exp(log_prob - self.norm[temperature])
        outside = np.maximum(1 - prob.sum(axis=1), 0)
        cross = (prob * np.maximum(kept - total[:, None], -60)).sum(axis=1) + outside * (one - total)
        return float((self.negentropy[temperature] - cross).mean())


def compacted(rows: Rows, classes: int, bits: int) -> tuple[float, Rows]:
    """(Bytes a row, all datasets included; the rows back)."""
    n, form = len(rows), RowFormat(classes, rows.class_id.shape[1], False, bits)
    datasets = compact.encode(rows, form)
    back = compact.take([(compact.open(datasets, n, form), np.arange(n))], form)
    return sum(data.nbytes for data in datasets.values()) / n, Rows(rows.sample_id, *back)


def exact(rows: Rows) -> tuple[float, Rows]:
    half = rows.log_prob.astype(np.float16)
    return 4 + 4 * half.shape[1], Rows(rows.sample_id, rows.class_id, half, rows.log_tail.astype(np.float32))


def tinyvit(rows: Rows) -> tuple[float, Rows]:
    prob = np.exp(rows.log_prob).astype(np.float16).astype(np.float64)
    with np.errstate(divide="ignore"):
        tail = np.log(np.maximum(1 - prob.sum(axis=1), 0))
        return 20 + 4 * prob.shape[1], Rows(rows.sample_id, rows.class_id, np.log(prob), tail)


def linear(rows: Rows, strategy: int) -> tuple[float, Rows]:
    order = np.argsort(rows.class_id, axis=1)
    class_id = np.take_along_axis(rows.class_id, order, axis=1)
    values = np.take_along_axis(rows.log_prob, order, axis=1)
    gaps = np.diff(class_id, axis=1, prepend=-1).astype("<u2")
    low = float(values.min())
    codes, tail = np.rint(values / low * 255).astype(np.uint8), rows.log_tail.astype("<f2")
    parts = [(gaps & 255).astype(np.uint8), (gaps >> 8).astype(np.uint8), codes, tail]
    size = 0
    for part in parts:
        packer = zlib.compressobj(9, strategy=strategy)
        size += len(packer.compress(np.ascontiguousarray(part).tobytes()) + packer.flush())
    return size / len(rows), Rows(rows.sample_id, class_id, codes.astype(np.float64) * low / 255, tail)


def distillkit(rows: Rows, classes: int, head: int, powers: int) -> tuple[float, Rows]:
    values = rows.log_prob.copy()
    values[:, :head] = (values[:, :head].astype(np.float32).view(np.uint32) + 0x8000 & 0xFFFF0000).view(np.float32)
    rank = np.arange(values.shape[1] - head) / (values.shape[1] - head - 1)
    terms = np.stack([*(rank**power for power in range(powers)), np.sqrt(rank)], axis=1)
    values[:, head:] = (values[:, head:] @ np.linalg.pinv(terms).T).astype(np.float32) @ terms.T
    index = -(-values.shape[1] * int(np.ceil(np.log2(classes))) // 8)
    tail = np.log(np.maximum(1 - np.exp(values).sum(axis=1), 1e-9))
    return 2 * head + 4 * (powers + 1) + index, Rows(rows.sample_id, rows.class_id, values, tail)


def measure(teacher: Teacher) -> Iterator[tuple[str, int, int, float, list[float], list[float]]]:
    """(codec, k, bits, bytes a row, KL at each temperature, that above the k exact ones)."""
    classes = teacher.log_prob.shape[1]
    for k in (*KS, 128):
        if k > classes:
            continue
        rows = teacher.top(k)
        least = [teacher.divergence(rows, temperature) for temperature in TEMPERATURES]
        found = [
            ("exact", 0, *exact(rows)),
            ("TinyViT", 0, *tinyvit(rows)),
            ("linear, zlib", 8, *linear(rows, zlib.Z_DEFAULT_STRATEGY)),
        ]
        found.append(("linear, Huffman", 8, *linear(rows, zlib.Z_HUFFMAN_ONLY)))
        found += [("compact", bits, *compacted(rows, classes, bits)) for bits in BITS]
        if k == 50:
            found.append(("DistillKit budget", 0, *distillkit(rows, classes, 1, 2)))
        if k == 128:
            found = [("DistillKit recommended", 0, *distillkit(rows, classes, 16, 5))]
        for name, bits, size, back in found:
            loss = [teacher.divergence(back, temperature) for temperature in TEMPERATURES]
            yield name, k, bits, size, loss, [one - other for one, other in zip(loss, least, strict=True)]


def plot(results: list[tuple[str, int, int, float, list[float], list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    marks = {
        "compact": "o-",
        "exact": "s",
        "TinyViT": "^",
        "linear, zlib": "v",
        "linear, Huffman": "1",
        "DistillKit budget": "D",
    }
    for name, mark in marks.items():
        chosen = [one for one in results if one[0] == name]
        at = [one for one in chosen if one[1] == 100]
        if not at:
            continue
        left.plot([one[3] for one in at], [one[5][0] for one in at], mark, markersize=4, label=name)
    for one in results:
        if one[0] == "compact" and one[1] == 100:
            left.annotate(f"{one[2]} bits", (one[3], one[5][0]), (6, 2), textcoords="offset points", fontsize=7)
    left.axhline(1e-4, color="0.7", linewidth=0.8)
    left.set(title="k = 100", xlabel="bytes a row", ylabel="KL above exact, nats", yscale="log", xlim=(0, 450))
    for name, mark in {**marks, "DistillKit recommended": "D"}.items():
        chosen = [one for one in results if one[0] == name and one[2] in (0, 8)]
        right.plot([one[3] for one in chosen], [one[4][0] for one in chosen], mark, markersize=4, label=name)
    right.set(title="k = 5 to 200", xlabel="bytes a row", ylabel="KL from the whole teacher, nats")
    right.set(xscale="log", yscale="log")
    right.legend(fontsize=7, frameon=False)
    for axes in (left, right):
        axes.grid(True, which="major", color="0.92", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("logits", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    logits = np.load(arguments.logits, mmap_mode="r")[:16_384].astype(np.float64)
    norm = np.logaddexp.reduce(logits, axis=1, keepdims=True)
    results = []
    print("| codec | k | bits | bytes a row | KL, T = 1 | above, T = 1 | T = 2 | T = 4 |")
    print("|---|---|---|---|---|---|---|---|")
    for one in measure(Teacher((logits - norm).astype(np.float32))):
        name, k, bits, size, loss, above = one
        cells = [name, str(k), str(bits or ""), f"{size:.1f}", f"{loss[0]:.4f}", *(f"{value:.1e}" for value in above)]
        print("| " + " | ".join(cells) + " |")
        sys.stdout.flush()
        results.append(one)
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
