"""The manifest of a generation: written last, its presence means that every shard of the plan is there."""

import re
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from distill_cli.errors import DamagedError
from distill_cli.files import canonical_json, sha256
from distill_cli.store.place import Place
from distill_cli.store.plan import FORMAT, VERSION, Generation, is_count, parse

SHA256 = re.compile("[0-9a-f]{64}")
ADVICE = "restore it from a copy, or delete it and run teacher-logits again"


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
    """What a complete generation holds."""

    plan_sha256: str
    shards: tuple[ShardEntry, ...]
    skipped: tuple[int, ...] = ()
    """Ids of samples that could not be decoded and have no row in at least one view."""
    top1: float | None = None
    """The teacher's own accuracy on the labelled rows, in percent."""
    top5: float | None = None
    format: str = FORMAT
    version: int = VERSION

    @cached_property
    def rows(self) -> int:
        return sum(entry.rows for entry in self.shards)

    @cached_property
    def bytes(self) -> int:
        """Of all shards."""
        return sum(entry.bytes for entry in self.shards)

    @cached_property
    def text(self) -> str:
        """The bytes of manifest.json; its `sha256` is of the same text without it."""
        values = {**asdict(self), "rows": self.rows, "bytes": self.bytes}
        digest = sha256(canonical_json(values, indent=2) + "\n")
        return canonical_json({**values, "sha256": digest}, indent=2) + "\n"


def read_manifest(place: Place, generation: Generation) -> Manifest | None:
    """Read the manifest of a generation; None where there is none yet.

    Raises:
        DamagedError: it is no manifest, or was changed, or belongs to another plan.
        MismatchError: it is of another format version.
    """
    name = generation.manifest_name
    where = f"{place}/{name}"
    try:
        content = place.read(name)
    except FileNotFoundError:
        return None
    values = parse(content, where)
    found, expected = str(values.get("plan_sha256")), generation.plan.sha256
    if found != expected:
        raise DamagedError(f"{where}: belongs to store {found[:12]}, the plan beside it to {expected[:12]}; {ADVICE}")
    try:
        manifest = _manifest(values)
        text = manifest.text
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        raise DamagedError(f"{where}: not a manifest ({error}); {ADVICE}") from error
    if text.encode() != content:
        raise DamagedError(f"{where}: was changed since it was written; {ADVICE}")
    plan = generation.plan
    listed = [entry.path for entry in manifest.shards]
    # The number first: the paths of a hostile plan could be without end.
    if len(listed) != plan.views * plan.shards or listed != list(generation.paths()):
        raise DamagedError(f"{where}: does not list the shards of the plan; {ADVICE}")
    return manifest


def _manifest(values: dict[str, Any]) -> Manifest:
    """
    Raises:
        KeyError, TypeError, ValueError: there are other fields, or values, than a manifest has.
    """
    values = {name: value for name, value in values.items() if name not in ("rows", "bytes", "sha256")}
    entries = tuple(ShardEntry(**entry) for entry in values.pop("shards"))
    for entry in entries:
        if not (is_count(entry.bytes) and is_count(entry.rows, 0, entry.bytes) and SHA256.fullmatch(entry.sha256)):
            raise ValueError(f"{entry.path} has {entry.rows!r} rows in {entry.bytes!r} bytes, sha256 {entry.sha256!r}")
    skipped = tuple(values.pop("skipped"))
    if not all(is_count(sample_id) for sample_id in skipped):
        raise ValueError("skipped is not a list of sample ids")
    return Manifest(shards=entries, skipped=skipped, **values)
