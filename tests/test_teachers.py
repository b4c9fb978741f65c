from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from distill_cli.errors import DamagedError, DistillError, MismatchError, UsageError
from distill_cli.students.build import create
from distill_cli.students.weights import Card, save_student
from distill_cli.teachers import TeacherConfig, check_classifier, load_frozen

TINY = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}


def refusal(config: TeacherConfig, flag: str = "--teacher") -> DistillError:
    with pytest.raises(DistillError) as caught:
        load_frozen(config, flag)
    return caught.value


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A small ResNet's, of three classes."""
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(create("resnet18", num_classes=3, arguments=TINY).state_dict(), path)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of a small ResNet of three classes."""
    path = tmp_path / "run"
    path.mkdir()
    card = Card(
        student="resnet18.a1_in1k",
        arguments=TINY,
        num_classes=3,
        classes=("bag", "boot", "coat"),
        input={
            "input_size": (3, 28, 28),
            "mean": (0.1, 0.2, 0.3),
            "std": (1.0, 1.0, 1.0),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
        },
        recipe_sha256="1",
        data_fingerprint="2",
        objective="supervised",
    )
    save_student(path / "student.safetensors", create("resnet18", num_classes=3, arguments=TINY), card)
    (path / "result.json").write_text("{}")
    return path


def test_an_untrained_teacher_is_refused() -> None:
    error = refusal(TeacherConfig(name="resnet18"))
    assert error.exit_code == 2
    assert str(error) == (
        "--teacher resnet18: has no weights, and an untrained head cannot teach; "
        "give --teacher-weights FILE or --pretrained, or a run directory"
    )


def test_the_refusal_names_the_flag_of_the_command() -> None:
    assert str(refusal(TeacherConfig(name="resnet18"), "--model")).startswith("--model resnet18: has no weights")
    assert "give --weights FILE" in str(refusal(TeacherConfig(name="resnet18"), "--model"))


def test_no_teacher_at_all_is_refused() -> None:
    assert refusal(TeacherConfig()).exit_code == 2


def test_an_unknown_teacher_names_the_nearest() -> None:
    assert "did you mean resnet18" in str(refusal(TeacherConfig(name="resnet_18")))


def test_the_weights_decide_the_class_count(weights: Path) -> None:
    found = load_frozen(TeacherConfig(name="resnet18", weights=str(weights), kwargs=TINY))
    assert found.num_classes == 3
    assert found.model(torch.zeros(1, 3, 28, 28)).shape == (1, 3)
    assert (found.classes, found.card) == (None, None)


def test_another_class_count_than_expected_is_refused_with_both(weights: Path) -> None:
    error = refusal(TeacherConfig(name="resnet18", weights=str(weights), kwargs=TINY, num_classes=21841))
    assert isinstance(error, MismatchError)
    assert "its weights have 3 classes, teacher.num_classes says 21841" in str(error)


def test_a_run_is_held_to_the_expected_class_count_too(run: Path) -> None:
    assert refusal(TeacherConfig(name=str(run), num_classes=4)).exit_code == 3


def test_a_teacher_with_two_heads_is_told_by_the_first(tmp_path: Path) -> None:
    kwargs = {"depth": 1, "embed_dim": 12, "num_heads": 3}
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=4, **kwargs)
    torch.save(model.state_dict(), tmp_path / "deit.pth")
    found = load_frozen(TeacherConfig(name="deit-tiny", weights=str(tmp_path / "deit.pth"), kwargs=kwargs))
    assert found.num_classes == 4


def test_weights_without_a_classifier_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "features.pth"
    torch.save(create("resnet18", num_classes=0, arguments=TINY).state_dict(), path)
    error = refusal(TeacherConfig(name="resnet18", weights=str(path), kwargs=TINY))
    assert isinstance(error, MismatchError)
    assert f"{path}: has no fc.weight, the head of resnet18" in str(error)


def test_weights_that_never_had_a_classifier_have_no_classes_and_no_logits(tmp_path: Path) -> None:
    path, small = tmp_path / "mae.safetensors", {"depth": 1, "embed_dim": 12, "num_heads": 3}
    safetensors.torch.save_file(create("vit_base_patch16_224.mae", num_classes=0, arguments=small).state_dict(), path)
    found = load_frozen(TeacherConfig(name="vit_base_patch16_224.mae", weights=str(path), kwargs=small))
    assert found.num_classes == 0
    with pytest.raises(
        MismatchError, match=r"^--teacher mae: has no logits, as these weights have no classifier; give"
    ):
        check_classifier(found, "--teacher mae")


def test_weights_of_another_architecture_are_refused_by_their_keys(weights: Path) -> None:
    error = refusal(TeacherConfig(name="resnet18", weights=str(weights)))
    assert isinstance(error, MismatchError)
    assert f"{weights}: does not fit ResNet (missing layer1.1.conv1.weight; " in str(error)


def test_a_teacher_is_frozen_and_in_evaluation_mode(weights: Path) -> None:
    model = load_frozen(TeacherConfig(name="resnet18", weights=str(weights), kwargs=TINY)).model
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_run_says_itself_what_it_is(run: Path) -> None:
    found = load_frozen(TeacherConfig(name=str(run)))
    assert (found.name, found.num_classes, found.classes) == ("resnet18.a1_in1k", 3, ("bag", "boot", "coat"))
    assert found.input(None)["mean"] == [0.1, 0.2, 0.3]


def test_the_weights_file_of_a_run_says_it_too(run: Path) -> None:
    from_file = load_frozen(TeacherConfig(name="resnet18.a1_in1k", weights=str(run / "student.safetensors")))
    assert from_file.classes == ("bag", "boot", "coat")
    assert from_file.weights_sha256 == load_frozen(TeacherConfig(name=str(run))).weights_sha256


def test_the_same_weights_in_another_file_are_the_same_teacher(weights: Path, tmp_path: Path) -> None:
    torch.save({"model": safetensors.torch.load_file(weights)}, tmp_path / "again.pth")
    one, other = (
        load_frozen(TeacherConfig(name="resnet18", weights=str(path), kwargs=TINY)).weights_sha256
        for path in (weights, tmp_path / "again.pth")
    )
    assert one == other


@pytest.mark.parametrize("missing", ["result.json", "student.safetensors"])
def test_a_run_that_is_not_finished_is_refused(run: Path, missing: str) -> None:
    (run / missing).unlink()
    error = refusal(TeacherConfig(name=str(run)))
    assert isinstance(error, DamagedError)
    assert str(error) == f"{run}: not a finished run; run its distill train command again to finish it"


def test_a_run_with_a_damaged_student_is_refused(run: Path) -> None:
    path = run / "student.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert refusal(TeacherConfig(name=str(run))).exit_code == 4


def test_weights_beside_a_run_are_refused_and_not_ignored(run: Path, weights: Path) -> None:
    error = refusal(TeacherConfig(name=str(run), weights=str(weights)))
    assert isinstance(error, UsageError)
