import json
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from safetensors import safe_open
from torch import nn

from distill_cli.errors import DamagedError, DistillError, MismatchError, UsageError
from distill_cli.students.aliases import ALIASES
from distill_cli.students.build import (
    StudentConfig,
    check_forward,
    constructor_arguments,
    create,
    input_config,
    parameters_in_millions,
    timm_name,
)
from distill_cli.students.weights import Card, digest, fill, read_card, read_weights, save_student

TINY = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}


def resnet(num_classes: int = 3) -> nn.Module:
    return create("resnet18", num_classes=num_classes, arguments=TINY)


@pytest.fixture
def card() -> Card:
    return Card(
        student="resnet18.a1_in1k",
        arguments=TINY,
        num_classes=3,
        classes=("1", "true", 'a "b"'),
        input={"input_size": (3, 28, 28), "mean": (0.5, 0.5, 0.5), "crop_pct": 1.0},
        recipe_sha256="12ab",
        data_fingerprint="34cd",
        objective="supervised",
        top1=50.0,
    )


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_pins_a_tag_of_a_thousand_classes(alias: str) -> None:
    config = timm.get_pretrained_cfg(timm_name(alias))
    assert config is not None
    assert config.tag == ALIASES[alias].partition(".")[2]
    assert config.num_classes == 1000


def test_any_timm_name_is_a_name() -> None:
    assert timm_name("tiny_vit_21m_224.dist_in22k") == "tiny_vit_21m_224.dist_in22k"


@pytest.mark.parametrize(
    ("name", "near"), [("tinyvit-12m", "tinyvit-11m"), ("resnet_18", "resnet18"), ("diet-tiny", "deit-tiny")]
)
def test_an_unknown_name_lists_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UsageError, match=f'{name}: no such model; did you mean .*{near}.*; "distill models ls"'):
        timm_name(name)


def test_an_unknown_tag_is_refused_here_and_not_by_timm() -> None:
    with pytest.raises(UsageError, match=r"tiny_vit_21m_224\.in1k: no such model"):
        timm_name("tiny_vit_21m_224.in1k")


def test_what_is_left_out_is_the_architectures_own() -> None:
    assert constructor_arguments(StudentConfig(name="deit-tiny")) == {}
    assert constructor_arguments(StudentConfig(name="deit-tiny", depth=2, drop_path=0.1, kwargs={"num_heads": 3})) == {
        "depth": 2,
        "drop_path_rate": 0.1,
        "num_heads": 3,
    }


def test_only_an_architecture_of_fixed_input_is_told_the_image_size() -> None:
    assert constructor_arguments(StudentConfig(name="deit-tiny"), 28) == {"img_size": 28}
    assert constructor_arguments(StudentConfig(name="resnet18"), 28) == {}


def test_an_argument_that_the_architecture_has_not_is_named() -> None:
    with pytest.raises(UsageError, match=r"resnet18: timm cannot build it with patch_size=4 \(.*patch_size"):
        create("resnet18", num_classes=3, arguments={"patch_size": 4})


def test_weights_that_cannot_be_fetched_are_not_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(DistillError, match=r"could not be fetched \(no route to host\); give a weights file") as caught:
        create("resnet18", num_classes=3, arguments={}, pretrained=True)
    assert caught.value.exit_code == 1


def test_an_input_that_the_architecture_cannot_take_is_refused_before_any_work() -> None:
    student = create("deit-tiny", num_classes=3, arguments={"img_size": 32, "depth": 1})
    with pytest.raises(UsageError, match=r"deit-tiny: does not take 48 px images \(.*\); set data\.image_size"):
        check_forward(student, "deit-tiny", 48)


def test_checking_the_input_changes_nothing() -> None:
    student = resnet().train()
    before = digest(student.state_dict())
    check_forward(student, "resnet18", 28)
    assert student.training
    assert digest(student.state_dict()) == before


@pytest.mark.parametrize(("size", "crop"), [(28, 1.0), (32, 1.0), (224, 0.95), (None, 0.95)])
def test_a_small_image_is_evaluated_whole(size: int | None, crop: float) -> None:
    config = input_config(create("resnet18.a1_in1k", num_classes=3, arguments=TINY), size)
    assert config["crop_pct"] == crop
    assert config["input_size"] == (3, size or 224, size or 224)


def test_parameters_are_counted_in_millions() -> None:
    assert parameters_in_millions(nn.Linear(1000, 1000, bias=False)) == 1.0


def test_a_saved_student_loads_into_timm_as_its_card_says(tmp_path: Path, card: Card) -> None:
    model, path = resnet(), tmp_path / "student.safetensors"
    save_student(path, model, card)
    with safe_open(path, "pt") as file:
        said = file.metadata()
    again = timm.create_model(said["student"], num_classes=3, **json.loads(said["arguments"]))
    again.load_state_dict(safetensors.torch.load_file(path))
    assert digest(again.state_dict()) == digest(model.state_dict())


def test_a_card_is_read_as_it_was_written(tmp_path: Path, card: Card) -> None:
    path = tmp_path / "student.safetensors"
    save_student(path, resnet(), card)
    found = read_card(path)
    assert found is not None
    assert found.classes == card.classes
    assert (found.recipe_sha256, found.data_fingerprint) == ("12ab", "34cd")
    assert found.input == {"input_size": [3, 28, 28], "mean": [0.5, 0.5, 0.5], "crop_pct": 1.0}
    assert (found.top1, found.teacher) == (50.0, None)


def test_somebody_elses_weights_have_no_card(tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file(resnet().state_dict(), path)
    assert read_card(path) is None
    assert read_card(tmp_path / "theirs.pth") is None


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_torch_checkpoint_is_read_as_well(tmp_path: Path, wrapped: bool) -> None:
    weights, path = resnet().state_dict(), tmp_path / "theirs.pth"
    torch.save({"state_dict": weights, "epoch": 3} if wrapped else weights, path)
    assert digest(read_weights(path)) == digest(weights)


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("ran",)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "theirs.pth"
    torch.save({"state_dict": Harmful()}, path)
    with pytest.raises(DamagedError, match=r"theirs.pth: cannot be read as weights \(.*\); save it as safetensors"):
        read_weights(path)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pth", "other.pkl", "list.pth"])
def test_a_file_that_is_no_weights_is_damaged(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(pickle.dumps([1, 2, 3], protocol=2) if name == "other.pkl" else b"\x08\0\0\0\0\0\0\0{}")
    if name == "list.pth":
        torch.save([torch.zeros(3)], path)
    with pytest.raises(DamagedError, match=f"{name}: cannot be read as weights"):
        read_weights(path)


def test_a_weights_file_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none.pth: no such weights file"):
        read_weights(tmp_path / "none.pth")


def test_weights_of_another_model_are_refused_by_their_keys() -> None:
    weights = dict(resnet(num_classes=4).state_dict())
    weights["extra"] = weights.pop("conv1.weight")
    with pytest.raises(MismatchError) as caught:
        fill(resnet(num_classes=3), weights, Path("w.pth"))
    assert str(caught.value) == (
        "w.pth: does not fit ResNet (missing conv1.weight; unknown extra; fc.weight is [4, 8], not [3, 8]; "
        "fc.bias is [4], not [3]); give the weights of this model"
    )


def test_many_problems_are_counted() -> None:
    with pytest.raises(MismatchError, match=r"; and \d+ more\)"):
        fill(resnet(), {}, Path("w.pth"))


def test_weights_are_digested_by_names_types_shapes_and_values_in_any_order() -> None:
    weights = {"a": torch.zeros(2, 3), "b": torch.ones((), dtype=torch.bfloat16)}
    changed = [
        {**weights, "a": torch.zeros(3, 2)},
        {**weights, "a": torch.zeros(2, 3, dtype=torch.float64)},
        {**weights, "b": 2 * weights["b"]},
        {"c": weights["a"], "b": weights["b"]},
    ]
    assert digest(dict(reversed(weights.items()))) == digest(weights)
    assert len({digest(values) for values in [weights, *changed]}) == 5
