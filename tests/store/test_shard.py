import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_cli.errors import DamagedError, MismatchError
from distill_cli.store.plan import Plan
from distill_cli.store.rows import Rows
from distill_cli.store.shard import HEADER_BYTES, Shard, check_rows, encode, open_shard

MakePlan = Callable[..., Plan]
MakeRows = Callable[..., Rows]
CRC = np.arange(4, dtype=np.uint32)
KINDS: list[dict[str, Any]] = [{}, {"keep_mass": 0.9}, {"sample": 2, "top_k": 1}]


@pytest.fixture(scope="module")
def shard(make_plan: MakePlan, make_rows: MakeRows) -> tuple[Plan, bytes]:
    plan = make_plan()
    return plan, encode(plan, 0, 0, make_rows(plan, 0, 0), CRC)


def _opened(content: bytes, plan: Plan) -> Shard:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.h5"
        path.write_bytes(content)
        opened = open_shard(path, plan, 0, 0)
        check_rows(path, opened, plan, 0)
    return opened


def _header(content: bytes) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(content[:HEADER_BYTES])
    return values


def _with_line(content: bytes, line: str) -> bytes:
    return line.encode().ljust(HEADER_BYTES - 1) + b"\n" + content[HEADER_BYTES:]


def _with(content: bytes, **changes: object) -> bytes:
    return _with_line(content, json.dumps({**_header(content), **changes}))


def _with_array(content: bytes, name: str, *layout: object) -> bytes:
    return _with(content, arrays={**_header(content)["arrays"], name: layout})


# What is written.


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_line_says_where_the_arrays_lie_that_hdf5_tools_see(
    make_plan: MakePlan, make_rows: MakeRows, kind: dict[str, Any]
) -> None:
    plan = make_plan(**kind)
    content = encode(plan, 0, 1, make_rows(plan, 0, 1), CRC, (2, None))
    header = _header(content)
    with h5py.File(io.BytesIO(content)) as file:
        assert file.keys() == header["arrays"].keys()
        assert {name: value for name, value in file.attrs.items() if name in ("view", "shard")} == {
            "view": 0,
            "shard": 1,
        }
        for name, (dtype, shape, first) in header["arrays"].items():
            there = np.frombuffer(content, dtype, int(np.prod(shape)), first).reshape(shape)
            assert np.array_equal(there, file[name][:])
            assert first % 8 == 0
    assert (header["rows"], header["top1"], header["top5"]) == (4, 2, None)
    assert content[HEADER_BYTES - 1 : HEADER_BYTES] == b"\n"


@pytest.mark.parametrize("kind", KINDS)
def test_an_open_shard_has_what_was_written(make_plan: MakePlan, make_rows: MakeRows, kind: dict[str, Any]) -> None:
    plan = make_plan(**kind)
    rows = make_rows(plan, 0, 0, skip=(int(plan.dealing.sample_ids(0)[1]),))
    opened = _opened(encode(plan, 0, 0, rows, CRC[:3]), plan)
    assert opened.sample_id is not None
    assert (len(opened), opened.sample_id.tolist()) == (3, rows.sample_id.tolist())
    assert (opened.skipped.tolist(), opened.probe_crc.tolist()) == ([1], [0, 1, 2])
    assert opened.find(np.array([0, 2, 3])).tolist() == [0, 1, 2]
    with pytest.raises(KeyError):
        opened.find(np.array([1]))


@pytest.mark.parametrize(("samples", "dtype"), [(2**32, "<u4"), (2**32 + 1, "<u8")])
def test_sample_ids_are_wide_beyond_32_bits(make_plan: MakePlan, make_rows: MakeRows, samples: int, dtype: str) -> None:
    plan = make_plan(samples=samples)
    content = encode(plan, 0, 0, make_rows(plan, 0, 0), CRC)
    assert _header(content)["arrays"]["sample_id"][0] == dtype
    assert np.array_equal(_opened(content, plan).sample_id, plan.dealing.sample_ids(0))


def test_equal_rows_give_equal_bytes(shard: tuple[Plan, bytes], make_rows: MakeRows) -> None:
    plan, content = shard
    assert encode(plan, 0, 0, make_rows(plan, 0, 0), CRC.astype(np.int64)) == content
    assert encode(plan, 0, 1, make_rows(plan, 0, 1), CRC) != content


def test_bytes_do_not_tell_the_time(shard: tuple[Plan, bytes], make_rows: MakeRows) -> None:
    """HDF5 keeps times in seconds, if it is let."""
    plan, rows = shard[0], make_rows(shard[0], 0, 0)
    earlier = encode(plan, 0, 0, rows, CRC)
    time.sleep(1.1)
    assert encode(plan, 0, 0, rows, CRC) == earlier


def test_an_open_shard_is_a_read_only_view_of_its_file(shard: tuple[Plan, bytes]) -> None:
    rows = _opened(shard[1], shard[0]).rows
    for array in (rows.class_id, rows.log_prob, rows.log_tail):
        assert not array.flags.writeable
        assert not array.flags.owndata


# What is refused.


def test_a_missing_shard_is_named(tmp_path: Path, make_plan: MakePlan) -> None:
    with pytest.raises(DamagedError, match=r'shard-00000.h5: missing; run the same "distill teacher-logits"'):
        open_shard(tmp_path / "shard-00000.h5", make_plan(), 0, 0)


@pytest.mark.parametrize(
    ("changes", "view", "number", "message"),
    [
        ({"seed": 1}, 0, 0, "plan_sha256 is .*, not .*: a shard of another store or place"),
        ({}, 1, 0, "view is 0, not 1: a shard of another store or place"),
        ({}, 0, 2, "shard is 0, not 2: a shard of another store or place"),
    ],
)
def test_a_shard_of_another_place_is_refused(
    tmp_path: Path,
    shard: tuple[Plan, bytes],
    changes: dict[str, int],
    view: int,
    number: int,
    message: str,
) -> None:
    (tmp_path / "shard").write_bytes(shard[1])
    with pytest.raises(DamagedError, match=message):
        open_shard(tmp_path / "shard", replace(shard[0], **changes), view, number)  # type: ignore[arg-type]


def test_a_view_is_known_by_the_number_it_was_drawn_by(make_plan: MakePlan, make_rows: MakeRows) -> None:
    """Views captured apart, to be merged: a plan that begins at view 3 has no shard of view 0."""
    plan = make_plan(first_view=3)
    content = encode(plan, 0, 0, make_rows(plan, 0, 0), CRC)
    assert _header(content)["view"] == 3
    assert _opened(content, plan).header.view == 3
    with pytest.raises(DamagedError, match="view is 0, not 3"):
        _opened(_with(content, view=0), plan)


@given(st.data())
def test_a_shard_cut_short_anywhere_is_damaged(shard: tuple[Plan, bytes], data: st.DataObject) -> None:
    plan, content = shard
    header = _header(content)
    end = max(
        first + np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape, first in header["arrays"].values()
    )
    with pytest.raises(DamagedError):
        _opened(content[: data.draw(st.integers(0, end - 1))], plan)


def test_no_flipped_byte_hangs_or_crashes(tmp_path: Path, shard: tuple[Plan, bytes]) -> None:
    plan, content = shard
    path = tmp_path / "shard.h5"
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 0x80
        path.write_bytes(flipped)
        with contextlib.suppress(DamagedError, MismatchError):
            opened = open_shard(path, plan, 0, 0)
            check_rows(path, opened, plan, 0)
            assert opened.rows.class_id.shape == (4, plan.top_k)


def test_the_error_of_an_unreadable_shard_is_one_line(tmp_path: Path, make_plan: MakePlan) -> None:
    with pytest.raises(DamagedError, match="not a readable shard") as caught:
        open_shard(tmp_path, make_plan(), 0, 0)
    assert "\n" not in str(caught.value)


def test_a_newer_shard_is_told_apart_from_damage(shard: tuple[Plan, bytes]) -> None:
    with pytest.raises(MismatchError, match="store version 2, this program reads version 1; update distill"):
        _opened(_with(shard[1], version=2), shard[0])


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "no JSON": lambda content: _with_line(content, "{"),
    "a list": lambda content: _with_line(content, "[1]"),
    "deep nesting": lambda content: _with_line(content, "[" * 1000),
    "tables in tables": lambda content: _with_line(content, '{"a":' * 200),
    "a number without end": lambda content: _with_line(
        content, json.dumps(_header(content))[:-1] + ',"rows":' + "9" * 300 + "}"
    ),
    "a name twice": lambda content: _with_line(content, json.dumps(_header(content))[:-1] + ',"rows":4}'),
    "another format": lambda content: _with(content, format="zarr"),
    "a field that is not ours": lambda content: _with(content, colour=3),
    "no arrays": lambda content: _with(content, arrays=None),
    "a list of arrays": lambda content: _with(content, arrays=[]),
    "view true": lambda content: _with(content, view=False),
    "view 0.0": lambda content: _with(content, view=0.0),
    "shard in text": lambda content: _with(content, shard="0\n0"),
    "rows true": lambda content: _with(content, rows=True),
    "rows 4.0": lambda content: _with(content, rows=4.0),
    "rows NaN": lambda content: _with(content, rows=float("nan")),
    "rows infinite": lambda content: _with(content, rows=float("inf")),
    "rows negative": lambda content: _with(content, rows=-1),
    "more rows than places": lambda content: _with(content, rows=5),
    "more hits than rows": lambda content: _with(content, top1=5),
    "hits NaN": lambda content: _with(content, top5=float("nan")),
    "sha256 a number": lambda content: _with(content, payload_sha256=0),
    "huge": lambda content: _with_array(content, "sample_id", "<u4", [2**40], 2048),
    "huge and overflowing": lambda content: _with_array(content, "sample_id", "<u8", [2**61, 2**61], 2048),
    "huge and empty": lambda content: _with_array(content, "class_id", "<u2", [0, 2**62], 2048),
    "beyond all numbers": lambda content: _with_array(content, "sample_id", "<u4", [2**63], 2048),
    "a negative size": lambda content: _with_array(content, "log_tail", "<f4", [-4], 2048),
    "a size that is true": lambda content: _with_array(content, "log_tail", "<f4", [True], 2048),
    "a size of 4.0": lambda content: _with_array(content, "log_tail", "<f4", [4.0], 2048),
    "no size": lambda content: _with_array(content, "log_tail", "<f4", [], 2048),
    "three sizes": lambda content: _with_array(content, "log_tail", "<f4", [4, 1, 1], 2048),
    "a size alone": lambda content: _with_array(content, "log_tail", "<f4", 4, 2048),
    "in the header": lambda content: _with_array(content, "log_tail", "<f4", [4], 0),
    "before the file": lambda content: _with_array(content, "log_tail", "<f4", [4], -8),
    "at a byte of text": lambda content: _with_array(content, "log_tail", "<f4", [4], "2048"),
    "not aligned": lambda content: _with_array(content, "log_tail", "<f4", [4], 2049),
    "beyond the file": lambda content: _with_array(content, "log_tail", "<f4", [4], len(content) - len(content) % 8),
    "far beyond the file": lambda content: _with_array(content, "log_tail", "<f4", [4], 2**62),
    "one over the other": lambda content: _with_array(
        content, "log_tail", "<f4", [4], _header(content)["arrays"]["sample_id"][2]
    ),
    "wrong type": lambda content: _with_array(content, "log_tail", "<u4", [4], 2048),
    "big-endian": lambda content: _with_array(content, "log_tail", ">f4", [4], 2048),
    "objects": lambda content: _with_array(content, "log_tail", "|O", [4], 2048),
    "a list of types": lambda content: _with_array(content, "log_tail", ["<f4"], [4], 2048),
    "two parts": lambda content: _with_array(content, "log_tail", "<f4", [4]),
    "four parts": lambda content: _with_array(content, "log_tail", "<f4", [4], 2048, 0),
    "probes in a table": lambda content: _with_array(content, "probe_crc", "<u4", [2, 2], 2048),
    "skipped without end": lambda content: _with_array(content, "skipped", "<u4", [2**30], 2048),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_header_is_damage(shard: tuple[Plan, bytes], how: str) -> None:
    plan, content = shard
    with pytest.raises(DamagedError) as caught:
        _opened(HOSTILE[how](content), plan)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def _soft_link(file: h5py.File) -> None:
    file["log_tail"] = h5py.SoftLink("/log_tail")


def _external_link(file: h5py.File) -> None:
    file["log_tail"] = h5py.ExternalLink("/etc/hostname", "log_tail")


def _external_bytes(file: h5py.File) -> None:
    file.create_dataset("log_tail", shape=(4,), dtype="<f4", external=[("/etc/hostname", 0, 16)])


@pytest.mark.parametrize("link", [_soft_link, _external_link, _external_bytes])
def test_links_of_hdf5_are_never_followed(
    tmp_path: Path, shard: tuple[Plan, bytes], monkeypatch: pytest.MonkeyPatch, link: Callable[[h5py.File], None]
) -> None:
    """The reader goes by the first line; what HDF5 would do is of no meaning to it."""
    plan, content = shard
    path = tmp_path / "shard.h5"
    path.write_bytes(content)
    with h5py.File(path, "r+") as file:
        del file["log_tail"]
        link(file)
    monkeypatch.setattr(h5py, "File", lambda *_: pytest.fail("HDF5 was asked"))
    rows = open_shard(path, plan, 0, 0).rows
    assert rows.log_tail.tobytes() == _opened(content, plan).rows.log_tail.tobytes()


def test_values_that_no_row_has_are_found_by_looking(shard: tuple[Plan, bytes]) -> None:
    plan, content = shard
    for name, message in (("sample_id", "sample_id has other samples"), ("class_id", "class_id has class")):
        changed = bytearray(content)
        changed[_header(content)["arrays"][name][2]] ^= 0x80
        with pytest.raises(DamagedError, match=message):
            _opened(bytes(changed), plan)


def test_a_shard_holds_one_descriptor_as_long_as_it_is_used(shard: tuple[Plan, bytes]) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    opened = _opened(shard[1], shard[0])
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
    del opened
    assert len(list(Path("/proc/self/fd").iterdir())) == before
