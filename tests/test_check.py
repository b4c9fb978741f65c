import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from distill_cli.capture import CaptureOrder, open_capture
from distill_cli.check import Summary, check, check_passed, choose
from distill_cli.data import open_source
from distill_cli.distributed import World
from distill_cli.errors import MismatchError
from distill_cli.recipe import Recipe, load
from distill_cli.report import Report
from distill_cli.store.codecs import CODECS
from distill_cli.store.compare import compare
from distill_cli.store.place import Folder
from distill_cli.store.plan import Generation, Plan, read_plan
from distill_cli.store.reader import Store
from distill_cli.store.rows import Rows
from distill_cli.store.shard import open_shard
from distill_cli.store.writer import StoreWriter
from distill_cli.teacher_logits import teacher_logits, write_generation

HERE = World(torch.device("cpu"))
QUIET = Report(quiet=True)
KWARGS = "teacher.kwargs={layers=[1,1,1,1],channels=[8,8,8,8]}"
ROWS = {"exact": {}, "ragged": {"keep_mass": 0.8}, "sampled": {"top_k": 1, "sample": 4}}


def teacher(path: Path, seed: int, duplicated: bool = False) -> Path:
    """Weights of a small ResNet of three classes; `duplicated`: all classes have the same head, and tie."""
    torch.manual_seed(seed)
    model = timm.create_model("resnet18", num_classes=3, layers=[1, 1, 1, 1], channels=[8, 8, 8, 8])
    weights = model.state_dict()
    weights["fc.weight"] *= 3
    if duplicated:
        weights["fc.weight"][1:], weights["fc.bias"][1:] = weights["fc.weight"][0], weights["fc.bias"][0]
    save_file(weights, path)
    return path


def recipe(weights: Path, images: Path, store: Path, **rows: object) -> Recipe:
    values = {"top_k": 2, "views": 2, "shard_rows": 8, "batch_size": 3, "path": str(store), **rows}
    values = {f"store.{name}": value for name, value in values.items()}
    values |= {"data.path": str(images), "data.image_size": 32}
    values |= {"teacher.name": "resnet18", "teacher.weights": str(weights)}
    return load(None, [KWARGS], {path: (path, value) for path, value in values.items()}).recipe


@pytest.fixture(scope="module")
def made(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and its stores by kind of rows: 2 views of 18 images in shards of 8, 8 and 2; not to be written to."""
    root = tmp_path_factory.mktemp("check")
    weights = teacher(root / "teacher.safetensors", 0)
    for name, rows in ROWS.items():
        teacher_logits(recipe(weights, image_folder, root / name, **rows), root / name, HERE, QUIET)
    return root


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "exact", tmp_path / "store"))


def checked(made: Path, store: Path, images: Path, **options: object) -> Summary:
    return check(recipe(made / "teacher.safetensors", images, store), HERE, QUIET, **options)  # type: ignore[arg-type]


def rewrite(path: Path, change: Callable[[int, int, Rows], Rows], number: int = 0, offset: int = 0) -> None:
    """Write every shard of a generation anew from changed rows, and a manifest that fits."""
    plan = read_plan(Folder(path), number)
    generation = Generation(number, plan, offset)
    shards = {}
    for view, shard in plan.every_shard():
        opened = open_shard(path / generation.path(view, shard), plan, view, shard)
        ids = np.delete(plan.dealing.sample_ids(shard), opened.skipped)
        taken = CODECS[plan.codec].take([(opened.rows, np.arange(len(opened)))], plan.form)
        shards[view, shard] = change(view, shard, Rows(ids, *taken)), opened.probe_crc.copy()
    (path / generation.manifest_name).unlink()
    writer = StoreWriter(path, generation)
    for piece, (rows, probes) in shards.items():
        writer.write(*piece, rows, probes)
    writer.finish()


@pytest.mark.parametrize("kind", ROWS)
def test_a_fresh_store_passes_in_every_bit(made: Path, image_folder: Path, kind: str) -> None:
    summary = checked(made, made / kind, image_folder)
    assert (summary.status, summary.rows, summary.shards, summary.rows_beyond) == ("ok", 36, 6, 0)
    assert (summary.identical, summary.other_classes) == (100, 0)
    assert summary.same_draws == (100 if kind == "sampled" else None)
    assert summary.probes == 2 * (4 + 4 + 2)
    assert summary.max_difference < 0.004
    check_passed(summary)


def test_every_generation_is_looked_at(made: Path, store: Path, image_folder: Path) -> None:
    asked = recipe(made / "teacher.safetensors", image_folder, store, views=1, first_view=2)
    capture = open_capture(asked, HERE, QUIET)
    write_generation(capture, Generation(1, capture.plan, 2), store, HERE, QUIET, 0.0)
    summary = checked(made, store, image_folder, rows=2)
    assert (summary.status, summary.identical, summary.batches) == ("ok", 100, 4)
    rewrite(store, lambda view, shard, rows: replace(rows, log_prob=rows.log_prob - np.float16(1)), 1, 2)
    summary = checked(made, store, image_folder, rows=2)
    assert summary.worst is not None
    assert summary.worst.startswith("view 2 of ")


@pytest.mark.parametrize("kind", ROWS)
def test_batches_of_another_size_pass(made: Path, image_folder: Path, kind: str) -> None:
    other = recipe(made / "teacher.safetensors", image_folder, made / kind, batch_size=7)
    assert check(other, HERE, QUIET).status == "ok"


def test_rows_that_are_off_by_a_tenth_are_beyond(made: Path, store: Path, image_folder: Path) -> None:
    rewrite(store, lambda view, shard, rows: replace(rows, log_prob=rows.log_prob - np.float16(0.1)))
    summary = checked(made, store, image_folder)
    assert (summary.status, summary.rows_beyond) == ("differs", 36)
    assert summary.max_difference == pytest.approx(0.1, abs=0.005)
    with pytest.raises(MismatchError, match=r"36 of 36 rows differ beyond the tolerance of 0\.02 nats, as view"):
        check_passed(summary)
    assert checked(made, store, image_folder, tolerance=0.2).status == "ok"


def test_the_last_row_of_the_last_shard_is_looked_at(made: Path, store: Path, image_folder: Path) -> None:
    def change(view: int, shard: int, rows: Rows) -> Rows:
        if (view, shard) != (1, 2):
            return rows
        log_prob = rows.log_prob.copy()
        log_prob[-1] -= np.float16(0.1)
        return replace(rows, log_prob=log_prob)

    rewrite(store, change)
    summary = checked(made, store, image_folder, rows=1)
    assert summary.rows < 10
    assert (summary.status, summary.rows_beyond) == ("differs", 1)


def test_other_classes_are_beyond_ties(made: Path, store: Path, image_folder: Path) -> None:
    rewrite(store, lambda view, shard, rows: replace(rows, class_id=(rows.class_id + 1) % 3))
    summary = checked(made, store, image_folder)
    assert summary.status == "differs"
    assert summary.other_classes_beyond_ties == 100


def test_other_draws_are_noticed(made: Path, tmp_path: Path, image_folder: Path) -> None:
    store = Path(shutil.copytree(made / "sampled", tmp_path / "store"))

    def change(view: int, shard: int, rows: Rows) -> Rows:
        """The masses of the two drawn classes swapped."""
        assert rows.count is not None
        class_id = rows.class_id.copy()
        class_id[:, 1:3] = class_id[:, 2:0:-1]
        return replace(rows, class_id=np.where(rows.count[:, None] == 3, class_id, rows.class_id))

    rewrite(store, change)
    summary = checked(made, store, image_folder)
    assert (summary.status, summary.rows_beyond) == ("differs", 0)
    with pytest.raises(MismatchError, match="of the drawn mass is the same, at least 95 % asked"):
        check_passed(summary)


def test_ties_may_fall_either_way(tmp_path: Path, image_folder: Path) -> None:
    weights = teacher(tmp_path / "tied.safetensors", 0, duplicated=True)
    tied = recipe(weights, image_folder, tmp_path / "store")
    teacher_logits(tied, tmp_path / "store", HERE, QUIET)

    def change(view: int, shard: int, rows: Rows) -> Rows:
        """The class that was left out, in the place of the last one that was kept."""
        class_id = rows.class_id.copy()
        class_id[:, 1] = 3 - rows.class_id.astype(np.int64).sum(axis=1)
        return replace(rows, class_id=class_id)

    rewrite(tmp_path / "store", change)
    summary = check(tied, HERE, QUIET)
    assert (summary.status, summary.other_classes, summary.other_classes_beyond_ties) == ("ok", 100, 0)
    assert summary.identical == 0


def test_another_teacher_of_the_same_architecture_is_refused(made: Path, tmp_path: Path, image_folder: Path) -> None:
    other = recipe(teacher(tmp_path / "other.safetensors", 1), image_folder, made / "exact")
    with pytest.raises(MismatchError, match=r"is of teacher resnet18.* with weights \w{12}, --teacher resnet18 is"):
        check(other, HERE, QUIET)


def test_other_images_are_refused(made: Path, tmp_path: Path, image_folder: Path) -> None:
    images = Path(shutil.copytree(image_folder, tmp_path / "images"))
    next(images.glob("train/*/*.png")).unlink()
    with pytest.raises(MismatchError, match="is of 18 images, the data has 17"):
        checked(made, made / "exact", images)


def test_changed_pixels_are_noticed_by_probe_and_by_row(made: Path, tmp_path: Path, image_folder: Path) -> None:
    images = Path(shutil.copytree(image_folder, tmp_path / "images"))
    source = open_source(str(images), "train")
    assert source is not None
    ids = Store(made / "exact").plan.dealing.sample_ids(0)
    for place, probed in ((7, False), (0, True)):
        path = images / "train" / source.keys[int(ids[place])]
        Image.eval(source.read(int(ids[place])), lambda value: 255 - value).save(path)
        if probed:
            with pytest.raises(MismatchError, match="does not replay to the pixels"):
                checked(made, made / "exact", images)
        else:
            summary = checked(made, made / "exact", images)
            assert summary.status == "differs"
            assert summary.worst is not None
            assert source.keys[int(ids[place])] in summary.worst


def test_an_imported_store_is_refused_in_one_line(tmp_path: Path, make_plan: Callable, fill_store: Callable) -> None:
    fill_store(tmp_path / "store", make_plan(lineage={"command": "import tinyvit"}))
    with pytest.raises(MismatchError, match="was imported, and what its teacher saw cannot be replayed here"):
        check(load(None, [], {"store.path": ("", str(tmp_path / "store"))}).recipe, HERE, QUIET)


def test_the_first_and_the_last_batch_are_always_chosen(make_plan: Callable) -> None:
    generation = Generation(0, make_plan(samples=1003, shard_rows=100, views=3))
    for seed in range(5):
        chosen = choose(generation, 16, 50, seed)
        assert chosen == sorted(set(chosen)) == choose(generation, 16, 50, seed)
        assert chosen[0] == 0
        assert chosen[-1] == (2 * 11 + 10) * 7
        assert 4 <= len(chosen) <= 8
    assert choose(generation, 16, 50, 0) != choose(generation, 16, 50, 1)
    assert len(choose(generation, 16, 10**6, 0)) == 3 * (10 * 7 + 1)


def test_batches_are_chosen_of_shards_of_any_size(make_plan: Callable) -> None:
    """Twelve batches a view; where the drawn ones have too few rows, others follow."""
    plan = make_plan(samples=142, shard_sizes=(1, 100, 1, 40), shard_rows=100, views=3)
    order = CaptureOrder(plan.dealing, 16)
    every = [number for piece in plan.every_shard() for number in order.numbers(piece)]
    assert len(every) == len(set(every)) == 3 * (1 + 7 + 1 + 3)
    for rows in range(1, 3 * 142, 20):
        chosen = choose(Generation(0, plan), 16, rows, rows)
        assert {0, every[-1]} <= set(chosen) <= set(every)
        assert sum(len(order(number)[1]) for number in chosen) >= rows
    assert choose(Generation(0, plan), 16, 10**6, 0) == every


def test_counts_may_differ_by_what_a_tolerance_moves(make_plan: Callable) -> None:
    """P = 0.9 is held by two classes, or just not: then three are as right; but not one."""
    plan: Plan = make_plan(keep_mass=0.9, samples=1)
    log_prob = np.log(np.array([[0.5, 0.40001, 0.05, 0.03, 0.01999]], np.float32))

    def rows(count: int) -> Rows:
        kept = np.arange(3) < count
        tail = np.log(1 - np.exp(log_prob[0, :count].astype(np.float64)).sum(keepdims=True))
        values = np.where(kept, log_prob[:, :3], -np.inf).astype(np.float16)
        return Rows(np.zeros(1, np.int64), np.where(kept, np.arange(3), 0)[None], values, tail, np.array([count]))

    found = {count: compare(plan, rows(count), rows(2), log_prob, 0.02) for count in (1, 2, 3)}
    beyond = {count: [cause for cause, at in each.beyond.items() if at[0]] for count, each in found.items()}
    assert beyond == {1: ["count"], 2: [], 3: []}
