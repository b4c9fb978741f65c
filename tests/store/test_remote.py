import http.server
import multiprocessing
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from distill_cli import server
from distill_cli.errors import DamagedError, DistillError, UsageError
from distill_cli.store import open_place
from distill_cli.store.config import StoreConfig
from distill_cli.store.plan import Plan
from distill_cli.store.reader import Store
from distill_cli.store.remote import Remote
from distill_cli.store.writer import StoreWriter

IDS = np.array([7, 2, 9, 0, 7, 1, 3, 4, 5, 6, 8])


@dataclass
class Served:
    """A store behind a server on this machine."""

    url: str
    folder: Path
    asked: list[str] = field(default_factory=list)
    """Paths that were fetched, in order."""


@pytest.fixture
def served(tmp_path: Path, make_plan: Callable[..., Plan], fill_store: Callable[..., StoreWriter]) -> Iterator[Served]:
    fill_store(tmp_path / "served", make_plan())
    served = Served("", tmp_path / "served")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            served.asked.append(self.path)
            super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(served.folder))) as server:
        served.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield served
        server.shutdown()
        thread.join()


def _rows(place: Remote) -> list[int]:
    return Store(place).rows(0, IDS).class_id[:, 0].tolist()


def test_a_store_behind_a_url_gives_the_rows_of_its_folder_and_is_fetched_once(served: Served, tmp_path: Path) -> None:
    place = Remote(served.url, tmp_path / "cache")
    assert _rows(place) == _rows(place) == Store(served.folder).rows(0, IDS).class_id[:, 0].tolist()
    shards = [path for path in served.asked if path.endswith(".h5")]
    assert len(shards) == len(set(shards)) == 3


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_it_and_one_of_them_fetches(served: Served, tmp_path: Path, method: str) -> None:
    place = Remote(served.url, tmp_path / "cache")
    store = Store(place)  # The connection is open when the others are made.
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context(method)) as pool:
        assert len({tuple(rows) for rows in pool.map(_rows, [place] * 3)}) == 1
    shards = [path for path in served.asked if path.endswith(".h5")]
    assert len(shards) == len(set(shards)) == 3
    assert store.rows(0, IDS[:1]).sample_id.tolist() == [7]


def test_a_shard_that_was_damaged_on_its_way_never_enters_the_cache(served: Served, tmp_path: Path) -> None:
    path = served.folder / "view-000/shard-00000.h5"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DamagedError, match=r"shard-00000\.h5: its sha256 is not the manifest's; the store there"):
        Store(Remote(served.url, tmp_path / "cache")).rows(0, np.arange(10))
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_shard_that_was_damaged_in_the_cache_is_named(served: Served, tmp_path: Path) -> None:
    place = Remote(served.url, tmp_path / "cache")
    _rows(place)
    for path in (tmp_path / "cache").glob("*.h5"):
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DamagedError, match=r"cache/.*: its sha256 is not the manifest's; delete it to fetch it again"):
        _rows(place)


def test_the_cache_is_bounded_and_a_shard_that_went_is_fetched_again(served: Served, tmp_path: Path) -> None:
    size = (served.folder / "view-000/shard-00000.h5").stat().st_size
    place = Remote(served.url, tmp_path / "cache", cache_bytes=1.5 * size)
    assert _rows(place) == _rows(Remote(served.url, tmp_path / "other"))
    assert len(list((tmp_path / "cache").glob("*.h5"))) == 1
    assert _rows(place) == _rows(Remote(served.url, tmp_path / "other"))


def test_what_is_not_there_is_told_as_of_a_folder(served: Served, tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match=r"/none: no plan\.json; this is not a store"):
        Store(Remote(f"{served.url}/none", tmp_path))
    (served.folder / "view-000/shard-00001.h5").unlink()
    with pytest.raises(DamagedError, match=r"view-000/shard-00001\.h5: missing"):
        _rows(Remote(served.url, tmp_path))
    (served.folder / "manifest.json").unlink()
    with pytest.raises(DamagedError, match=r"127\.0\.0\.1:\d+: incomplete; run the same"):
        Store(Remote(served.url, tmp_path))


def test_a_server_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "WAIT_S", 0)
    with pytest.raises(DistillError, match=r"http://127\.0\.0\.1:9/plan\.json: cannot be read \(.*\); look at the net"):
        Store(Remote("http://127.0.0.1:9", tmp_path))


def test_a_kind_of_url_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"nosuch://a: cannot be read here \(.*\); pip install 'distill-cli\[remote\]'"
    ):
        Store(Remote("nosuch://a", tmp_path))


def test_a_path_is_a_folder_and_a_url_is_fetched(tmp_path: Path) -> None:
    assert str(open_place("stores/a")) == "stores/a"
    place = open_place("s3://bucket/a/", StoreConfig(cache=str(tmp_path), cache_gb=2))
    assert isinstance(place, Remote)
    assert (str(place), place.shards.folder, place.shards.most_bytes) == ("s3://bucket/a", tmp_path, 2e9)
    assert pickle.loads(pickle.dumps(place)).url == place.url


def test_fsspec_s_memory_serves_too(served: Served, tmp_path: Path) -> None:
    """Another of fsspec's file systems, without a server."""
    shutil.copytree(served.folder, tmp_path / "copy")
    assert _rows(Remote(f"file://{tmp_path / 'copy'}", tmp_path / "cache")) == _rows(Remote(served.url, tmp_path))
