"""Decoded images, kept for data that is read many times. With and without it a model sees the same pixels, bit for bit.

CACHE/cache.json            whose images, how small, decoded by what: written first
CACHE/shard-00000.rgb …     the uint8 pixels of some images, one after the other; then the index, a line of JSON; then
                            its length and its sha256 in 80 characters
CACHE/manifest.json         the bytes of each shard: written last, its presence means complete

An index has of each image its width, its height, the CRC-32 of its pixels and that of what it was decoded from, and of
one that did not decode what was said. A shard's index is checked when a process first opens it, an image when it first
reads it: whole shards would be read a hundred times over before a first batch of random images. What is damaged is
warned of, deleted, and decoded anew in its place; the next start makes its shard again.

An image is read by one system call. (A memory map would be a file descriptor for each shard, of which there are
thousands; the bytes lie in the page cache, where all processes share them, in either case.)
"""

import contextlib
import itertools
import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features
from torch.utils.data import Dataset

from distill_cli.data.config import DataConfig, View
from distill_cli.data.crops import reduced
from distill_cli.data.images import Readable, UnreadableImage, printable
from distill_cli.data.keys import keys_sha256
from distill_cli.data.loader import in_workers
from distill_cli.data.sources import Source
from distill_cli.distributed import Signals, World, stopped
from distill_cli.errors import DamagedError, DistillError, MismatchError, UsageError
from distill_cli.files import (
    TEMPORARY,
    canonical_json,
    check_ours,
    free_bytes,
    fsync_directory,
    remove_temporaries,
    sha256,
    write_json,
)
from distill_cli.locks import Claims, shared
from distill_cli.report import Progress, Report
from distill_cli.software import versions

FORMAT, VERSION = "distill-image-cache", 1
"""The version is also that of what decoding makes of an image."""
IDENTITY, MANIFEST = "cache.json", "manifest.json"
SHARD_BYTES, SHARD_IMAGES = 2**27, 1024
"""A shard has about so many bytes and at most so many images."""
MEASURED = 64
"""Images that are decoded to know what all will take."""
PROBES = 4
"""Images of a cache whose contents are compared with the data's at each start."""
TAIL = 16 + 64
POLL_S = 0.5
"""How often a process with nothing left to claim looks whether the others are done, or gone."""


@dataclass(frozen=True)
class Identity:
    """What a cache holds."""

    keys_sha256: str
    images: int
    short_side: int
    """Of the images, at most; 0: as they are."""
    software: Mapping[str, str]
    """Versions of what decodes with a loss, or resizes."""
    shard_images: int
    format: str = FORMAT
    version: int = VERSION

    @cached_property
    def sha256(self) -> str:
        """Stands in every shard."""
        return sha256(canonical_json(self.table))

    @property
    def table(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def shards(self) -> int:
        return -(-self.images // self.shard_images)

    def sample_ids(self, shard: int) -> range:
        return range(shard * self.shard_images, min(self.images, (shard + 1) * self.shard_images))


@dataclass(frozen=True)
class _Index:
    """Of one shard."""

    images: NDArray[np.uint32]
    """`[n, 4]`: width, height, CRC-32 of the pixels, CRC-32 of the content."""
    unreadable: Mapping[int, str]
    """Place -> what was said."""
    offsets: NDArray[np.int64]
    read: NDArray[np.bool_]
    """Whose pixels this process has found to be right."""


@dataclass(frozen=True)
class ImageCache(Readable):
    """A source whose images come from its cache; contents stay its own."""

    source: Source
    folder: Path
    identity: Identity
    _indices: dict[int, _Index | None] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Of the shards that this process has opened; None of a damaged one."""

    @property
    def keys(self) -> Sequence[str]:
        return self.source.keys

    @property
    def labels(self) -> NDArray[np.int64] | None:
        return self.source.labels

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.source.classes

    def __len__(self) -> int:
        return len(self.source)

    def content(self, sample_id: int) -> bytes:
        return self.source.content(sample_id)

    def decode(self, sample_id: int, content: bytes) -> Image.Image:
        return reduced(self.source.decode(sample_id, content), self.identity.short_side)

    def read(self, sample_id: int) -> Image.Image:
        return self.read_with_crc(sample_id)[0]

    def read_with_crc(self, sample_id: int) -> tuple[Image.Image, int]:
        shard, place = divmod(sample_id, self.identity.shard_images)
        try:
            index = self.index(shard)
            if index is not None:
                return self._image(shard, place, index), int(index.images[place, 3])
        except DamagedError as error:
            self._indices[shard] = None
            with contextlib.suppress(OSError):
                self.path(shard).unlink()
            Report().warn(f"{error}; its images are decoded anew, and the next start makes it again")
        return super().read_with_crc(sample_id)

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.rgb"

    def index(self, shard: int) -> _Index | None:
        """The index of a shard; None where it was found damaged before.

        Raises:
            DamagedError: it is missing, cut short, or not what was written.
        """
        if shard not in self._indices:
            self._indices[shard] = _read_index(self.path(shard), self.identity, shard)
        return self._indices[shard]

    def is_there(self, shard: int) -> bool:
        """Whether a shard is written."""
        with contextlib.suppress(DamagedError):
            return self.index(shard) is not None
        return False

    def _image(self, shard: int, place: int, index: _Index) -> Image.Image:
        """
        Raises:
            UnreadableImage: it did not decode when the cache was filled.
            DamagedError: the pixels are not those that were written.
        """
        if place in index.unreadable:
            raise UnreadableImage(index.unreadable[place])
        width, height, crc, _ = index.images[place].tolist()
        pixels = _read_at(self.path(shard), int(index.offsets[place]), 3 * width * height)
        if not index.read[place]:
            if zlib.crc32(pixels) != crc:
                raise DamagedError(f"{self.path(shard)}: damaged")
            index.read[place] = True
        return Image.frombytes("RGB", (width, height), pixels)


def cached(source: Source, config: DataConfig, part: str, view: View | None, world: World, report: Report) -> Source:
    """A source as it is, or, where `data.cache` names a folder, with its images read from there: filled first, by this
    and whatever other processes come with the same.

    Args:
        part: of the folder: `train` or `val`.
        view: that the images are read for; None for an evaluation's.

    Raises:
        UsageError: the disk is too small, the folder holds something else, or a view decodes for each crop.
        MismatchError: it is the cache of other images, of another size, or of other decoders; both are named.
        UnreadableImage: an image does not decode, and is not to be skipped.
        DistillError: the disk is full.
        Stopped: a signal came; whole shards stay.
    """
    if config.cache is None:
        return source
    cache = _opened(source, config, part, view)
    if not _is_complete(cache):
        _fill(cache, config.skip_unreadable, world, report)
    _prove(cache)
    return cache


def bill(config: DataConfig, *parts: tuple[Source | None, str, View | None]) -> dict[str, int | None]:
    """What `cached` would write of some (source, part, view), and what is free there; None without a cache.

    Raises:
        as `cached`.
    """
    if config.cache is None:
        return {"cache_bytes": None, "cache_free_bytes": None}
    caches = [_opened(source, config, part, view) for source, part, view in parts if source is not None]
    need = sum(_bytes(cache, _missing(cache)) for cache in caches if not _is_complete(cache))
    return {"cache_bytes": need, "cache_free_bytes": free_bytes(Path(config.cache))}


# Opening.


def _opened(source: Source, config: DataConfig, part: str, view: View | None) -> ImageCache:
    """The cache, there or not yet.

    Raises:
        UsageError, MismatchError, DamagedError: the folder is none for it.
    """
    assert config.cache is not None
    if view is not None and view.decode != "full":
        raise UsageError(
            f"--cache: keeps decoded images, and data.decode={view.decode} decodes for each crop; leave one out"
        )
    root, short_side = Path(config.cache), 0 if view is None else view.short_side
    for data in filter(None, (config.path, config.val)):
        if Path(data).is_dir() and root.resolve().is_relative_to(Path(data).resolve()):
            raise UsageError(f"--cache {root}: lies in the data, {data}, and would be listed with it; give another")
    folder = root / part
    check_ours(folder, (IDENTITY,), "cache of images", "--cache")
    there = _read_identity(folder)
    asked = Identity(
        keys_sha256=keys_sha256(source.keys),
        images=len(source),
        short_side=short_side,
        software=_decoders(),
        shard_images=there.shard_images if there else _shard_images(source, short_side),
    )
    if there is not None and there != asked:
        differing = "; ".join(_differences(there.table, asked.table))
        raise MismatchError(
            f"{folder}: is a cache of other images ({differing}: there, asked); give another --cache, or delete it"
        )
    return ImageCache(source, folder, asked)


def _decoders() -> dict[str, str]:
    jpeg = features.version_feature("libjpeg_turbo") or features.version_codec("jpg")
    return {**versions(("pillow",)), "libjpeg": str(jpeg), "libwebp": str(features.version_module("webp"))}


def _differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[str]:
    for name, value in there.items():
        if isinstance(value, Mapping):
            yield from _differences(value, asked[name])
        elif value != asked.get(name):
            yield f"{name}: {str(value)[:12]}, {str(asked.get(name))[:12]}"


def _read_identity(folder: Path) -> Identity | None:
    """
    Raises:
        DamagedError: the file is none of a cache.
    """
    try:
        found = Identity(**json.loads((folder / IDENTITY).read_bytes()))
        if not found.shard_images > 0:
            raise ValueError(f"shard_images is {found.shard_images}")
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise DamagedError(f"{folder / IDENTITY}: not that of a cache ({error}); delete the folder") from error
    return found


def _shard_images(source: Source, short_side: int) -> int:
    return max(1, min(SHARD_IMAGES, SHARD_BYTES // max(1, _mean_bytes(source, short_side, range(len(source))))))


def _mean_bytes(source: Source, short_side: int, sample_ids: Sequence[int]) -> int:
    """Of an image, by some of these, evenly chosen."""
    sizes = []
    for sample_id in sample_ids[:: -(-len(sample_ids) // MEASURED)]:
        with contextlib.suppress(UnreadableImage):
            width, height = reduced(source.read(sample_id), short_side).size
            sizes.append(3 * width * height)
    return sum(sizes) // max(1, len(sizes))


def _bytes(cache: ImageCache, missing: Sequence[int]) -> int:
    """What shards that are missing will take."""
    if not missing:
        return 0
    sample_ids = [i for shard in missing for i in cache.identity.sample_ids(shard)]
    return len(sample_ids) * _mean_bytes(cache.source, cache.identity.short_side, sample_ids)


def _is_complete(cache: ImageCache) -> bool:
    try:
        sizes = json.loads((cache.folder / MANIFEST).read_bytes())["bytes"]
        return len(sizes) == cache.identity.shards and all(
            cache.path(shard).stat().st_size == size for shard, size in enumerate(sizes)
        )
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _prove(cache: ImageCache) -> None:
    """Compare some images with what they were decoded from: other data can have the same names.

    Raises:
        MismatchError: one has changed.
    """
    for sample_id in np.unique(np.linspace(0, len(cache) - 1, PROBES).astype(int)).tolist():
        with contextlib.suppress(UnreadableImage):
            if cache.read_with_crc(sample_id)[1] != zlib.crc32(cache.content(sample_id)):
                raise MismatchError(
                    f"{cache.folder}: its {printable(cache.keys[sample_id])} is not that of the data; "
                    "give another --cache, or delete this one"
                )


# Filling.


def _fill(cache: ImageCache, skip_unreadable: bool, world: World, report: Report) -> None:
    """Write what is missing, until all of it is there, whoever wrote it."""
    identity, folder = cache.identity, cache.folder
    missing = _missing(cache)
    need, free = _bytes(cache, missing), free_bytes(folder)
    images = sum(len(identity.sample_ids(shard)) for shard in missing)
    what = f"{images:,} images in {folder} take about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    if need > free:
        raise UsageError(f"--cache: {what}; free some space, give another, or a smaller data.short_side")
    report.stage(f"caching: {what}")
    with shared(folder, advice="give a --cache elsewhere") as claims:
        with claims.desk():
            _begin(cache)
        with Signals() as signals, report.progress("cache", len(cache), len(cache) - images) as progress:
            while missing:
                mine = _pass(cache, missing, claims, skip_unreadable, signals, progress, world)
                others = [shard for shard in missing if shard not in mine and cache.is_there(shard)]
                progress.advance(sum(len(identity.sample_ids(shard)) for shard in others))
                missing = [shard for shard in missing if shard not in mine and shard not in others]
                if missing and not mine:
                    time.sleep(POLL_S)
                _stop(signals, cache)
        with claims.desk():
            if not _is_complete(cache):
                remove_temporaries(folder)
                sizes = [cache.path(shard).stat().st_size for shard in range(identity.shards)]
                write_json(folder / MANIFEST, {"cache": identity.sha256, "bytes": sizes})


def _missing(cache: ImageCache) -> list[int]:
    return [shard for shard in range(cache.identity.shards) if not cache.is_there(shard)]


def _begin(cache: ImageCache) -> None:
    """Say whose cache it is, unless another process has.

    Raises:
        MismatchError: it has said otherwise.
    """
    there = _read_identity(cache.folder)
    if there is None:
        write_json(cache.folder / IDENTITY, cache.identity.table)
    elif there != cache.identity:
        raise MismatchError(f"{cache.folder}: another process has just begun a cache of other images; give another")
    (cache.folder / MANIFEST).unlink(missing_ok=True)


def _pass(
    cache: ImageCache,
    missing: Sequence[int],
    claims: Claims,
    skip_unreadable: bool,
    signals: Signals,
    progress: Progress,
    world: World,
) -> set[int]:
    """Write all shards that can be claimed; gives those."""
    mine = set[int]()
    claimed = _claimed(cache, missing, claims)
    first = next(claimed, None)
    if first is None:
        return mine
    numbers = itertools.chain([first], claimed)
    with contextlib.closing(in_workers(_Shards(cache, skip_unreadable), numbers, world.workers)) as written:
        for shard in written:
            _temporary(cache, shard).replace(cache.path(shard))
            fsync_directory(cache.folder)
            claims.release(shard)
            mine.add(shard)
            progress.advance(len(cache.identity.sample_ids(shard)))
            _stop(signals, cache)
    return mine


def _claimed(cache: ImageCache, missing: Sequence[int], claims: Claims) -> Iterator[int]:
    """Claim shard after shard, each when a process is about to write it."""
    for shard in missing:
        if claims.claim(shard):
            # Whoever had it before may have finished it.
            if cache.is_there(shard):
                claims.release(shard)
            else:
                yield shard


def _stop(signals: Signals, cache: ImageCache) -> None:
    if signals.received:
        raise stopped(signals.received, f"{cache.folder}: whole shards are kept; the same command goes on")


@dataclass(frozen=True)
class _Shards(Dataset["int | DistillError"]):
    """Number -> the shard of this number, written under its temporary name.

    The name becomes the final one in the process that has the claim: a loader process may outlive it, and another
    have claimed the shard since.
    """

    cache: ImageCache
    skip_unreadable: bool

    def __getitem__(self, shard: int) -> int | DistillError:
        path = _temporary(self.cache, shard)
        try:
            self._write(shard, path)
        except (DistillError, OSError) as error:
            with contextlib.suppress(OSError):
                path.unlink()
            if isinstance(error, DistillError):
                return error
            reason = (error.strerror or str(error)).lower()
            return DistillError(
                f"{path.parent}: {reason}; free some space, or choose another --cache, then run the same command again"
            )
        return shard

    def _write(self, shard: int, path: Path) -> None:
        """
        Raises:
            UnreadableImage: an image does not decode, and is not to be skipped.
            OSError: the disk is full.
        """
        images, unreadable = list[tuple[int, int, int, int]](), dict[int, str]()
        path.unlink(missing_ok=True)
        with path.open("xb") as file:
            for place, sample_id in enumerate(self.cache.identity.sample_ids(shard)):
                try:
                    image, content_crc = self.cache.source.read_with_crc(sample_id)
                except UnreadableImage as error:
                    if not self.skip_unreadable:
                        raise
                    unreadable[place] = str(error)
                    images.append((0, 0, 0, 0))
                    continue
                image = reduced(image, self.cache.identity.short_side)
                pixels = image.tobytes()
                file.write(pixels)
                images.append((*image.size, zlib.crc32(pixels), content_crc))
            values = {"cache": self.cache.identity.sha256, "shard": shard, "images": images, "unreadable": unreadable}
            index = canonical_json(values).encode() + b"\n"
            file.write(index + f"{len(index):016d}{sha256(index)}".encode())
            file.flush()
            os.fsync(file.fileno())


def _temporary(cache: ImageCache, shard: int) -> Path:
    path = cache.path(shard)
    return path.with_name(f"{TEMPORARY}{path.name}")


# Reading.


def _read_index(path: Path, identity: Identity, shard: int) -> _Index:
    """
    Raises:
        DamagedError: there is no such shard of this cache, or it is not what was written.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            tail = file.read()
            end = size - TAIL
            start = end - int(tail[:16])
            file.seek(start)
            line = file.read(end - start)
        if sha256(line) != tail[16:].decode():
            raise ValueError("its index is not what was written")
        values = json.loads(line)
        images = np.array(values["images"], np.uint32).reshape(-1, 4)
        offsets = np.cumsum(3 * images[:, 0].astype(np.int64) * images[:, 1])
        if (values["cache"], values["shard"]) != (identity.sha256, shard):
            raise ValueError("it is a shard of another cache")
        if len(images) != len(identity.sample_ids(shard)) or offsets[-1] != start:
            raise ValueError("its index does not fit it")
    except FileNotFoundError:
        raise DamagedError(f"{path}: missing") from None
    except (OSError, ValueError, KeyError) as error:
        raise DamagedError(f"{path}: damaged ({error})") from error
    unreadable = {int(place): said for place, said in values["unreadable"].items()}
    return _Index(images, unreadable, np.concatenate([[0], offsets[:-1]]), np.zeros(len(images), np.bool_))


def _read_at(path: Path, offset: int, size: int) -> bytes:
    """
    Raises:
        DamagedError: the bytes are not there.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            content = os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) != size:
        raise DamagedError(f"{path}: cut short")
    return content
