"""What holds for every objective. To add one, enter its settings in CASES."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small import CLASSES, KINDS, SETTING, make_batch, make_live, make_plain, make_student, part
from torch import Tensor

from distill_cli.accumulate import backward
from distill_cli.data.batch import Batch
from distill_cli.distributed import World
from distill_cli.objectives import OBJECTIVES, Objective, ObjectiveConfig, TermsConfig, build, needs_of
from distill_cli.objectives.deit import DeiTConfig
from distill_cli.objectives.dist import DISTConfig
from distill_cli.objectives.dkd import DKDConfig
from distill_cli.objectives.dmae import DecoderConfig, DMAEConfig
from distill_cli.objectives.feature_pairs import (
    AttentionConfig,
    DenseConfig,
    MaskedConfig,
    PooledConfig,
    RelationConfig,
    SimilarityConfig,
)
from distill_cli.objectives.features import FeaturesConfig
from distill_cli.objectives.fkd import FKDConfig
from distill_cli.objectives.jsd import JSDConfig
from distill_cli.objectives.ramps import PositiveRamp, Ramp
from distill_cli.objectives.supervised import SupervisedConfig
from distill_cli.objectives.tinymim import TinyMIMConfig
from distill_cli.objectives.tinyvit import TinyViTConfig
from distill_cli.report import Report
from distill_cli.sparse import SparseLogits, top_k
from distill_cli.teaching import leave_out

SMALL_DECODER = DecoderConfig(depth=1, width=32, heads=2)
BLOCKS = {"student": "blocks.0", "teacher": "blocks.1"}
CASES: dict[str, ObjectiveConfig] = {
    "supervised": SupervisedConfig(),
    "tinyvit": TinyViTConfig(temperature=2.0),
    "tinyvit-bucket": TinyViTConfig(temperature=2.0, tail="bucket", label_weight=0.5),
    "tinyvit-renormalise": TinyViTConfig(temperature=2.0, tail="renormalise"),
    "tinyvit-standardise": TinyViTConfig(temperature=2.0, standardise=True),
    "tinyvit-jsd": TinyViTConfig(temperature=2.0, divergence=JSDConfig()),
    "tinyvit-dkd": TinyViTConfig(temperature=2.0, divergence=DKDConfig()),
    "tinyvit-dist-inter": TinyViTConfig(divergence=DISTConfig(inter=1, intra=0)),
    "tinyvit-dist": TinyViTConfig(temperature=2.0, divergence=DISTConfig()),
    "fkd": FKDConfig(k=2, temperature=2.0),
    "fkd-hard": FKDConfig(label_type="hard"),
    "deit": DeiTConfig(),
    "deit-soft": DeiTConfig(distillation="soft", temperature=2.0),
    "deit-second-head": DeiTConfig(second_head="average"),
    "deit-dropped-head": DeiTConfig(second_head="drop", distillation="soft", divergence=DKDConfig(), standardise=True),
    "tinymim": TinyMIMConfig(),
    "tinymim-features": TinyMIMConfig(relations="features"),
    "dmae": DMAEConfig(decoder=SMALL_DECODER),
    "dmae-mlp": DMAEConfig(
        alpha=Ramp(start=0.5, end=2.0),
        normalise=False,
        blocks=((1, 1), (2, 3)),
        projection="mlp",
        norm_pix=True,
        decoder=SMALL_DECODER,
    ),
    "mae": DMAEConfig(alpha=0, decoder=SMALL_DECODER),
    "features": FeaturesConfig(),
    "features-pooled": FeaturesConfig(
        pairs={"p": PooledConfig(distance="smooth_l1", target="layernorm", projection="mlp")}, label_weight=0
    ),
    "features-dense": FeaturesConfig(
        pairs={"one": DenseConfig(**BLOCKS), "two": DenseConfig(student="blocks.1", teacher="blocks.2", distance="l2")}
    ),
    "features-masked": FeaturesConfig(pairs={"m": MaskedConfig(**BLOCKS)}, label_weight=0),
    "features-channels": FeaturesConfig(pairs={"m": MaskedConfig(**BLOCKS, mask=0.15, masked="channels")}),
    "features-attention": FeaturesConfig(pairs={"a": AttentionConfig(**BLOCKS)}, label_weight=0),
    "features-similarity": FeaturesConfig(pairs={"s": SimilarityConfig()}),
    "features-relation": FeaturesConfig(pairs={"r": RelationConfig()}, label_weight=0),
    "terms-features": TermsConfig(
        terms={
            "tinyvit": TinyViTConfig(),
            "features": FeaturesConfig(pairs={"d": DenseConfig(**BLOCKS)}, label_weight=0),
        }
    ),
    "terms": TermsConfig(
        terms={"deit": DeiTConfig(), "soft": TinyViTConfig(weight=0.5, temperature=PositiveRamp(start=4.0, end=1.0))}
    ),
}
PARTIAL = [
    *("features-pooled", "features-masked", "features-attention", "features-relation"),
    *("tinymim", "tinymim-features", "dmae", "dmae-mlp", "mae"),
]
"""Those that train without the student's classifier, and say nothing of its logits."""
WHOLE_BATCH = ("tinyvit-dist", "features-similarity", "features-relation")
"""Those that compare images of a batch with each other: of its parts the mean is not that of the whole."""
PLAIN = ("deit-second-head", "deit-dropped-head", "dmae")
"""Those whose student has no distillation token."""
every_objective = pytest.mark.parametrize("case", CASES)
every_mean = pytest.mark.parametrize("case", [case for case in CASES if case not in WHOLE_BATCH])
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(case: str, seed: int = 0) -> Objective:
    """The objective around a fresh student, in training, beside a live teacher where it needs one."""
    config = CASES[case]
    setting = replace(SETTING, teacher=make_live()) if "teacher" in needs_of(config) else SETTING
    objective = build(config, (make_plain if case in PLAIN else make_student)(seed), setting).train()
    leave_out(objective, Report(quiet=True))
    return objective


def gradients(objective: Objective, *batches: Batch) -> dict[str, Tensor]:
    """Of the mean loss over the batches, by parameter."""
    objective.zero_grad()
    for batch in batches:
        (objective(batch).total / len(batches)).backward()
    return {name: parameter.grad.clone() for name, parameter in objective.named_parameters() if parameter.requires_grad}


def other_labels(batch: Batch) -> Batch:
    return replace(batch, labels=(batch.labels + 1) % CLASSES)


def other_rows(batch: Batch) -> Batch:
    return replace(batch, teacher=make_batch(len(batch), seed=2).teacher)


def with_rows(batch: Batch, logits: Tensor) -> Batch:
    return replace(batch, teacher=top_k(logits, 3))


def test_every_objective_is_a_case() -> None:
    assert {config.name for config in CASES.values()} == {*OBJECTIVES, "terms"}


@every_objective
@every_kind
def test_the_losses_are_finite_scalars_and_the_parts_detached(case: str, kind: str) -> None:
    losses = make(case)(make_batch(kind=kind))
    assert losses.parts
    for loss in (losses.total, *losses.parts.values()):
        assert loss.shape == ()
        assert loss.isfinite()
    assert not any(loss.requires_grad for loss in losses.parts.values())


@every_objective
@every_kind
def test_where_there_are_rows_it_says_how_the_student_stands_to_them(case: str, kind: str) -> None:
    objective, batch = make(case), make_batch(kind=kind)
    assert batch.teacher is not None
    seen = objective(batch).seen
    if case in PARTIAL:
        assert seen == {}
        return
    student = objective.student.eval()(batch.images)
    assert seen["agreement"] == (student.argmax(1) == batch.teacher.class_id[:, 0]).float().mean()
    entries = torch.arange(batch.teacher.class_id.shape[1]) < batch.teacher.counts[:, None]
    kept = (batch.teacher.log_prob.exp() * entries).sum(1)
    torch.testing.assert_close(seen["mass"], kept.mean())
    assert not any(value.requires_grad for value in seen.values())


def test_without_rows_there_is_nothing_to_stand_to() -> None:
    assert make("supervised")(replace(make_batch(), teacher=None)).seen == {}


@every_objective
@every_kind
def test_a_gradient_reaches_everything_that_is_trained_and_nothing_else(case: str, kind: str) -> None:
    objective = make(case)
    objective(make_batch(kind=kind)).total.backward()
    reached = {name for name, parameter in objective.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    assert case in PARTIAL or reached >= {f"student.{name}" for name, _ in objective.student.named_parameters()}
    assert all(objective.get_parameter(name).grad.any() for name in reached)


@every_objective
@every_kind
def test_no_gradient_reaches_the_teacher(case: str, kind: str) -> None:
    batch = make_batch(kind=kind)
    assert batch.teacher is not None
    rows = SparseLogits(
        batch.teacher.class_id,
        batch.teacher.log_prob.requires_grad_(),
        batch.teacher.log_tail.requires_grad_(),
        batch.teacher.count,
    )
    objective = make(case)
    objective(replace(batch, teacher=rows)).total.backward()
    assert rows.log_prob.grad is None
    assert rows.log_tail.grad is None
    live = objective.setting.teacher
    assert live is None or all(parameter.grad is None for parameter in live.model.parameters())


@every_objective
def test_the_live_teacher_is_no_part_of_it(case: str) -> None:
    """… so that no optimiser, checkpoint or DDP holds it."""
    objective = make(case)
    if objective.setting.teacher is not None:
        theirs = {id(each) for each in objective.setting.teacher.model.parameters()}
        assert theirs.isdisjoint(id(each) for each in objective.parameters())


@every_objective
def test_it_says_what_does_not_hold_of_it(case: str) -> None:
    objective, batch = make(case), make_batch()
    assert objective.trains_classifier == (case not in PARTIAL)
    assert objective.relates_images == (case in WHOLE_BATCH)
    halves = [objective(part(batch, start, start + 4)).total for start in (0, 4)]
    is_mean = torch.allclose(sum(halves) / 2, objective(batch).total, rtol=1e-5)
    assert is_mean == (case not in WHOLE_BATCH)


@every_mean
@every_kind
def test_accumulating_two_halves_is_one_batch(case: str, kind: str) -> None:
    objective, batch = make(case), make_batch(kind=kind)
    whole = gradients(objective, batch)
    halves = gradients(objective, part(batch, 0, 4), part(batch, 4, 8))
    torch.testing.assert_close(halves, whole, rtol=1e-6, atol=1e-6)


@every_mean
@every_kind
def test_what_is_said_of_accumulated_parts_are_the_means_of_the_batch(case: str, kind: str) -> None:
    objective, batch, world = make(case), make_batch(kind=kind), World(torch.device("cpu"))
    whole, cut = (backward(objective, batch, parts, world, "fp32") for parts in (1, 3))
    assert cut.parts.keys() == whole.parts.keys()
    assert cut.seen.keys() == whole.seen.keys() == (set() if case in PARTIAL else {"agreement", "mass"})
    for name, value in {"total": whole.total, **whole.parts, **whole.seen}.items():
        torch.testing.assert_close({"total": cut.total, **cut.parts, **cut.seen}[name], value, rtol=1e-5, atol=1e-6)


@every_objective
@pytest.mark.parametrize(("need", "change"), [("labels", other_labels), ("logits", other_rows)])
def test_it_learns_from_what_it_needs_and_from_nothing_else(
    case: str, need: str, change: Callable[[Batch], Batch]
) -> None:
    objective, batch = make(case), make_batch()
    learns = not torch.equal(objective(batch).total, objective(change(batch)).total)
    assert learns == (need in objective.needs)


@every_objective
def test_of_mixed_images_it_learns_from_both_labels_or_from_none(case: str) -> None:
    objective, batch = make(case), make_batch(kind="mixed")
    assert batch.mixed is not None
    other = replace(batch, mixed=replace(batch.mixed, partner=(batch.mixed.partner + 1) % CLASSES))
    learns = not torch.equal(objective(batch).total, objective(other).total)
    assert learns == ("labels" in objective.needs)


@pytest.mark.parametrize("case", [case for case in CASES if "labels" in needs_of(CASES[case])])
def test_a_partner_without_a_label_fails_loudly(case: str) -> None:
    objective, batch = make(case), make_batch(kind="mixed")
    assert batch.mixed is not None
    bare = replace(batch, mixed=replace(batch.mixed, partner=torch.full_like(batch.labels, -1)))
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        objective(bare)


@every_objective
def test_it_does_without_what_it_does_not_need(case: str) -> None:
    objective, batch = make(case), make_batch()
    if "labels" not in objective.needs:
        batch = replace(batch, labels=torch.full_like(batch.labels, -1))
    if "logits" not in objective.needs:
        batch = replace(batch, teacher=None)
    assert objective(batch).total.isfinite()


@every_objective
def test_its_state_is_all_there_is_of_it(case: str) -> None:
    one, other, batch = make(case, seed=0), make(case, seed=1), make_batch()
    assert not torch.equal(one(batch).total, other(batch).total)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(batch).total, other(batch).total)


NEEDS = [(case, need) for case, config in CASES.items() for need in sorted(needs_of(config) - {"teacher"})]


@pytest.mark.parametrize(("case", "need"), NEEDS)
def test_a_class_that_the_student_does_not_have_fails_loudly(case: str, need: str) -> None:
    objective, batch = make(case), make_batch()
    beyond = {
        "labels": replace(batch, labels=batch.labels + CLASSES),
        "logits": with_rows(batch, torch.arange(CLASSES + 3.0).expand(8, -1)),
    }
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        objective(beyond[need])


def a_few_steps(case: str, world: World) -> dict[str, Tensor]:
    """The weights after a step on each kind of rows: on this rank's half, or on all where there is one rank."""
    objective = make(case)
    model = world.wrap(objective)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    share = 8 // world.size
    for kind in KINDS:
        batch = part(make_batch(kind=kind), world.rank * share, (world.rank + 1) * share)
        optimizer.zero_grad()
        model(batch).total.backward()
        optimizer.step()
    return objective.state_dict()


def work_as_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    weights = {case: a_few_steps(case, World(torch.device("cpu"), rank, 2)) for case in CASES}
    torch.save(weights, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """By rank and case, the weights after a few steps of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    # A fork has torch and timm imported already; where CUDA is, autograd has threads that a fork would lose.
    method = "spawn" if torch.cuda.is_available() else "fork"
    torch.multiprocessing.start_processes(work_as_rank, (str(folder),), nprocs=2, start_method=method)
    return [torch.load(Path(folder) / f"rank{rank}.pt") for rank in (0, 1)]


@every_mean
def test_two_ranks_are_one_process(case: str, ranks: list[dict[str, dict[str, Tensor]]]) -> None:
    alone = a_few_steps(case, World(torch.device("cpu")))
    for rank in ranks:
        torch.testing.assert_close(rank[case], alone, rtol=1e-5, atol=1e-6)
