import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from pydantic import ValidationError
from small import CLASSES, SETTING, make_batch, make_live, make_plain, make_student, part
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as torchvision

from distill_cli.errors import UsageError
from distill_cli.live_teacher import LiveTeacher
from distill_cli.objectives import SupervisedConfig, TermsConfig, build, tinymim
from distill_cli.objectives.jitter import color_jitter, jittered
from distill_cli.objectives.relation_sides import split
from distill_cli.objectives.tinymim import TinyMIM, TinyMIMConfig, relation_divergence
from distill_cli.report import Report
from distill_cli.teachers import Frozen
from distill_cli.teaching import leave_out, unreached

PLAIN = TinyMIMConfig(color_jitter=0)
RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "output_stride": 8}


def make(
    config: TinyMIMConfig = PLAIN, student: nn.Module | None = None, teacher: LiveTeacher | None = None
) -> TinyMIM:
    setting = replace(SETTING, teacher=teacher or make_live())
    return TinyMIM(student or make_plain(), config, setting).train()


def make_resnet(**arguments: Any) -> LiveTeacher:
    torch.manual_seed(3)
    model = timm.create_model("resnet18", num_classes=CLASSES, **(RESNET | arguments)).eval().requires_grad_(False)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 28, 28)}
    return LiveTeacher(Frozen("t", model, "", CLASSES, None), SETTING.mean, SETTING.std, torch.device("cpu"))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense_divergence(query: Tensor, key: Tensor, teacher_query: Tensor, teacher_key: Tensor) -> Tensor:
    """Row by row, by plain softmax and log."""
    rows = []
    for image in range(len(query)):
        for head in range(query.shape[1]):
            for token in range(query.shape[2]):
                ours = torch.softmax(key[image, head] @ query[image, head, token], 0)
                theirs = torch.softmax(teacher_key[image, head] @ teacher_query[image, head, token], 0)
                rows.append((theirs * (theirs.log() - ours.log())).sum())
    return torch.stack(rows).mean()


@pytest.mark.parametrize("piece", [1, 60, 10**6])
def test_it_is_the_dense_divergence_in_pieces_of_any_size(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinymim, "PIECE", (piece, piece))
    query, key = (random(5, 2, 4, 3, seed=seed).requires_grad_() for seed in (1, 2))
    teacher = random(5, 2, 4, 7, seed=3), random(5, 2, 4, 7, seed=4)
    ours, dense = relation_divergence(query, key, *teacher), dense_divergence(query, key, *teacher)
    torch.testing.assert_close(ours, dense, rtol=1e-10, atol=0)
    found, expected = (torch.autograd.grad(3 * loss, (query, key)) for loss in (ours, dense))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def test_the_same_relations_cost_nothing_and_pull_nowhere() -> None:
    query, key = random(2, 2, 4, 3).requires_grad_(), random(2, 2, 4, 3, seed=1)
    loss = relation_divergence(query, key, query.detach(), key)
    loss.backward()
    assert loss.abs() < 1e-12
    assert query.grad.abs().max() < 1e-12


def test_beside_a_uniform_teacher_it_is_the_mean_log_of_the_student_less_log_n() -> None:
    query, key, nothing = random(2, 2, 6, 3), random(2, 2, 6, 3, seed=1), torch.zeros(2, 2, 6, 3, dtype=torch.float64)
    expected = -(query @ key.mT).log_softmax(-1).mean() - math.log(6)
    torch.testing.assert_close(relation_divergence(query, key, nothing, nothing), expected)


def test_a_uniform_student_beside_a_certain_teacher_costs_log_n() -> None:
    certain, nothing = 100 * torch.eye(6).expand(1, 1, 6, 6), torch.zeros(1, 1, 6, 3)
    loss = relation_divergence(nothing, nothing, certain, torch.eye(6).expand(1, 1, 6, 6))
    torch.testing.assert_close(loss, torch.tensor(math.log(6)))


def test_a_relation_that_underflows_stays_finite() -> None:
    """softmax().log() of the authors' code has -inf here."""
    query = (1000 * torch.eye(4)).expand(1, 1, 4, 4).clone().requires_grad_()
    key = torch.eye(4).expand(1, 1, 4, 4)
    loss = relation_divergence(query, key, -query.detach(), key)
    loss.backward()
    assert loss.isfinite()
    assert query.grad.isfinite().all()


def block_qkv(model: nn.Module, images: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a block from 0 by timm's parts, without hooks: each `[batch, tokens, width]`."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    for each in model.blocks[:block]:
        x = each(x)
    last = model.blocks[block]
    return last.attn.qkv(last.norm1(x)).chunk(3, dim=-1)


def sharpened(model: nn.Module) -> nn.Module:
    """With relations that are far from uniform."""
    with torch.no_grad():
        model.get_submodule("blocks.1.attn.qkv").weight.mul_(10)
    return model


def dense_relations(q: Tensor, k: Tensor, v: Tensor, heads: int) -> dict[str, Tensor]:
    by_head = [torch.stack(each.chunk(heads, dim=-1), dim=1) for each in (q, k, v)]
    root = math.sqrt(by_head[0].shape[-1])
    pairs = {"qk": (by_head[0], by_head[1]), "vv": (by_head[2], by_head[2])}
    return {name: torch.softmax(one @ other.transpose(2, 3) / root, -1) for name, (one, other) in pairs.items()}


def test_a_pair_of_vits_is_the_dense_reference_in_values_and_gradients() -> None:
    """The student has three heads of 16 channels, viewed as four of 12; the teacher's block is the second of three."""
    teacher, batch = make_live(), make_batch(4)
    sharpened(teacher.model)
    objective = make(teacher=teacher, student=sharpened(make_plain()))
    losses = objective(batch)
    losses.total.backward()
    reference = sharpened(make_plain()).double()
    ours = dense_relations(*block_qkv(reference, batch.images.double(), 1), heads=4)
    model = sharpened(make_live().model).double()
    seen = teacher.normalised(batch.images).double()
    theirs = dense_relations(*block_qkv(model, seen, 1), heads=4)
    parts = {name: (theirs[name] * (theirs[name] / ours[name]).log()).sum(-1).mean() for name in ours}
    sum(parts.values()).backward()
    for name, value in parts.items():
        assert value > 0.05
        torch.testing.assert_close(losses.parts[name].double(), value, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.total, losses.parts["qk"] + losses.parts["vv"])
    found = {name: each.grad.double() for name, each in objective.student.named_parameters() if each.grad is not None}
    expected = {name: each.grad for name, each in reference.named_parameters() if each.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_relation_of_queries_and_keys_is_timm_s_attention(qk_norm: bool) -> None:
    teacher = make_live(qk_norm=qk_norm)
    objective, batch, found = make(teacher=teacher), make_batch(3), []
    attention = teacher.model.blocks[1].attn
    attention.fused_attn = False
    attention.attn_drop.register_forward_hook(lambda _, inputs, output: found.append(output))
    teacher.model(teacher.normalised(batch.images))
    value = objective.teacher.inside(batch.images)[objective.theirs.layer]
    query, key = objective.theirs.relations(value, 4, objective.grid, with_class=True)["qk"]
    torch.testing.assert_close((query @ key.mT).softmax(-1), found[0])


@pytest.mark.parametrize(("depth", "expected"), [(1, 0), (2, 1), (3, 1), (4, 2), (8, 5)])
def test_a_deeper_teacher_is_asked_three_quarters_up(depth: int, expected: int) -> None:
    assert make(teacher=make_live(depth=depth)).theirs.layer == f"blocks.{expected}.attn.qkv"


def test_blocks_may_be_chosen() -> None:
    objective = make(TinyMIMConfig(teacher_block=1, student_block=1, color_jitter=0))
    assert (objective.ours.layer, objective.theirs.layer) == ("blocks.0.attn.qkv", "blocks.0.attn.qkv")


def test_both_stop_at_their_block() -> None:
    objective = make()
    done: list[str] = []
    for side, model in (("student", objective.student), ("teacher", objective.teacher.model)):
        for name in ("blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1", "norm", "head"):
            hook = lambda *_, what=f"{side} {name}": done.append(what)  # noqa: E731
            model.get_submodule(name).register_forward_pre_hook(hook)
    objective(make_batch())
    assert done == ["student blocks.1", "student blocks.1.attn.qkv", "teacher blocks.1", "teacher blocks.1.attn.qkv"]


def test_what_comes_behind_the_student_s_block_is_not_trained() -> None:
    objective = make()
    behind = ("attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    layers = {*(f"blocks.1.{name}" for name in behind), "norm", "head"}
    names = {f"student.{name}.{kind}" for name in layers for kind in ("weight", "bias")}
    assert set(unreached(objective)) == names
    leave_out(objective, Report(quiet=True))
    assert {name for name, each in objective.named_parameters() if not each.requires_grad} == names


@pytest.mark.parametrize(
    ("student", "registers", "tokens"),
    [(make_plain(), 0, 17), (make_student(), 0, 17), (make_plain(), 3, 17)],
    ids=["plain", "distilled", "registers"],
)
def test_of_the_prefix_tokens_the_class_token_alone_has_relations(
    student: nn.Module, registers: int, tokens: int
) -> None:
    teacher = make_live(reg_tokens=registers)
    objective = make(student=student, teacher=teacher)
    value = objective.teacher.inside(make_batch(2).images)[objective.theirs.layer]
    query, key = objective.theirs.relations(value, 4, objective.grid, with_class=True)["qk"]
    assert query.shape == key.shape == (2, 4, tokens, 16)
    torch.testing.assert_close(key[:, :, 1:], split(value[:, 1 + registers :, 64:128], 4))
    assert objective(make_batch(2)).total.isfinite()


def test_a_class_token_that_one_side_lacks_has_no_relations() -> None:
    objective = make(teacher=make_live(class_token=False, global_pool="avg"))
    assert not (objective.ours.has_class and objective.theirs.has_class)
    assert objective(make_batch(2)).total.isfinite()


def test_two_grids_meet_on_the_one_that_is_given() -> None:
    """Of queries, keys and values the means over the patches that fall together."""
    objective = make(replace(PLAIN, grid=2), teacher=make_live(patch_size=14))
    batch = make_batch(2)
    assert objective(batch).total.isfinite()
    value = torch.randn(2, 17, 3 * 48)
    _, ours = objective.ours.relations(value, 4, 2, with_class=False)["vv"]
    patches = value[:, 1:, 96:].unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(ours, split(patches, 4))


def dense_features(tokens: Tensor, heads: int) -> Tensor:
    centred = tokens - tokens.mean(-1, keepdim=True)
    normalised = centred / centred.var(-1, keepdim=True, unbiased=False).sqrt()
    by_head = torch.stack(normalised.chunk(heads, dim=-1), dim=1)
    return torch.softmax(8 * by_head @ by_head.transpose(2, 3) / by_head.shape[-1], -1)


@pytest.mark.parametrize("heads", [None, 4])
def test_a_vit_learns_the_relations_of_a_resnet_s_features(heads: int | None) -> None:
    teacher, batch = make_resnet(), make_batch(4)
    objective = make(replace(PLAIN, relation_heads=heads), teacher=teacher)
    losses = objective(batch)
    student = make_plain().double()
    x = student._pos_embed(student.patch_embed(batch.images.double()))
    ours = dense_features(student.blocks(x)[:, 1:], heads or 1)
    maps = make_resnet().model.double().forward_features(teacher.normalised(batch.images).double())
    theirs = dense_features(maps.flatten(2).transpose(1, 2), heads or 1)
    expected = (theirs * (theirs / ours).log()).sum(-1).mean()
    torch.testing.assert_close(losses.parts["features"].double(), expected, rtol=1e-3, atol=1e-6)


TINY = {
    "tiny_vit_5m_224": {"depths": [1, 1, 1, 1], "embed_dims": [16, 32, 32, 32], "num_heads": [1, 2, 2, 2]},
    "swin_tiny_patch4_window7_224": {
        "img_size": 64, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2), "window_size": 4,
    },
    "levit_128s": {}, "levit_conv_128s": {},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    "beit_base_patch16_224": {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_students_without_attention_of_all_to_all_learn_relations_of_features(name: str) -> None:
    size = 224 if "levit" in name else 64
    torch.manual_seed(0)
    student = timm.create_model(name, num_classes=CLASSES, **TINY[name])
    teacher = make_live(img_size=size, patch_size=size // 4)
    setting = replace(SETTING, image_size=size, teacher=teacher)
    objective = TinyMIM(student, PLAIN, setting).train()
    leave_out(objective, Report(quiet=True))
    batch = replace(make_batch(2), images=torch.randn(2, 3, size, size))
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.0)
    losses = objective(batch)
    losses.total.backward()
    optimizer.step()
    assert losses.parts.keys() == {"features"}
    assert losses.total > 0
    assert all(each.grad is not None for each in objective.parameters() if each.requires_grad)
    left = {key for key, each in student.named_parameters() if not each.requires_grad}
    assert left == {key for key in left if key.startswith(("head", "norm", "fc_norm"))} != set()


def test_a_step_downhill_costs_less() -> None:
    objective, batch = make(teacher=make_resnet()), make_batch()
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.05)
    costs = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = objective(batch).total
        loss.backward()
        optimizer.step()
        costs.append(loss.item())
    assert costs == sorted(costs, reverse=True)


def test_under_autocast_the_relations_are_float32_s() -> None:
    objective, batch = make(), make_batch()
    exact = objective(batch).total
    with torch.autocast("cpu", torch.bfloat16):
        losses = objective(batch)
    assert losses.total.dtype == torch.float32
    losses.total.backward()
    torch.testing.assert_close(losses.total, exact, rtol=0.1, atol=1e-5)


def test_in_a_sum_it_shares_the_pass_where_both_see_the_same_colours() -> None:
    batch = make_batch()
    alone = make()(batch).total
    for strength, passes in ((0.0, 1), (0.4, 2)):
        terms = TermsConfig(terms={"tinymim": TinyMIMConfig(color_jitter=strength), "label": SupervisedConfig()})
        objective = build(terms, make_plain(), replace(SETTING, teacher=make_live())).train()
        seen: list[Tensor] = []
        objective.student.patch_embed.register_forward_pre_hook(lambda _, inputs, to=seen: to.append(inputs[0]))
        parts = objective(batch).parts
        assert len(seen) == passes
        assert objective.trains_classifier
        if strength == 0:
            torch.testing.assert_close(parts["tinymim.qk"] + parts["tinymim.vv"], alone.detach())


def test_the_jitter_is_torchvision_s() -> None:
    images = torch.rand(6, 3, 9, 9)
    factors = 0.6 + 0.8 * torch.rand(6, 3)
    order = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
    operations = torchvision.adjust_brightness, torchvision.adjust_contrast, torchvision.adjust_saturation
    for image, own, which, ours in zip(images, factors, order, color_jitter(images, factors, order), strict=True):
        for each in which.tolist():
            image = operations[each](image, own[each].item())
        torch.testing.assert_close(ours, image, rtol=1e-4, atol=1e-3)


def test_what_is_jittered_depends_on_the_sample_and_its_view_alone() -> None:
    batch = make_batch(8)
    whole, other_view = jittered(batch, 0.4, SETTING), jittered(replace(batch, views=(1,)), 0.4, SETTING)
    torch.testing.assert_close(jittered(part(batch, 3, 6), 0.4, SETTING), whole[3:6])
    assert not torch.isclose(whole, other_view).all((1, 2, 3)).any()
    assert not torch.equal(jittered(batch, 0.4, replace(SETTING, seed=1)), whole)
    same = replace(batch, images=batch.images[:1].repeat(8, 1, 1, 1), sample_ids=np.repeat([4], 8))
    twins = jittered(same, 0.4, SETTING)
    assert torch.equal(twins[0], twins[7])


def test_colours_stay_colours() -> None:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (SETTING.mean, SETTING.std))
    pixels = torch.rand(8, 3, 28, 28)
    batch = replace(make_batch(8), images=(pixels - mean) / std)
    images = jittered(batch, 0.4, SETTING) * std + mean
    assert images.min() > -1e-5
    assert images.max() < 1 + 1e-5
    torch.testing.assert_close(jittered(batch, 0.0, SETTING), batch.images, rtol=1e-4, atol=1e-5)


def test_the_student_alone_sees_the_jitter() -> None:
    objective, batch = make(TinyMIMConfig()), make_batch()
    seen: list[Tensor] = []
    for model in (objective.student, objective.teacher.model):
        model.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    objective(batch)
    assert torch.equal(seen[0], jittered(batch, 0.4, objective.setting))
    assert torch.equal(seen[1], objective.teacher.normalised(batch.images))


def refused(line: str, config: TinyMIMConfig = PLAIN, **models: Any) -> None:
    with pytest.raises(UsageError, match=line):
        make(config, **models)


def test_what_does_not_fit_is_refused_in_a_line() -> None:
    refused(
        r"^objective tinymim: 5 relation heads do not divide the 48 channels of the student and the 64 of the teacher; "
        r"give objective.relation_heads, one of 1, 2, 4, 8, 16$",
        replace(PLAIN, relation_heads=5),
    )
    refused(
        r"^objective tinymim: the student's patches are a grid of 4 x 4, the teacher's of 2 x 2; give objective.grid, ",
        teacher=make_live(patch_size=14),
    )
    refused(
        r"^objective.teacher_block 4: VisionTransformer has 3 blocks; give 1 to 3$", replace(PLAIN, teacher_block=4)
    )
    refused(
        r"^objective.teacher_block 4: ResNet is no ViT; give objective.teacher_layer by timm's name$",
        replace(PLAIN, teacher_block=4),
        teacher=make_resnet(),
    )
    refused(
        r'^objective.relations attention: ResNet is no ViT with plain attention; give "features", or leave it out$',
        replace(PLAIN, relations="attention"),
        teacher=make_resnet(),
    )
    refused(r"^layer9: ResNet has no such layer", replace(PLAIN, teacher_layer="layer9"), teacher=make_resnet())
    refused(
        r"^objective tinymim: the student's layer is a grid of 4 x 4, the teacher's of 1 x 1, and one token stands to "
        r"no other; give larger images, or objective.student_layer, teacher_layer$",
        teacher=make_resnet(output_stride=32),
    )
    refused(
        r"^objective tinymim: relations are of all patches; leave patch_drop_rate out$",
        student=timm.create_model("vit_tiny_patch16_224", img_size=28, patch_size=7, patch_drop_rate=0.5),
    )


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"relations": "attention", "student_layer": "norm"}, 'student_layer is of relations = "features"; give that'),
        ({"teacher_block": 1, "teacher_layer": "norm"}, "teacher_block and teacher_layer: give one of them"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ValidationError, match=line):
        TinyMIMConfig(**settings)


def test_layers_may_be_named() -> None:
    objective = make(replace(PLAIN, student_layer="blocks.0", teacher_layer="layer2"), teacher=make_resnet())
    assert objective(make_batch(2)).parts.keys() == {"features"}
    assert set(unreached(objective)) >= {"student.blocks.1.norm1.weight"}
