"""What a student becomes for the machine that trains it."""

from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from timm.layers.norm_act import SyncBatchNormAct
from torch import nn

from distill_cli.distributed import World
from distill_cli.engine import check_engine, prepare
from distill_cli.errors import UsageError
from distill_cli.recipe import Recipe, parse

CPU = torch.device("cpu")
TWO = World(CPU, 0, 2)
SYNCED = {"train.sync_bn": True}


def kinds(model: nn.Module) -> set[type[nn.Module]]:
    return {type(each) for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)}


# train.sync_bn.


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("tiny_vit_5m_224", nn.BatchNorm2d, nn.SyncBatchNorm),
        ("levit_128s", nn.BatchNorm1d, nn.SyncBatchNorm),
        ("test_byobnet", BatchNormAct2d, SyncBatchNormAct),
    ],
)
def test_every_batch_norm_is_synchronised_under_the_same_names(
    name: str, before: type[nn.Module], after: type[nn.Module]
) -> None:
    student = timm.create_model(name, num_classes=3)
    weights = student.state_dict()
    assert before in kinds(student)
    images = torch.randn(2, 3, *student.pretrained_cfg["input_size"][1:])
    evaluated = student.eval()(images)
    synced = prepare(student, parse(SYNCED), TWO)
    assert after in kinds(synced)
    assert kinds(synced) <= {nn.SyncBatchNorm, SyncBatchNormAct}
    assert list(synced.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[key]) for key, value in synced.state_dict().items())
    assert torch.equal(synced.eval()(images), evaluated)


@pytest.mark.parametrize(("recipe", "world"), [(parse(SYNCED), World(CPU)), (Recipe(), TWO)])
def test_one_rank_alone_or_not_asked_for_leaves_the_student_as_it_is(recipe: Recipe, world: World) -> None:
    student = timm.create_model("test_byobnet", num_classes=3)
    before = kinds(student)
    check_engine(recipe, world)
    assert prepare(student, recipe, world) is student
    assert kinds(student) == before


def test_ranks_on_the_cpu_cannot_synchronise() -> None:
    with pytest.raises(UsageError, match="torch has no SyncBatchNorm on the CPU; leave it out, or train on CUDA"):
        check_engine(parse(SYNCED), TWO)


def test_torch_still_has_no_synchronised_batch_norm_on_the_cpu(tmp_path: Path) -> None:
    """Where this fails the refusal can go."""
    dist.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="expected input tensor to be on"):
            nn.SyncBatchNorm(3).train()(torch.randn(2, 3, 4, 4))
    finally:
        dist.destroy_process_group()


# runtime.channels_last.


@pytest.mark.parametrize(
    ("asked", "device", "name", "last"),
    [
        ("auto", "cpu", "resnet18", False),
        ("auto", "cuda", "resnet18", True),
        ("auto", "cuda", "tiny_vit_5m_224", True),
        ("auto", "cuda", "deit_tiny_distilled_patch16_224", False),
        (True, "cpu", "resnet18", True),
        (False, "cuda", "resnet18", False),
    ],
)
def test_convolutions_lie_channels_last_where_it_is_asked_for_or_helps(
    asked: bool | str, device: str, name: str, last: bool
) -> None:
    student = timm.create_model(name, num_classes=3)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    student = prepare(student, parse({"runtime.channels_last": asked}), World(torch.device(device)))
    weights = [each.weight for each in student.modules() if isinstance(each, nn.Conv2d) and each.kernel_size > (1, 1)]
    found = {weight.is_contiguous(memory_format=torch.channels_last) for weight in weights if weight.shape[1] > 1}
    assert found == {last}
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_what_comes_out_of_such_convolutions_lies_so_too() -> None:
    student = prepare(timm.create_model("test_byobnet"), parse({"runtime.channels_last": True}), World(CPU))
    features = student.forward_features(torch.randn(2, 3, 64, 64))
    assert features.is_contiguous(memory_format=torch.channels_last)


# runtime.compile.


def test_cuda_graphs_need_cuda() -> None:
    with pytest.raises(UsageError, match="cuda-graphs needs CUDA; give --compile, or train on CUDA"):
        check_engine(parse({"runtime.compile": "cuda-graphs"}), World(CPU))


@pytest.mark.parametrize("name", ["tinymim", "dmae"])
def test_a_pass_that_is_no_whole_one_is_not_compiled(name: str) -> None:
    line = f"^--compile: objective {name} makes no whole pass of the student; leave one of them out"
    with pytest.raises(UsageError, match=line):
        check_engine(parse({"runtime.compile": True, "objective.name": name}), World(CPU))


@pytest.mark.parametrize(("variable", "said"), [(None, r"no g\+\+|no clang\+\+"), ("ccache no-such-c++", "no ccache")])
def test_without_a_compiler_there_is_one_line(
    variable: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if variable:
        monkeypatch.setenv("CXX", variable)
    with pytest.raises(UsageError, match=rf"--compile: torch.compile needs a compiler, and there is ({said}); install"):
        check_engine(parse({"runtime.compile": True}), World(CPU))
    check_engine(Recipe(), World(CPU))
