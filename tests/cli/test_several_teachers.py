"""Training from several stores, and from a store of other classes."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import DISTIL, TRAIN, Cli, Made, Refused, capture

from distill_cli.ensemble import Ensemble, open_stores
from distill_cli.recipe import load
from distill_cli.replay import SparseRows
from distill_cli.store.reader import Store
from distill_cli.students.weights import Card, read_card


@pytest.fixture(scope="session")
def other(distill: Cli, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A store of another teacher, in shards of another size, of ragged rows."""
    made = tmp_path_factory.mktemp("other")
    trained = distill("train", *TRAIN, "--seed", "7", "--data", folder, "--out", made / "run", "--json", "--quiet")
    assert trained.code == 0, trained
    written = distill(
        *capture(made / "run", folder, made / "store"), "--keep-mass", "0.6", "--shard-rows", "10", "--json", "--quiet"
    )
    assert written.code == 0, written
    return Made(made / "store", written.json)


def opened(*sets: str, **values: object) -> Ensemble:
    found = open_stores(load(None, sets, {f"store.{name}": ("", value) for name, value in values.items()}).recipe.store)
    assert isinstance(found, Ensemble)
    return found


def card(run: Path) -> Card:
    found = read_card(run / "student.safetensors")
    assert found is not None
    return found


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def write_map(path: Path, *classes: int) -> Path:
    path.write_text(" ".join(map(str, classes)))
    return path


def test_a_student_learns_from_two_teachers(
    distill: Cli, folder: Path, store: Made, other: Made, tmp_path: Path
) -> None:
    both = ("--store", store.path, "--store", other.path, "--data", folder, "--set", "train.log_every=1")
    result = distill("train", *DISTIL, *both, "--set", "store.weights=[3, 1]", "--out", tmp_path / "r", "--json")
    assert result.code == 0, result
    found, ids = card(tmp_path / "r"), [Store(path).id for path in (store.path, other.path)]
    assert found.store == ", ".join(ids)
    assert found.teacher == "resnet18, resnet18"
    assert found.averaging == {"weights": [0.75, 0.25], "average": "probability"}
    assert found.classes == ("bag", "boot", "coat")
    there = load(str(tmp_path / "r" / "recipe.toml")).recipe.store
    assert there.path == (str(store.path), str(other.path))
    assert there.weights == (3, 1)
    again = distill("train", *DISTIL, *both, "--set", "store.weights=[0.75, 0.25]", "--out", tmp_path / "r", "--json")
    assert again.json["status"] == "already_done"
    alone = distill("train", *DISTIL, *both[2:], "--store", store.path, "--out", tmp_path / "alone")
    assert alone.code == 0, alone
    losses = [[line["loss"] for line in lines(tmp_path / run) if "loss" in line] for run in ("r", "alone")]
    assert losses[0] != losses[1]


def test_a_teacher_twice_trains_as_once(distill: Cli, folder: Path, store: Made, tmp_path: Path) -> None:
    for name, given in (("one", ("--store", store.path)), ("two", ("--store", store.path, "--store", store.path))):
        done = distill(
            "train", *DISTIL, *given, "--data", folder, "--set", "train.log_every=1", "--out", tmp_path / name
        )
        assert done.code == 0, done
    one, two = (
        [(line["loss"], line["agreement"]) for line in lines(tmp_path / name) if "loss" in line]
        for name in ("one", "two")
    )
    np.testing.assert_allclose(one, two, rtol=1e-5)


def test_rows_are_read_by_sample_whatever_their_shards(store: Made, other: Made) -> None:
    both, ids = opened(path=[str(store.path), str(other.path)], weights=[1, 3]), np.array([39, 0, 7, 7, 21])
    rows = SparseRows(both)(1, ids)
    for row, sample_id in enumerate(ids.tolist()):
        alone = SparseRows(both)(1, np.array([sample_id]))
        kept = alone.class_id.shape[1]
        assert rows.class_id[row, :kept].tolist() == alone.class_id[0].tolist()
        assert rows.log_prob[row, :kept].tolist() == alone.log_prob[0].tolist()
    turned = SparseRows(opened(path=[str(other.path), str(store.path)], weights=[3, 1]))(1, ids)
    assert rows.class_id.tolist() == turned.class_id.tolist()
    np.testing.assert_allclose(rows.log_prob.exp(), turned.log_prob.exp(), rtol=1e-5)


def test_a_run_goes_on_with_the_same_teachers_only(
    distill: Cli, refused: Refused, folder: Path, store: Made, other: Made, tmp_path: Path
) -> None:
    both = ("train", *DISTIL, "--store", store.path, "--store", other.path, "--data", folder)
    log = (*both, "--set", "store.average=log", "--set", "store.weights=[1, 1]", "--out", tmp_path / "r")
    assert distill(*both, "--set", "store.average=log", "--out", tmp_path / "whole").code == 0
    begun = distill(*log)
    assert begun.code == 0, begun
    (tmp_path / "r" / "result.json").unlink()
    said = refused(3, *both, "--set", "store.weights=[3, 1]", "--set", "store.average=log", "--out", tmp_path / "r")
    assert said == (
        f"{tmp_path}/r: began with another store.weights ([0.5, 0.5] there, [0.75, 0.25] asked); choose another --out"
    )
    said = refused(3, *both, "--out", tmp_path / "r")
    assert "began with another store.average (log there, probability asked)" in said
    said = refused(3, *both[:-4], "--data", folder, "--out", tmp_path / "r")
    ids = [Store(path).id[:12] for path in (store.path, other.path)]
    assert f"began with another store ([{', '.join(ids)}] there, {ids[0]} asked)" in said
    went_on = distill(*log)
    assert went_on.code == 0, went_on
    assert "going on from step-00000002" in went_on.err
    student, whole = (tmp_path / run / "student.safetensors" for run in ("r", "whole"))
    assert student.read_bytes() == whole.read_bytes()


def test_a_run_of_several_teachers_that_was_stopped_ends_as_if_it_had_not_been(
    distill: Cli, folder: Path, store: Made, other: Made, tmp_path: Path
) -> None:
    both = ("train", *DISTIL, "--store", store.path, "--store", other.path, "--data", folder, "--set", "train.keep=9")
    four = (*both, "--set", "train.steps=4", "--set", "train.save_every=1")
    assert distill(*four, "--out", tmp_path / "whole").code == 0
    assert distill(*four, "--out", tmp_path / "r").code == 0
    for gone in (
        "result.json",
        "student.safetensors",
        *(f"checkpoints/step-0000000{step}.safetensors" for step in (3, 4)),
    ):
        (tmp_path / "r" / gone).unlink()
    went_on = distill(*four, "--out", tmp_path / "r")
    assert "going on from step-00000002" in went_on.err
    student, whole = (tmp_path / run / "student.safetensors" for run in ("r", "whole"))
    assert student.read_bytes() == whole.read_bytes()


def test_eval_and_report_compare_with_the_average(
    distill: Cli, folder: Path, store: Made, other: Made, tmp_path: Path
) -> None:
    both = ("--store", store.path, "--store", other.path, "--data", folder)
    assert distill("train", *DISTIL, *both, "--out", tmp_path / "r").code == 0
    evaluate = ("eval", tmp_path / "r", "--data", folder, "--workers", "0", "--json", "--quiet")
    said = [distill(*evaluate, *given).json for given in (both[:2], both[2:4], both[:4])]
    assert said[2]["rows"] == 40
    assert len({one["kl"] for one in said}) == 3
    page = distill("report", tmp_path / "r", "--out", tmp_path / "page.html", "--quiet")
    assert page.code == 0, page
    text = (tmp_path / "page.html").read_text()
    assert "could not be compared" not in text
    assert all(f'<td>path</td><td class="mono">{path}</td>' in text for path in (store.path, other.path))
    bench = distill(
        "bench", "data", *both, "--batches", "1", "--batch-size", "8", "--workers", "0", "--json", "--quiet"
    )
    assert "rows" in [stage["name"] for stage in bench.json["stages"]]


def test_a_class_map_gathers_what_a_student_learns(distill: Cli, folder: Path, store: Made, tmp_path: Path) -> None:
    """Classes turned round and one left out, beside data that has no names for them."""
    turned = write_map(tmp_path / "map.txt", 2, 0)
    asked = ("--set", f'store.class_maps=["{turned}"]', "--set", "data.labelled=false")
    done = distill("train", *DISTIL, "--store", store.path, *asked, "--data", folder, "--out", tmp_path / "r", "--json")
    assert done.code == 0, done
    found = card(tmp_path / "r")
    assert (found.num_classes, found.classes, found.store) == (2, None, Store(store.path).id)
    assert found.averaging is not None
    assert list(found.averaging) == ["class_maps"]
    ids = np.arange(40)
    stored = Store(store.path).rows(0, ids)
    full = np.exp(stored.log_tail.astype(np.float64))[:, None].repeat(3, 1)
    np.put_along_axis(full, stored.class_id.astype(np.int64), np.exp(stored.log_prob.astype(np.float64)), 1)
    rows = SparseRows(opened(path=str(store.path), class_maps=[str(turned)]))(0, ids)
    expected = full[:, [2, 0]] / full[:, [2, 0]].sum(axis=1, keepdims=True)
    first = rows.class_id[:, 0].numpy()
    np.testing.assert_allclose(rows.log_prob[:, 0].exp(), expected[ids, first], rtol=1e-4)


def test_the_names_of_a_mapped_students_classes_are_the_datas(
    distill: Cli, folder: Path, store: Made, tmp_path: Path
) -> None:
    turned = write_map(tmp_path / "map.txt", 2, 0, 1)
    mapped = ("--store", store.path, "--set", f'store.class_maps=["{turned}"]')
    done = distill("train", *DISTIL, *mapped, "--data", folder, "--out", tmp_path / "r", "--json")
    assert done.code == 0, done
    assert card(tmp_path / "r").classes == ("bag", "boot", "coat")
    said = distill("eval", tmp_path / "r", *mapped, "--data", folder, "--workers", "0", "--json", "--quiet").json
    plain = distill("eval", tmp_path / "r", *mapped[:2], "--data", folder, "--workers", "0", "--json", "--quiet").json
    assert said["kl"] != plain["kl"]


@pytest.mark.parametrize(
    ("code", "asked", "said"),
    [
        (2, "weights=[1]", "store.weights: has 1 values, there are 2 --store; give one for each"),
        (2, 'class_maps=[""]', "store.class_maps: has 1 values, there are 2 --store; give one for each"),
        (2, "weights=[1, 0]", "--set: store.weights.1: input should be greater than 0, not 0"),
        (2, "average=mean", "--set: store.average: input should be 'probability' or 'log', not 'mean'"),
        (2, 'class_maps=["", "none.txt"]', "store.class_maps none.txt: cannot be read ([Errno 2]"),
    ],
)
def test_settings_of_several_stores_that_do_not_fit(
    refused: Refused, folder: Path, store: Made, other: Made, tmp_path: Path, code: int, asked: str, said: str
) -> None:
    both = ("train", *DISTIL, "--store", store.path, "--store", other.path, "--data", folder, "--out", tmp_path / "r")
    assert refused(code, *both, "--set", f"store.{asked}").startswith(said)


@pytest.mark.parametrize(
    ("code", "classes", "said"),
    [
        (2, (0, -1, 2), "says -1 of class 1: a class that a teacher does not know has no probability; give a class"),
        (2, (0, 2, 2), "gives class 2 of the store to both 1 and 2; give each class of the store once"),
        (3, (0, 1, 3), "has class 3, store STORE has 3 classes; give ids below that"),
        (3, (0, 1), None),
    ],
)
def test_a_class_map_that_does_not_fit(
    refused: Refused, folder: Path, store: Made, tmp_path: Path, code: int, classes: tuple[int, ...], said: str | None
) -> None:
    chosen = write_map(tmp_path / "map.txt", *classes)
    command = ("train", *DISTIL, "--store", store.path, "--data", folder, "--out", tmp_path / "r")
    line = refused(code, *command, "--set", f'store.class_maps=["{chosen}"]')
    wanted = f"store.class_maps {chosen}: {said}" if said else f"store {store.path}: has 2 classes, the data 3"
    assert line.startswith(wanted.replace("STORE", str(store.path)))


def test_stores_of_other_classes_are_refused(
    refused: Refused, folder: Path, store: Made, other: Made, tmp_path: Path
) -> None:
    chosen = write_map(tmp_path / "map.txt", 0, 1)
    both = ("train", *DISTIL, "--store", store.path, "--store", other.path, "--data", folder, "--out", tmp_path / "r")
    line = refused(3, *both, "--set", f'store.class_maps=["", "{chosen}"]')
    assert line == f"store {other.path}: gives 2 classes, store {store.path} 3; give store.class_maps"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--seed", "3"),
            "view 0 is drawn by seed 3, view 0, that of store STORE by seed 0, view 0; write it with the",
        ),
        (("--set", "store.first_view=1"), "view 0 is drawn by seed 0, view 1, that of store STORE by seed 0, view 0;"),
        (
            ("--views", "1"),
            'has 1 views, store STORE 2; bring them to one number by "distill store extend" or "distill',
        ),
        (("--set", "data.hflip=0.25"), "data.hflip 0.25, that of store STORE 0.5; write it with the data, [data] and"),
        (("--image-size", "32"), "data.image_size 32, that of store STORE 28; write it with the data, [data] and seed"),
    ],
)
def test_other_views_are_refused(
    distill: Cli,
    refused: Refused,
    folder: Path,
    run: Made,
    store: Made,
    tmp_path: Path,
    options: tuple[str, ...],
    said: str,
) -> None:
    assert distill(*capture(run.path, folder, tmp_path / "s"), *options, "--quiet").code == 0
    both = ("--store", store.path, "--store", tmp_path / "s")
    line = refused(3, "train", *DISTIL, *both, "--data", folder, "--out", tmp_path / "r")
    assert line.startswith(f"store {tmp_path}/s: {said.replace('STORE', str(store.path))}")


def test_other_images_are_refused(
    distill: Cli, refused: Refused, copied: Path, run: Made, store: Made, tmp_path: Path
) -> None:
    one = next((copied / "train" / "bag").iterdir())
    one.rename(one.with_name("renamed.png"))
    assert distill(*capture(run.path, copied, tmp_path / "s"), "--quiet").code == 0
    both = ("--store", store.path, "--store", tmp_path / "s", "--data", copied, "--out", tmp_path / "r")
    assert f"store {tmp_path}/s: keys fingerprint " in refused(3, "train", *DISTIL, *both)
    one.with_name("renamed.png").unlink()
    shutil.rmtree(tmp_path / "s")
    assert distill(*capture(run.path, copied, tmp_path / "s"), "--quiet").code == 0
    said = refused(3, "train", *DISTIL, *both)
    assert said.startswith(f"store {tmp_path}/s: number of images 39, that of store {store.path} 40; write it with")


def test_other_pixels_are_found_in_any_of_the_stores(
    distill: Cli, refused: Refused, folder: Path, copied: Path, run: Made, store: Made, tmp_path: Path
) -> None:
    names = sorted((copied / "train").rglob("*.png"))
    for path in names[1:]:
        shutil.copy(names[0], path)
    assert distill(*capture(run.path, copied, tmp_path / "s"), "--quiet").code == 0
    both = ("--store", store.path, "--store", tmp_path / "s", "--data", folder, "--out", tmp_path / "r")
    said = refused(3, "train", *DISTIL, *both)
    assert said.startswith(f"store {tmp_path}/s: view ")
    assert "does not replay to the pixels that the teacher saw" in said


def test_samples_without_rows_must_be_the_same(
    distill: Cli, refused: Refused, copied: Path, run: Made, tmp_path: Path
) -> None:
    assert distill(*capture(run.path, copied, tmp_path / "a"), "--quiet").code == 0
    names = sorted((copied / "train").rglob("*.png"))
    names[3].write_bytes(b"no image")
    for name in ("b", "c"):
        assert distill(*capture(run.path, copied, tmp_path / name), "--skip-unreadable", "--quiet").code == 0
    command = ("train", *DISTIL, "--data", copied, "--skip-unreadable", "--store", tmp_path / "b", "--store")
    said = refused(3, *command, tmp_path / "a", "--out", tmp_path / "r")
    assert said == (
        f"store {tmp_path}/a: 1 samples, such as 3, have rows in it or in store {tmp_path}/b, but not in both; "
        "write both of the same files"
    )
    done = distill(*command, tmp_path / "c", "--out", tmp_path / "r")
    assert done.code == 0, done


def test_teachers_of_other_colours_teach_together(
    distill: Cli, folder: Path, run: Made, store: Made, tmp_path: Path
) -> None:
    own = ("--set", "data.mean=[0.3, 0.4, 0.5]", "--set", "data.std=[0.2, 0.2, 0.2]")
    assert distill(*capture(run.path, folder, tmp_path / "s"), *own, "--quiet").code == 0
    both = ("--store", store.path, "--store", tmp_path / "s", "--data", folder, "--out", tmp_path / "r")
    done = distill("train", *DISTIL, *both)
    assert done.code == 0, done
    assert card(tmp_path / "r").input["mean"] == Store(store.path).plan.transform["mean"]


def test_mixed_images_need_the_same_shards(
    distill: Cli, refused: Refused, folder: Path, run: Made, tmp_path: Path
) -> None:
    for name, rows in (("a", "20"), ("b", "10"), ("c", "20")):
        written = distill(
            *capture(run.path, folder, tmp_path / name), "--shard-rows", rows, "--set", "data.mixup=0.8", "--quiet"
        )
        assert written.code == 0, written
    command = ("train", *DISTIL, "--data", folder, "--out", tmp_path / "r", "--store", tmp_path / "a", "--store")
    said = refused(3, *command, tmp_path / "b")
    assert said == (
        f"store {tmp_path}/b: mixes images within shards of 10 rows, store {tmp_path}/a of 20, so that view 0 has "
        "other pairs; write it with --shard-rows 20"
    )
    done = distill(*command, tmp_path / "c")
    assert done.code == 0, done


def test_sampled_rows_are_averaged_as_probabilities_only(
    distill: Cli, refused: Refused, folder: Path, run: Made, store: Made, tmp_path: Path
) -> None:
    sampled = ("--top-k", "1", "--sample", "1")
    assert distill(*capture(run.path, folder, tmp_path / "s"), *sampled, "--quiet").code == 0
    both = ("--store", store.path, "--store", tmp_path / "s", "--data", folder, "--out", tmp_path / "r")
    assert refused(3, "train", *DISTIL, *both, "--set", "store.average=log") == (
        f"store.average: log asked, the rows of store {tmp_path}/s are sampled, and the logs of draws have another "
        "mean; give store.average=probability, or a store without --sample"
    )
    chosen = write_map(tmp_path / "map.txt", 0, 1, 2)
    line = refused(3, "train", *DISTIL, *both, "--set", f'store.class_maps=["", "{chosen}"]')
    assert line.startswith(f"store.class_maps: the rows of store {tmp_path}/s are sampled, and their share of some")
    line = refused(3, "train", *DISTIL, *both, "--set", "objective.name=tinyvit", "--set", "objective.temperature=2.0")
    assert f"objective.temperature: 2.0 needs the probabilities themselves, the rows of store {tmp_path}/s are" in line
    done = distill("train", *DISTIL, *both)
    assert done.code == 0, done


def test_a_path_that_is_none(refused: Refused, folder: Path, tmp_path: Path) -> None:
    command = ("train", *DISTIL, "--data", folder, "--out", tmp_path / "r", "--set")
    for given in ("3", "[]", "[1, 2]"):
        assert "give a path, or a list of paths" in refused(2, *command, f"store.path={given}")
