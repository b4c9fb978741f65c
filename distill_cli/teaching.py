"""Who teaches whom: store, live teacher, objective and student, checked against each other."""

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from distill_cli.data.batch import Batch
from distill_cli.data.sources import Source
from distill_cli.errors import MismatchError, UsageError
from distill_cli.live_teacher import LiveTeacher
from distill_cli.objectives import (
    OBJECTIVES,
    Objective,
    ObjectiveConfig,
    Setting,
    SingleConfig,
    build,
    needs_of,
    singles,
)
from distill_cli.objectives.fkd import FKDConfig
from distill_cli.recipe import Recipe
from distill_cli.report import Report
from distill_cli.sparse import top_k
from distill_cli.store.reader import Store
from distill_cli.students.build import check_forward, constructor_arguments, create, input_config
from distill_cli.teachers import Frozen, check_classifier, load_frozen


def open_teacher(config: ObjectiveConfig, recipe: Recipe) -> Frozen | None:
    """The live teacher, where the objective needs one or the recipe asks for one.

    Raises:
        UsageError: store, teacher and objective do not go together.
        as `load_frozen`.
    """
    needs, name, live = needs_of(config), f"objective {config.name}", recipe.teacher.live
    stored = recipe.store.path is not None
    if "logits" in needs and not stored and not live:
        raise UsageError(
            f"{name}: learns from a store; give --store, or --teacher with --live, or --objective supervised"
        )
    if stored and "teacher" in needs and "logits" not in needs:
        raise UsageError(
            f"{name}: learns from more of a teacher than the logits of a store; leave --store out, and give --teacher"
        )
    if live and needs.isdisjoint({"logits", "teacher"}):
        raise UsageError(f"--live: {name} learns from no teacher; leave it out")
    if live and stored and "teacher" not in needs:
        raise UsageError(f"--live: store {recipe.store.path} has all that {name} asks of a teacher; give one of them")
    if not live and "teacher" not in needs:
        return None
    frozen = load_frozen(recipe.teacher, pretrained="--teacher-pretrained")
    if live or ("logits" in needs and not stored):
        check_classifier(frozen, f"--teacher {recipe.teacher.name}")
    return frozen


def rehearse(config: ObjectiveConfig, recipe: Recipe, frozen: Frozen | None) -> None:
    """Refuse a student and an objective that do not fit, before the data is opened.

    Raises:
        UsageError: they do not.
    """
    if all(OBJECTIVES[each.name].takes_any for each in singles(config)):
        return
    assert recipe.student.name is not None
    size = recipe.student.img_size or recipe.data.image_size
    classes = recipe.student.num_classes or (frozen.num_classes if frozen else 2)
    student = create(recipe.student.name, num_classes=classes, arguments=constructor_arguments(recipe.student, size))
    seen = int(input_config(student, size)["input_size"][-1])
    check_forward(student, recipe.student.name, seen)
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    live = LiveTeacher(frozen, mean, std, torch.device("cpu")) if frozen else None
    build(config, student, Setting(seen, mean, std, teacher=live))


def leave_out(objective: Objective, report: Report) -> None:
    """Train nothing of a student that its objective does not reach."""
    names = [] if objective.trains_classifier else unreached(objective)
    for name in names:
        objective.get_parameter(name).requires_grad_(False)
    if names:
        report.stage(f"{len(names)} of the student's tensors are beyond the objective and stay as they are")


def unreached(objective: Objective) -> list[str]:
    """The parameters that get no gradient, by a pass of two blank images."""
    before = {name: value.clone() for name, value in objective.named_buffers()}
    training, device = objective.training, objective.progress.device
    size, classes = objective.setting.image_size, int(objective.student.num_classes)  # type: ignore[arg-type]
    batch = Batch(
        images=torch.zeros(2, 3, size, size, device=device),
        labels=torch.zeros(2, dtype=torch.int64, device=device),
        sample_ids=np.arange(2),
        views=(0,),
        teacher=top_k(torch.zeros(2, max(classes, 1), device=device), 1),
    )
    objective.train()(batch).total.backward()
    names = [name for name, each in objective.named_parameters() if each.requires_grad and each.grad is None]
    objective.zero_grad(set_to_none=True)
    objective.train(training)
    for name, value in objective.named_buffers():
        value.copy_(before[name])
    return names


def check_needs(config: ObjectiveConfig, recipe: Recipe, source: Source, store: Store | None) -> None:
    """
    Raises:
        UsageError: the data has no labels, and the objective learns from them.
        MismatchError: it asks of sampled rows what they cannot tell, or for more classes than rows have.
    """
    if "labels" in needs_of(config) and source.labels is None:
        raise UsageError(
            f"objective {config.name}: learns from labels, which --data {recipe.data.path} has not; "
            "use tinyvit without label_weight and dkd"
        )
    if store is None:
        return
    for each in singles(config):
        for sampled in (one for one in store.stores if one.sampled):
            _check_sampled(each, sampled)
        if isinstance(each, FKDConfig) and each.k is not None and each.k > store.plan.top_k:
            raise MismatchError(
                f"objective.k: {each.k} asked, store {store} has {store.plan.top_k} classes a row; give at most that"
            )


def _check_sampled(config: SingleConfig, store: Store) -> None:
    beyond = config.beyond_samples() if "logits" in OBJECTIVES[config.name].needs else None
    if beyond is not None:
        setting, instead = beyond
        raise MismatchError(
            f"objective.{setting}, the rows of store {store} are sampled; {instead}, or write a store without --sample"
        )
