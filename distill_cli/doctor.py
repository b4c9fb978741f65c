"""What a machine has, and what of it stands in the way."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from distill_cli import __version__
from distill_cli.files import free_bytes
from distill_cli.locks import locked
from distill_cli.software import versions

LIBRARIES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "pillow",
    "h5py",
    "safetensors",
    "pydantic",
    "typer",
    "tensorboard",
)
LITTLE_DISK = 5 * 2**30


@dataclass(frozen=True)
class Finding:
    what: str
    found: str
    advice: str = ""
    """What to do; empty where nothing is wrong."""


def examine(folder: Path) -> Iterator[Finding]:
    """Look at Python, the libraries, the devices, and the disk and file locks of a folder."""
    yield Finding("distill", __version__)
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", python, "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer")
    found = versions(LIBRARIES)
    for name in LIBRARIES:
        yield Finding(name, found.get(name, "missing"), "" if name in found else f"pip install {name}")
    for check in (_pair, _cuda, _cores, _shared_memory):
        yield check()
    for check_folder in (_disk, _locks, _hdf5):
        yield check_folder(folder)


def _pair() -> Finding:
    """torchvision built for another torch fails as it registers its operators, and timm with it."""
    try:
        import timm  # noqa: F401
        import torch
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        advice = "torch and torchvision are not built for each other: pip install --force-reinstall torch torchvision"
        return Finding("torch + torchvision", reason, advice)
    return Finding("torch + torchvision", "work together")


def _cuda() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("cuda", "unknown: torch does not import", " ".join(str(error).split())[:120])
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return Finding("cuda", f"{torch.version.cuda}: {names}")
    built = torch.version.cuda
    advice = "the driver is older than this torch" if built and shutil.which("nvidia-smi") else ""
    return Finding(
        "cuda", f"no device (torch is built for CUDA {built})" if built else "torch is built without", advice
    )


def _cores() -> Finding:
    return Finding("cores", str(len(os.sched_getaffinity(0))))


def _shared_memory() -> Finding:
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding("shared memory", "none", "loader workers need /dev/shm; use --workers 0")
    free = free_bytes(path)
    advice = "" if free > 2**28 else "loader workers hand batches over in /dev/shm: give it 1 GiB, or use --workers 0"
    return Finding("shared memory", f"{free / 2**30:.1f} GiB free in /dev/shm", advice)


def _disk(folder: Path) -> Finding:
    free = free_bytes(folder)
    advice = "" if free > LITTLE_DISK else "less than 5 GiB: a store or a run may not fit; --dry-run tells"
    return Finding("disk", f"{free / 2**30:.1f} GiB free at {folder.resolve()}", advice)


def _locks(folder: Path) -> Finding:
    def lock(inside: Path) -> None:
        with locked(inside / "locked"):
            pass

    return _try("file locks", folder, lock, "two commands could write one directory: use a file system with locks")


def _hdf5(folder: Path) -> Finding:
    try:
        import h5py
    except (ImportError, OSError) as error:
        return Finding("hdf5", "h5py does not import", " ".join(str(error).split())[:120])

    def write(inside: Path) -> None:
        with h5py.File(inside / "probe.h5", "w") as file:
            file["x"] = [1, 2, 3]
        with h5py.File(inside / "probe.h5", "r") as file:
            assert file["x"][2] == 3

    setting = os.environ.get("HDF5_USE_FILE_LOCKING")
    found = _try("hdf5", folder, write, "set HDF5_USE_FILE_LOCKING=FALSE if this file system has no locks")
    version = f"HDF5 {h5py.version.hdf5_version}, file locking {setting or 'by its default'}"
    return Finding("hdf5", f"{version}: {found.found}", found.advice)


def _try(what: str, folder: Path, action: Callable[[Path], None], advice: str) -> Finding:
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".distill-doctor-") as name:
            action(Path(name))
    except OSError as error:
        return Finding(what, f"fail ({error})", advice)
    return Finding(what, "work")
