"""What keeping a teacher's top-k costs and gives, format beside format, in one run.

    python benchmarks/store.py LOGITS.npy [--k 100] [--rounds 5] [--rows 16384]

LOGITS.npy: float32 [rows, classes], a teacher's output. Formats: this package's two codecs, TinyViT's records (read one
by one as its own reader does), FKD's pickles (a file an image with all of its crops, of which four are used), rows of a
shard through h5py one by one, and, as the limit, a plain memory map of the bytes of an exact row.

Bytes a row are all in: keys, headers, checksums. KL is KL(teacher || kept), the tail uniform, a mean over the rows.
Reading ends in tensors of a batch (class ids int64, log-probabilities float32). Rates are medians of rounds in turn.
This package reads as its loader does, 8,192 rows for several batches at once; the others batch by batch.
Cold: the kernel was asked to forget the files before (posix_fadvise), so what is under the kernel may still know them.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from distill_cli.data.batches import Batches
from distill_cli.data.orders import TrainingOrder
from distill_cli.replay import SparseRows
from distill_cli.sparse import SparseLogits, soften, top_k
from distill_cli.store.plan import Plan
from distill_cli.store.reader import Store
from distill_cli.store.rows import Rows
from distill_cli.store.tinyvit import RankWriter, RecordReader
from distill_cli.store.writer import StoreWriter

CROPS, USED = 50, 4
"""Of FKD: crops of an image in its file, and those that a step takes."""


@dataclass(frozen=True)
class Teacher:
    """What all formats keep."""

    log_prob: torch.Tensor
    """float64 `[rows, classes]`."""
    rows: SparseLogits

    @property
    def k(self) -> int:
        return int(self.rows.class_id.shape[1])

    def kl(self, kept: SparseLogits) -> float:
        """Mean KL(teacher || kept) in nats; the tail of what is kept is uniform."""
        classes = self.log_prob.shape[1]
        target = soften(kept, classes)
        kept_log_prob = target.tail.log().unsqueeze(-1).expand(-1, classes).clone()
        kept_log_prob.scatter_(1, target.class_id, target.prob.log())
        terms = self.log_prob.exp() * (self.log_prob - kept_log_prob.double())
        return float(terms.nan_to_num().sum(dim=1).mean())


class Format(Protocol):
    name: str

    def write(self, folder: Path, teacher: Teacher) -> None: ...

    def reader(self, folder: Path) -> Callable[[NDArray[np.int64]], SparseLogits]:
        """A function that gives the rows of some samples as tensors."""
        ...


class Ours:
    """This package's store."""

    def __init__(self, codec: str, shard_rows: int) -> None:
        self.name, self.codec, self.shard_rows = codec, codec, shard_rows

    def plan(self, teacher: Teacher) -> Plan:
        return Plan(
            teacher={"name": "t", "weights_sha256": "0", "num_classes": teacher.log_prob.shape[1], "classes": None},
            data={"keys_sha256": "0", "labels_sha256": None},
            transform={},
            samples=len(teacher.log_prob),
            views=1,
            top_k=teacher.k,
            shard_rows=self.shard_rows,
            seed=0,
            precision="fp32",
            codec=self.codec,
            bits=8 if self.codec == "compact" else None,
        )

    def write(self, folder: Path, teacher: Teacher) -> None:
        plan = self.plan(teacher)
        writer = StoreWriter(folder, plan)
        columns = [part.numpy() for part in (teacher.rows.class_id, teacher.rows.log_prob, teacher.rows.log_tail)]
        for view, shard in plan.every_shard():
            ids = plan.dealing.sample_ids(shard)
            writer.write(view, shard, Rows(ids, *(column[ids] for column in columns)), np.zeros(4, np.uint32))
        writer.finish()

    def reader(self, folder: Path) -> Callable[[NDArray[np.int64]], SparseLogits]:
        rows = SparseRows(Store(folder))
        return lambda ids: rows(0, ids)


class ByH5py(Ours):
    """The same files, a row at a time through h5py."""

    def __init__(self, shard_rows: int) -> None:
        super().__init__("exact", shard_rows)
        self.name = "exact, row by row through h5py"

    def reader(self, folder: Path) -> Callable[[NDArray[np.int64]], SparseLogits]:
        store = Store(folder)
        dealing = store.plan.dealing
        files = [h5py.File(folder / entry.path) for entry in store.manifests[0].shards]
        names = ("class_id", "log_prob", "log_tail")

        def read(ids: NDArray[np.int64]) -> SparseLogits:
            shards, places = np.divmod(dealing.place(ids), dealing.shard_rows)
            found = [
                [files[shard][name][place] for name in names]
                for shard, place in zip(shards.tolist(), places.tolist(), strict=True)
            ]
            return tensors(*(np.stack(column) for column in zip(*found, strict=True)))

        return read


class TinyViT:
    """Records of seed, ids and probabilities, read one by one, with a dictionary of keys, and collated."""

    name = "TinyViT's records"

    def write(self, folder: Path, teacher: Teacher) -> None:
        n = len(teacher.log_prob)
        with RankWriter(folder, 0, teacher.k, n) as rank:
            rank.records["seed"], rank.records["class_id"] = np.arange(n), teacher.rows.class_id
            rank.records["prob"] = teacher.rows.log_prob.exp()
            rank.write_keys(self._key(sample) for sample in range(n))

    def reader(self, folder: Path) -> Callable[[NDArray[np.int64]], SparseLogits]:
        values, keys = (folder / f"rank0-{name}" for name in ("values.bin", "keys.txt"))
        places = {key: place for place, key in enumerate(keys.read_text().split())}
        records = RecordReader(values, (values.stat().st_size // len(places) - 4) // 4)

        def read(ids: NDArray[np.int64]) -> SparseLogits:
            found = (records.read(places[self._key(sample)]) for sample in ids.tolist())
            pairs = [(class_id.astype(np.int64), prob.astype(np.float32)) for _, class_id, prob in found]
            class_id, prob = torch.utils.data.default_collate(pairs)
            # Rounded to float16, a row can have more than all of the mass; a tail of none has infinite KL.
            return SparseLogits(class_id, prob.log(), (1 - prob.sum(dim=1)).clamp(min=1e-7).log())

        return read

    @staticmethod
    def _key(sample: int) -> str:
        return f"n{sample // 1300:08d}_{sample % 1300}"


class FKD:
    """A file an image, with all of its crops."""

    name = f"FKD's pickles ({CROPS} crops a file)"

    def write(self, folder: Path, teacher: Teacher) -> None:
        self.rows = len(teacher.log_prob) // CROPS * CROPS
        for image in range(self.rows // CROPS):
            here = slice(image * CROPS, (image + 1) * CROPS)
            prob, class_id = teacher.rows.log_prob[here].exp().numpy(), teacher.rows.class_id[here].numpy()
            coordinates, flip = np.zeros((CROPS, 4), np.float32), np.zeros(CROPS, bool)
            label = np.stack([class_id, prob], axis=1).astype(np.float32)
            torch.save([coordinates, flip, label], folder / f"{image}.tar")

    def reader(self, folder: Path) -> Callable[[NDArray[np.int64]], SparseLogits]:
        images = len(list(folder.iterdir()))

        def read(ids: NDArray[np.int64]) -> SparseLogits:
            found = []
            for sample in ids[::USED].tolist():
                _, _, label = torch.load(folder / f"{sample // CROPS % images}.tar", weights_only=False)
                found.append(label[:USED])
            label = torch.from_numpy(np.concatenate(found)[: len(ids)])
            return SparseLogits(label[:, 0].long(), label[:, 1].log(), (1 - label[:, 1].sum(dim=1)).log())

        return read


class MemoryMap:
    """The bytes of exact rows behind one another: what no reader of them can beat."""

    name = "a plain memory map"

    def write(self, folder: Path, teacher: Teacher) -> None:
        kind = np.dtype(
            [("id", "<u4"), ("class_id", "<u2", teacher.k), ("log_prob", "<f2", teacher.k), ("tail", "<f4")]
        )
        records = np.zeros(len(teacher.log_prob), kind)
        records["id"] = np.arange(len(records))
        records["class_id"], records["log_prob"] = teacher.rows.class_id, teacher.rows.log_prob
        records["tail"] = teacher.rows.log_tail
        with (folder / f"{teacher.k}.bin").open("wb") as file:
            file.write(records.tobytes())
            os.fsync(file.fileno())

    def reader(self, folder: Path) -> Callable[[NDArray[np.int64]], SparseLogits]:
        (path,) = folder.iterdir()
        k = int(path.stem)
        kind = np.dtype([("id", "<u4"), ("class_id", "<u2", k), ("log_prob", "<f2", k), ("tail", "<f4")])
        records = np.asarray(np.memmap(path, kind, "r"))

        def read(ids: NDArray[np.int64]) -> SparseLogits:
            rows = records[ids]
            return tensors(rows["class_id"], rows["log_prob"], rows["tail"])

        return read


def tensors(class_id: NDArray[np.uint16], log_prob: NDArray[np.float16], log_tail: NDArray[np.float32]) -> SparseLogits:
    parts = (class_id.astype(np.int64), log_prob.astype(np.float32), np.ascontiguousarray(log_tail))
    return SparseLogits(*map(torch.from_numpy, parts))


def in_training_order(form: Format, folder: Path, rows: int, size: int, most: int) -> float:
    """Rows a second of an epoch's first `most` rows; every shard has been read before."""
    order = TrainingOrder(np.arange(rows), size, seed=0, views=1)
    steps = range(min(rows, most) // size)
    if type(form) is Ours:
        stored = SparseRows(Store(folder))
        stored(0, np.arange(rows))
        loader = Batches(None, None, order, rows=stored)  # type: ignore[arg-type]
        read: Callable[[int], object] = lambda step: loader._teacher(step, size)  # noqa: E731
    else:
        reader, ids = form.reader(folder), [order(step)[1] for step in steps]
        read = lambda step: reader(ids[step])  # noqa: E731
    return len(steps) * size / timed(lambda: [read(step) for step in steps])


def forget(folder: Path) -> None:
    """Ask the kernel to drop the files from its cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measure(form: Format, teacher: Teacher, most: int) -> dict[str, float]:
    """One round: rows a second of each kind of work."""
    rows = len(teacher.log_prob)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "store"
        folder.mkdir()
        rates = {"write": rows / timed(lambda: form.write(folder, teacher))}
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        forget(folder)
        first = TrainingOrder(np.arange(rows), 1024, seed=0, views=1)(0)[1]
        rates["cold"] = len(first) / timed(lambda: form.reader(folder)(first))
        read = form.reader(folder)
        everything = read(np.arange(rows))
        listing = [np.arange(start, min(start + 4096, most)) for start in range(0, most, 4096)]
        rates["sequential"] = most / timed(lambda: [read(ids) for ids in listing])
        for batch in (128, 1024):
            rates[f"training order, {batch}"] = in_training_order(form, folder, rows, batch, most)
        kl = float("nan") if isinstance(form, FKD) else teacher.kl(everything)
        return {"bytes": size / getattr(form, "rows", rows), "kl": kl, **rates}


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logits")
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shard-rows", type=int, default=4096)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logits = torch.from_numpy(np.load(arguments.logits)[: arguments.rows].astype(np.float32))
    teacher = Teacher(logits.double().log_softmax(dim=1), top_k(logits, arguments.k))
    slow = min(len(logits), 4096)
    forms: list[tuple[Format, int]] = [
        (Ours("exact", arguments.shard_rows), len(logits)),
        (Ours("compact", arguments.shard_rows), len(logits)),
        (TinyViT(), len(logits)),
        (FKD(), slow),
        (ByH5py(arguments.shard_rows), slow),
        (MemoryMap(), len(logits)),
    ]
    found: dict[str, list[dict[str, float]]] = {form.name: [] for form, _ in forms}
    for _ in range(arguments.rounds):
        for form, most in forms:
            found[form.name].append(measure(form, teacher, most))
    own = teacher.kl(teacher.rows)
    print(f"{len(logits)} rows of {logits.shape[1]} classes, k = {arguments.k}; KL of the top k as it is: {own:.4e}\n")
    names = [name for name in next(iter(found.values()))[0] if name not in ("bytes", "kl")]
    print("| format | bytes a row | KL, nats | " + " | ".join(f"{name}, k rows/s" for name in names) + " |")
    print("|" + "---|" * (3 + len(names)))
    for name, rounds in found.items():
        middle = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        rates = " | ".join(f"{middle[key] / 1000:,.1f}" for key in names)
        print(f"| {name} | {middle['bytes']:.1f} | {middle['kl']:.4e} | {rates} |")


if __name__ == "__main__":
    main()
