"""Whatever happens to a store's files is noticed, by its checksums, before a row of it is given."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from distill_cli.errors import BusyError, DamagedError, MismatchError
from distill_cli.locks import locked
from distill_cli.report import Report
from distill_cli.store.manifest import Manifest, ShardEntry
from distill_cli.store.plan import PROBES, Generation, Plan
from distill_cli.store.reader import Store
from distill_cli.store.rows import Rows
from distill_cli.store.verify import check_verified
from distill_cli.store.verify import verify as verify_store
from distill_cli.store.writer import StoreWriter

MakePlan = Callable[..., Plan]
MakeRows = Callable[..., Rows]
FillStore = Callable[..., StoreWriter]
FLIPS = 2000
SHARD = "view-000/shard-00001.h5"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make_plan: MakePlan, make_rows: MakeRows) -> Path:
    """A store of three generations: fixed, ragged, and by the other codec; not to be written to."""
    path = tmp_path_factory.mktemp("damage") / "store"
    path.mkdir()
    kinds = ({}, {"keep_mass": 0.9, "shard_sizes": (3, 1, 6), "shard_rows": 6}, {"codec": "compact", "bits": 8})
    for number, kind in enumerate(kinds):
        generation = Generation(number, make_plan(first_view=number, **kind), number)
        writer = StoreWriter(path, generation, np.arange(10) % 5)
        for view, shard in writer.missing():
            rows = make_rows(generation.plan, view, shard)
            writer.write(view, shard, rows, np.arange(min(PROBES, len(rows)), dtype=np.uint32))
        writer.finish()
    return path


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def verify(path: Path) -> None:
    """As `distill store verify`.

    Raises:
        DamagedError, MismatchError: something is not as it was written.
    """
    check_verified(verify_store(path, workers=1, report=Report(quiet=True)))


def rows_of(path: Path) -> list[bytes]:
    """All rows, as bytes."""
    store = Store(path)
    found = [store.rows(view, np.arange(10)) for view in range(store.views)]
    columns = [(rows.class_id, rows.log_prob, rows.log_tail) for rows in found]
    return [column.tobytes() for rows in columns for column in rows]


def _flips(path: Path) -> Iterator[tuple[Path, int, int]]:
    """Random bytes of all files, each byte as likely as any other, and to what they change."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    ends = np.cumsum([file.stat().st_size for file in files])
    rng = np.random.default_rng(0)
    for place in rng.integers(0, ends[-1], FLIPS).tolist():
        number = int(np.searchsorted(ends, place, side="right"))
        yield files[number], place - int(ends[number]), int(rng.integers(1, 256))


@pytest.mark.slow
def test_every_flipped_byte_of_every_file_is_noticed(copy: Path) -> None:
    verify(copy)
    hit = set()
    for number, (file, place, change) in enumerate(_flips(copy)):
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[place] ^= change
        file.write_bytes(flipped)
        for look in (verify, rows_of)[: 1 + (number % 4 == 0)]:
            with pytest.raises((DamagedError, MismatchError)) as caught:
                look(copy)
            assert "\n" not in str(caught.value)
        file.write_bytes(content)
        hit.add(file.name)
    assert {"plan.json", "plan-001.json", "manifest.json", "manifest-001.json"} < hit
    verify(copy)


def test_trust_goes_without_checksums_but_not_without_shapes(copy: Path) -> None:
    content = bytearray((copy / SHARD).read_bytes())
    content[content.index(Store(copy).shard(0, 1).rows.log_prob.tobytes())] ^= 1
    (copy / SHARD).write_bytes(content)
    assert len(Store(copy, trust=True).rows(0, np.arange(10))) == 10
    (copy / SHARD).write_bytes(bytes(len(content)))
    with pytest.raises(DamagedError, match="its first line is not a shard's"):
        Store(copy, trust=True).rows(0, np.arange(10))
    (copy / SHARD).write_bytes(content[:-8])
    with pytest.raises(DamagedError, match="its size is not the manifest's"):
        Store(copy, trust=True).rows(0, np.arange(10))


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "dangling"])
@pytest.mark.parametrize("trust", [False, True])
def test_what_is_no_file_in_a_shard_s_place_is_damage(copy: Path, kind: str, trust: bool) -> None:
    path = copy / SHARD
    path.unlink()
    make: dict[str, Callable[[], None]] = {
        "fifo": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
        "dangling": lambda: path.symlink_to("nowhere"),
    }
    make[kind]()
    with pytest.raises(DamagedError, match=SHARD):
        Store(copy, trust=trust).rows(0, np.arange(10))
    assert not Path(copy / "view-000" / "nowhere").exists()


def test_a_reader_beside_a_writer_is_told_of_it(tmp_path: Path, make_plan: MakePlan, fill_store: FillStore) -> None:
    fill_store(tmp_path, make_plan(), only=2)
    with locked(tmp_path), pytest.raises(BusyError, match="1 of 3 shards missing, and this process is writing") as busy:
        Store(tmp_path)
    assert busy.value.exit_code == 75
    with pytest.raises(DamagedError, match='1 of 3 shards missing; run the same "distill teacher-logits"'):
        Store(tmp_path)


def test_a_generation_that_is_being_written_leaves_the_others_readable(copy: Path) -> None:
    (copy / "manifest-001.json").unlink()
    store = Store(copy)
    assert (store.views, store.unfinished_views) == (1, 2)
    assert len(store.rows(0, np.arange(10))) == 10


def test_a_plan_of_another_store_is_damage(copy: Path, make_plan: MakePlan) -> None:
    (copy / "plan-001.json").write_text(make_plan(num_classes=6, first_view=1).text)
    with pytest.raises(DamagedError, match="a plan of another store"):
        Store(copy)


# What no machine could hold.

READ = """
import resource, sys
from pathlib import Path
import numpy as np
import numpy.ma  # which numpy imports when it is first needed
from distill_cli.errors import DistillError
from distill_cli.store.reader import Store
root, opened = sys.argv[1], []
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 2**26, -1))
sys.addaudithook(lambda event, arguments: event == "open" and opened.append(str(arguments[0])))
for read in (lambda store: store.rows(0, np.array([0, 5])), lambda store: store.sample_ids, lambda store: store.drawn):
    try:
        read(Store(Path(root)))
    except DistillError as error:
        print(type(error).__name__, error)
assert all(path.startswith(root) for path in opened), opened
"""


def _read_within_limits(path: Path) -> list[str]:
    """The errors of reading a store where 64 MiB more memory can be had and every opened file is looked at."""
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_whole_store_is_read_within_the_limits(whole: Path) -> None:
    assert _read_within_limits(whole) == []


@pytest.mark.parametrize(
    ("changes", "entries", "said"),
    [
        ({"samples": 10**18, "shard_rows": 10**18}, 1, "missing"),
        ({"samples": 10**18, "shard_rows": 1}, 1, "does not list the shards of the plan"),
        ({"samples": 10**18, "shard_rows": 10**18, "shard_sizes": (10**18,)}, 1, "missing"),
        ({"samples": 2**36, "shard_rows": 2**36, "shard_sizes": (2**36,)}, 1, "missing"),
        ({"samples": 2**62, "shard_rows": 2**61, "shard_sizes": (2**61, 2**61)}, 1, "does not list the shards"),
        ({"views": 2**60}, 3, "does not list the shards of the plan"),
        ({"views": 2**60, "samples": 10**18}, 0, "does not list the shards of the plan"),
        ({"samples": 2**36, "shard_rows": 2**36}, 1, "missing"),
        ({"num_classes": 2**31, "top_k": 65_535}, 3, "missing"),
    ],
)
def test_absurd_numbers_are_one_error_and_no_memory(
    tmp_path: Path, make_plan: MakePlan, changes: dict[str, object], entries: int, said: str
) -> None:
    plan = make_plan(**changes)
    rows = [min(plan.shard_rows, plan.samples - plan.shard_rows * number) for number in range(entries)]
    paths = [f"view-000/shard-{number:05d}.h5" for number in range(entries)]
    listed = tuple(ShardEntry(path, count, 10**19, "0" * 64) for path, count in zip(paths, rows, strict=True))
    listed = tuple(ShardEntry(entry.path, entry.rows, 2**62, entry.sha256) for entry in listed)
    (tmp_path / "plan.json").write_text(plan.text)
    (tmp_path / "manifest.json").write_text(Manifest(plan.sha256, listed).text)
    errors = _read_within_limits(tmp_path)
    assert errors
    assert all(error.startswith("DamagedError ") and said in error for error in errors)


def test_a_manifest_cannot_lead_out_of_the_store(copy: Path, tmp_path: Path) -> None:
    values = json.loads((copy / "manifest.json").read_text())
    shutil.copy(copy / SHARD, tmp_path / "x")
    entries = tuple(ShardEntry(**entry) for entry in values["shards"])
    led = (entries[0], ShardEntry("../x", *list(vars(entries[1]).values())[1:]), *entries[2:])
    (copy / "manifest.json").write_text(Manifest(values["plan_sha256"], led).text)
    errors = _read_within_limits(copy)
    assert len(errors) == 3
    assert all("does not list the shards of the plan" in error for error in errors)
