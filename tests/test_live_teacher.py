"""A teacher beside the student: what it sees, how often it looks, and how far."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from distill_cli.errors import UsageError
from distill_cli.live_teacher import LiveTeacher
from distill_cli.students.taps import Enough, Taps, glimpse
from distill_cli.teachers import Frozen

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Counting(nn.Module):
    """A model whose layers count how often they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 7)
        self.done: list[str] = []
        for name, module in self.named_children():
            module.register_forward_hook(lambda *_, name=name: self.done.append(name))
        self.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.25,) * 3}

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(self.first(images)).mean((2, 3)))


def make(model: nn.Module) -> LiveTeacher:
    return LiveTeacher(Frozen("t", model.eval(), "", 7, None), MEAN, STD, torch.device("cpu"))


def test_it_sees_the_same_pixels_by_its_own_normalisation_and_size() -> None:
    pixels = torch.rand(2, 3, 8, 8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    teacher = make(Counting())
    torch.testing.assert_close(teacher.normalised((pixels - mean) / std), (pixels - 0.5) / 0.25)
    assert teacher.normalised(torch.rand(2, 3, 12, 12)).shape == (2, 3, 8, 8)


def test_it_looks_once_at_a_batch_however_many_ask() -> None:
    model = Counting()
    teacher = make(model)
    teacher.tap("first")
    images = torch.rand(2, 3, 8, 8)
    rows, inside = teacher.rows(images), teacher.inside(images)
    assert model.done == ["first", "second", "head"]
    torch.testing.assert_close(rows.log_prob[:, 0], model(teacher.normalised(images)).log_softmax(-1).amax(-1))
    torch.testing.assert_close(inside["first"], model.first(teacher.normalised(images)))
    teacher.inside(images.clone())
    assert model.done.count("head") == 3


def test_logits_may_be_asked_for_after_layers() -> None:
    model = Counting()
    teacher = make(model)
    teacher.tap("first")
    images = torch.rand(2, 3, 8, 8)
    teacher.inside(images)
    assert model.done == ["first"]
    assert teacher.rows(images).log_prob.shape == (2, 7)


def test_it_looks_no_further_than_it_is_asked() -> None:
    model = Counting()
    teacher = make(model)
    teacher.tap("second:input")
    assert teacher.inside(torch.rand(2, 3, 8, 8)).keys() == {"second:input"}
    assert model.done == ["first"]


def test_nothing_of_it_has_a_gradient() -> None:
    teacher = make(Counting())
    teacher.tap("first")
    assert not teacher.inside(torch.rand(1, 3, 8, 8, requires_grad=True))["first"].requires_grad


def test_a_layer_that_it_has_not_is_named_with_the_nearest() -> None:
    model = timm.create_model("test_vit")
    with pytest.raises(UsageError, match=r"blocks\.77: VisionTransformer has no such layer; did you mean blocks"):
        make(model).tap("blocks.77")


def test_taps_give_inputs_and_outputs_once() -> None:
    model = Counting()
    taps = Taps(model, ["second", "head:input"])
    model(torch.rand(2, 3, 8, 8))
    found = taps.take()
    torch.testing.assert_close(found["head:input"], found["second"].mean((2, 3)))
    assert not taps.take()


def test_taps_are_of_their_model_and_not_of_a_copy() -> None:
    model = Counting()
    taps = Taps(model, ["first", "head:input"])
    copy.deepcopy(model)(torch.rand(2, 3, 8, 8))
    assert not taps.take()
    taps.remove()
    model(torch.rand(2, 3, 8, 8))
    assert not taps.take()


def test_taps_of_training_leave_evaluation_alone() -> None:
    model = Counting()
    taps = Taps(model, ["first"], only_in_training=True)
    model.eval()(torch.rand(2, 3, 8, 8))
    assert not taps.take()
    # A layer that is kept in evaluation, as frozen BatchNorm is, belongs to the pass of training all the same.
    model.train()
    model.first.eval()
    model(torch.rand(2, 3, 8, 8))
    assert taps.take().keys() == {"first"}


def test_a_glimpse_leaves_a_model_as_it_was() -> None:
    model = timm.create_model("resnet10t", num_classes=3).train()
    before = copy.deepcopy(model.state_dict())
    found = glimpse(model, ["layer1", "fc:input"], torch.rand(2, 3, 32, 32))
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "layer1": (2, 64, 8, 8),
        "fc:input": (2, 512),
    }
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_teacher_that_was_built_for_another_size_is_shown_images_of_it() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3)
    teacher = make(model.requires_grad_(False))
    assert teacher.image_size == 32
    assert teacher.glimpse(["blocks.0"], 28)["blocks.0"].shape == (1, 17, 48)


def test_a_tapped_model_can_stop_early() -> None:
    model = Counting()
    taps = Taps(model, ["first"], stop=True)
    with pytest.raises(Enough):
        model(torch.rand(2, 3, 8, 8))
    assert model.done == ["first"]
    assert taps.take().keys() == {"first"}
