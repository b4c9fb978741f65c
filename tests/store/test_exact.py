import contextlib
import multiprocessing
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_cli.errors import DamagedError
from distill_cli.store.exact import Rows, Shard, dtypes, encode, open_shard
from distill_cli.store.plan import Plan

MakePlan = Callable[..., Plan]
MakeRows = Callable[..., Rows]
CRC = np.arange(4, dtype=np.uint32)


@pytest.fixture(scope="module")
def shard(make_plan: MakePlan, make_rows: MakeRows) -> tuple[Plan, bytes]:
    plan = make_plan()
    return plan, encode(plan, 0, 0, make_rows(plan, 0, 0), CRC)


def _opened(content: bytes, plan: Plan) -> Shard:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "shard.h5").write_bytes(content)
        return open_shard(Path(folder) / "shard.h5", plan, 0, 0)


@st.composite
def _drawn(draw: st.DrawFn) -> tuple[int, int, Rows]:
    """(classes, k, rows) of any size, with tails of -inf among others."""
    n, k = draw(st.integers(0, 40)), draw(st.integers(1, 8))
    classes = draw(st.sampled_from([8, 1000, 65_535, 65_536, 100_000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    log_tail = np.where(rng.random(n) < 0.3, -np.inf, rng.normal(-5, 3, n)).astype(np.float32)
    class_id = rng.integers(0, classes, (n, k))
    class_id[: n // 2] = classes - 1
    return classes, k, Rows(np.arange(n), class_id, rng.normal(-5, 3, (n, k)).astype(np.float16), log_tail)


@given(_drawn())
def test_any_rows_come_back_bit_by_bit(make_plan: MakePlan, drawn: tuple[int, int, Rows]) -> None:
    classes, k, rows = drawn
    plan = make_plan(num_classes=classes, top_k=k, samples=40, shard_rows=40)
    opened = _opened(encode(plan, 0, 0, rows, CRC[: len(rows)]), plan)
    for column in fields(Rows):
        written, read = getattr(rows, column.name), getattr(opened.rows, column.name)
        assert np.array_equal(written, read), column.name
        assert read.dtype == dtypes(plan)[column.name]
    assert np.array_equal(opened.probe_crc, CRC[: len(rows)])


@pytest.mark.parametrize(("classes", "dtype"), [(65_535, "<u2"), (65_536, "<u4")])
def test_class_ids_are_wide_from_65536_classes_on(make_plan: MakePlan, classes: int, dtype: str) -> None:
    assert dtypes(make_plan(num_classes=classes))["class_id"] == np.dtype(dtype)


@pytest.mark.parametrize(("samples", "dtype"), [(2**32, "<u4"), (2**32 + 1, "<u8")])
def test_sample_ids_are_wide_beyond_32_bits(make_plan: MakePlan, samples: int, dtype: str) -> None:
    assert dtypes(make_plan(samples=samples))["sample_id"] == np.dtype(dtype)


def test_equal_rows_give_equal_bytes(shard: tuple[Plan, bytes], make_rows: MakeRows) -> None:
    plan, content = shard
    rows = make_rows(plan, 0, 0)
    narrow = Rows(*(getattr(rows, name).astype(dtype) for name, dtype in dtypes(plan).items() if name != "probe_crc"))
    assert encode(plan, 0, 0, narrow, CRC.astype(np.int64)) == content
    assert encode(plan, 0, 1, rows, CRC) != content


def test_bytes_do_not_tell_the_time(shard: tuple[Plan, bytes], make_rows: MakeRows) -> None:
    """HDF5 keeps times in seconds, if it is let."""
    plan, rows = shard[0], make_rows(shard[0], 0, 0)
    earlier = encode(plan, 0, 0, rows, CRC)
    time.sleep(1.1)
    assert encode(plan, 0, 0, rows, CRC) == earlier


def test_an_open_shard_is_a_read_only_view_of_its_file(shard: tuple[Plan, bytes]) -> None:
    rows = _opened(shard[1], shard[0]).rows
    assert not any(getattr(rows, column.name).flags.writeable for column in fields(Rows))
    assert not any(getattr(rows, column.name).flags.owndata for column in fields(Rows))


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


@given(st.data())
def test_a_shard_cut_short_anywhere_is_damaged(shard: tuple[Plan, bytes], data: st.DataObject) -> None:
    plan, content = shard
    with pytest.raises(DamagedError):
        _opened(content[: data.draw(st.integers(0, len(content) - 1))], plan)


def _open_with_each_byte_flipped(content: bytes, plan: Plan, path: Path) -> None:
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 0x80
        path.write_bytes(flipped)
        signal.alarm(5)  # HDF5 loops without end over some damage, deaf to all but the default action
        with contextlib.suppress(DamagedError):
            assert open_shard(path, plan, 0, 0).rows.class_id.shape[1] == plan.top_k
    signal.alarm(0)


def test_no_flipped_byte_hangs_or_crashes(tmp_path: Path, shard: tuple[Plan, bytes]) -> None:
    plan, content = shard
    arguments = (content, plan, tmp_path / "shard.h5")
    process = multiprocessing.get_context("fork").Process(target=_open_with_each_byte_flipped, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_the_error_of_an_unreadable_shard_is_one_line(tmp_path: Path, make_plan: MakePlan) -> None:
    with pytest.raises(DamagedError, match="not a readable shard") as caught:
        open_shard(tmp_path, make_plan(), 0, 0)
    assert "\n" not in str(caught.value)


def _instead(name: str, **dataset: Any) -> Callable[[h5py.File], None]:
    def put(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, **dataset)

    return put


def _group(file: h5py.File) -> None:
    del file["log_prob"]
    file.create_group("log_prob")


def _soft_link(file: h5py.File) -> None:
    del file["log_tail"]
    file["log_tail"] = h5py.SoftLink("/log_tail")


def _external_link(file: h5py.File) -> None:
    del file["log_tail"]
    file["log_tail"] = h5py.ExternalLink("beside.h5", "log_tail")


def _attribute(value: object) -> Callable[[h5py.File], None]:
    def put(file: h5py.File) -> None:
        file.attrs["version"] = value

    return put


HOSTILE: dict[str, Callable[[h5py.File], None]] = {
    "wrong type": _instead("log_tail", data=np.zeros(4, "<f8")),
    "big-endian": _instead("log_tail", data=np.zeros(4, ">f4")),
    "text": _instead("log_tail", data=["a"] * 4),
    "too few rows": _instead("log_tail", data=np.zeros(3, "<f4")),
    "more rows than a shard has": _instead("sample_id", data=np.zeros(5, "<u4")),
    "another k": _instead("class_id", data=np.zeros((4, 2), "<u2")),
    "scalar": _instead("sample_id", data=np.uint32(3)),
    "no rows at all": _instead("sample_id", data=h5py.Empty("<u4")),
    "no probes at all": _instead("probe_crc", data=h5py.Empty("<u4")),
    "probes in a table": _instead("probe_crc", data=np.zeros((2, 2), "<u4")),
    "huge": _instead("sample_id", shape=(2**40,), dtype="<u4"),
    "huge and overflowing": _instead("probe_crc", shape=(2**32, 2**30), dtype="<u4", chunks=(1, 1)),
    "chunked": _instead("log_tail", data=np.zeros(4, "<f4"), chunks=(2,)),
    "compressed": _instead("log_tail", data=np.zeros(4, "<f4"), compression="gzip"),
    "bytes of another file": _instead("log_tail", shape=(4,), dtype="<f4", external=[("/etc/hostname", 0, 16)]),
    "group": _group,
    "link in a circle": _soft_link,
    "link into another file": _external_link,
    "attribute of two values": _attribute(np.array([1, 1])),
    "empty attribute": _attribute(h5py.Empty("i4")),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_shard_is_damaged(tmp_path: Path, shard: tuple[Plan, bytes], how: str) -> None:
    plan, content = shard
    for name in ("shard.h5", "beside.h5"):
        (tmp_path / name).write_bytes(content)
    with h5py.File(tmp_path / "shard.h5", "r+") as file:
        HOSTILE[how](file)
    with pytest.raises(DamagedError):
        open_shard(tmp_path / "shard.h5", plan, 0, 0)
