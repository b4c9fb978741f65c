import pytest
import timm
from torch import nn

from distill_cli.errors import DistillError, UsageError
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
from distill_cli.students.weights import digest

TINY = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}


def resnet(num_classes: int = 3) -> nn.Module:
    return create("resnet18", num_classes=num_classes, arguments=TINY)


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
    with pytest.raises(UsageError, match=r"tiny_vit_21m_224\.in2k: timm has no such weights"):
        timm_name("tiny_vit_21m_224.in2k")


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


def test_a_model_that_was_built_for_another_size_has_that() -> None:
    arguments = {"img_size": 64, "depth": 1, "embed_dim": 24}
    model = create("vit_tiny_patch16_224", num_classes=3, arguments=arguments)
    assert input_config(model)["input_size"] == (3, 64, 64)
    assert input_config(model, 96)["input_size"] == (3, 96, 96)


def test_parameters_are_counted_in_millions() -> None:
    assert parameters_in_millions(nn.Linear(1000, 1000, bias=False)) == 1.0
