"""What a store is: plans, written first and never changed.

STORE/plan.json                    identity of the first views
STORE/plan-001.json …              of the views that the store was extended by, or that were merged into it
STORE/view-000/shard-00000.h5 …    rows
STORE/manifest.json, …-001.json    sha256 of every shard under each plan; its presence means that they are complete

The sha256 of a plan's bytes stands in each of its shards.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

from distill_cli.errors import DamagedError, MismatchError
from distill_cli.files import canonical_json, sha256
from distill_cli.store.dealing import Dealing, Following
from distill_cli.store.place import Place
from distill_cli.store.rows import RowFormat

FORMAT = "distill-store"
VERSION = 1
PROBES = 4
"""Rows at the head of each shard whose inputs are checksummed."""
CODECS = ("exact", "compact")
SHARED = ("teacher", "data", "transform", "samples")
"""What the plans of a store have in common."""
MOST_ENTRIES = 2**16 - 1
"""Of a row."""


@dataclass(frozen=True)
class Plan:
    """The identity of a store's views: who taught what, on which inputs, kept how."""

    teacher: Mapping[str, Any]
    """`name`, `weights_sha256`, `num_classes`, `classes` (ordered names, or None)."""
    data: Mapping[str, Any]
    """`keys_sha256`, `labels_sha256` (None without labels): of the ordered listing."""
    transform: Mapping[str, Any]
    """The view: augmentation, image size, mean, std and the rest of `data/views.py:View`."""
    samples: int
    views: int
    top_k: int
    """Classes kept of each row: the most probable ones. 0 only where the rest is sampled."""
    shard_rows: int
    """Rows of a shard, the last may have fewer; with `shard_sizes` those of the largest."""
    seed: int
    precision: str
    first_view: int = 0
    """The number by which the first of these views is drawn."""
    keep_mass: float | None = None
    """Of a row no more classes are kept than are needed for this mass."""
    min_k: int = 1
    """… but at least these."""
    sample: int = 0
    """Draws from the classes outside the top k; 0 for none."""
    codec: str = "exact"
    bits: int | None = None
    """Of the codec `compact`."""
    shard_sizes: Sequence[int] | None = None
    """Rows of each shard, where shards follow the parts (tars) of the listing; None where samples are dealt."""
    lineage: Mapping[str, Any] | None = None
    """What these rows were made from, where that is not the teacher: `command`, `store` and more."""
    software: Mapping[str, str] = field(default_factory=dict)
    """Versions of the libraries that decide pixels and logits."""
    format: str = FORMAT
    version: int = VERSION

    @cached_property
    def text(self) -> str:
        """The bytes of plan.json; `shard_sizes` has come since the first stores, and is left out where it is None."""
        values = asdict(self)
        if self.shard_sizes is None:
            del values["shard_sizes"]
        return canonical_json(values, indent=2) + "\n"

    @cached_property
    def sha256(self) -> str:
        """Stands in every shard; the store's id, where this is its only plan."""
        return sha256(self.text)

    @property
    def shards(self) -> int:
        """Shards of one view."""
        return self.dealing.shards

    @property
    def rows(self) -> int:
        """Rows of all views."""
        return self.samples * self.views

    @property
    def num_classes(self) -> int:
        count: int = self.teacher["num_classes"]
        return count

    @property
    def drawn(self) -> tuple[tuple[int, int], ...]:
        """(seed, view) by which the inputs of each view are drawn."""
        return tuple((self.seed, self.first_view + view) for view in range(self.views))

    @property
    def form(self) -> RowFormat:
        """What a codec needs to know of the rows."""
        return RowFormat(
            num_classes=self.num_classes,
            width=min(self.num_classes, self.top_k + self.sample),
            ragged=self.keep_mass is not None or self.sample > 0,
            **({} if self.bits is None else {"bits": self.bits}),
        )

    @cached_property
    def dealing(self) -> Dealing | Following:
        """Which sample lies in which shard."""
        if self.shard_sizes is None:
            return Dealing(self.samples, self.shard_rows)
        return Following(tuple(self.shard_sizes))

    def every_shard(self) -> Iterator[tuple[int, int]]:
        """(view, shard) of all, in order; views from 0."""
        return ((view, shard) for view in range(self.views) for shard in range(self.shards))

    def differences(self, other: "Plan") -> list[str]:
        """`field: ours, theirs` for each field in which two plans differ; tables are compared key by key."""
        return sorted(_differences(asdict(self), asdict(other)))


FIELDS = frozenset(item.name for item in fields(Plan))


@dataclass(frozen=True)
class Generation:
    """The views of a store that were captured under one plan."""

    number: int
    plan: Plan
    offset: int = 0
    """Views of the generations before it."""

    @property
    def plan_name(self) -> str:
        return numbered("plan", self.number)

    @property
    def manifest_name(self) -> str:
        return numbered("manifest", self.number)

    def path(self, view: int, shard: int) -> str:
        """Where a shard lies, relative to the store; `view` counts from 0 within the generation."""
        return f"view-{self.offset + view:03d}/shard-{shard:05d}.h5"

    def paths(self) -> Iterator[str]:
        """Of every shard, in order."""
        return (self.path(*place) for place in self.plan.every_shard())


def numbered(name: str, generation: int) -> str:
    """The name of a generation's plan or manifest."""
    return f"{name}-{generation:03d}.json" if generation else f"{name}.json"


def store_id(plans: list[Plan]) -> str:
    """The id of a store: the sha256 of its plan, or of its plans' sha256 in hexadecimal, each with a newline."""
    if len(plans) == 1:
        return plans[0].sha256
    return sha256("".join(f"{plan.sha256}\n" for plan in plans))


def read_generations(place: Place) -> list[Generation]:
    """Every generation of the store at `place`, complete or not.

    Raises:
        DamagedError: there is no store, or a plan is not a plan, or one is of another teacher or of other data.
        MismatchError: it is of another format version.
    """
    found = [Generation(0, read_plan(place))]
    while place.has(numbered("plan", len(found))):
        before = found[-1]
        plan = read_plan(place, len(found))
        for name in SHARED:
            if getattr(plan, name) != getattr(found[0].plan, name):
                raise DamagedError(
                    f"{place}/{numbered('plan', len(found))}: its {name} is not that of plan.json: a plan of another "
                    "store; restore it from a copy"
                )
        found.append(Generation(len(found), plan, before.offset + before.plan.views))
    return found


def read_plan(place: Place, number: int = 0) -> Plan:
    """Read one plan of the store at `place`.

    Raises:
        DamagedError: it is missing, or not a plan.
        MismatchError: it is of another format version.
    """
    name = numbered("plan", number)
    where = f"{place}/{name}"
    try:
        content = place.read(name)
    except FileNotFoundError:
        raise DamagedError(
            f'{place}: no {name}; this is not a store; "distill teacher-logits --out {place}" makes one'
        ) from None
    values = parse(content, where)
    if unknown := sorted(values.keys() - FIELDS):
        raise MismatchError(f"{where}: says {unknown[0]}, which this program does not know; update distill")
    try:
        plan = Plan(**values)
        _check_values(plan)
        text = canonical_json(values, indent=2) + "\n"
    except (TypeError, ValueError, KeyError, RecursionError) as error:
        raise DamagedError(f"{where}: not a plan ({error}); restore it from a copy") from error
    if text.encode() != content:
        raise DamagedError(f"{where}: was edited by hand; restore it from a copy")
    # Its hash is of these bytes, also where they lack a field that has come since.
    vars(plan)["text"] = text
    return plan


def parse(content: bytes, where: str) -> dict[str, Any]:
    """The JSON table of a plan, a manifest or a shard's header.

    Raises:
        DamagedError: it is not JSON, or not of this format.
        MismatchError: it is of another version of the format.
    """
    try:
        values = json.loads(content, object_pairs_hook=_table, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{where}: not JSON ({error}); restore it from a copy") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise DamagedError(f"{where}: not of the format {FORMAT}; restore it from a copy")
    version = values.get("version")
    if type(version) is not int or version != VERSION:
        raise MismatchError(f"{where}: store version {version}, this program reads version {VERSION}; update distill")
    return values


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """
    Raises:
        ValueError: a name comes twice: readers would take one or the other.
    """
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name comes twice")
    return table


def _refuse(constant: str) -> None:
    """
    Raises:
        ValueError: NaN and Infinity are no JSON, though Python reads them.
    """
    raise ValueError(f"{constant} is no number")


def is_count(value: object, least: int = 0, most: int = 2**62) -> bool:
    """Whether a value from a file is an integer in a range; True and 1.0 are not."""
    return type(value) is int and least <= value <= most


def _check_values(plan: Plan) -> None:
    """
    Raises:
        ValueError: a value is of a kind that no plan has.
    """
    for name in ("teacher", "data", "transform", "software"):
        if not isinstance(getattr(plan, name), dict):
            raise ValueError(f"{name} is {getattr(plan, name)!r}")
    classes, digest = plan.teacher["classes"], plan.data["keys_sha256"]
    if classes is not None and (not isinstance(classes, list) or not all(isinstance(name, str) for name in classes)):
        raise ValueError("teacher.classes is not a list of names")
    if not isinstance(digest, str) or not isinstance(plan.data["labels_sha256"], str | None):
        raise ValueError("data has no fingerprints")
    least = {"samples": 1, "views": 1, "shard_rows": 1, "num_classes": 1, "min_k": 1, "top_k": int(plan.sample == 0)}
    for name in (*least, "seed", "first_view", "sample"):
        if not is_count(value := getattr(plan, name), least.get(name, 0), 2**63 - 1):
            raise ValueError(f"{name} is {value!r}")
    if plan.shard_sizes is not None:
        _check_sizes(plan.shard_sizes, plan)
    if plan.top_k > plan.num_classes or plan.num_classes > 2**31 or plan.form.width > MOST_ENTRIES:
        raise ValueError(f"top_k is {plan.top_k} of {plan.num_classes} classes")
    if plan.keep_mass is not None and not (isinstance(plan.keep_mass, float) and 0 < plan.keep_mass <= 1):
        raise ValueError(f"keep_mass is {plan.keep_mass!r}")
    if plan.keep_mass is not None and plan.sample:
        raise ValueError("keep_mass and sample exclude each other")
    if plan.codec not in CODECS or (plan.bits is not None) != (plan.codec == "compact"):
        raise ValueError(f"codec is {plan.codec!r} with bits {plan.bits!r}")
    if plan.bits is not None and not is_count(plan.bits, 4, 10):
        raise ValueError(f"bits is {plan.bits!r}")


def _check_sizes(sizes: object, plan: Plan) -> None:
    """
    Raises:
        ValueError: shards of these sizes do not hold the samples.
    """
    if not isinstance(sizes, list) or not all(is_count(size, 1, 2**63 - 1) for size in sizes):
        raise ValueError("shard_sizes is not a list of counts")
    if sum(sizes) != plan.samples or max(sizes) != plan.shard_rows:
        raise ValueError(f"shard_sizes add up to {sum(sizes)} of {plan.samples}, or shard_rows is not the largest")


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
