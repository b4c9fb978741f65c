import math

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.optim import param_groups_layer_decay
from torch import nn

from distill_cli.errors import UsageError
from distill_cli.objectives import Setting
from distill_cli.objectives.supervised import Supervised, SupervisedConfig
from distill_cli.optim import OPTIMIZERS, TrainConfig, build_optimizer, optimizer_settings, parameter_groups, settle
from distill_cli.recipe import load

CONFIG = TrainConfig(lr=1e-3)


def around(student: nn.Module) -> Supervised:
    return Supervised(student, SupervisedConfig(), Setting(28))


def groups(student: nn.Module) -> tuple[set[str], set[str]]:
    """Names of the student's parameters with and without weight decay."""
    objective = around(student)
    optimizer = build_optimizer(objective, TrainConfig(lr=1e-3, weight_decay=0.05))
    named = {id(parameter): name.removeprefix("student.") for name, parameter in objective.named_parameters()}
    names: dict[float, set[str]] = {0.05: set(), 0.0: set()}
    for group in optimizer.param_groups:
        names[group["weight_decay"]] |= {named[id(parameter)] for parameter in group["params"]}
    return names[0.05], names[0.0]


def small_tinyvit() -> nn.Module:
    arguments = {"depths": (1, 1, 2, 1), "embed_dims": (16, 32, 32, 32), "num_heads": (1, 2, 2, 2)}
    return timm.create_model("tiny_vit_5m_224", num_classes=3, **arguments)


def test_tinyvit_decays_no_norm_bias_or_attention_bias() -> None:
    decayed, exempt = groups(timm.create_model("tiny_vit_5m_224", num_classes=10))
    assert not [name for name in decayed if "norm" in name or "bias" in name or ".bn." in name]
    assert [name for name in exempt if name.endswith("attention_biases")]
    assert "head.fc.weight" in decayed
    assert "stages.1.blocks.0.attn.qkv.weight" in decayed


def test_deit_decays_no_norm_bias_token_or_position() -> None:
    student = timm.create_model("deit_tiny_distilled_patch16_224", depth=1, embed_dim=48, num_heads=3)
    decayed, exempt = groups(student)
    assert {"cls_token", "dist_token", "pos_embed", "norm.weight", "blocks.0.attn.qkv.bias"} <= exempt
    assert decayed == {
        "patch_embed.proj.weight", "head.weight", "head_dist.weight", "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight",
    }  # fmt: skip


class Speaking(nn.Module):
    """Parameters of two dims, one of which it exempts by a part of its name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.attention_biases, self.my_gate = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))

    def no_weight_decay_keywords(self) -> set[str]:
        return {"gate"}


def test_attention_biases_and_what_a_student_exempts_itself_are_not_decayed() -> None:
    assert groups(Speaking()) == ({"weight"}, {"attention_biases", "my_gate"})


MODELS = ["tiny_vit_5m_224", "deit_tiny_distilled_patch16_224", "levit_128s", "resnet18", "convnext_atto"]


@pytest.mark.parametrize("decay", [None, 0.8])
@pytest.mark.parametrize("name", MODELS)
def test_every_trained_parameter_is_in_exactly_one_group(name: str, decay: float | None) -> None:
    with torch.device("meta"):
        student = timm.create_model(name)
    objective = around(student)
    next(student.parameters()).requires_grad_(False)
    config = TrainConfig(lr=1e-3, layer_decay=decay)
    grouped = [id(p) for group in build_optimizer(objective, config).param_groups for p in group["params"]]
    trained = [id(parameter) for parameter in objective.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trained)


@pytest.mark.parametrize("name", MODELS)
def test_the_layers_and_their_shares_are_timms(name: str) -> None:
    with torch.device("meta"):
        student = timm.create_model(name)
    ours = parameter_groups(around(student), TrainConfig(lr=1e-3, layer_decay=0.7))
    theirs = param_groups_layer_decay(student, layer_decay=0.7)
    expected = {id(parameter): group["lr_scale"] for group in theirs for parameter in group["params"]}
    assert {id(parameter): group["lr_scale"] for group in ours for parameter in group["params"]} == expected
    assert len(set(expected.values())) > 2


def test_tinyvits_shares_fall_by_a_factor_a_block_from_the_head_down() -> None:
    student = small_tinyvit()
    shares = {}
    for group in parameter_groups(around(student), TrainConfig(lr=1e-3, layer_decay=0.8)):
        shares |= {id(parameter): group["lr_scale"] for parameter in group["params"]}
    blocks = [student.stages[0].blocks[0], student.stages[1].blocks[0], *student.stages[2].blocks]
    blocks += [student.stages[3].blocks[0]]
    for above, module in enumerate([student.head.fc, *reversed(blocks), student.patch_embed]):
        assert {shares[id(parameter)] for parameter in module.parameters()} == {0.8**above}


def test_what_an_objective_adds_to_the_student_has_the_whole_rate() -> None:
    objective = around(small_tinyvit())
    objective.decoder = nn.Linear(2, 2)
    found = parameter_groups(objective, TrainConfig(lr=1e-3, layer_decay=0.5))
    added = [group["lr_scale"] for group in found for p in group["params"] if p in set(objective.decoder.parameters())]
    assert added == [1.0, 1.0]


def test_layer_decay_needs_layers() -> None:
    with pytest.raises(UsageError, match=r"train.layer_decay: timm knows no layers of Linear; leave it out"):
        parameter_groups(around(nn.Linear(2, 2)), TrainConfig(lr=1e-3, layer_decay=0.5))


@given(lr=st.floats(1e-6, 1), decay=st.floats(0, 1), beta=st.floats(0, 0.99))
def test_the_optimizer_has_the_settings_of_the_recipe(lr: float, decay: float, beta: float) -> None:
    config = TrainConfig(lr=lr, weight_decay=decay, betas=(beta, 0.5), eps=1e-6)
    optimizer = build_optimizer(around(nn.Linear(2, 2)), config)
    for group, weight_decay in zip(optimizer.param_groups, (decay, 0.0), strict=True):
        assert (group["lr"], group["weight_decay"]) == (lr, weight_decay)
        assert (tuple(group["betas"]), group["eps"]) == ((beta, 0.5), 1e-6)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("adamw", {"betas": (0.9, 0.999), "eps": 1e-8}),
        ("lamb", {"betas": (0.9, 0.999), "eps": 1e-6}),
        ("sgd", {"momentum": 0.9}),
        ("muon", {"betas": (0.9, 0.95), "eps": 1e-7, "momentum": 0.9}),
        ("adan", {"betas": (0.98, 0.92, 0.99), "eps": 1e-8}),
    ],
)
def test_what_a_recipe_leaves_open_is_the_optimizers_own(name: str, own: dict[str, object]) -> None:
    assert optimizer_settings(TrainConfig(opt=name, lr=1e-3)) == own


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_that_is_offered_takes_its_settled_settings_and_steps(name: str) -> None:
    config = TrainConfig(opt=name, lr=1e-3, batch_size=8)
    settled = TrainConfig(opt=name, batch_size=8, **settle(config))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = build_optimizer(around(model), settled)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 6)).square().mean().backward()
        optimizer.step()
    moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert all(moved)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_sgd_has_nesterovs_momentum() -> None:
    optimizer = build_optimizer(around(nn.Linear(2, 2)), TrainConfig(opt="sgd", lr=0.1, momentum=0.8))
    assert [(group["nesterov"], group["momentum"]) for group in optimizer.param_groups] == [(True, 0.8)] * 2


def test_muon_leaves_what_is_not_decayed_and_no_matrix_to_adamw() -> None:
    student = small_tinyvit()
    optimizer = build_optimizer(around(student), TrainConfig(opt="muon", lr=1e-3))
    student(torch.randn(2, 3, 224, 224)).square().mean().backward()
    optimizer.step()
    by_muon = {name for name, p in student.named_parameters() if optimizer.state[p]["use_muon"]}
    assert "stages.1.blocks.0.attn.qkv.weight" in by_muon
    assert not [name for name in by_muon if name.endswith(("attention_biases", ".bias")) or ".bn." in name]


def test_further_arguments_reach_the_optimizer() -> None:
    config = TrainConfig(opt="lamb", lr=1e-3, opt_kwargs={"max_grad_norm": 7.0})
    assert build_optimizer(around(nn.Linear(2, 2)), config).defaults["max_grad_norm"] == 7.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"opt_kwargs": {"nesterow": True}}, r"train.opt: timm cannot build adamw with .*nesterow=True \(.*nesterow"),
        ({"betas": (0.9, 1.0)}, r"train.opt: timm cannot build adamw with betas=\(0.9, 1.0\), .* \(Invalid beta"),
        ({"opt": "sgd", "betas": (0.9, 0.9)}, r"train.betas: sgd has none; leave it out"),
        ({"momentum": 0.9}, r"train.momentum: adamw has none; leave it out"),
        ({"opt": "adan", "betas": (0.9, 0.9)}, r"train.betas: adan has 3, not 2"),
    ],
)
def test_settings_that_an_optimizer_does_not_take_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        build_optimizer(around(nn.Linear(2, 2)), TrainConfig(lr=1e-3, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adamv", "--set: train.opt: no such optimizer, 'adamv'; did you mean adam, "),
        ("moun", "no such optimizer, 'moun'; did you mean muon?"),
        ("zzz", "no such optimizer, 'zzz'; adamw, lamb, sgd and muon are among timm's"),
        ("fusedadam", "no such optimizer, 'fusedadam'; did you mean "),
    ],
)
def test_an_unknown_optimizer_names_the_nearest(name: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(sets=[f"train.opt={name}"])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "train.layer_decay=0", "train.layer_decay=1.1", "train.decay_share=0", "train.ema_decay=1",
        "train.accumulate=0",
        "train.clip_mode=both", "train.schedule=poly", "train.decay_rate=2", "train.betas=[0.9]", "train.momentum=-1",
    ],
)  # fmt: skip
def test_a_value_out_of_its_bounds_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=f"--set: {text.partition('=')[0]}: "):
        load(sets=[text])


def test_the_default_rate_grows_with_the_batch_and_is_adamws() -> None:
    assert [settle(TrainConfig(batch_size=size))["lr"] for size in (512, 1024)] == [5e-4, 1e-3]
    with pytest.raises(UsageError, match=r"train.lr is missing: its default is AdamW's; give the rate of lamb"):
        settle(TrainConfig(opt="lamb"))


def test_the_default_bound_is_that_of_the_mode() -> None:
    bounds = {mode: settle(TrainConfig(clip_mode=mode, clip_grad=given))["clip_grad"]  # type: ignore[arg-type]
              for mode, given in {"norm": None, "agc": None, "value": 0.5}.items()}  # fmt: skip
    assert bounds == {"norm": 5.0, "agc": 0.01, "value": 0.5}
    assert settle(TrainConfig(clip_grad=0))["clip_grad"] == 0
    with pytest.raises(UsageError, match=r"train.clip_grad is missing: clip_mode value has no default"):
        settle(TrainConfig(clip_mode="value"))


def test_adamw_on_the_cpu_is_torchs_loop_and_not_its_fused_kernel() -> None:
    optimizer = build_optimizer(around(nn.Linear(2, 2)), CONFIG)
    assert not optimizer.defaults["fused"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_torchs_optimizers_are_fused_on_cuda(name: str) -> None:
    model = nn.Linear(2, 2).cuda()
    optimizer = build_optimizer(around(model), TrainConfig(opt=name, lr=1e-3))
    assert optimizer.defaults["fused"]
    model(torch.ones(1, 2, device="cuda")).sum().backward()
    optimizer.step()
    assert math.isfinite(model.weight.sum().item())
