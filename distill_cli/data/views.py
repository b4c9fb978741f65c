"""Views: what is done to a sample before a model sees it, as a function of (seed, view, sample id) alone.

A view draws from `random`, `numpy.random` and torch, which are seeded around it, so every transform of timm and
torchvision replays without anything stored. (TinyViT stores a seed a sample and replaces the generators inside
vendored transforms, which misses those that draw elsewhere; FKD stores crop boxes and knows no other transform.)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from PIL import Image
from pydantic import ValidationError
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybePILToTensor
from torch import Tensor
from torchvision import transforms

from distill_cli.config import Colour
from distill_cli.data.config import DEFAULTS, SEEN, DataConfig, View, said
from distill_cli.data.crops import RANDOM, CentreCrop, Elsewhere, PadCrop, SimpleCrop, evaluated, reduced
from distill_cli.data.mixing import Mixing
from distill_cli.data.pixels import Box, Pixels
from distill_cli.data.policies import TRIVIAL, Trivial, in_proportion
from distill_cli.errors import MismatchError, UsageError
from distill_cli.randomness import derive, seed_everything

SMALL = 32
"""Up to this side in pixels an image is small: padded and cropped rather than zoomed into, and evaluated whole."""

IMPORTED = "tinyvit"
"""What a plan's transform says for its `augment` where the rows were imported."""


def resolve_view(config: DataConfig, model: Mapping[str, Any]) -> View:
    """The view that a recipe asks for, the rest filled from the model's own input and from the defaults.

    Args:
        model: timm's `input_size`, `mean`, `std`, `interpolation`, `crop_pct`.
    """
    own = own_input(model)
    own["augment"] = "pad-crop" if (config.image_size or own["image_size"]) <= SMALL else "rrc"
    if config.augment == "src":
        own["padding"] = 4
    view = View(**{**DEFAULTS, **own, **said(config)})
    _check_policy(view)
    return view


def own_input(model: Mapping[str, Any]) -> dict[str, Any]:
    """timm's description of a model's input in the fields of a view."""
    return {"image_size": int(model["input_size"][-1])} | {name: model[name] for name in SEEN if name in model}


def read_view(transform: Mapping[str, Any], where: str = "the store") -> View:
    """The view that a store's plan states.

    Raises:
        MismatchError: it states something that this program does not know, or lacks something.
    """
    try:
        return View(**transform)
    except ValidationError as error:
        name = str(error.errors(include_url=False)[0]["loc"][0])
        found = f"has {name} {transform[name]!r}" if name in transform else f"has no {name}"
        raise MismatchError(
            f"{where}: its transform {found}, which this program cannot replay; update distill"
        ) from error


def stored_view(config: DataConfig, transform: Mapping[str, Any], where: str = "the store") -> View:
    """The view of a store, once the recipe says nothing else.

    Raises:
        MismatchError: the recipe asks for other views than the store has; both values are named.
    """
    view = read_view(transform, where)
    _check_same(config, view, [field.name for field in fields(View)])
    return view


def student_view(config: DataConfig, taught: View, own: Mapping[str, Any]) -> View:
    """What a student sees of its teacher's views: the same places and draws, at its own size and in its own colours.

    Args:
        taught: what the teacher saw, as the store has it.
        own: the student's `SEEN`, of which the recipe may say others.

    Raises:
        MismatchError: the recipe asks for other draws than the store has; both values are named.
    """
    _check_same(config, taught, [field.name for field in fields(View) if field.name not in SEEN])
    asked = {name: value for name, value in said(config).items() if name in SEEN}
    values = {name: own[name] for name in SEEN} | asked
    if (values["interpolation"] == RANDOM) != (taught.interpolation == RANDOM):
        if "interpolation" in asked:
            raise MismatchError(
                f"data.interpolation: {asked['interpolation']} asked, the store has {taught.interpolation}: one is "
                "drawn and the other is not, so that all draws behind it would differ; leave it out"
            )
        values["interpolation"] = taught.interpolation
    return replace(taught, **values)


def _check_same(config: DataConfig, view: View, names: Sequence[str]) -> None:
    for name, value in said(config).items():
        if name in names and value != getattr(view, name):
            raise MismatchError(
                f"data.{name}: {value} asked, the store has {getattr(view, name)}; leave it out, or write a store "
                "with it"
            )


def check_replayable(where: str, transform: Mapping[str, Any]) -> None:
    """Refuse a store whose views are drawn by other programs.

    Raises:
        MismatchError: it was imported.
    """
    if transform.get("augment") == IMPORTED:
        raise MismatchError(
            f"{where}: was imported; its views are drawn by TinyViT's own code, and cannot be replayed here; "
            'write a store with "distill teacher-logits", or give it back by "distill store export tinyvit"'
        )


@dataclass(frozen=True)
class Transform:
    """What makes a model's inputs of images: what is drawn, image by image, then the arithmetic of the whole batch."""

    pixels: Callable[[Image.Image], Tensor]
    """RGB image -> uint8 `[3, size, size]`."""
    mean: Colour
    std: Colour
    erase: Callable[[Tensor], Tensor] | None = None
    """timm's RandomErasing, in place."""
    frame: int | None = None
    """The size in which boxes are drawn, where it is not that of the images."""
    mixing: Mixing | None = None
    """What is drawn for two images that are mixed; None where none are."""
    short_side: int = 0
    """Pixels to which the short side of a larger image is brought first; 0 for none."""

    def __call__(self, images: Sequence[Image.Image], seed: int, view: int, sample_ids: Sequence[int]) -> Tensor:
        """The inputs that view number `view` makes of some samples: float32 `[batch, 3, size, size]`, normalised.

        Each depends on (seed, view, sample id) alone, and is mixed with no other. The generators are left seeded.
        """
        return self.inputs(self.draw(images, seed, view, sample_ids))

    def draw(self, images: Sequence[Image.Image], seed: int, view: int, sample_ids: Sequence[int]) -> Pixels:
        """What is drawn for some samples; the rest is arithmetic."""
        pixels, boxes = [], []
        for image, sample_id in zip(images, sample_ids, strict=True):
            seed_everything(derive("view", seed, view, sample_id))
            pixels.append(self.pixels(self.reduced(image)))
            boxes.append(self._box(pixels[-1].shape, derive("erase", seed, view, sample_id)))
        return Pixels.of(pixels, boxes)

    def reduced(self, image: Image.Image) -> Image.Image:
        """An image as the draws begin with it, the same for every view; `draw` itself begins so."""
        return reduced(image, self.short_side)

    def inputs(self, pixels: Pixels) -> Tensor:
        """float32 `[batch, 3, size, size]`, normalised, erased, then mixed, on the device of the pixels."""
        return pixels.inputs(self.mean, self.std)

    def _box(self, shape: torch.Size, number: int) -> Box | None:
        if self.erase is None:
            return None
        seed_everything(number)
        # timm draws box and noise while it fills them in: so it fills a canvas that is not a number elsewhere.
        size = self.frame or shape[-1]
        canvas = self.erase(torch.full((3, size, size), torch.nan))
        rows, columns = (~canvas[0].isnan()).nonzero().T
        if len(rows) == 0:
            return None
        top, left = int(rows[0]), int(columns[0])
        box = Box(top, left, canvas[:, top : int(rows[-1]) + 1, left : int(columns[-1]) + 1].clone())
        return box if size == shape[-1] else box.scaled(shape[-1] / size)


def eval_transform(view: View) -> Transform:
    """Resize and centre crop, as timm evaluates: of the image as it is, whatever `short_side` says, so that accuracies
    are those that anybody else measures."""
    pixels = create_transform(
        view.image_size,
        is_training=False,
        interpolation=evaluated(view.interpolation),
        crop_pct=view.crop_pct,
        normalize=False,
    )
    return Transform(pixels, view.mean, view.std)


def train_transform(view: View, student: View | None = None) -> Transform:
    """The view's augmentation: timm's, but for the crops that it lacks and TrivialAugment.

    Args:
        student: what a student sees of it, where that is something else (see `student_view`). All draws are the same
            numbers: the crop's box in pixels of the image, flips, operations and their strengths; a box to erase, or to
            fill with another image, is drawn in the teacher's frame and scaled.

    Paper: Wu et al. 2022, arXiv:2207.10666, whose student of another size and normalisation than its teacher's does so.
    Differs: the colour that fills what a rotation bares is the teacher's mean for both, as they see one picture
        (TinyViT: each model's own); radii of blurs are in proportion to the size (it has none); the noise of an erased
        box is of the student's own pixels, as there.
    """
    own = student or view
    mixing = Mixing(view, own.image_size) if view.mixes else None
    if view.augment == "none":
        return replace(_centre(view, own), mean=own.mean, std=own.std, mixing=mixing, short_side=view.short_side)
    asked = replace(view, image_size=own.image_size, interpolation=own.interpolation)
    crop, secondary, final = _pipeline(asked, own.image_size / view.image_size)
    if view.augment != "rrc":
        crop[0] = _crop(view, own)
    erase = RandomErasing(view.reprob, mode="pixel", device="cpu") if view.reprob else None
    pixels = transforms.Compose([*crop, *secondary, *final])
    return Transform(pixels, own.mean, own.std, erase, view.image_size, mixing, view.short_side)


def _centre(view: View, own: View) -> Transform:
    """The centre crop of an evaluation, seen by another model."""
    if own.image_size == view.image_size:
        return eval_transform(replace(view, interpolation=own.interpolation))
    place = CentreCrop(view.image_size, view.crop_pct, view.interpolation)
    look = Elsewhere(place, own.image_size, evaluated(own.interpolation))
    return Transform(transforms.Compose([look, MaybePILToTensor()]), own.mean, own.std)


def _pipeline(view: View, ratio: float = 1.0) -> tuple[list[Any], list[Any], list[Any]]:
    """timm's transforms in three groups: crop and flips; policy and colours; to a tensor."""
    trivial = view.auto_augment == TRIVIAL
    groups = create_transform(
        view.image_size,
        is_training=True,
        scale=view.scale,
        ratio=view.ratio,
        hflip=view.hflip,
        vflip=view.vflip,
        color_jitter=None if trivial else view.color_jitter or None,  # type: ignore[arg-type]
        color_jitter_prob=view.color_jitter_prob if view.color_jitter_prob < 1 else None,
        grayscale_prob=view.grayscale_prob,
        gaussian_blur_prob=view.gaussian_blur_prob,
        auto_augment=None if trivial else view.auto_augment or None,
        interpolation=view.interpolation,
        mean=view.mean,
        normalize=False,
        separate=True,
    )
    crop, secondary, final = (list(group.transforms) for group in groups)
    if trivial:
        secondary.insert(0, Trivial(evaluated(view.interpolation), ratio))
    if ratio != 1:
        secondary = [in_proportion(transform, ratio) for transform in secondary]
    return crop, secondary, final


def _crop(view: View, own: View) -> Any:
    kind = PadCrop if view.augment == "pad-crop" else SimpleCrop
    if own.image_size == view.image_size:
        return kind(view.image_size, view.padding, own.interpolation)
    return Elsewhere(kind(view.image_size, view.padding, view.interpolation), own.image_size, own.interpolation)


def _check_policy(view: View) -> None:
    """
    Raises:
        UsageError: `auto_augment` is no policy.
    """
    try:
        _pipeline(view)
    except (AssertionError, ValueError, KeyError) as error:
        reason = f" ({error})" if str(error) else ""
        raise UsageError(
            f"data.auto_augment: {view.auto_augment!r} is no policy of timm{reason}; give one such as "
            f"rand-m9-mstd0.5-inc1, augmix-m3-w3, 3a, original or v0, or {TRIVIAL!r}"
        ) from error
