"""Views: what is done to a sample before a model sees it, as a function of (seed, view, sample id) alone.

A view draws from `random`, `numpy.random` and torch, which are seeded around it, so every transform of timm and
torchvision replays without anything stored. (TinyViT stores a seed a sample and replaces the generators inside
vendored transforms, which misses those that draw elsewhere; FKD stores crop boxes and knows no other transform.)
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any, Literal

from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms

from distill_cli.config import Colour, Fraction, Natural, NonNegative, Positive, PositiveFloat, Range, section
from distill_cli.errors import MismatchError
from distill_cli.randomness import derive, seed_everything

Transform = Callable[[Image.Image], Tensor]
Augment = Literal["none", "rrc", "pad-crop"]
SMALL = 32
"""Up to this side in pixels an image is small: padded and cropped rather than zoomed into, and evaluated whole."""


@section
class DataConfig:
    """Where the images are and what their views are; a field left out comes from the store, else from the model."""

    path: str | None = None
    """`--data`: a folder, an IDX folder, or `sample`."""
    val: str | None = None
    """Another folder to validate on, where `path` has no validation split."""
    labelled: bool = True
    """False: ignore the classes of the data (a teacher of other classes, unlabelled folders)."""
    skip_unreadable: bool = False
    """Go on without images that cannot be decoded, and count them."""
    augment: Augment | None = None
    """`none` (the model's own evaluation transform), `rrc` (random resized crop) or `pad-crop`; by default `pad-crop`
    up to 32 px and `rrc` above, as TinyViT does."""
    image_size: Positive | None = None
    """Pixels of a side of the model's input."""
    mean: Colour | None = None
    std: Colour | None = None
    interpolation: Literal["bilinear", "bicubic", "nearest"] | None = None
    crop_pct: PositiveFloat | None = None
    """Evaluation: the share of the resized image's side that the centre crop keeps."""
    scale: Range | None = None
    """`rrc`: share of the image's area that a crop covers; (0.08, 1)."""
    ratio: Range | None = None
    """`rrc`: width over height of a crop; (3/4, 4/3)."""
    padding: Natural | None = None
    """`pad-crop`: pixels of zero around the image before the crop; 2."""
    hflip: Fraction | None = None
    """Probability of a horizontal flip, with either crop; 0.5."""
    color_jitter: NonNegative | None = None
    """Strength of brightness, contrast and saturation jitter; 0. Not used beside `auto_augment`, as in timm."""
    auto_augment: str | None = None
    """timm's string of a policy, such as `rand-m9-mstd0.5-inc1`; empty for none."""
    reprob: Fraction | None = None
    """Probability of random erasing, in pixel mode; 0."""


@section
class View:
    """A resolved view: all that decides the pixels of a model's input. It stands in a store's plan."""

    augment: Augment
    image_size: Positive
    mean: Colour
    std: Colour
    interpolation: str
    crop_pct: PositiveFloat
    scale: Range
    ratio: Range
    padding: Natural
    hflip: Fraction
    color_jitter: NonNegative
    auto_augment: str
    reprob: Fraction


DEFAULTS = {
    "scale": (0.08, 1.0),
    "ratio": (3 / 4, 4 / 3),
    "padding": 2,
    "hflip": 0.5,
    "color_jitter": 0.0,
    "auto_augment": "",
    "reprob": 0.0,
}


def resolve_view(config: DataConfig, model: Mapping[str, Any]) -> View:
    """The view that a recipe asks for, the rest filled from the model's own input and from the defaults.

    Args:
        model: timm's `input_size`, `mean`, `std`, `interpolation`, `crop_pct`.
    """
    own = {name: model[name] for name in ("mean", "std", "interpolation", "crop_pct")}
    size = config.image_size or int(model["input_size"][-1])
    own |= {"image_size": size, "augment": "pad-crop" if size <= SMALL else "rrc"}
    return View(**{**DEFAULTS, **own, **said(config)})


def stored_view(config: DataConfig, transform: Mapping[str, Any]) -> View:
    """The view of a store, once the recipe says nothing else.

    Raises:
        MismatchError: the recipe asks for other views than the store has; both values are named.
    """
    view = View(**transform)
    stored = asdict(view)
    for name, value in said(config).items():
        if value != stored[name]:
            raise MismatchError(
                f"data.{name}: {value} asked, the store has {stored[name]}; leave it out, or write a store with it"
            )
    return view


def said(config: DataConfig) -> dict[str, Any]:
    """The fields of a view that a recipe states."""
    values = {field.name: getattr(config, field.name) for field in fields(View)}
    return {name: value for name, value in values.items() if value is not None}


def eval_transform(view: View) -> Transform:
    """Resize and centre crop, as timm evaluates: float32 `[3, size, size]`, normalised."""
    return create_transform(
        view.image_size,
        is_training=False,
        interpolation=view.interpolation,
        mean=view.mean,
        std=view.std,
        crop_pct=view.crop_pct,
    )


def train_transform(view: View) -> Transform:
    """The view's augmentation: float32 `[3, size, size]`, normalised."""
    if view.augment == "none":
        return eval_transform(view)
    transform = create_transform(
        view.image_size,
        is_training=True,
        scale=view.scale,
        ratio=view.ratio,
        hflip=view.hflip,
        color_jitter=view.color_jitter or None,  # type: ignore[arg-type]
        auto_augment=view.auto_augment or None,
        interpolation=view.interpolation,
        mean=view.mean,
        std=view.std,
        re_prob=view.reprob,
        re_mode="pixel",
    )
    if view.augment == "pad-crop":
        interpolation = transforms.InterpolationMode(view.interpolation)
        crop = transforms.RandomCrop(view.image_size, padding=view.padding)
        transform.transforms[0] = transforms.Compose([transforms.Resize(view.image_size, interpolation), crop])
    return transform


def replay(transform: Transform, image: Image.Image, seed: int, view: int, sample_id: int) -> Tensor:
    """The input that view number `view` makes of a sample: float32 `[3, size, size]`."""
    seed_everything(derive("view", seed, view, sample_id))
    return transform(image)


def checksum(image: Tensor) -> int:
    """The CRC-32 of an input's little-endian float32 bytes, by which a store proves its replay."""
    return zlib.crc32(image.contiguous().numpy().astype("<f4", copy=False).tobytes())
