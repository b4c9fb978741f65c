from pathlib import Path

import pytest

from distill_cli import shipped
from distill_cli.errors import UsageError
from distill_cli.objectives.deit import DeiTConfig
from distill_cli.objectives.tinyvit import TinyViTConfig
from distill_cli.recipe import Recipe, differences, fingerprint, flat, load, parse, to_toml, update

DEIT = """\
[teacher]
name = "regnety_160"
weights = "teacher.safetensors"

[student]
name = "deit-tiny"
drop_path = 0.1

[objective]
name = "deit"
alpha = 0.3

[train]
lr = 1e-3
epochs = 7
"""


@pytest.fixture
def deit(tmp_path: Path) -> str:
    path = tmp_path / "deit.toml"
    path.write_text(DEIT)
    return str(path)


def refusal(*sets: str, name: str | None = None) -> str:
    """What a recipe with these values is refused with."""
    with pytest.raises(UsageError) as caught:
        load(name, sets)
    return str(caught.value)


def test_a_flag_wins_over_set_over_recipe_over_default(deit: str) -> None:
    def lr(*args: object) -> float | None:
        return load(*args).recipe.train.lr  # type: ignore[arg-type]

    assert lr() is None
    assert lr(deit) == 1e-3
    assert lr(deit, ["train.lr=2e-3"]) == 2e-3
    assert lr(deit, ["train.lr=2e-3"], {"train.lr": ("--lr", 3e-3)}) == 3e-3


def test_the_last_set_of_a_key_wins() -> None:
    assert load(sets=["train.epochs=1", "train.epochs=2"]).recipe.train.epochs == 2


def test_every_value_knows_where_it_came_from(deit: str) -> None:
    loaded = load(deit, ["train.lr=2e-3", "train.seed=1"], {"train.seed": ("--seed", 2)})
    assert loaded.origins["train.epochs"] == f"recipe {deit}"
    assert loaded.origins["train.lr"] == "--set"
    assert loaded.origins["train.seed"] == "--seed"
    assert "train.batch_size" not in loaded.origins


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("data.path=/images/a=b", "data.path", "/images/a=b"),
        ("data.path=some words", "data.path", "some words"),
        ('data.path="quoted"', "data.path", "quoted"),
        ("data.auto_augment=", "data.auto_augment", ""),
        ("data.labelled=false", "data.labelled", False),
        ("data.scale=[0.2, 1]", "data.scale", (0.2, 1.0)),
        ("train.batch_size=1_024", "train.batch_size", 1024),
        ("train.lr=1e-3", "train.lr", 1e-3),
        ("train.lr = 1e-3", "train.lr", 1e-3),
        ("data.path = images", "data.path", "images"),
        ("student.kwargs={layers=[1,1], act='relu'}", "student.kwargs", {"layers": [1, 1], "act": "relu"}),
        ("student.kwargs.layers=[1, 1]", "student.kwargs", {"layers": [1, 1]}),
    ],
)
def test_set_takes_a_toml_value_or_a_bare_string_after_the_first_equals(text: str, path: str, value: object) -> None:
    assert flat(load(sets=[text]).recipe)[path] == value


def test_set_reaches_into_the_kwargs_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('[student]\nname = "resnet18"\nkwargs = {layers = [1, 1], act = "relu"}\n')
    loaded = load(str(path), ["student.kwargs.act=gelu"])
    assert loaded.recipe.student.kwargs == {"layers": [1, 1], "act": "gelu"}


@pytest.mark.parametrize("text", ["train.lr", "lr=1", "=1"])
def test_set_of_another_form_is_refused(text: str) -> None:
    assert refusal(text) == f"--set {text}: not of the form section.key=VALUE"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train.batchsize=8", "--set: train.batchsize: unknown key; did you mean train.batch_size"),
        ("train.image_size=8", "--set: train.image_size: unknown key; did you mean data.image_size?"),
        ("train.path=x", "--set: train.path: unknown key; did you mean data.path, store.path?"),
        ("trian.lr=1", "did you mean train.lr"),
        ("zebra.lr=1", "the sections are data, eval, objective, runtime, store, student, teacher, train"),
    ],
)
def test_an_unknown_key_names_the_same_key_elsewhere_or_the_nearest(text: str, said: str) -> None:
    assert said in refusal(text)


def test_an_unknown_section_knows_where_it_came_from() -> None:
    assert refusal("zebra.lr=1").startswith("--set: zebra")


def test_an_unknown_key_of_an_objective_names_the_nearest() -> None:
    said = refusal("objective.name=tinyvit", "objective.temprature=2")
    assert said.startswith("--set: objective.temprature: unknown key; did you mean objective.temperature")


def test_a_key_of_another_objective_says_so() -> None:
    said = refusal("objective.name=tinyvit", "objective.alpha=0.1")
    assert said == "--set: objective.alpha: unknown key of the objective that is chosen"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train.lr=0", "--set: train.lr: input should be greater than 0, not 0"),
        ("train.lr=fast", "--set: train.lr: input should be a valid number"),
        ("train.lr=nan", "--set: train.lr: input should be a finite number"),
        ("train.betas=[0.9, 2]", "train.betas.1: input should be less than or equal to 1, not 2"),
        ("train.seed=-1", "train.seed: input should be greater than or equal to 0"),
        ("train.precision=fp16", "train.precision: input should be 'fp32' or 'bf16', not 'fp16'"),
        ("data.labelled=maybe", "data.labelled: input should be a valid boolean"),
        ("store.codec=zip", "store.codec: input should be 'exact' or 'compact', not 'zip'"),
        (
            "objective.name=dino",
            "objective.name: no such objective, 'dino'; there are supervised, tinyvit, fkd, deit, features",
        ),
        ("objective.alpha=0.5", "objective.name is missing"),
    ],
)
def test_a_wrong_value_is_named_by_its_full_path(text: str, said: str) -> None:
    assert said in refusal(text)


def test_a_wrong_value_of_an_objective_is_named_by_its_full_path() -> None:
    said = refusal("objective.name=deit", "objective.alpha=2")
    assert said == "--set: objective.alpha: input should be less than or equal to 1, not 2"


def test_the_origin_of_a_wrong_element_is_that_of_its_list() -> None:
    assert refusal("train.betas=[0.9, 2]").startswith("--set: train.betas.1")


def test_more_than_one_wrong_value_is_counted() -> None:
    assert refusal("train.lr=0", "train.epochs=0", "train.seed=-1").endswith("(and 2 more)")


def test_a_section_that_is_a_value_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("train = 5\n")
    assert "train: " in refusal(name=str(path))
    assert "train is a value, not a table" in refusal("train.lr=1", name=str(path))


@pytest.mark.parametrize("content", [b"[train\n", b"lr = \xff\n"])
def test_a_file_that_is_no_toml_is_refused_by_its_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(content)
    assert refusal(name=str(path)).startswith(f"{path}: not TOML (")


def test_a_recipe_that_is_not_there_names_the_nearest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "deit-tiny.toml").write_text("")
    monkeypatch.setattr(shipped, "FOLDERS", (tmp_path,))
    assert refusal(name="deit-tinny").startswith("--recipe deit-tinny: no such recipe or file; did you mean deit-tiny?")


@pytest.mark.parametrize(
    ("named", "dropped"),
    [
        ("student.name=levit-128", ("student.drop_path", None)),
        ("teacher.name=resnet18", ("teacher.weights", None)),
        ("objective.name=tinyvit", ("objective.temperature", 1.0)),
    ],
)
def test_naming_another_drops_the_section_of_the_recipe(deit: str, named: str, dropped: tuple[str, object]) -> None:
    loaded = load(deit, [named])
    assert flat(loaded.recipe)[dropped[0]] == dropped[1]
    assert dropped[0] not in loaded.origins
    assert loaded.recipe.train.epochs == 7


def test_naming_another_keeps_what_set_says_of_it(deit: str) -> None:
    recipe = load(deit, ["student.drop_path=0.2"], {"student.name": ("--student", "levit-128")}).recipe
    assert recipe.student.drop_path == 0.2
    objective = load(deit, ["objective.name=tinyvit", "objective.temperature=2"]).recipe.objective
    assert objective == TinyViTConfig(temperature=2)


def test_naming_the_same_keeps_the_section_of_the_recipe(deit: str) -> None:
    recipe = load(deit, flags={"student.name": ("--student", "deit-tiny"), "objective.name": ("--objective", "deit")})
    assert recipe.recipe.student.drop_path == 0.1
    assert recipe.recipe.objective == DeiTConfig(alpha=0.3)


def test_a_recipe_that_names_none_keeps_its_section_whatever_a_flag_names(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("[teacher]\nnum_classes = 21841\n")
    recipe = load(str(path), flags={"teacher.name": ("--teacher", "resnet18")}).recipe
    assert recipe.teacher.num_classes == 21841


def test_a_recipe_written_and_read_is_the_same(deit: str, tmp_path: Path) -> None:
    sets = ["student.kwargs={layers=[1,1]}", "train.betas=[0.8,0.9]", 'data.auto_augment=""', "data.labelled=false"]
    recipe = load(deit, sets).recipe
    path = tmp_path / "again.toml"
    path.write_text(to_toml(recipe))
    assert load(str(path)).recipe == recipe


def test_the_default_recipe_written_and_read_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "default.toml"
    path.write_text(to_toml(Recipe()))
    assert load(str(path)).recipe == Recipe()


@pytest.mark.parametrize(
    "text",
    [
        "runtime.device=cpu",
        "runtime.workers=3",
        "data.path=/elsewhere",
        "data.val=/elsewhere",
        "store.path=/elsewhere",
        "eval.batch_size=7",
        "train.log_every=1",
        "train.save_every=1",
    ],
)
def test_the_fingerprint_ignores_machines_and_places(deit: str, text: str) -> None:
    assert fingerprint(load(deit, [text]).recipe) == fingerprint(load(deit).recipe)


@pytest.mark.parametrize(
    "text",
    ["train.lr=1", "train.seed=1", "student.depth=3", "objective.alpha=0.1", "data.hflip=0", "student.kwargs.a=1"],
)
def test_the_fingerprint_changes_with_the_experiment(deit: str, text: str) -> None:
    assert fingerprint(load(deit, [text]).recipe) != fingerprint(load(deit).recipe)


def test_differences_name_each_field_with_both_values(deit: str) -> None:
    there, asked = load(deit).recipe, load(deit, ["train.lr=0.5", "train.steps=3", "runtime.device=cpu"]).recipe
    assert differences(there, asked) == ["train.lr: 0.001, 0.5", "train.steps: None, 3"]


def test_update_replaces_and_checks(deit: str) -> None:
    recipe = load(deit).recipe
    assert update(recipe, {"train.lr": 0.5}).train.lr == 0.5
    assert update(recipe, {}) == recipe
    with pytest.raises(UsageError, match=r"train\.lr: input should be greater than 0"):
        update(recipe, {"train.lr": -1})


def test_a_recipe_cannot_be_changed_in_place() -> None:
    with pytest.raises(AttributeError):
        parse({}).train.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("name", shipped.recipes())
def test_a_shipped_recipe_is_valid_and_says_what_it_reproduces(name: str) -> None:
    load(name)
    header = list(shipped.header(shipped.find_recipe(name)))
    for word in ("paper", "command", "expected top1"):
        assert any(line.startswith(f"{word}:") for line in header), word
