"""DMAE against a reference that shares nothing with it: one image, one token, one head at a time, in float64."""

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from pydantic import ValidationError
from small import CLASSES, SETTING, make_batch, make_live, make_plain, make_student, part
from torch import Tensor, nn

from distill_cli.data.batch import Batch
from distill_cli.errors import UsageError
from distill_cli.live_teacher import LiveTeacher
from distill_cli.objectives.dmae import (
    DMAE,
    DecoderConfig,
    DMAEConfig,
    patchify,
    pixel_error,
    random_order,
    token_distance,
)
from distill_cli.objectives.ramps import Ramp
from distill_cli.objectives.supervised import Supervised, SupervisedConfig
from distill_cli.objectives.terms import Terms
from distill_cli.randomness import derive, uniforms
from distill_cli.report import Report
from distill_cli.sparse import top_k
from distill_cli.teachers import Frozen
from distill_cli.teaching import leave_out

SIDE, PATCH, VISIBLE = 4, 7, 4
SMALL = DecoderConfig(depth=1, width=32, heads=2)
Weights = Mapping[str, Tensor]


def make(student: nn.Module | None = None, teacher: LiveTeacher | None = None, **settings: Any) -> DMAE:
    config = DMAEConfig(**({"decoder": SMALL} | settings))
    return DMAE(student or make_plain(), config, replace(SETTING, teacher=teacher or make_live())).train()


class Reference:
    """The loss of a batch, from the weights of an objective and its teacher."""

    def __init__(self, objective: DMAE) -> None:
        self.config = objective.config
        self.weights = {name: value.detach().double().requires_grad_() for name, value in objective.named_parameters()}
        self.teacher = {name: value.double() for name, value in objective.teacher.model.state_dict().items()}

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """L_MAE and the sum of L_dist."""
        errors, distances = [], [[] for _ in self.config.blocks or [(1, 2)]]
        for image, sample_id in zip(batch.images.double(), batch.sample_ids, strict=True):
            draws = uniforms([derive("mask", 0, 0, int(sample_id))], SIDE * SIDE, torch.device("cpu"))[0].tolist()
            order = sorted(range(SIDE * SIDE), key=draws.__getitem__)
            student = self.vit(below(self.weights, "student."), image, order[:VISIBLE], heads=3, depth=2)
            # From ImageNet's mean and deviation to a half and a half.
            mean, std = (torch.tensor(values).double().view(3, 1, 1) for values in (SETTING.mean, SETTING.std))
            seen = (image * std + mean - 0.5) / 0.5
            teacher = self.vit(self.teacher, seen, order[:VISIBLE], heads=4, depth=3)
            for pair, (ours, theirs) in enumerate(self.config.blocks or [(1, 2)]):
                for token, target in zip(student[ours], teacher[theirs], strict=True):
                    token = self.project(token, pair)
                    if self.config.normalise:
                        token, target = token / token.square().sum().sqrt(), target / target.square().sum().sqrt()
                    distances[pair].append((token - target).abs().mean())
            last = self.layer_norm(student[2], below(self.weights, "student.norm."))
            painted = self.decode(last, order)
            for number in order[VISIBLE:]:
                pixels = self.pixels(image, number).movedim(0, -1).flatten()
                if self.config.norm_pix:
                    centred = pixels - pixels.mean()
                    pixels = centred / (centred.square().sum() / (len(pixels) - 1) + 1e-6).sqrt()
                errors.append((painted[number] - pixels).square().mean())
        return torch.stack(errors).mean(), sum(torch.stack(each).mean() for each in distances)

    def vit(self, weights: Weights, image: Tensor, keep: list[int], heads: int, depth: int) -> list[Tensor]:
        """Its tokens, class token first: embedded, and behind each block."""
        kernel = weights["patch_embed.proj.weight"]
        tokens = [weights["cls_token"][0, 0] + weights["pos_embed"][0, 0]]
        for number in keep:
            embedded = kernel.flatten(1) @ self.pixels(image, number).flatten() + weights["patch_embed.proj.bias"]
            tokens.append(embedded + weights["pos_embed"][0, 1 + number])
        states = [torch.stack(tokens)]
        for number in range(depth):
            states.append(self.block(states[-1], below(weights, f"blocks.{number}."), heads))
        return states

    def decode(self, tokens: Tensor, order: list[int]) -> dict[int, Tensor]:
        weights = below(self.weights, "decoder.")
        embedded = linear(tokens, below(weights, "embed."))
        patches = dict(zip(order[:VISIBLE], embedded[1:], strict=True))
        sequence = [embedded[0]]
        for number in range(SIDE * SIDE):
            sequence.append(patches.get(number, weights["mask_token"]) + self.position(number))
        state = torch.stack(sequence)
        for number in range(self.config.decoder.depth):
            state = self.block(state, below(weights, f"blocks.{number}."), self.config.decoder.heads)
        painted = linear(self.layer_norm(state, below(weights, "norm.")), below(weights, "predict."))
        return dict(enumerate(painted[1:]))

    def position(self, number: int) -> Tensor:
        """Sines, then cosines, each of row and column."""
        bands = self.config.decoder.width // 4
        angles = [place / 10000 ** (band / bands) for place in (number // SIDE, number % SIDE) for band in range(bands)]
        return torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64)

    def project(self, token: Tensor, pair: int) -> Tensor:
        weights = below(self.weights, f"projections.{pair}.")
        if self.config.projection == "linear":
            return linear(token, weights)
        return linear(gelu(linear(token, below(weights, "fc1."))), below(weights, "fc2."))

    def block(self, tokens: Tensor, weights: Weights, heads: int) -> Tensor:
        packed = linear(self.layer_norm(tokens, below(weights, "norm1.")), below(weights, "attn.qkv."))
        queries, keys, values = packed.chunk(3, dim=1)
        width = queries.shape[1] // heads
        mixed = []
        for head in range(heads):
            q, k, v = (each[:, head * width : (head + 1) * width] for each in (queries, keys, values))
            scores = (q @ k.T / math.sqrt(width)).exp()
            mixed.append(scores / scores.sum(1, keepdim=True) @ v)
        tokens = tokens + linear(torch.cat(mixed, dim=1), below(weights, "attn.proj."))
        hidden = gelu(linear(self.layer_norm(tokens, below(weights, "norm2.")), below(weights, "mlp.fc1.")))
        return tokens + linear(hidden, below(weights, "mlp.fc2."))

    @staticmethod
    def layer_norm(tokens: Tensor, weights: Weights) -> Tensor:
        centred = tokens - tokens.mean(1, keepdim=True)
        scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return scaled * weights["weight"] + weights["bias"]

    @staticmethod
    def pixels(image: Tensor, number: int) -> Tensor:
        """A patch: `[3, 7, 7]`."""
        row, column = PATCH * (number // SIDE), PATCH * (number % SIDE)
        return image[:, row : row + PATCH, column : column + PATCH]


def below(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def linear(tokens: Tensor, weights: Weights) -> Tensor:
    return tokens @ weights["weight"].T + weights["bias"]


def gelu(values: Tensor) -> Tensor:
    return values * (1 + torch.erf(values / math.sqrt(2))) / 2


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"normalise": False, "norm_pix": True, "alpha": 0.3},
        {"blocks": ((1, 1), (2, 3), (1, 3)), "projection": "mlp", "decoder": DecoderConfig(depth=2, width=24, heads=3)},
    ],
)
def test_it_is_the_reference(settings: dict[str, Any]) -> None:
    objective, batch = make(**settings), make_batch(3)
    reference = Reference(objective)
    objective.double().teacher.model.double()
    losses = objective(replace(batch, images=batch.images.double()))
    reconstruct, distill = reference.loss(batch)
    torch.testing.assert_close(losses.parts["reconstruct"].double(), reconstruct.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.parts["distill"].double(), distill.detach(), rtol=1e-5, atol=0)
    total = reconstruct + settings.get("alpha", 1.0) * distill
    torch.testing.assert_close(losses.total.double(), total, rtol=1e-5, atol=0)
    losses.total.backward()
    total.backward()
    ours = {name: value.grad for name, value in objective.named_parameters() if value.grad is not None}
    theirs = {name: value.grad for name, value in reference.weights.items() if value.grad is not None}
    assert {"student.cls_token", "student.pos_embed", "decoder.mask_token"} <= theirs.keys()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def twins() -> tuple[nn.Module, LiveTeacher]:
    """A student and the same model as its teacher, which sees the same values."""
    student = make_plain()
    model = copy.deepcopy(student).eval().requires_grad_(False)
    frozen = Frozen("twin", model, weights_sha256="", num_classes=CLASSES, classes=None)
    own = frozen.input(None)
    return student, LiveTeacher(frozen, own["mean"], own["std"], torch.device("cpu"))


@pytest.mark.parametrize("normalise", [True, False])
def test_a_student_that_is_its_teacher_is_at_no_distance(normalise: bool) -> None:
    """… which it could not be if they saw other patches."""
    objective = make(*twins(), normalise=normalise, blocks=((2, 2),))
    assert objective(make_batch()).parts["distill"] > 0.01
    nn.init.eye_(objective.projections[0].weight)
    nn.init.zeros_(objective.projections[0].bias)
    assert objective(make_batch()).parts["distill"] < 1e-6


def test_tokens_at_right_angles_are_two_over_their_channels_apart() -> None:
    one, other = torch.eye(8)[0].expand(2, 5, 8), torch.eye(8)[3].expand(2, 5, 8)
    assert token_distance(7 * one, 3 * other, normalise=True).item() == pytest.approx(2 / 8)
    assert token_distance(7 * one, 3 * other, normalise=False).item() == pytest.approx(10 / 8)
    assert token_distance(7 * one, 3 * one, normalise=True) == 0


def test_a_picture_that_is_right_costs_nothing_and_a_grey_one_its_variance() -> None:
    pixels = torch.randn(2, 5, 12)
    assert pixel_error(pixels, pixels, norm_pix=False) == 0
    var, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
    assert pixel_error((pixels - mean) / var.sqrt(), pixels, norm_pix=True) < 1e-9
    assert pixel_error(torch.zeros_like(pixels), pixels, norm_pix=True).item() == pytest.approx(11 / 12, rel=1e-4)
    assert pixel_error(mean.expand_as(pixels), pixels, norm_pix=False).item() == pytest.approx(
        11 / 12 * var.mean().item(), rel=1e-5
    )


def test_patches_are_those_that_the_embedding_sees() -> None:
    student: Any = make_plain()
    images = torch.randn(2, 3, 28, 28)
    kernel = student.patch_embed.proj.weight.permute(0, 2, 3, 1).flatten(1)
    embedded = patchify(images, (7, 7)) @ kernel.T + student.patch_embed.proj.bias
    torch.testing.assert_close(embedded, student.patch_embed(images), rtol=1e-4, atol=1e-5)


def test_what_is_masked_is_seen_by_nobody() -> None:
    objective, batch = make(), make_batch()
    keep = random_order(0, batch, 16)[:, :VISIBLE]
    hidden = torch.ones(8, 16, dtype=torch.bool).scatter(1, keep, False)
    over = hidden.view(8, 1, 4, 4).repeat_interleave(7, 2).repeat_interleave(7, 3)
    spoilt = replace(batch, images=torch.where(over, torch.randn_like(batch.images), batch.images))
    one, other = objective(batch).parts, objective(spoilt).parts
    assert torch.equal(one["distill"], other["distill"])
    assert not torch.equal(one["reconstruct"], other["reconstruct"])
    shown = replace(batch, images=torch.where(over, batch.images, torch.randn_like(batch.images)))
    assert not torch.equal(one["distill"], objective(shown).parts["distill"])


def test_the_mask_is_of_the_image_and_not_of_its_batch() -> None:
    batch = make_batch()
    whole = random_order(3, batch, 16)
    assert torch.equal(whole.sort(dim=1).values, torch.arange(16).expand(8, -1))
    assert torch.equal(torch.cat([random_order(3, part(batch, *ends), 16) for ends in ((0, 5), (5, 8))]), whole)
    assert len({tuple(row) for row in whole.tolist()}) == 8
    for other in (random_order(4, batch, 16), random_order(3, replace(batch, views=(1,)), 16)):
        assert (other != whole).any(dim=1).all()


@pytest.mark.parametrize(("ratio", "visible"), [(0.75, 4), (0.9, 1), (0.5, 8), (0.1, 14)])
def test_how_many_patches_are_visible(ratio: float, visible: int) -> None:
    counts = []
    objective = make(mask_ratio=ratio)
    for model in (objective.student, objective.teacher.model):
        model.get_submodule("blocks.0").register_forward_hook(lambda _, inputs, __: counts.append(inputs[0].shape[1]))
    objective(make_batch())
    assert counts == [1 + visible] * 2


def test_the_teacher_stops_behind_its_block_and_looks_once() -> None:
    objective = make(blocks=((1, 1), (2, 2)))
    done: list[str] = []
    for name, module in objective.teacher.model.named_modules():
        if name in ("patch_embed", "blocks.0", "blocks.1", "blocks.2", "norm", "head"):
            module.register_forward_hook(lambda *_, name=name: done.append(name))
    objective(make_batch())
    assert done == ["patch_embed", "blocks.0", "blocks.1"]


def test_outside_of_it_the_student_sees_whole_images() -> None:
    objective, batch = make(), make_batch()
    objective(batch)
    counts: list[int] = []
    objective.student.get_submodule("norm").register_forward_hook(lambda *args: counts.append(args[2].shape[1]))
    objective.student(batch.images)
    assert counts == [17]


def test_by_default_it_compares_the_blocks_at_three_quarters() -> None:
    shape = {"img_size": 28, "patch_size": 7, "embed_dim": 24, "num_heads": 2, "num_classes": 0}
    student = timm.create_model("vit_tiny_patch16_224", depth=12, **shape)
    assert make(student, make_live(depth=24)).pairs == ((9, 18),)
    assert make(student, make_live(depth=1)).pairs == ((9, 1),)


@pytest.mark.parametrize("kind", ["deit_tiny_distilled_patch16_224", "vit_base_patch16_gap_224", "registers"])
def test_students_with_other_prefix_tokens_and_norms(kind: str) -> None:
    """Two, none, five; a norm behind the last block, or of the pooled features alone."""
    name, more = (
        ("vit_tiny_patch16_224", {"reg_tokens": 4, "global_pool": "avg"}) if kind == "registers" else (kind, {})
    )
    shape = {"img_size": 28, "patch_size": 7, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": CLASSES}
    objective = make(timm.create_model(name, **shape, **more))
    compared: list[tuple[int, ...]] = []
    objective.projections[0].register_forward_hook(lambda *args: compared.append(tuple(args[2].shape)))
    objective(make_batch()).total.backward()
    assert compared == [(8, VISIBLE + ("gap" not in kind), 64)]
    assert isinstance(objective.decoder.norm_before, nn.Identity) == (kind != "registers")
    reached = {name for name, value in objective.student.named_parameters() if value.grad is not None}
    missed = {name for name, _ in objective.student.named_parameters()} - reached
    beside = {"registers": {"fc_norm"}, "deit_tiny_distilled_patch16_224": {"head_dist"}}.get(kind, set())
    assert {name.split(".")[0] for name in missed} == {"head"} | beside


def test_alpha_may_change_and_0_needs_no_teacher() -> None:
    batch = make_batch()
    objective = make(alpha=Ramp(start=0.0, end=2.0))
    objective.go_to(0.5)
    losses = objective(batch)
    torch.testing.assert_close(losses.total.detach(), losses.parts["reconstruct"] + losses.parts["distill"])
    alone = DMAE(make_plain(), DMAEConfig(alpha=0, decoder=SMALL), SETTING).train()
    assert alone.needs == DMAE.needs_of(alone.config) == frozenset()
    alone.load_state_dict(objective.state_dict(), strict=False)
    assert torch.equal(alone(batch).total, losses.parts["reconstruct"])


def test_it_may_be_a_term_beside_labels() -> None:
    student, batch = make_plain(), make_batch()
    alone, labels = make(student), Supervised(student, SupervisedConfig(), SETTING)
    expected = 0.5 * alone(batch).total + labels.train()(batch).total
    both = Terms(student, {"dmae": alone, "label": labels}, {"dmae": 0.5, "label": 1.0}, SETTING).train()
    losses = both(batch)
    torch.testing.assert_close(losses.total, expected)
    assert losses.parts.keys() == {"dmae.reconstruct", "dmae.distill", "label"}
    assert both.trains_classifier


def test_in_half_precision_its_losses_are_float32() -> None:
    objective, batch = make(), make_batch()
    exact = objective(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = objective(batch)
    assert rounded.total.dtype == torch.float32
    for name, value in exact.parts.items():
        torch.testing.assert_close(rounded.parts[name], value, rtol=2e-2, atol=0)


def test_its_state_has_decoder_and_projections_and_no_teacher() -> None:
    names = {name.split(".")[0] for name in make().state_dict()}
    assert names == {"student", "projections", "decoder"}
    assert not make().trains_classifier


def test_what_it_does_not_reach_is_left_out_of_a_student_without_classes_too() -> None:
    shape = {"img_size": 28, "patch_size": 7, "embed_dim": 48, "depth": 2, "num_heads": 3}
    student = timm.create_model("vit_tiny_patch16_224", num_classes=0, global_pool="avg", **shape)
    leave_out(make(student), Report(quiet=True))
    assert [name for name, value in student.named_parameters() if not value.requires_grad] == [
        "fc_norm.weight",
        "fc_norm.bias",
    ]


def make_other(name: str, **arguments: Any) -> LiveTeacher:
    model = timm.create_model(name, num_classes=CLASSES, **arguments).eval()
    frozen = Frozen(name, model, weights_sha256="", num_classes=CLASSES, classes=None)
    return LiveTeacher(frozen, SETTING.mean, SETTING.std, torch.device("cpu"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"student": timm.create_model("test_resnet")},
            r"^objective dmae: ResNet is no plain ViT, timm's VisionTransformer; take a student such as deit-small ",
        ),
        (
            {"student": timm.create_model("vitamin_small_224", depth=1)},
            r"^objective dmae: its patches are embedded by HybridEmbed, which looks beyond each; take a student such ",
        ),
        (
            {"teacher": make_other("test_resnet")},
            r"^teacher test_resnet: ResNet is no plain ViT, timm's VisionTransformer; objective dmae takes one such ",
        ),
        (
            {"teacher": make_live(patch_size=4)},
            r"^teacher teacher: has 7 x 7 patches, the student 4 x 4, and objective dmae masks both alike; give "
            r"--image-size 49, or another teacher$",
        ),
        (
            {"mask_ratio": 0.95},
            r"^objective.mask_ratio: 0.95 leaves 0 of 16 patches visible; give one that leaves some ",
        ),
        ({"mask_ratio": 1e-20}, r"^objective.mask_ratio: 1e-20 leaves 16 of 16 patches visible; give one that leaves "),
        ({"blocks": ((3, 1),)}, r"^objective.blocks: the student has 2 blocks, 3 asked; give 1 to 2$"),
        ({"blocks": ((1, 1), (2, 4))}, r"^objective.blocks: teacher teacher has 3 blocks, 4 asked; give 1 to 3$"),
        (
            {"student": timm.create_model("vit_tiny_patch16_224", img_size=28, patch_size=7, patch_drop_rate=0.5)},
            r"^objective dmae: the student drops patches by itself; give it no patch_drop_rate$",
        ),
        (
            {"student": timm.create_model("vit_tiny_patch16_224", img_size=28, patch_size=5)},
            r"^objective dmae: 5 x 5 patches do not fill images of 28 px; give --image-size 25$",
        ),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make(**settings)


def test_a_teacher_of_another_size_with_as_many_patches_will_do() -> None:
    teacher = make_live(img_size=64, patch_size=16)
    assert make(teacher=teacher)(make_batch()).total.isfinite()


@pytest.mark.parametrize("width", [30, 20])
def test_a_decoder_whose_width_does_not_divide(width: int) -> None:
    with pytest.raises(ValidationError, match=f"width {width} is no multiple of 4 and of 3 heads"):
        DecoderConfig(width=width, heads=3)


def test_labels_and_rows_are_nothing_to_it() -> None:
    batch = make_batch()
    bare = replace(batch, labels=torch.full((8,), -1), teacher=top_k(torch.zeros(8, CLASSES), 1))
    objective = make(make_student())
    assert torch.equal(objective(batch).total, objective(bare).total)
