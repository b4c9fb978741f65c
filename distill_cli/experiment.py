"""An experiment: recipe, store, data and student, opened, checked against each other, and with nothing left open."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from distill_cli.data import open_train, open_val
from distill_cli.data.crops import evaluated
from distill_cli.data.mixing import SHARD_ROWS, DrawnPartners, Partners
from distill_cli.data.orders import TrainingOrder
from distill_cli.data.sources import Source, check_classes, fingerprint, num_classes, parts
from distill_cli.data.views import (
    DEFAULTS,
    SEEN,
    Transform,
    View,
    check_decoder,
    own_input,
    read_view,
    resolve_view,
    student_view,
    train_transform,
)
from distill_cli.distributed import World
from distill_cli.ema import build_ema
from distill_cli.engine import check_engine, prepare
from distill_cli.ensemble import identity_of, lineage_of, open_stores
from distill_cli.errors import MismatchError, UsageError
from distill_cli.files import canonical_json, sha256
from distill_cli.live_teacher import LiveTeacher
from distill_cli.objectives import Objective, ObjectiveConfig, Setting, build, needs_of
from distill_cli.objectives.base import trains_classifier
from distill_cli.objectives.supervised import SupervisedConfig
from distill_cli.objectives.tinyvit import TinyViTConfig
from distill_cli.optim import build_optimizer, settle
from distill_cli.recipe import Recipe, update
from distill_cli.recipe import fingerprint as recipe_fingerprint
from distill_cli.replay import check_data, stored_partners
from distill_cli.report import Report
from distill_cli.schedules import learning_rate
from distill_cli.sharding import is_sharded, shard
from distill_cli.software import versions
from distill_cli.store.dealing import Dealing
from distill_cli.store.reader import Store
from distill_cli.students.build import (
    check_forward,
    constructor_arguments,
    create,
    has_batch_norm,
    input_config,
    timm_name,
)
from distill_cli.students.transfer import begin_from, check_begin
from distill_cli.students.weights import Card
from distill_cli.teachers import Frozen
from distill_cli.teaching import check_needs, leave_out, open_teacher, rehearse

SHUFFLE_TARS = 16


@dataclass(frozen=True)
class Experiment:
    """Everything that a run works with."""

    recipe: Recipe
    """With nothing left open."""
    origins: dict[str, str]
    source: Source
    val: Source | None
    store: Store | None
    view: View
    """What the student sees."""
    taught: View | None
    """What the teacher of the store saw."""
    objective: Objective
    optimizer: Optimizer
    ema: ModelEmaV3 | None
    """The average of the student's weights."""
    order: TrainingOrder
    classes: int
    arguments: dict[str, Any]
    """Of the student's constructor."""
    begun: Mapping[str, str | None]
    """The sha256 of the weights and of the class map that the student began from."""
    frozen: Frozen | None
    """The live teacher."""

    @property
    def transform(self) -> Transform:
        """What makes the student's inputs."""
        return train_transform(self.drawn_from, self.view)

    @property
    def drawn_from(self) -> View:
        """The view whose draws the student sees: the teacher's, where there is one."""
        return self.taught or self.view

    @property
    def steps(self) -> int:
        config = self.recipe.train
        return config.steps or config.epochs * self.order.steps_per_epoch

    @property
    def epochs(self) -> int:
        return -(-self.steps // self.order.steps_per_epoch)

    def learning_rate(self, step: int) -> float:
        return learning_rate(step, self.steps, self.order.steps_per_epoch, self.recipe.train)

    def validates_at(self, step: int) -> bool:
        """After each epoch, and after the last step."""
        return self.validation is not None and step > 0 and self.ends_at(step)

    @property
    def validation(self) -> Source | None:
        """The images that are validated on: none where there is no classifier to validate."""
        labelled = self.val is not None and self.val.labels is not None
        return self.val if labelled and self.objective.trains_classifier else None

    def ends_at(self, step: int) -> bool:
        """An epoch, or the run."""
        return step % self.order.steps_per_epoch == 0 or step == self.steps

    @property
    def sharded(self) -> bool:
        """Whether the ranks have parts of the weights, so that all of them take part in saving."""
        return is_sharded(self.objective)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with besides the recipe."""
        live = {"teacher": self.frozen.weights_sha256} if self.frozen else {}
        return {"data": fingerprint(self.source), **identity_of(self.store), **self.begun, **live}

    def card(self, top1: float | None, top5: float | None, ema_decay: float | None = None) -> Card:
        """What the weights of this experiment say of themselves."""
        view, recipe = self.view, self.recipe
        assert recipe.objective is not None
        assert recipe.student.name is not None
        return Card(
            student=timm_name(recipe.student.name),
            arguments=self.arguments,
            num_classes=self.classes,
            classes=class_names(self.source, self.store),
            input={
                "input_size": (3, view.image_size, view.image_size),
                "mean": view.mean,
                "std": view.std,
                "interpolation": evaluated(view.interpolation),
                "crop_pct": view.crop_pct,
            },
            recipe_sha256=recipe_fingerprint(recipe),
            data_fingerprint=sha256(canonical_json(self.identity["data"])),
            objective=recipe.objective.name,
            **(lineage_of(self.store) if self.store or not self.frozen else {"teacher": self.frozen.name}),
            init_from=self.begun["init_from"],
            ema_decay=ema_decay,
            trained_classifier=self.objective.trains_classifier,
            top1=top1,
            top5=top5,
            software=versions(),
        )


def open_experiment(recipe: Recipe, world: World, report: Report) -> Experiment:
    """Open store, data and student, and settle what the recipe leaves open.

    Raises:
        UsageError, MismatchError, DamagedError: they do not fit each other; both sides are named.
    """
    if recipe.student.name is None:
        raise UsageError('--student is missing: give an alias or a timm name; "distill models ls" lists them')
    check_engine(recipe, world)
    check_begin(recipe.train.init_from, recipe.student.class_map, recipe.student.pretrained)
    config = recipe.objective or (TinyViTConfig() if recipe.store.path else SupervisedConfig())
    frozen = open_teacher(config, recipe)
    rehearse(config, recipe, frozen)
    report.stage("opening the data")
    source = open_train(recipe.data, report)
    val = open_val(recipe.data, report)
    store = open_stores(recipe.store)
    classes = _classes(recipe, config, source, val, store, frozen)
    report.stage(f"{len(source)} images, {len(val) if val else 'none'} to validate on; building {recipe.student.name}")
    torch.manual_seed(recipe.train.seed)
    size = _image_size(recipe, store)
    arguments = constructor_arguments(recipe.student, size)
    student = create(
        recipe.student.name, num_classes=classes, arguments=arguments, pretrained=recipe.student.pretrained
    )
    begun = begin_from(student, recipe.train.init_from, recipe.student.class_map, class_names(source, store), report)
    taught = None if store is None else read_view(store.plan.transform, f"store {store}")
    view = _view(recipe, taught, input_config(student, size), size)
    check_decoder(view, world.device, store)
    _say_input(view, taught, report)
    check_forward(student, recipe.student.name, view.image_size)
    order = training_order(recipe, source, store, view, world)
    settled, origins = _settle(recipe, config, store, view, order, classes)
    check_needs(config, settled, source, store)
    live = None if frozen is None else LiveTeacher(frozen, view.mean, view.std, world.device)
    setting = Setting(view.image_size, view.mean, view.std, recipe.train.seed, live)
    objective = build(config, prepare(student, recipe, world), setting).to(world.device)
    leave_out(objective, report)
    ema = build_ema(objective.student, settled.train)
    if recipe.runtime.fsdp and world.size > 1:
        shard(objective, ema, world)
    _warn(recipe, source, store, student, view, report)
    if not objective.trains_classifier:
        report.stage(f"objective {config.name} trains no classifier: nothing is validated, and there is no top1")
    elif val is None or val.labels is None:
        lack = "validation split" if val is None else "labels to validate on"
        report.warn(f"--data {recipe.data.path}: has no {lack}, so there is no top1; data.val names other images")
    pieces = recipe.train.accumulate * world.size
    if objective.relates_images and pieces > 1:
        report.warn(
            f"objective {config.name}: compares the images of a batch with each other, and sees {pieces} parts of it, "
            "each by itself (train.accumulate, ranks)"
        )
    return Experiment(
        recipe=settled,
        origins=origins,
        source=source,
        val=val,
        store=store,
        view=view,
        taught=taught,
        objective=objective,
        optimizer=build_optimizer(objective, settled.train),
        ema=ema,
        order=order,
        classes=classes,
        arguments=arguments,
        begun=begun,
        frozen=frozen,
    )


def class_names(source: Source, store: Store | None) -> tuple[str, ...] | None:
    """Of a student's classes: its teacher's where there is a store that has them, else the data's."""
    names = (store and store.classes) or source.classes
    return names and tuple(names)


def _view(recipe: Recipe, taught: View | None, own: Mapping[str, Any], size: int | None) -> View:
    """What the student sees: of the teacher's views where there is a store.

    Args:
        own: the student's own input, as timm has it.
        size: the input size that was settled.
    """
    if taught is None:
        return resolve_view(recipe.data, own)
    seen = own_input(own) if recipe.data.input == "student" else {name: getattr(taught, name) for name in SEEN}
    return student_view(recipe.data, taught, seen | ({} if size is None else {"image_size": size}))


def _say_input(view: View, taught: View | None, report: Report) -> None:
    names = [] if taught is None else [name for name in SEEN if getattr(view, name) != getattr(taught, name)]
    if names:
        said = ", ".join(f"{name} {getattr(view, name)} (the teacher {getattr(taught, name)})" for name in names)
        report.stage(f"the student sees the teacher's crops by an input of its own: {said}")


def _settle(
    recipe: Recipe, config: ObjectiveConfig, store: Store | None, view: View, order: TrainingOrder, classes: int
) -> tuple[Recipe, dict[str, str]]:
    """The recipe with nothing left open, and what decided each value that was."""
    train, by = recipe.train, "store" if store else "student"
    epochs = train.epochs if train.steps is None else -(-train.steps // order.steps_per_epoch)
    warmup = epochs / 20 if train.warmup_epochs is None else train.warmup_epochs
    chosen = settle(train)
    origins = dict.fromkeys(DEFAULTS, "default") if store is None else {}
    if recipe.data.input == "student":
        origins |= dict.fromkeys(SEEN, "student")
    decided = {f"data.{name}": (origins.get(name, by), value) for name, value in view.table.items()} | {
        "objective.name": ("store" if store else "no store", config.name),
        "student.num_classes": ("store" if store else "data", classes),
        "student.img_size": (origins.get("image_size", by), view.image_size),
        "train.lr": ("batch size", chosen.pop("lr")),
        "train.epochs": ("steps" if train.steps else "default", epochs),
        "train.warmup_epochs": ("epochs", warmup),
    }
    decided |= {f"train.{name}": ("optimizer", value) for name, value in chosen.items()}
    if order.tars:
        decided["train.shuffle_tars"] = ("data", order.window)
    settled = update(recipe, {path: value for path, (_, value) in decided.items()})
    return settled, {path: origin for path, (origin, _) in decided.items()}


def _warn(recipe: Recipe, source: Source, store: Store | None, student: nn.Module, view: View, report: Report) -> None:
    batch_size, views = recipe.train.batch_size, recipe.train.views_per_read
    for field, asked, what in (
        ("freeze_bn", recipe.train.freeze_bn, "freeze"),
        ("sync_bn", recipe.train.sync_bn, "synchronise"),
    ):
        if asked and not has_batch_norm(student):
            report.warn(f"train.{field}: {recipe.student.name} has no BatchNorm to {what}")
    if view.mixes and views > 1:
        report.warn(
            f"--views-per-read {views}: each view mixes a sample with another one, which is decoded in addition: "
            "nothing is saved beside data.mixup and data.cutmix"
        )
    if len(source) < batch_size:
        report.warn(f"--batch-size {batch_size}: is more than the {len(source)} images; an epoch is one batch of all")
    if store is not None and store.unfinished_views:
        report.warn(f"store {store}: {store.unfinished_views} more views are not complete yet and are not read")


def _classes(
    recipe: Recipe,
    config: ObjectiveConfig,
    source: Source,
    val: Source | None,
    store: Store | None,
    frozen: Frozen | None,
) -> int:
    """The student's class count, agreed by store, data, live teacher and recipe; 1 where it learns none."""
    if store is not None:
        check_data(store, source)
    known = store.num_classes if store else num_classes(source)
    if frozen is not None and recipe.teacher.live:
        check_classes(source, f"--teacher {recipe.teacher.name}", frozen.num_classes, frozen.classes)
        known = frozen.num_classes
    count = recipe.student.num_classes or known
    if count is None and not trains_classifier(needs_of(config)):
        count = 1
    if count is None:
        raise UsageError(f"--data {recipe.data.path}: has no labels; give a --store to learn from, or class folders")
    if known is not None and count != known:
        raise MismatchError(
            f"student.num_classes: {count} asked, the {'store' if store else 'data'} has {known}; leave it out"
        )
    if val is not None:
        check_classes(val, "the training data", count, source.classes)
    return count


def _image_size(recipe: Recipe, store: Store | None) -> int | None:
    """The student's input size: what the recipe says, else the store's; None leaves it to the architecture."""
    ours, theirs = recipe.data.image_size, recipe.student.img_size
    if ours is not None and theirs is not None and ours != theirs:
        raise UsageError(f"image size: data.image_size {ours}, student.img_size {theirs}; give one size")
    if ours or theirs or store is None or recipe.data.input == "student":
        return ours or theirs
    return read_view(store.plan.transform, f"store {store}").image_size


def training_order(recipe: Recipe, source: Source, store: Store | None, view: View, world: World) -> TrainingOrder:
    """The order in which this rank sees the samples of a store, or of a source.

    Raises:
        UsageError: the batch size, the views of a read, the ranks and the store do not fit.
    """
    config = recipe.train
    views = config.views_per_read
    if config.batch_size % (views * world.size):
        several = "" if views == 1 else f"--views-per-read {views} and "
        raise UsageError(
            f"--batch-size {config.batch_size}: is global and does not divide by {several}{world.size} ranks"
        )
    if store is not None and views > store.views:
        raise UsageError(f"--views-per-read {views}: store {store} has {store.views} views; give at most as many")
    if config.accumulate * world.size > config.batch_size:
        raise UsageError(
            f"train.accumulate: {config.accumulate} parts of {config.batch_size // world.size} images a rank; "
            "give fewer, or a larger --batch-size"
        )
    sample_ids = store.sample_ids if store else np.arange(len(source))
    if len(sample_ids) < world.size:
        raise UsageError(
            f"--data {recipe.data.path}: {len(sample_ids)} images for {world.size} ranks; take fewer ranks"
        )
    tars = _tars(recipe, source, sample_ids)
    return TrainingOrder(
        sample_ids=sample_ids,
        batch_size=config.batch_size,
        seed=config.seed,
        views=store.views if store else 2**31,
        rank=world.rank,
        world_size=world.size,
        views_per_read=views,
        tars=tars,
        window=0 if not tars else SHUFFLE_TARS if config.shuffle_tars is None else config.shuffle_tars,
        partners=_partners(recipe, source, store, view),
    )


def _partners(recipe: Recipe, source: Source, store: Store | None, view: View) -> Partners | None:
    """With whom each sample is mixed: as in the store, else drawn by (`train.seed`, epoch)."""
    if store is not None:
        return stored_partners(store, view)
    return DrawnPartners(Dealing(len(source), SHARD_ROWS), recipe.train.seed) if view.mixes else None


def _tars(recipe: Recipe, source: Source, sample_ids: NDArray[np.int64]) -> tuple[int, ...]:
    """How many of the samples each tar has; none where the data is no tars.

    Raises:
        UsageError: it is none, and some are asked for.
    """
    sizes = parts(source)
    if sizes is None:
        if recipe.train.shuffle_tars is not None:
            raise UsageError(f"train.shuffle_tars: --data {recipe.data.path} is no tars; leave it out")
        return ()
    before = np.searchsorted(sample_ids, np.cumsum(sizes))
    return tuple(np.diff(before, prepend=0).tolist())
