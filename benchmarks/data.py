"""Loading a folder of JPEGs: this program, timm's `create_loader`, torchvision's ImageFolder, side by side.

    PYTHONPATH=. python benchmarks/data.py DIR [--images 2000] [--rounds 7] [--workers 1 2]

makes the folder in DIR where it is not there: 500 x 400 px, band-limited noise with the spectrum of photographs. Every
loader crops at random to 224 px by a bicubic filter, flips, and draws a RandAugment; ours and timm's is
rand-m9-mstd0.5-inc1, torchvision's its own of the same two operations. Ours replays the views of a store and reads its
rows, k = 10 of 1,000 classes. In each round each loader gives `--batches` batches to the main process, normalised; the
first ones, which pay for the start, are not timed. The last table is of an epoch's inputs with several views a read.
"""

import argparse
import io
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset, create_loader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from distill_cli.data import open_source
from distill_cli.data.batches import Batches
from distill_cli.data.config import DataConfig
from distill_cli.data.loader import load
from distill_cli.data.orders import TrainingOrder
from distill_cli.data.sources import Source, fingerprint
from distill_cli.data.views import View, resolve_view, train_transform
from distill_cli.replay import SparseRows
from distill_cli.store.plan import PROBES, Plan
from distill_cli.store.reader import Store
from distill_cli.store.rows import Rows
from distill_cli.store.writer import StoreWriter

SIZE, BATCH, CLASSES, VIEWS = 224, 64, 1000, 4
POLICY = "rand-m9-mstd0.5-inc1"
MODEL = {
    "input_size": (3, SIZE, SIZE),
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "interpolation": "bicubic",
    "crop_pct": 0.9,
}
CPU = torch.device("cpu")


def picture(rng: np.random.Generator, width: int = 500, height: int = 400) -> Image.Image:
    """Noise whose amplitude falls with its frequency, as a photograph's does."""
    pixels = np.full((height, width, 3), 128, np.float32)
    for cells, amplitude in ((8, 60), (24, 40), (80, 25), (250, 14)):
        noise = rng.normal(0, amplitude, (3, cells * height // width, cells)).astype(np.float32)
        for channel in range(3):
            band = Image.fromarray(noise[channel]).resize((width, height), Image.Resampling.BICUBIC)
            pixels[..., channel] += np.asarray(band)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make(root: Path, images: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(images):
        path = root / "train" / f"{number % 10}" / f"{number:06d}.jpg"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        encoded = io.BytesIO()
        picture(rng).save(encoded, "JPEG", quality=90)
        path.write_bytes(encoded.getvalue())


def store(path: Path, source: Source, view: View, views: int = VIEWS, top_k: int = 10) -> Store:
    """A store of a view of these images, with rows of noise."""
    plan = Plan(
        teacher={"name": "noise", "weights_sha256": "0" * 64, "num_classes": CLASSES, "classes": None},
        data=fingerprint(source),
        transform=view.table,
        samples=len(source),
        views=views,
        top_k=top_k,
        shard_rows=4096,
        seed=0,
        precision="fp32",
        software={},
    )
    path.mkdir(exist_ok=True)
    writer = StoreWriter(path, plan, None)
    rng = np.random.default_rng(0)
    for view, shard in list(writer.missing()):
        ids = plan.dealing.sample_ids(shard)
        prob = -np.sort(-rng.dirichlet(np.full(CLASSES, 0.01), len(ids)).astype(np.float32), axis=1)[:, :top_k]
        class_id = np.tile(np.arange(top_k), (len(ids), 1))
        with np.errstate(divide="ignore"):
            rows = Rows(ids, class_id, np.log(prob), np.log(np.maximum(1e-30, 1 - prob.sum(axis=1))), None)
        writer.write(view, shard, rows, np.zeros(min(PROBES, len(ids)), np.uint32))
    writer.finish()
    return Store(path)


def ours(source: Source, rows: Store, workers: int, views_per_read: int = 1, **data: Any) -> Iterator[Any]:
    """Without an end, as the others below."""
    transform = train_transform(resolve_view(DataConfig(auto_augment=POLICY, **data), MODEL))
    order = TrainingOrder(np.arange(len(source)), BATCH, 0, VIEWS, views_per_read=views_per_read)
    batches = Batches(source, transform, order, drawn=rows.drawn, rows=SparseRows(rows), views_per_read=views_per_read)
    return load(batches, itertools.count(), workers, CPU)


def timms(root: Path, workers: int) -> Iterator[Any]:
    loader = create_loader(
        create_dataset("", root=str(root / "train"), is_training=True),
        (3, SIZE, SIZE),
        BATCH,
        is_training=True,
        auto_augment=POLICY,
        color_jitter=0.0,
        interpolation="bicubic",
        num_workers=workers,
        device=CPU,
        use_prefetcher=True,
    )
    return _for_ever(loader)


def torchvisions(root: Path, workers: int, interpolation: transforms.InterpolationMode) -> Iterator[Any]:
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, interpolation=interpolation),
            transforms.RandomHorizontalFlip(),
            transforms.RandAugment(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )
    dataset = ImageFolder(str(root / "train"), transform)
    loader = torch.utils.data.DataLoader(
        dataset, BATCH, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0
    )
    return _for_ever(loader)


def _for_ever(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def cpu_s() -> float:
    """Of this process and of the loader's, so far."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(") ")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


@dataclass(frozen=True)
class Speed:
    images_per_s: float
    cpu_ms: float
    """An image, of all processes together: what other people on the machine hardly change."""


def speed(batches: Iterator[Any], count: int, skip: int) -> Speed:
    for _ in range(skip):
        next(batches)
    cpu, start = cpu_s(), time.perf_counter()
    for _ in range(count):
        next(batches)
    elapsed, cpu = time.perf_counter() - start, cpu_s() - cpu
    batches.close()  # type: ignore[attr-defined]
    return Speed(BATCH * count / elapsed, 1000 * cpu / (BATCH * count))


def measured(
    cases: dict[str, Callable[[], Iterator[Any]]], rounds: int, count: int, skip: int
) -> dict[str, list[Speed]]:
    """Each in each round, in turn."""
    found: dict[str, list[Speed]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, begin in cases.items():
            found[name].append(speed(begin(), count, skip))
    return found


def say(found: dict[str, list[Speed]], rivals: list[str]) -> None:
    """Medians, and the medians of the ratios within a round, with their range."""
    for name, speeds in found.items():
        ratios = []
        for rival in rivals:
            pairs = zip(speeds, found[rival], strict=True)
            each = sorted(one.images_per_s / other.images_per_s for one, other in pairs)
            ratios.append(f"{statistics.median(each):.2f} ({each[0]:.2f} to {each[-1]:.2f})")
        images_per_s = statistics.median(one.images_per_s for one in speeds)
        cpu_ms = statistics.median(one.cpu_ms for one in speeds)
        print(f"| {name} | {images_per_s:.0f} | {cpu_ms:.2f} | {' | '.join(ratios)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("dir", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    make(asked.dir / "images", asked.images)
    root = asked.dir / "images"
    source = open_source(str(root), "train")
    assert source is not None
    rows = store(asked.dir / "store", source, resolve_view(DataConfig(auto_augment=POLICY), MODEL))
    modes = transforms.InterpolationMode
    for workers in asked.workers:
        cases: dict[str, Callable[[], Iterator[Any]]] = {
            "ours": lambda w=workers: ours(source, rows, w),
            "ours, data.resize=torch": lambda w=workers: ours(source, rows, w, resize="torch"),
            "timm create_loader": lambda w=workers: timms(root, w),
            "torchvision": lambda w=workers: torchvisions(root, w, modes.BICUBIC),
            "torchvision, its default (bilinear) crop": lambda w=workers: torchvisions(root, w, modes.BILINEAR),
        }
        print(f"\n{workers} workers\n")
        print("| loader | images/s | CPU ms an image | over timm | over torchvision | over its default |")
        print("|---|---|---|---|---|---|")
        say(measured(cases, asked.rounds, asked.batches, 2 * workers), list(cases)[2:])
        several = {
            f"{reads} views a read{said}": lambda w=workers, r=reads, d=data: ours(source, rows, w, r, **d)
            for said, data in (("", {}), (", data.resize=torch", {"resize": "torch"}))
            for reads in (1, 4)
        }
        print("\n| inputs | inputs/s | CPU ms an input | over 1 view a read |\n|---|---|---|---|")
        say(measured(several, asked.rounds, asked.batches, 2 * workers), list(several)[:1])


if __name__ == "__main__":
    main()
