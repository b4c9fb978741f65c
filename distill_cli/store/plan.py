"""What a store is: its plan, written first and never changed, and its manifest, written last.

STORE/plan.json                    identity; the sha256 of its bytes is the store's id and stands in every shard
STORE/view-000/shard-00000.h5 …    rows
STORE/manifest.json                sha256 of every shard; its presence means that the store is complete
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_cli.errors import DamagedError, MismatchError
from distill_cli.files import canonical_json, sha256

FORMAT = "distill-store"
VERSION = 1
PLAN, MANIFEST = "plan.json", "manifest.json"
PROBES = 4
"""Rows at the head of each shard whose inputs are checksummed."""


@dataclass(frozen=True)
class Plan:
    """The identity of a store: who taught what, on which inputs, kept how."""

    teacher: Mapping[str, Any]
    """`name`, `weights_sha256`, `num_classes`, `classes` (ordered names, or None)."""
    data: Mapping[str, Any]
    """`fingerprint` (sha256 of the ordered keys and labels), `labelled`."""
    transform: Mapping[str, Any]
    """The view: augmentation, image size, mean, std and the rest of `data/views.py:View`."""
    samples: int
    views: int
    top_k: int
    shard_rows: int
    seed: int
    precision: str
    codec: str = "exact"
    software: Mapping[str, str] = field(default_factory=dict)
    """Versions of the libraries that decide pixels and logits."""
    format: str = FORMAT
    version: int = VERSION

    @cached_property
    def text(self) -> str:
        """The bytes of plan.json."""
        return canonical_json(asdict(self), indent=2) + "\n"

    @cached_property
    def sha256(self) -> str:
        """The store's id."""
        return sha256(self.text)

    @property
    def shards(self) -> int:
        """Shards of one view."""
        return -(-self.samples // self.shard_rows)

    @property
    def rows(self) -> int:
        """Rows of all views."""
        return self.samples * self.views

    @property
    def num_classes(self) -> int:
        return int(self.teacher["num_classes"])

    @cached_property
    def dealing(self) -> "Dealing":
        return Dealing(self.samples, self.shard_rows)

    def every_shard(self) -> Iterator[tuple[int, int]]:
        """(view, shard) of the whole store, in order."""
        return ((view, shard) for view in range(self.views) for shard in range(self.shards))

    def differences(self, other: "Plan") -> list[str]:
        """`field: ours, theirs` for each field in which two plans differ; tables are compared key by key."""
        return list(_differences(asdict(self), asdict(other)))


@dataclass(frozen=True)
class Dealing:
    """How samples are dealt to shards: sample i has place `(i * multiplier) mod samples`; shards are runs of places.

    The multiplier is near the golden section of `samples` and has no common factor with it, so that every run of
    places is spread evenly over any listing, sorted by class or periodic, and nothing has to be stored or searched.
    """

    samples: int
    shard_rows: int

    @cached_property
    def multiplier(self) -> int:
        candidate = max(1, round(self.samples * 0.6180339887498949))
        while math.gcd(candidate, self.samples) != 1:
            candidate += 1
        return candidate

    def place(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The place of each sample; `place // shard_rows` is its shard. Exact up to 2^32 samples."""
        product = sample_ids.astype(np.uint64) * np.uint64(self.multiplier)
        return (product % np.uint64(self.samples)).astype(np.int64)

    def sample_ids(self, shard: int) -> NDArray[np.int64]:
        """The samples of one shard, by place."""
        places = np.arange(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.samples), dtype=np.uint64)
        inverse = pow(self.multiplier, -1, self.samples) if self.samples > 1 else 0
        return ((places * np.uint64(inverse)) % np.uint64(max(1, self.samples))).astype(np.int64)


@dataclass(frozen=True)
class ShardEntry:
    """One shard in the manifest."""

    path: str
    """Relative to the store."""
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a complete store holds."""

    plan_sha256: str
    rows: int
    bytes: int
    """Of all shards."""
    shards: tuple[ShardEntry, ...]
    skipped: tuple[int, ...] = ()
    """Ids of samples that could not be decoded and have no rows."""
    top1: float | None = None
    """The teacher's own accuracy on the labelled rows, in percent."""
    top5: float | None = None
    format: str = FORMAT
    version: int = VERSION


def shard_path(view: int, shard: int) -> str:
    """Where a shard lies, relative to its store."""
    return f"view-{view:03d}/shard-{shard:05d}.h5"


def read_plan(store: Path) -> Plan:
    """Read STORE/plan.json.

    Raises:
        DamagedError: it is missing, or not a plan.
        MismatchError: it is of another format version.
    """
    path = store / PLAN
    values = _read(path, f'{store}: no {PLAN}; this is not a store; "distill teacher-logits --out {store}" makes one')
    try:
        plan = Plan(**values)
    except TypeError as error:
        raise DamagedError(f"{path}: not a plan ({error}); restore it from a copy") from error
    if plan.text != path.read_text():
        raise DamagedError(f"{path}: was edited by hand; restore it from a copy")
    return plan


def read_manifest(store: Path, plan: Plan) -> Manifest:
    """Read STORE/manifest.json.

    Raises:
        DamagedError: the store is not complete, or the manifest belongs to another.
    """
    path = store / MANIFEST
    if not path.exists():
        present = sum((store / shard_path(*place)).exists() for place in plan.every_shard())
        total = plan.views * plan.shards
        raise DamagedError(
            f'{store}: {total - present} of {total} shards missing; run the same "distill teacher-logits" command '
            "again to finish it"
        )
    values = _read(path, "")
    try:
        entries = tuple(ShardEntry(**entry) for entry in values.pop("shards"))
        manifest = Manifest(shards=entries, **{**values, "skipped": tuple(values["skipped"])})
    except (TypeError, KeyError) as error:
        raise DamagedError(f"{path}: not a manifest ({error}); delete it and run teacher-logits again") from error
    if manifest.plan_sha256 != plan.sha256:
        raise DamagedError(
            f"{path}: belongs to store {manifest.plan_sha256[:12]}, the plan beside it to {plan.sha256[:12]}; "
            "restore the right one from a copy, or delete it and run teacher-logits again"
        )
    return manifest


def _read(path: Path, missing: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DamagedError(missing) from None
    except ValueError as error:
        raise DamagedError(f"{path}: not JSON ({error}); restore it from a copy") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise DamagedError(f"{path}: not of the format {FORMAT}; restore it from a copy")
    if values.get("version") != VERSION:
        raise MismatchError(
            f"{path}: store version {values.get('version')}, this program reads version {VERSION}; update distill"
        )
    return values


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in ours.keys() | theirs.keys():
        mine, other = ours.get(key), theirs.get(key)
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            yield from _differences(mine, other, f"{prefix}{key}.")
        elif _plain(mine) != _plain(other):
            yield f"{prefix}{key}: {_short(mine)}, {_short(other)}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
