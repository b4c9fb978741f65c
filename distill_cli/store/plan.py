"""What a store is: its plan, written first and never changed, and its manifest, written last.

STORE/plan.json                    identity; the sha256 of its bytes is the store's id and stands in every shard
STORE/view-000/shard-00000.h5 …    rows
STORE/manifest.json                sha256 of every shard; its presence means that the store is complete
"""

import json
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
ROUNDS = 4
"""Of the dealing."""


@dataclass(frozen=True)
class Plan:
    """The identity of a store: who taught what, on which inputs, kept how."""

    teacher: Mapping[str, Any]
    """`name`, `weights_sha256`, `num_classes`, `classes` (ordered names, or None)."""
    data: Mapping[str, Any]
    """`keys_sha256`, `labels_sha256` (None without labels): of the ordered listing."""
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
        count: int = self.teacher["num_classes"]
        return count

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
    """How samples are dealt to shards: a fixed permutation gives each sample its place; shards are runs of places.

    The permutation is a Feistel network of four rounds over the smallest 2^(2h) >= samples, walked until it falls
    below `samples`. It looks random to any listing, sorted by class or periodic, so that each shard is a fair sample,
    and either direction is arithmetic: nothing has to be stored or searched.
    """

    samples: int
    shard_rows: int

    def place(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The place of each sample; `place // shard_rows` is its shard."""
        return self._walk(sample_ids, range(ROUNDS))

    def places(self, shard: int) -> range:
        """The places of one shard; its length is the shard's, with no sample to be looked for."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.samples))

    def sample_ids(self, shard: int) -> NDArray[np.int64]:
        """The samples of one shard, by place."""
        return self._walk(np.array(self.places(shard), np.int64), range(ROUNDS - 1, -1, -1))

    def _walk(self, numbers: NDArray[np.int64], rounds: range) -> NDArray[np.int64]:
        forward = rounds.step > 0
        out = self._permute(numbers.astype(np.uint64), rounds, forward)
        while (outside := out >= self.samples).any():
            out[outside] = self._permute(out[outside], rounds, forward)
        return out.astype(np.int64)

    def _permute(self, numbers: NDArray[np.uint64], rounds: range, forward: bool) -> NDArray[np.uint64]:
        half = np.uint64(max(1, -(-(self.samples - 1).bit_length() // 2)))
        mask = (np.uint64(1) << half) - np.uint64(1)
        left, right = (numbers >> half) & mask, numbers & mask
        for number in rounds:
            if forward:
                left, right = right, left ^ (_scramble(right, number) & mask)
            else:
                left, right = right ^ (_scramble(left, number) & mask), left
        return (left << half) | right


def _scramble(values: NDArray[np.uint64], number: int) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64, modulo 2^64, of `value + (number + 1) * 0x9E3779B97F4A7C15`."""
    values = values + np.uint64((number + 1) * 0x9E3779B97F4A7C15 % 2**64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


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
        _check_values(plan)
    except (TypeError, ValueError, KeyError) as error:
        raise DamagedError(f"{path}: not a plan ({error}); restore it from a copy") from error
    if plan.text.encode() != path.read_bytes():
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
        np.array(manifest.skipped, np.int64)
    except (TypeError, KeyError, ValueError) as error:
        raise DamagedError(f"{path}: not a manifest ({error}); delete it and run teacher-logits again") from error
    if [entry.path for entry in entries] != [shard_path(*place) for place in plan.every_shard()]:
        raise DamagedError(f"{path}: does not list the shards of the plan; delete it and run teacher-logits again")
    if manifest.plan_sha256 != plan.sha256:
        raise DamagedError(
            f"{path}: belongs to store {manifest.plan_sha256[:12]}, the plan beside it to {plan.sha256[:12]}; "
            "restore the right one from a copy, or delete it and run teacher-logits again"
        )
    return manifest


def _check_values(plan: Plan) -> None:
    """
    Raises:
        ValueError: a value is of a kind that no plan has.
    """
    counts = {name: getattr(plan, name) for name in ("samples", "views", "top_k", "shard_rows", "num_classes")}
    for name, count in counts.items():
        if type(count) is not int or count < 1:
            raise ValueError(f"{name} is {count!r}")
    for name in ("data", "transform", "software"):
        if not isinstance(getattr(plan, name), dict):
            raise ValueError(f"{name} is {getattr(plan, name)!r}")


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
