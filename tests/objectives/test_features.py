"""Parity with plain float64 formulas on what timm's own `forward_intermediates` gives, closed forms, refusals."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from small import CLASSES, SETTING, make_batch, make_live, make_plain, make_student, part
from torch import Tensor, nn

from distill_cli.data.batch import Batch
from distill_cli.errors import UsageError
from distill_cli.live_teacher import LiveTeacher
from distill_cli.objectives import Objective, TermsConfig, build
from distill_cli.objectives.feature_losses import (
    angles,
    attention_map,
    attention_transfer,
    distance,
    kept,
    relation,
    relative_distances,
    similarity,
)
from distill_cli.objectives.feature_pairs import DenseConfig, PooledConfig
from distill_cli.objectives.features import Features, FeaturesConfig
from distill_cli.objectives.ramps import Ramp
from distill_cli.objectives.tinyvit import TinyViTConfig
from distill_cli.randomness import derive, uniforms
from distill_cli.recipe import parse
from distill_cli.teachers import Frozen

BLOCKS = {"student": "blocks.0", "teacher": "blocks.1"}
IMAGE, PLACES = 4, 16
"""Sides of the student's grid, and its places."""


def make(pairs: dict[str, Any], live: LiveTeacher | None = None, **settings: Any) -> Features:
    """In float64, so that it can be compared with formulas to many digits."""
    config = FeaturesConfig(pairs=pairs, **{"label_weight": 0, **settings})
    objective = build(config, make_student(), replace(SETTING, seed=7, teacher=live or make_live()))
    assert isinstance(objective, Features)
    objective.teacher.model.double()
    return objective.double().train()


def batch_of(size: int = 4, **changes: Any) -> Batch:
    batch = make_batch(size)
    return replace(batch, images=batch.images.double(), **changes)


def grids(objective: Features, batch: Batch, ours: int = 0, theirs: int = 1) -> tuple[Tensor, Tensor]:
    """What two blocks give, `[batch, channels, side, side]`, by timm's own reading of them."""
    student, teacher = objective.student, objective.teacher
    own = student.forward_intermediates(batch.images, indices=[ours], intermediates_only=True)[0]
    with torch.no_grad():
        images = teacher.normalised(batch.images)
        return own, teacher.model.forward_intermediates(images, indices=[theirs], intermediates_only=True)[0]


def assert_same(objective: Features, batch: Batch, expected: Tensor) -> None:
    """Loss and gradients of every parameter that is reached agree."""
    loss = objective(batch).total
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    weights = list(objective.parameters())
    ours, theirs = (torch.autograd.grad(value, weights, allow_unused=True) for value in (loss, expected))
    assert any(each is not None for each in ours)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-10)


def apply(linear: Any, vector: Tensor) -> Tensor:
    return linear.weight @ vector + linear.bias


def by_value(s: Tensor, t: Tensor, kind: str, beta: float) -> Tensor:
    """The distance of two vectors."""
    if kind == "cosine":
        return 1 - (s @ t) / (s.square().sum().sqrt() * t.square().sum().sqrt())
    gaps = (s - t).abs()
    if kind == "l2":
        return gaps.square().mean()
    return torch.where(gaps < beta, gaps.square() / (2 * beta), gaps - beta / 2).mean()


def standardised(t: Tensor) -> Tensor:
    return (t - t.mean()) / (t.var(unbiased=False) + 1e-5).sqrt()


KINDS = [
    ("cosine", None, "none"),
    ("l2", None, "layernorm"),
    ("smooth_l1", None, "layernorm"),
    ("smooth_l1", 0.1, "none"),
]


@pytest.mark.parametrize(("kind", "beta", "target"), KINDS)
@pytest.mark.parametrize("loss", ["pooled", "dense"])
def test_features_value_by_value(loss: str, kind: str, beta: float | None, target: str) -> None:
    pair = {"loss": loss, **BLOCKS, "distance": kind, "beta": beta, "target": target}
    objective, batch = make({"p": pair}), batch_of()
    linear, (ours, theirs) = objective.pairs[0].projection, grids(objective, batch)
    found = []
    for image in range(len(batch)):
        places = [(row, column) for row in range(IMAGE) for column in range(IMAGE)]
        s = [ours[image, :, row, column] for row, column in places]
        t = [theirs[image, :, row, column] for row, column in places]
        if loss == "pooled":
            s, t = [sum(s) / PLACES], [sum(t) / PLACES]
        t = [standardised(each) for each in t] if target == "layernorm" else t
        found += [by_value(apply(linear, a), b, kind, beta or 2.0) for a, b in zip(s, t, strict=True)]
    assert_same(objective, batch, torch.stack(found).mean())


def test_by_default_it_is_what_the_classifiers_see_by_its_direction() -> None:
    objective, batch = make(FeaturesConfig().pairs), batch_of()
    teacher, linear = objective.teacher, objective.pairs[0].projection
    ours = objective.student.forward_features(batch.images)[:, 0]
    theirs = teacher.model.forward_features(teacher.normalised(batch.images))[:, 0]
    found = [by_value(apply(linear, s), t, "cosine", 0) for s, t in zip(ours, theirs, strict=True)]
    assert_same(objective, batch, torch.stack(found).mean())


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_projections(kind: str) -> None:
    objective, batch = make({"p": {**BLOCKS, "distance": "l2", "projection": kind}}), batch_of()
    ours, theirs = (grid.mean((2, 3)) for grid in grids(objective, batch))
    layers = objective.pairs[0].projection
    if kind == "mlp":
        hidden = F.gelu(ours @ layers[0].weight.T + layers[0].bias)
        ours, layers = hidden, layers[2]
    assert_same(objective, batch, (ours @ layers.weight.T + layers.bias - theirs).square().mean())


def test_without_a_projection_the_widths_are_equal_and_nothing_is_added() -> None:
    pair = {**BLOCKS, "loss": "dense", "distance": "l2", "target": "none", "projection": "none"}
    objective, batch = make({"p": pair}, make_live(embed_dim=48, num_heads=3)), batch_of()
    assert not list(objective.pairs.parameters())
    ours, theirs = grids(objective, batch)
    assert_same(objective, batch, (ours - theirs).square().mean())


@pytest.mark.parametrize("grid", ["student", "teacher"])
def test_a_finer_grid_is_averaged_and_a_coarser_one_interpolated(grid: str) -> None:
    """Of the student 4 x 4, of the teacher 2 x 2."""
    pair = {**BLOCKS, "loss": "dense", "distance": "l2", "target": "none", "grid": grid}
    objective, batch = make({"p": pair}, make_live(patch_size=14)), batch_of()
    ours, theirs = grids(objective, batch)
    if grid == "teacher":
        ours = ours.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    else:
        # Between two places of a row of two, in quarters: the outer ones are the ends.
        steps = torch.tensor([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]], dtype=torch.float64)
        theirs = torch.einsum("ir,bcrs,js->bcij", steps, theirs, steps)
    linear = objective.pairs[0].projection
    projected = torch.einsum("ts,bsij->btij", linear.weight, ours) + linear.bias[:, None, None]
    assert_same(objective, batch, (projected - theirs).square().mean())


@pytest.mark.parametrize("masked", ["places", "channels"])
def test_masked_generation(masked: str) -> None:
    pair = {**BLOCKS, "loss": "masked", "mask": 0.4, "masked": masked}
    objective, batch = make({"other": {}, "m": pair}, label_weight=0), batch_of()
    module, (ours, theirs) = objective.pairs[1], grids(objective, batch)
    linear, (first, _, last) = module.projection, module.generation
    found = []
    for image in range(len(batch)):
        projected = torch.einsum("ts,sij->tij", linear.weight, ours[image]) + linear.bias[:, None, None]
        drawn = uniforms([derive("mgd", 7, 1, 0, image)], 64 if masked == "channels" else PLACES, torch.device("cpu"))[
            0
        ]
        left = (drawn >= 0.4).double()
        assert 0 < left.sum() < len(left)
        kept_ = projected * (left[:, None, None] if masked == "channels" else left.view(IMAGE, IMAGE))
        hidden = F.conv2d(kept_, first.weight, first.bias, padding=1).clamp(min=0)
        found.append((F.conv2d(hidden, last.weight, last.bias, padding=1) - theirs[image]).square().mean())
    losses = objective(batch)
    torch.testing.assert_close(losses.parts["m"], torch.stack(found).mean().detach(), rtol=1e-9, atol=1e-12)
    assert_same_gradients(losses.total, torch.stack(found).mean(), list(module.parameters()))


def assert_same_gradients(loss: Tensor, expected: Tensor, weights: list[nn.Parameter]) -> None:
    ours, theirs = (torch.autograd.grad(value, weights) for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("patch_size", [7, 14])
def test_attention_transfer(patch_size: int) -> None:
    objective, batch = make({"a": {**BLOCKS, "loss": "attention"}}, make_live(patch_size=patch_size)), batch_of()
    ours, theirs = (grid.square().sum(1) / grid.shape[1] for grid in grids(objective, batch))
    if patch_size == 14:
        steps = torch.tensor([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]], dtype=torch.float64)
        theirs = torch.einsum("ir,brs,js->bij", steps, theirs, steps)
    gaps = [s / s.square().sum().sqrt() - t / t.square().sum().sqrt() for s, t in zip(ours, theirs, strict=True)]
    assert_same(objective, batch, torch.stack([gap.square().sum() / PLACES for gap in gaps]).mean())


def test_similarity_preserving() -> None:
    """Of all that a block gives, class tokens and the like too."""
    objective, batch = make({"s": {**BLOCKS, "loss": "similarity"}}), batch_of()
    student, teacher = objective.student, objective.teacher

    def block(model: Any, images: Tensor, number: int) -> Tensor:
        (tokens, prefix), *_ = model.forward_intermediates(
            images, indices=[number], intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True
        )
        return torch.cat([prefix, tokens], dim=1).flatten(1)

    values = block(student, batch.images, 0), block(teacher.model, teacher.normalised(batch.images), 1)
    size, total = len(batch), torch.zeros((), dtype=torch.float64)
    for i in range(size):
        rows = [torch.stack([each[i] @ each[j] for j in range(size)]) for each in values]
        total = total + sum(
            (a - b) ** 2 for a, b in zip(*(row / row.square().sum().sqrt() for row in rows), strict=True)
        )
    assert_same(objective, batch, total / size**2)


def huber(gap: Tensor) -> Tensor:
    return gap.square() / 2 if gap.abs() <= 1 else gap.abs() - 0.5


@pytest.mark.parametrize(("far", "wide"), [(25.0, 50.0), (3.0, 0.0), (0.0, 2.0)])
def test_relations(far: float, wide: float) -> None:
    pair = {**BLOCKS, "loss": "relation", "distances": far, "angles": wide}
    objective, batch = make({"r": pair}), batch_of()
    sides = [grid.mean((2, 3)) for grid in grids(objective, batch)]
    size, total = len(batch), torch.zeros((), dtype=torch.float64)

    def apart(values: Tensor, i: int, j: int) -> Tensor:
        return (values[i] - values[j]).square().sum().sqrt()

    def cosine(values: Tensor, i: int, j: int, k: int) -> Tensor:
        return (values[j] - values[i]) @ (values[k] - values[i]) / apart(values, i, j) / apart(values, i, k)

    others = [(i, j) for i in range(size) for j in range(size) if i != j]
    means = [sum(apart(values, i, j) for i, j in others) / len(others) for values in sides]
    for i, j in others:
        gaps = [apart(values, i, j) / mean for values, mean in zip(sides, means, strict=True)]
        total = total + far / size**2 * huber(gaps[0] - gaps[1])
        for k in range(size):
            if k != i:
                total = total + wide / size**3 * huber(cosine(sides[0], i, j, k) - cosine(sides[1], i, j, k))
    assert_same(objective, batch, total)


def test_features_that_agree_cost_nothing() -> None:
    values, grid = torch.randn(6, 8), torch.rand(6, 1, 4, 4)
    assert all(distance(values, values, kind).abs() < 1e-6 for kind in ("cosine", "l2", "smooth_l1"))
    assert distance(values, 3 * values, "cosine").abs() < 1e-6
    assert attention_transfer(grid, 5 * grid) < 1e-12
    turned = values @ torch.linalg.qr(torch.randn(8, 8)).Q
    assert similarity(values, 2 * turned) < 1e-12
    assert relation(values, 2 * turned + 1, 25.0, 50.0) < 1e-9


def test_closed_forms() -> None:
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    assert distance(one, other, "cosine") == 1
    assert distance(one, other, "l2") == 5
    assert distance(one, other, "smooth_l1", beta=2) == pytest.approx((1 / 4 + 2) / 2)
    assert torch.equal(attention_map(torch.tensor([1.0, -3.0]).view(1, 2, 1, 1)), torch.full((1, 1, 1, 1), 5.0))
    # Two places, each side looks at another one: |(1, 0) - (0, 1)|^2 over two places.
    assert attention_transfer(torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([[[[0.0, 7.0]]]])) == 1
    # A 3-4-5 triangle: distances over their mean 4, and the right angle at its first corner.
    corners = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    expected = torch.tensor([[0, 3, 4], [3, 0, 5], [4, 5, 0]]) / 4
    torch.testing.assert_close(relative_distances(corners), expected)
    at = angles(corners)
    torch.testing.assert_close(torch.stack([at[0, 1, 2], at[1, 0, 2], at[2, 0, 1]]), torch.tensor([0, 0.6, 0.8]))
    # Images that are all alike against such that are orthogonal: (1 / sqrt(2) - 1)^2 + 1 / 2 in each row of two.
    alike, different = torch.ones(2, 3), torch.eye(2)
    assert similarity(alike, different).item() == pytest.approx(((0.5**0.5 - 1) ** 2 + 0.5) / 2)


def test_images_that_are_alike_have_finite_relations_and_gradients() -> None:
    one, other = torch.randn(2, 4)
    ours = torch.stack([one, one, one, other]).requires_grad_()
    loss = relation(ours, torch.randn(4, 6), 25.0, 50.0)
    loss.backward()
    assert loss.isfinite()
    assert ours.grad is not None
    assert ours.grad.abs().max() < 1e3
    assert relation(ours[:1], torch.randn(1, 6), 25.0, 50.0) == 0


def test_masks_are_of_seed_view_and_sample_alone() -> None:
    def draw(seed: int, views: list[int], ids: list[int]) -> Tensor:
        return kept((seed, 0), views, ids, 1000, 0.3, torch.device("cpu"))

    together = draw(1, [4, 4, 5], [10, 11, 10])
    assert torch.equal(draw(1, [5, 4], [10, 10]), together[[2, 0]])
    assert together.mean().item() == pytest.approx(0.7, abs=0.05)
    assert len({tuple(row.tolist()) for row in (*together, *draw(2, [4], [10]))}) == 4
    assert kept((1, 0), [0], [0], 9, 0.0, torch.device("cpu")).all()
    assert not kept((1, 0), [0], [0], 9, 1.0, torch.device("cpu")).any()


def test_masks_follow_each_image_into_parts_of_a_batch() -> None:
    objective = make({"m": {**BLOCKS, "loss": "masked"}})
    batch = replace(batch_of(8), views=(2, 5), sample_ids=batch_of(4).sample_ids.repeat(2))
    halves = [objective(replace(part(batch, at, at + 4), view_of=batch.each_view[at : at + 4])).total for at in (0, 4)]
    torch.testing.assert_close(sum(halves) / 2, objective(batch).total)


def test_the_total_weighs_pairs_and_labels() -> None:
    pairs = {"one": {"weight": Ramp(start=0, end=4)}, "two": {**BLOCKS, "loss": "dense", "weight": 0.5}}
    objective, batch = make(pairs, label_weight=3.0, label_smoothing=0.2), batch_of()
    objective.go_to(0.25)
    losses = objective(batch)
    label = F.cross_entropy(objective.student(batch.images).float(), batch.labels, label_smoothing=0.2)
    assert losses.parts.keys() == {"label", "one", "two"}
    torch.testing.assert_close(losses.parts["label"], label)
    torch.testing.assert_close(
        losses.total, 3 * label + losses.parts["one"] + 0.5 * losses.parts["two"], check_dtype=False
    )


def test_another_teacher_teaches_something_else() -> None:
    totals = {make({"p": pair}, make_live(seed))(batch_of()).total.item() for pair in ({}, BLOCKS) for seed in (5, 6)}
    assert len(totals) == 4


def test_what_no_pair_reaches_is_no_part_of_the_classifier_s_training() -> None:
    with_labels, without = (make({"p": BLOCKS}, label_weight=weight) for weight in (1, 0))
    assert (with_labels.trains_classifier, without.trains_classifier) == (True, False)
    assert without.needs == {"teacher"}


PAIRS_OF_MODELS = [
    ("resnet18", "layer3", "tiny_vit_5m_224", "stages.2"),
    ("swin_tiny_patch4_window7_224", "layers.1", "convnext_atto", "stages.2"),
    ("levit_128s", "stages.1", "resnet18", "layer4"),
    ("vit_tiny_patch16_224", "blocks.3.attn.qkv", "deit_tiny_distilled_patch16_224", "blocks.2"),
]


@pytest.mark.parametrize(("student", "ours", "teacher", "theirs"), PAIRS_OF_MODELS)
def test_layers_of_any_two_architectures(student: str, ours: str, teacher: str, theirs: str) -> None:
    def create(name: str) -> nn.Module:
        sized = {} if name in ("resnet18", "convnext_atto", "tiny_vit_5m_224") else {"img_size": 64}
        return timm.create_model(name, num_classes=CLASSES, drop_path_rate=0, **sized)

    model = create(teacher).eval().requires_grad_(False)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 64, 64)}
    live = LiveTeacher(Frozen("t", model, "", CLASSES, None), SETTING.mean, SETTING.std, torch.device("cpu"))
    layers = {"student": ours, "teacher": theirs}
    losses = ("pooled", "dense", "masked", "attention", "similarity", "relation")
    pairs: dict[str, Any] = {"last": {}} | {loss: {"loss": loss, **layers} for loss in losses}
    config, setting = FeaturesConfig(pairs=pairs), replace(SETTING, image_size=64, teacher=live)
    objective = build(config, create(student), setting).train()
    losses_ = objective(replace(make_batch(2), images=torch.randn(2, 3, 64, 64)))
    assert losses_.parts.keys() == {"label", *pairs}
    assert losses_.total.isfinite()


REFUSED = [
    ({"student": "blocks.77"}, r"^objective.pairs.p.student: blocks.77: VisionTransformer has no such layer; did you"),
    (
        {"teacher": "blocs.1:input"},
        r"^objective.pairs.p.teacher: blocs.1: VisionTransformer has no such layer; did you",
    ),
    (
        {"projection": "none"},
        r'^objective.pairs.p: projection "none" of 48 channels to the 64 of the teacher; give "linear" or "mlp"$',
    ),
    (
        {"loss": "dense", "student": "norm", "teacher": "head"},
        r"^objective.pairs.p: VisionTransformer: a layer's output \[1, 5\] is no square grid",
    ),
    ({"loss": "attention", "student": "head", "teacher": "norm"}, r"^objective.pairs.p: .*\[1, 5\] is no square grid"),
]


@pytest.mark.parametrize(("pair", "line"), REFUSED)
def test_layers_that_cannot_be_compared_are_refused(pair: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        build(FeaturesConfig(pairs={"p": pair}), make_plain(), replace(SETTING, teacher=make_live()))


def test_a_layer_that_gives_no_tensor_and_a_model_without_a_classifier_are_refused() -> None:
    class Two(nn.Module):
        num_classes = CLASSES

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, CLASSES)
            self.unused = nn.Linear(4, 4)

        def forward(self, images: Tensor) -> Tensor:
            return self.last(self.inner(images.mean(3).transpose(1, 2))[0][:, -1])

    setting = replace(SETTING, teacher=make_live())
    with pytest.raises(UsageError, match=r"^objective.pairs: inner: of Two gives no tensor; name another layer$"):
        build(FeaturesConfig(pairs={"p": PooledConfig(student="inner")}), Two(), setting)
    with pytest.raises(
        UsageError, match=r"^objective.pairs.p.student: Two names no module as its classifier; name a layer$"
    ):
        build(FeaturesConfig(pairs={"p": PooledConfig()}), Two(), setting)
    with pytest.raises(
        UsageError, match=r"^objective.pairs: unused: of Two is in no forward pass; name another layer$"
    ):
        build(FeaturesConfig(pairs={"p": PooledConfig(student="unused")}), Two(), setting)
    with pytest.raises(UsageError, match=r"^objective.pairs.p: Two: a layer's output \[1, 5\] is no square grid"):
        build(FeaturesConfig(pairs={"p": DenseConfig(student="last", teacher="norm")}), Two(), setting)


FIELDS = [
    ({"beta": 1}, r'objective.pairs.p: beta is of distance = "smooth_l1"; give that too$'),
    ({"mask": 0.5}, r"objective.pairs.p.mask: unknown key of the loss that is chosen$"),
    (
        {"loss": "similarity", "projection": "mlp"},
        r"objective.pairs.p.projection: unknown key of the loss that is chosen$",
    ),
    ({"loss": "dense"}, r"objective.pairs.p.student: field required"),
    (
        {"loss": "kl"},
        r"objective.pairs.p.loss: no such loss, 'kl'; there are pooled, dense, masked, attention, similarity",
    ),
    ({"distanc": "l2"}, r"objective.pairs.p.distanc: unknown key; did you mean objective.pairs.NAME.distance"),
]


@pytest.mark.parametrize(("fields", "line"), FIELDS)
def test_a_field_that_is_not_of_the_loss_is_named(fields: dict[str, Any], line: str) -> None:
    values = {f"objective.pairs.p.{name}": value for name, value in fields.items()}
    with pytest.raises(UsageError, match=line):
        parse({"objective.name": "features", **values})


def test_a_pair_is_not_called_as_the_loss_of_the_labels() -> None:
    line = r"objective.pairs: label is what the loss of the labels is called; call the pair otherwise$"
    with pytest.raises(UsageError, match=line):
        parse({"objective.name": "features", "objective.pairs.label.weight": 2.0})


def shared(*names: str) -> Objective:
    """Two terms on the layers of one student, and one on its logits."""
    pairs = {"a": {"d": DenseConfig(**BLOCKS)}, "b": {"p": PooledConfig(student="blocks.0", teacher="blocks.2")}}
    terms: dict[str, Any] = {name: FeaturesConfig(pairs=pairs[name], label_weight=0) for name in names}
    config = TermsConfig(terms={**terms, "tinyvit": TinyViTConfig()})
    return build(config, make_student(), replace(SETTING, teacher=make_live())).train()


def test_objectives_share_one_pass_of_the_student_and_one_of_the_teacher() -> None:
    together, batch = shared("a", "b"), make_batch()
    passes = []
    together.student.register_forward_hook(lambda *_: passes.append("student"))
    together.teacher.model.blocks[2].register_forward_hook(lambda *_: passes.append("teacher"))
    losses = together(batch)
    assert passes == ["student", "teacher"]
    assert losses.parts.keys() == {"a", "b", "tinyvit"}
    torch.testing.assert_close(losses.parts["a"], shared("a")(batch).parts["a"])


def test_another_pass_of_the_student_disturbs_nothing() -> None:
    """A term with a pass of its own, as of masked images, though it comes first."""
    objective, batch = shared("a", "b"), make_batch()
    expected = objective(batch)
    other = objective.terms["tinyvit"]
    other.own_forward = True
    other.forward = lambda batch: type(other).forward(other, replace(batch, images=batch.images.flip(0)))
    objective.terms = nn.ModuleDict({name: objective.terms[name] for name in ("tinyvit", "a", "b")})
    losses = objective(batch)
    assert torch.equal(losses.parts["a"], expected.parts["a"])
    assert torch.equal(losses.parts["b"], expected.parts["b"])
    assert objective.terms["a"].taps._found
    objective.after_step(0)
    assert not objective.terms["a"].taps._found


def test_neither_validation_nor_an_average_of_the_weights_leaves_anything_in_the_taps() -> None:
    objective, batch = make({"p": BLOCKS}), batch_of()
    average = copy.deepcopy(objective.student)
    average.train()(batch.images)
    objective.student.eval()(batch.images)
    average.eval()(batch.images)
    assert not objective.taps._found
    objective.train()
    assert objective(batch).total.isfinite()
    assert not objective.taps._found


def test_losses_are_float32_under_autocast() -> None:
    live = make_live()
    pairs: dict[str, Any] = {"similarity": {"loss": "similarity"}, "relation": {"loss": "relation"}}
    pairs |= {loss: {"loss": loss, **BLOCKS} for loss in ("pooled", "dense", "masked", "attention")}
    objective = build(FeaturesConfig(pairs=pairs), make_student(), replace(SETTING, teacher=live)).train()
    batch = make_batch()
    plain = objective(batch)
    with torch.autocast("cpu", torch.bfloat16):
        half = objective(replace(batch, images=batch.images.clone()))
    for name, value in half.parts.items():
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value, plain.parts[name], rtol=0.05, atol=1e-3)
    values = torch.randn(8, 48), torch.randn(8, 64)
    for pair in objective.pairs[:2]:
        exact = pair(*values, batch)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(pair(*values, batch), exact)


def test_what_is_trained_besides_the_student_is_the_objective_s() -> None:
    objective = make({"last": {}, "m": {**BLOCKS, "loss": "masked"}})
    names = {name for name, _ in objective.named_parameters() if not name.startswith("student.")}
    parts = ("projection", "generation.0", "generation.2")
    assert names == {
        f"pairs.{place}.{part}.{each}"
        for place, part in [("0", "projection"), *(("1", part) for part in parts)]
        for each in ("weight", "bias")
    }
    assert objective.student.state_dict().keys() == make_student().state_dict().keys()
