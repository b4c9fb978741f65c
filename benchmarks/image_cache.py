"""What a cache of decoded images gives a loader: epochs over JPEGs of 500 x 400 px, with and without, in turn.

    PYTHONPATH=. python benchmarks/image_cache.py

Random resized crops of 224 px and flips by two loader processes; what is timed is the loader itself, up to the uint8
batches that cross to the device. Then the same loader with and without the checksums of files that a capture keeps.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from distill_cli.data import image_cache, open_source
from distill_cli.data.batches import Batches
from distill_cli.data.config import DataConfig
from distill_cli.data.loader import in_workers
from distill_cli.data.orders import TrainingOrder
from distill_cli.data.sources import Source
from distill_cli.data.views import resolve_view, train_transform
from distill_cli.distributed import World
from distill_cli.report import Report

IMAGES, ROUNDS, WORKERS, BATCH_SIZE, CPU_BATCHES = 2000, 5, 2, 100, 3
MODEL = {
    "input_size": (3, 224, 224),
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "interpolation": "bicubic",
    "crop_pct": 0.9,
}
HERE = World(torch.device("cpu"), workers=WORKERS)
QUIET = Report(quiet=True)


def texture(draw: np.random.Generator, height: int = 1200, width: int = 1500) -> NDArray[np.float32]:
    """Noise with the spectrum of photographs, 1/f, its three colours correlated: `[height, width, 3]`, deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1
    layers = [np.fft.irfft2(np.fft.rfft2(draw.normal(size=(height, width))) / frequency) for _ in range(3)]
    grey, *tints = [(layer - layer.mean()) / layer.std() for layer in layers]
    colours = grey[..., None] + 0.3 * np.stack([tints[0], tints[1], -tints[0]], axis=-1)
    return (colours / colours.std()).astype(np.float32)


def write_images(folder: Path) -> None:
    """Photograph-like JPEGs: smooth regions of different texture with sharp edges between them."""
    draw = np.random.default_rng(0)
    textures = [texture(draw) for _ in range(6)]
    y, x = np.mgrid[:400, :500]
    for number in range(IMAGES):
        top, left = draw.integers(0, 800, 4), draw.integers(0, 1000, 4)
        chosen = [textures[i] for i in draw.integers(0, 6, 4)]
        parts = [part[t : t + 400, s : s + 500] for part, t, s in zip(chosen, top, left, strict=True)]
        seeds = draw.uniform((0, 0), (400, 500), (4, 2))
        region = np.hypot(y[None] - seeds[:, 0, None, None], x[None] - seeds[:, 1, None, None]).argmin(axis=0)
        strength = draw.uniform(15, 60, 4)[region][..., None]
        mixed = np.choose(region[..., None], parts) * strength + draw.uniform(60, 190, (4, 3))[region]
        pixels = np.clip(mixed, 0, 255).astype(np.uint8)
        (folder / f"{number % 10}").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number % 10}" / f"{number:05d}.jpg", quality=90)


def batches_of(source: Source, short_side: int = 0, with_content_crc: bool = False) -> Batches:
    transform = train_transform(resolve_view(DataConfig(augment="rrc", short_side=short_side), MODEL))
    order = TrainingOrder(np.arange(len(source)), BATCH_SIZE, seed=0, views=1)
    return Batches(source, transform, order, with_content_crc=with_content_crc)


def epoch(batches: Batches) -> Callable[[], float]:
    """Wall seconds of the second epoch of two loader processes; in the first a cache looks at its checksums."""
    steps = IMAGES // BATCH_SIZE

    def run() -> float:
        loaded = in_workers(batches, range(2 * steps), WORKERS)
        for _ in range(steps):
            next(loaded)
        start = time.perf_counter()
        for _ in loaded:
            pass
        return time.perf_counter() - start

    return run


def processor(batches: Batches) -> Callable[[], float]:
    """CPU seconds of some batches in this process."""

    def run() -> float:
        start = time.process_time()
        for number in range(CPU_BATCHES):
            batches.draw(number)
        return time.process_time() - start

    return run


def in_turn(actions: Sequence[Callable[[], float]]) -> list[list[float]]:
    """Seconds of each, round by round, after one that is not counted."""
    rounds = [[action() for action in actions] for _ in range(ROUNDS + 1)][1:]
    return [list(times) for times in zip(*rounds, strict=True)]


def ratio(times: Sequence[float], to: Sequence[float]) -> str:
    ratios = sorted(theirs / mine for mine, theirs in zip(times, to, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "images").mkdir()
        write_images(root / "images")
        source = open_source(str(root / "images"), "train")
        assert source is not None
        kinds = {"files": batches_of(source), "files, short side 256": batches_of(source, 256)}
        folders = [root / "images", root / "images"]
        for short_side in (0, 256):
            folders.append(root / f"cache-{short_side}")
            start = time.perf_counter()
            view = resolve_view(DataConfig(short_side=short_side), MODEL)
            cache = image_cache.cached(source, DataConfig(cache=str(folders[-1])), "train", view, HERE, QUIET)
            kinds[f"cache, short side {short_side or 'as it is'}"] = batches_of(cache, short_side)
            print(f"short side {short_side}: filled in {time.perf_counter() - start:.1f} s")
        cpu = in_turn([processor(batches) for batches in kinds.values()])
        wall = in_turn([epoch(batches) for batches in kinds.values()])
        print(f"{'read from':28}{'epochs/s':10}{'ratio':24}{'CPU ms an image':16}{'ratio':24}MB")
        for name, mine, used, folder in zip(kinds, wall, cpu, folders, strict=True):
            rate, each = 1 / statistics.median(mine), 1e3 * statistics.median(used) / (CPU_BATCHES * BATCH_SIZE)
            ratios = ratio(mine, wall[0]), ratio(used, cpu[0])
            print(f"{name:28}{rate:<10.3f}{ratios[0]:24}{each:<16.2f}{ratios[1]:24}{size(folder):.0f}")
        summed, plain = in_turn([processor(batches_of(source, 0, with_crc)) for with_crc in (True, False)])
        print("CPU with checksums of the files over without:", ratio(plain, summed))


if __name__ == "__main__":
    main()
