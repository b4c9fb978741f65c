"""Whether a store is what it was written as: every plan, manifest and shard, byte for byte, and every row decoded.

What a plan does not name is listed by name and not opened, and no link is followed: a store that somebody else has
made can be verified. What is repaired is deleted, so that the next capture writes it anew; a manifest is written
anew at once, since sound shards say all that it has to say.
"""

import functools
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from distill_cli.errors import DamagedError, MismatchError
from distill_cli.files import write_atomic
from distill_cli.locks import holder_of, locked
from distill_cli.report import Report
from distill_cli.store.inventory import Inventory, Piece, take_inventory
from distill_cli.store.manifest import ADVICE as MANIFEST_ADVICE
from distill_cli.store.manifest import Manifest, ShardEntry, read_manifest
from distill_cli.store.place import Folder
from distill_cli.store.plan import Generation, numbered, read_plan
from distill_cli.store.verify_shard import Looked, Meter, bare, look_at_shard
from distill_cli.store.writer import Finished, manifest_of

MOST_NAMED = 1000
"""Missing shards that are named one by one; a plan can ask for any number."""
MOST_WORKERS = 8
Kind = Literal["damaged", "missing", "leftover", "stray", "foreign"]


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be."""

    path: str
    """Relative to the store."""
    kind: Kind
    """`foreign` is no fault: a file beside the store's own."""
    found: str
    repaired: str | None = None
    """What `--repair` did: `deleted` or `written anew`."""


@dataclass(frozen=True)
class Verification:
    """What `verify` found."""

    status: str
    """`ok`; `repaired`: it is now; `incomplete`: nothing is damaged, or is any more, but shards are missing;
    `untidy`: there are only files too many; `damaged`."""
    store: str
    shards: int
    """Of all plans that can be read."""
    sound: int
    rows: int
    """Of sound shards."""
    bytes: int
    """That were read."""
    mb_per_s: float
    wall_s: float
    findings: tuple[Finding, ...]


@dataclass
class _Survey:
    """A store's plans, names, and what was found of them."""

    folder: Path
    generations: list[Generation]
    inventory: Inventory
    findings: list[Finding]
    stuck: bool
    """Whether something stands in the way of a repair."""
    said: dict[int, list[Finished | None]]
    """Per generation what its shards say, in order; None for those that are not sound."""
    manifests: dict[int, Manifest | None]
    shards: int = 0
    rows: int = 0
    bytes: int = 0


def verify(
    folder: Path, repair: bool = False, workers: int | None = None, report: Report | None = None
) -> Verification:
    """Read every file of a store and compare it with what it must be.

    Args:
        repair: have the folder alone, delete damaged shards and what killed writers left, and the manifest of their
            generation; write anew the manifest of sound shards.
        workers: threads; by default one a core, at most 8.

    Raises:
        DamagedError: there is no store.
        MismatchError: it is of another format version.
        BusyError: with `repair`, a process is at work there.
        OSError: a folder or a file cannot be read.
    """
    report, start = report or Report(), time.monotonic()
    cores = len(os.sched_getaffinity(0))
    threads = min(cores, MOST_WORKERS) if workers is None else max(1, workers)
    if not repair:
        survey = _survey(folder, threads, report)
        return _result(survey, survey.findings, start)
    if not (folder / numbered("plan", 0)).exists():
        read_plan(Folder(folder))
    with locked(folder):
        survey = _survey(folder, threads, report)
        findings = survey.findings
        if not survey.stuck and any(finding.kind in ("damaged", "missing", "leftover") for finding in findings):
            report.stage(f"{folder}: repairing")
            findings = _repair(survey)
        return _result(survey, findings, start)


def check_verified(found: Verification) -> None:
    """
    Raises:
        DamagedError: the store is damaged or incomplete; says how much of it, and what to do.
    """
    if found.status in ("ok", "repaired"):
        return
    kinds = [finding.kind for finding in found.findings if finding.repaired is None]
    counts = [f"{kinds.count(kind)} {kind}" for kind in ("damaged", "missing", "leftover", "stray") if kind in kinds]
    deleted = sum(finding.repaired == "deleted" for finding in found.findings)
    counts += [f"{deleted} deleted"] if deleted else []
    if found.status == "incomplete":
        advice = 'run the same "distill teacher-logits" command again to finish it'
    elif any(finding.path.startswith("plan") for finding in found.findings):
        advice = "restore the plan from a copy"
    elif found.status == "damaged" or "leftover" in kinds:
        advice = f'run "distill store verify {found.store} --repair", then the same "distill teacher-logits" command'
    else:
        advice = "move away what does not belong there"
    raise DamagedError(
        f"{found.store}: {', '.join(counts)}; {found.sound} of {found.shards} shards are sound; {advice}"
    )


def _survey(folder: Path, threads: int, report: Report) -> _Survey:
    generations, findings = _plans(folder)
    stuck = bool(findings)
    inventory = take_inventory(folder, generations)
    for name in inventory.linked:
        stuck = True
        findings.append(Finding(name, "damaged", "is a link, which is not followed; put the folder itself there"))
    survey = _Survey(folder, generations, inventory, findings, stuck, {}, {})
    _shards(survey, threads, report)
    if holder_of(folder) in (None, "this process"):
        findings += [
            Finding(name, "leftover", "half-written by a process that was killed") for name in inventory.leftovers
        ]
    # Without its plan a sound file looks like a stray.
    if not any(finding.path.startswith("plan") for finding in findings):
        findings += [Finding(name, "stray", "no plan names it") for name in inventory.strays]
    findings += [Finding(name, "foreign", "is no file of a store") for name in inventory.foreign]
    return survey


def _plans(folder: Path) -> tuple[list[Generation], list[Finding]]:
    """The generations whose plans can be read, and the first plan that cannot.

    Raises:
        DamagedError: there is no first plan.
    """
    generations: list[Generation] = []
    while True:
        number = len(generations)
        path = folder / (name := numbered("plan", number))
        try:
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise DamagedError(f"{path}: is no file; restore it from a copy")
            if number and not path.exists():
                later = sorted(folder.glob("plan-[0-9][0-9][0-9]*.json"))
                behind = [each.name for each in later if each.name > name]
                gap = (
                    [Finding(name, "missing", f"though {behind[0]} is there; restore it from a copy")] if behind else []
                )
                return generations, gap
            plan = read_plan(Folder(folder), number)
        except DamagedError as error:
            if number == 0 and not path.exists() and not path.is_symlink():
                raise
            return generations, [Finding(name, "damaged", bare(error, path))]
        before = generations[-1] if generations else None
        generations.append(Generation(number, plan, before.offset + before.plan.views if before else 0))


def _shards(survey: _Survey, threads: int, report: Report) -> None:
    """Verify the manifest and the shards of every generation."""
    work: list[tuple[Generation, Piece, ShardEntry | None]] = []
    damage: dict[int, Finding] = {}
    for generation in survey.generations:
        manifest, finding = _manifest(survey.folder, generation)
        survey.manifests[generation.number] = manifest
        if finding is not None:
            damage[generation.number] = finding
        there = survey.inventory.shards[generation.number]
        entries = dict(zip(generation.plan.every_shard(), manifest.shards, strict=True)) if manifest else {}
        work += [(generation, piece, entries.get(piece)) for piece in sorted(there)]
        survey.shards += generation.plan.views * generation.plan.shards
    total = sum(_size(survey.folder / generation.path(*piece)) for generation, piece, _ in work)
    report.stage(f"verifying {len(work)} shards, {total / 1e6:,.1f} MB")
    with report.progress("verify", -(-total // 10**6), unit="MB") as progress:
        meter = Meter(progress)
        found = _in_threads(threads, [functools.partial(look_at_shard, survey.folder, *item, meter) for item in work])
        meter.finish(total)
    survey.bytes = meter.bytes
    looked: dict[int, dict[Piece, Looked]] = {generation.number: {} for generation in survey.generations}
    for (generation, piece, _), each in zip(work, found, strict=True):
        looked[generation.number][piece] = each
    for generation in survey.generations:
        _judge(survey, generation, looked[generation.number], damage.get(generation.number))


def _judge(survey: _Survey, generation: Generation, looked: dict[Piece, Looked], damage: Finding | None) -> None:
    """Turn what was found of a generation's files into findings."""
    plan, number = generation.plan, generation.number
    named = {each.plan_sha256 for each in looked.values() if each.plan_sha256}
    total = plan.views * plan.shards
    manifest = survey.manifests[number]
    if named and plan.sha256 not in named and manifest is None:
        # A plan that was changed may well be one still. Better no repair than one that deletes every shard.
        survey.stuck = True
        others = ", ".join(sorted(name[:12] for name in named)[:3])
        text = f"its sha256 is {plan.sha256[:12]}, its shards are of {others}; it was changed; restore it from a copy"
        survey.findings.append(Finding(generation.plan_name, "damaged", text))
        return
    for piece, each in sorted(looked.items()):
        if each.said is None:
            survey.findings.append(Finding(generation.path(*piece), "damaged", each.found))
        else:
            survey.rows += each.said.entry.rows
    for piece in itertools.islice(survey.inventory.missing(generation), MOST_NAMED):
        survey.findings.append(Finding(generation.path(*piece), "missing", "is not there"))
    if more := max(0, total - len(looked) - MOST_NAMED):
        survey.findings.append(
            Finding(f"view-{generation.offset + plan.views - 1:03d}", "missing", f"{more:,} more shards")
        )
    survey.said[number] = [looked[piece].said for piece in sorted(looked)]
    whole = _whole(survey, generation)
    if damage is not None:
        survey.findings.append(damage)
    elif manifest is None and whole is not None:
        found = "is not there, though all shards are"
        survey.findings.append(Finding(generation.manifest_name, "missing", found))
    elif manifest is not None and whole is not None and manifest_of(plan, whole).text != manifest.text:
        text = f"its skipped samples or accuracies are not those of its shards; {MANIFEST_ADVICE}"
        survey.findings.append(Finding(generation.manifest_name, "damaged", text))


def _whole(survey: _Survey, generation: Generation) -> list[Finished] | None:
    """What all shards of a generation say; None where one is missing or not sound."""
    sound = [each for each in survey.said.get(generation.number, []) if each is not None]
    return sound if len(sound) == generation.plan.views * generation.plan.shards else None


def _manifest(folder: Path, generation: Generation) -> tuple[Manifest | None, Finding | None]:
    path = folder / (name := generation.manifest_name)
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise DamagedError(f"{path}: is no file; {MANIFEST_ADVICE}")
        return read_manifest(Folder(folder), generation), None
    except (DamagedError, MismatchError) as error:
        return None, Finding(name, "damaged", bare(error, path))


def _repair(survey: _Survey) -> list[Finding]:
    """Delete and write anew; gives the findings with what was done."""
    manifests: dict[str, str | None] = {}
    for generation in survey.generations:
        whole = _whole(survey, generation)
        name = generation.manifest_name
        manifests[name] = None if whole is None else manifest_of(generation.plan, whole).text
        if whole is None:
            # Before the shards: killed in between, the store is unfinished and not damaged.
            (survey.folder / name).unlink(missing_ok=True)
    return [replace(finding, repaired=_mend(survey.folder, finding, manifests)) for finding in survey.findings]


def _mend(folder: Path, finding: Finding, manifests: Mapping[str, str | None]) -> str | None:
    path = folder / finding.path
    if finding.path in manifests:
        text = manifests[finding.path]
        if text is None:
            return "deleted"
        # What is in its place may be a link.
        path.unlink(missing_ok=True)
        write_atomic(path, text)
        return "written anew"
    if finding.kind not in ("damaged", "leftover") or (path.is_dir() and not path.is_symlink()):
        return None
    path.unlink(missing_ok=True)
    return "deleted"


def _result(survey: _Survey, findings: Sequence[Finding], start: float) -> Verification:
    wall_s = time.monotonic() - start
    return Verification(
        status=_status(findings),
        store=str(survey.folder),
        shards=survey.shards,
        sound=sum(each is not None for said in survey.said.values() for each in said),
        rows=survey.rows,
        bytes=survey.bytes,
        mb_per_s=round(survey.bytes / 1e6 / max(wall_s, 1e-3), 1),
        wall_s=round(wall_s, 2),
        findings=tuple(findings),
    )


def _status(findings: Sequence[Finding]) -> str:
    left = {finding.kind for finding in findings if finding.repaired is None} - {"foreign"}
    deleted = any(finding.repaired == "deleted" and finding.kind == "damaged" for finding in findings)
    if "damaged" in left or any(finding.path.startswith("plan") for finding in findings):
        return "damaged"
    if "missing" in left or deleted:
        return "incomplete"
    if left:
        return "untidy"
    return "repaired" if any(finding.repaired for finding in findings) else "ok"


def _in_threads(threads: int, tasks: Sequence[Callable[[], Looked]]) -> list[Looked]:
    pool = ThreadPoolExecutor(threads, thread_name_prefix="verify")
    try:
        return list(pool.map(lambda task: task(), tasks))
    finally:
        pool.shutdown(cancel_futures=True)


def _size(path: Path) -> int:
    return path.lstat().st_size
