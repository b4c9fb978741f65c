import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill_cli.errors import DamagedError, MismatchError, UsageError
from distill_cli.students.weights import Card, digest, fill, read_card, read_weights, save_student

NAME, ARGUMENTS = "test_vit.r160_in1k", {"img_size": 32, "patch_size": 8}
CARD = Card(
    student=NAME,
    arguments=ARGUMENTS,
    num_classes=3,
    classes=("boot", "coat", "shirt"),
    input={"input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5], "interpolation": "bicubic", "crop_pct": 0.9},
    recipe_sha256="1abc" * 16,
    data_fingerprint="2abc" * 16,
    objective="deit",
    teacher="vit_tiny",
    store="3abc" * 16,
    top1=81.25,
    software={"torch": "2.7.0"},
)


def _student() -> nn.Module:
    return timm.create_model(NAME, num_classes=3, **ARGUMENTS)


@pytest.fixture(scope="module")
def student() -> nn.Module:
    return _student()


@pytest.fixture
def written(tmp_path: Path, student: nn.Module) -> Path:
    save_student(tmp_path / "student.safetensors", student, CARD)
    return tmp_path / "student.safetensors"


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_weights_and_card_come_back(written: Path, student: nn.Module) -> None:
    assert _equal(read_weights(written), student.state_dict())
    assert read_card(written) == CARD


@pytest.mark.parametrize(
    "change",
    [
        {"classes": None, "teacher": None, "store": None, "top1": None, "software": None},
        {"classes": ("0", "1", "null"), "arguments": {}},
        {"classes": ("naïve", 'quo"te', "日本")},
        {"classes": (os.fsdecode(b"caf\xe9"),)},
        {"top1": 0.0, "top5": 100.0},
        {"teacher": "2024"},
        {"objective": "true"},
    ],
)
def test_any_card_comes_back(tmp_path: Path, change: dict[str, Any]) -> None:
    card = replace(CARD, **change)
    save_student(tmp_path / "a.safetensors", nn.Linear(1, 1), card)
    assert read_card(tmp_path / "a.safetensors") == card


def test_a_student_loads_with_timm_and_safetensors_alone(written: Path, student: nn.Module) -> None:
    from safetensors import safe_open

    with safe_open(written, "pt") as file:
        card = file.metadata()
    model = timm.create_model(card["student"], num_classes=3, **json.loads(card["arguments"])).eval()
    model.load_state_dict(load_file(written))
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(images), student.eval()(images))


def _save(path: Path) -> bytes:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_student(path, _student(), CARD)
    return path.read_bytes()


def test_equal_students_are_equal_bytes_in_every_process(tmp_path: Path, other_process: ProcessPoolExecutor) -> None:
    assert _save(tmp_path / "here") == other_process.submit(_save, tmp_path / "there").result()


def test_other_peoples_weights_have_no_card(tmp_path: Path, student: nn.Module) -> None:
    save_file(student.state_dict(), tmp_path / "a.safetensors")
    torch.save(student.state_dict(), tmp_path / "a.pth")
    assert read_card(tmp_path / "a.safetensors") is None
    assert read_card(tmp_path / "a.pth") is None


def test_a_card_with_fields_left_out_is_damage(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", {"recipe_sha256": "1"})
    with pytest.raises(DamagedError):
        read_card(tmp_path / "a.safetensors")


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_a_torch_checkpoint_is_unwrapped(tmp_path: Path, student: nn.Module, key: str | None) -> None:
    weights = student.state_dict()
    torch.save({key: weights, "epoch": 3} if key else weights, tmp_path / "a.pth")
    assert _equal(read_weights(tmp_path / "a.pth"), student.state_dict())


class _Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(1)}, "args": _Code(tmp_path / "ran")}, tmp_path / "a.pth")
    with pytest.raises(DamagedError, match=r"cannot be read as weights .*; save it as safetensors") as caught:
        read_weights(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"abc", b"<!DOCTYPE html>", b"version https://git-lfs", b"PK\3\4", b"\x80\2."]
)
def test_what_holds_no_weights_is_damage(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DamagedError, match=f"{name}: cannot be read as weights"):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("value", [[1, 2], 3, None, {"state_dict": [1]}])
def test_a_checkpoint_of_other_things_is_damage(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "a.pth")
    with pytest.raises(DamagedError, match=r"a\.pth: cannot be read as weights"):
        read_weights(tmp_path / "a.pth")


def test_a_cut_short_student_is_damage(written: Path) -> None:
    written.write_bytes(written.read_bytes()[:-1])
    for read in (read_card, read_weights):
        with pytest.raises(DamagedError, match=r"student.safetensors: (not a readable|cannot be read)"):
            read(written)


def test_a_file_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a\.pth: no such weights file"):
        read_weights(tmp_path / "a.pth")


def test_weights_that_fit_fill_a_model(student: nn.Module, tmp_path: Path) -> None:
    model = _student()
    fill(model, student.state_dict(), tmp_path)
    assert _equal(model.state_dict(), student.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": None}, r"a.pth: does not fit Linear \(missing weight\); give the weights of this model"),
        ({"scale": torch.ones(1)}, r"\(unknown scale\)"),
        ({"weight": torch.ones(3, 2)}, r"\(weight is \[3, 2\], not \[2, 3\]\)"),
        ({"weight": None, "bias": None, **dict.fromkeys("abc", torch.ones(1))}, r"missing weight; .*; and 1 more\)"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_nothing_is_loaded(change: dict[str, Any], message: str) -> None:
    model = nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {"weight": torch.ones(2, 3), "bias": torch.ones(2), **change}
    with pytest.raises(MismatchError, match=message):
        fill(model, {name: tensor for name, tensor in weights.items() if tensor is not None}, Path("a.pth"))
    assert _equal(model.state_dict(), before)


def test_a_digest_does_not_depend_on_the_container(tmp_path: Path, written: Path, student: nn.Module) -> None:
    weights = student.state_dict()
    torch.save({"state_dict": dict(reversed(weights.items()))}, tmp_path / "a.pth")
    turned = {name: tensor.T.contiguous().T if tensor.ndim == 2 else tensor for name, tensor in weights.items()}
    digests = [digest(w) for w in (weights, turned, read_weights(written), read_weights(tmp_path / "a.pth"))]
    assert len(set(digests)) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.zeros(2, 2)},
        {"a": torch.zeros(4)},
        {"a": torch.zeros(2, 2, dtype=torch.float16)},
        {"a": torch.tensor([[0.0, 0.0], [0.0, 1e-30]])},
        {"a": torch.zeros(2, 2), "b": torch.zeros(0)},
    ],
)
def test_other_names_shapes_types_or_bits_are_another_digest(other: dict[str, Tensor]) -> None:
    assert digest(other) != digest({"a": torch.zeros(2, 2)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool])
def test_every_type_has_a_digest(dtype: torch.dtype) -> None:
    assert digest({"a": torch.tensor(1, dtype=dtype)}) != digest({"a": torch.tensor(0, dtype=dtype)})
