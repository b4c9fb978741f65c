"""A second classifier in training; one, under timm's names, in what is delivered."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from distill_cli.clipping import _classifier
from distill_cli.ema import build_ema
from distill_cli.objectives import Setting, build
from distill_cli.objectives.deit import DeiTConfig
from distill_cli.optim import TrainConfig, parameter_groups
from distill_cli.students.build import parameters_in_millions
from distill_cli.students.second_head import Dropped, add_second_head, second_head, timm_weights
from distill_cli.students.weights import Card, save_student

TINYVIT = {"depths": [1, 1, 1, 1], "embed_dims": [16, 32, 32, 32], "num_heads": [1, 2, 2, 2]}
STUDENTS: dict[str, dict[str, Any]] = {
    "tiny_vit_5m_224": TINYVIT,
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]},
    "resnet18": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3},
    "mobilenetv3_small_050": {},
}


def make(name: str, how: str = "average") -> nn.Module:
    """With heads that differ."""
    torch.manual_seed(0)
    student = timm.create_model(name, num_classes=5, **STUDENTS[name])
    add_second_head(student, how, 32)
    with torch.no_grad():
        for parameter in second_head(student).parameters():
            parameter.normal_()
    return student


@pytest.mark.parametrize("how", ["average", "drop"])
@pytest.mark.parametrize("name", STUDENTS)
@torch.no_grad()
def test_what_is_delivered_is_timm_s_model_as_it_was_evaluated(name: str, how: str) -> None:
    student, images = make(name, how), torch.randn(2, 3, 32, 32)
    delivered = timm.create_model(name, num_classes=5, **STUDENTS[name])
    delivered.load_state_dict(timm_weights(student))
    assert torch.equal(delivered.eval()(images), student.eval()(images))
    assert parameters_in_millions(student) == parameters_in_millions(delivered)


@torch.no_grad()
def test_the_average_is_the_mean_of_both_heads_logits_and_a_dropped_one_says_nothing() -> None:
    images = torch.randn(2, 3, 32, 32)
    student = make("vit_tiny_patch16_224").eval()
    features = student.forward_head(student.forward_features(images), pre_logits=True)
    mean = (student.head(features) + student.head_dist(features)) / 2
    torch.testing.assert_close(student(images), mean)
    assert not isinstance(student.train()(images), Dropped)
    dropped = make("vit_tiny_patch16_224", "drop")
    assert torch.equal(dropped.eval()(images), dropped.head(features))
    assert isinstance(dropped.train()(images), Dropped)


@torch.no_grad()
def test_a_student_begins_as_it_was() -> None:
    images = torch.randn(2, 3, 32, 32)
    student = timm.create_model("resnet18", num_classes=5, **STUDENTS["resnet18"]).eval()
    before = student(images)
    add_second_head(student, "average", 32)
    assert torch.equal(student(images), before)
    assert student.training is False


def test_an_average_of_the_weights_has_both_heads() -> None:
    student, images = make("vit_tiny_patch16_224"), torch.randn(2, 3, 32, 32)
    ema = build_ema(student, TrainConfig(ema_decay=0.5))
    with torch.no_grad():
        student.head_dist.weight += 1
        ema.update(student, 1)
        ema.update(student, 2)
        assert ema.module.state_dict().keys() == student.state_dict().keys()
        assert torch.equal(ema.module.eval()(images), copy.deepcopy(student).eval()(images))


@pytest.mark.parametrize("name", STUDENTS)
def test_layer_decay_takes_it_for_a_head(name: str) -> None:
    student = timm.create_model(name, num_classes=5, **STUDENTS[name])
    objective = build(DeiTConfig(), student, Setting(32))
    groups = parameter_groups(objective, TrainConfig(layer_decay=0.5))
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert scale[id(student.head_dist.weight)] == scale[id(student.get_classifier().weight)] == 1


def test_agc_leaves_it_alone_as_it_does_the_first() -> None:
    student = make("resnet18")
    assert _classifier(student) == {*student.fc.parameters(), *student.head_dist.parameters()}


def test_what_a_run_delivers_loads_into_timm(tmp_path: Path) -> None:
    student = timm.create_model("resnet18", num_classes=5, layers=[1, 1, 1, 1], channels=[8, 8, 8, 8])
    add_second_head(student, "average", 32)
    torch.nn.init.normal_(student.get_submodule("head_dist").weight)
    save_student(tmp_path / "student.safetensors", student, Card("resnet18", {}, 5, None, {}, "0", "0", "deit"))
    fresh = timm.create_model("resnet18", num_classes=5, layers=[1, 1, 1, 1], channels=[8, 8, 8, 8])
    fresh.load_state_dict(load_file(tmp_path / "student.safetensors"))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(fresh.eval()(images), student.eval()(images), rtol=1e-4, atol=1e-5)
