"""Training order over tars: all samples shuffled against a window of tars, from the disk and from a server.

    PYTHONPATH=. python benchmarks/tars.py DIR [--rounds 5]

makes 64 tars of 250 photographs' size (500 x 375, 110 kB) in DIR where they are not there, and reads an epoch of them
by two loader workers, in rounds in turn, with and without decoding. Before each the kernel is asked to drop the tars.
Then 64 small tars behind a server, with room in the cache for a quarter of them: what an epoch asks of the server.
"""

import argparse
import functools
import http.server
import io
import os
import shutil
import statistics
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from distill_cli.data import open_source
from distill_cli.data.config import DataConfig
from distill_cli.data.orders import TrainingOrder
from distill_cli.data.webdataset import TarSource

TARS, IMAGES, SMALL_IMAGES, BATCH, WORKERS = 64, 250, 50, 128, 2
WINDOW, SMALL_WINDOW = 16, 4


def photograph() -> bytes:
    """A JPEG of a photograph's size on the screen and on the disk."""
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 256, (150, 200, 3), np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    pixels.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def make(root: Path, images: int, content: bytes) -> Path:
    """Tars of so many copies of an image."""
    root.mkdir(parents=True, exist_ok=True)
    for number in range(TARS):
        path = root / f"x-{number:04d}.tar"
        if path.exists():
            continue
        with tarfile.open(path.with_suffix(".tmp"), "w") as tar:
            for image in range(images):
                for kind, part in (("jpg", content), ("cls", b"0")):
                    member = tarfile.TarInfo(f"{image:04d}.{kind}")
                    member.size = len(part)
                    tar.addfile(member, io.BytesIO(part))
        path.with_suffix(".tmp").rename(path)
    os.sync()
    return root


def opened(pattern: str, cache_gb: float | None = None) -> TarSource:
    source = open_source(f"wds:{pattern}", "train", DataConfig(cache_gb=cache_gb))
    assert isinstance(source, TarSource)
    return source


def order_over(source: TarSource, window: int, epoch: int) -> Iterator[np.ndarray]:
    """The batches of an epoch."""
    order = TrainingOrder(np.arange(len(source)), BATCH, 0, 1, tars=source.parts, window=window)
    return (order(step)[1] for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch))


class Reading(Dataset[int]):
    """Batches of images, read and perhaps decoded, of which nothing is kept."""

    def __init__(self, source: TarSource, batches: list[np.ndarray], decode: bool) -> None:
        self.source, self.batches, self.decode = source, batches, decode

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> int:
        source = self.source
        for sample in self.batches[number].tolist():
            if self.decode:
                source.read(sample)
            else:
                source.tars.read(int(source.tar[sample]), int(source.offsets[sample]), int(source.sizes[sample]))
        return len(self.batches[number])


def images_per_s(source: TarSource, window: int, epoch: int, decode: bool) -> float:
    for name in source.tars.names:
        if "://" not in name:
            file = os.open(name, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)
    reading = Reading(source, list(order_over(source, window, epoch)), decode)
    start = time.monotonic()
    images = sum(DataLoader(reading, batch_size=None, num_workers=WORKERS))
    return images / (time.monotonic() - start)


def from_disk(root: Path, rounds: int) -> None:
    source = opened(str(make(root, IMAGES, photograph())))
    print(f"{len(source)} images of {source.sizes[0] / 1e3:.0f} kB in {TARS} tars, {WORKERS} workers")
    windows = {"random": 0, "windowed": WINDOW}
    for decode in (False, True):
        found: dict[str, list[float]] = {name: [] for name in windows}
        for turn in range(rounds):
            for name, window in windows.items():
                found[name].append(images_per_s(source, window, turn, decode))
        ratios = [two / one for one, two in zip(*found.values(), strict=True)]
        print(
            "decoded" if decode else "read",
            *(f"{name} {statistics.median(values):.0f}" for name, values in found.items()),
            f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        )


def from_server(root: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    make(root, SMALL_IMAGES, buffer.getvalue())
    asked = 0

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal asked
            asked += 1
            super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    bound = sum(path.stat().st_size for path in root.glob("*.tar")) / 4 / 1e9
    handler = functools.partial(Handler, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = opened(f"http://127.0.0.1:{server.server_port}/x-{{0000..{TARS - 1:04d}}}.tar", bound)
        for name, window in (("random", 0), ("windowed", SMALL_WINDOW)):
            shutil.rmtree(source.tars.cache.folder)
            asked = 0
            images_per_s(source, window, 0, decode=False)
            print(f"{name}, room for {TARS // 4} of {TARS} tars: {asked} fetches an epoch of {len(source)} images")
        server.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        from_disk(given.root / "large", given.rounds)
        from_server(given.root / "small")


if __name__ == "__main__":
    main()
