"""Views: what is done to a sample before a model sees it, as a function of (seed, view, sample id) alone.

A view draws from `random`, `numpy.random` and torch, which are seeded around it, so every transform of timm and
torchvision replays without anything stored. (TinyViT stores a seed a sample and replaces the generators inside
vendored transforms, which misses those that draw elsewhere; FKD stores crop boxes and knows no other transform.)
"""

import itertools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybePILToTensor
from torch import Tensor
from torchvision import transforms

from distill_cli.config import Colour
from distill_cli.data.config import DEFAULTS, SEEN, TENSORS, DataConfig, View, said
from distill_cli.data.crops import (
    RANDOM,
    RESIZES,
    TORCHS,
    CentreCrop,
    Crop,
    Elsewhere,
    PadCrop,
    RandomResizedCrop,
    SimpleCrop,
    evaluated,
    reduced,
)
from distill_cli.data.images import Encoded
from distill_cli.data.mixing import Mixing
from distill_cli.data.pixels import Box, Pixels
from distill_cli.data.policies import TRIVIAL, Trivial, in_proportion
from distill_cli.data.sources import Source
from distill_cli.data.tensors import Given, Look, TensorView, Undecoded, header_of
from distill_cli.errors import MismatchError, UsageError
from distill_cli.randomness import derive, seed_everything

SMALL = 32
"""Up to this side in pixels an image is small: padded and cropped rather than zoomed into, and evaluated whole."""

PILLOWS = {"color_jitter": 0.0, "grayscale_prob": 0.0, "gaussian_blur_prob": 0.0, "resize": "pillow"}
"""What views of tensors are without."""

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
    check_view(view)
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
    view = replace(taught, **values)
    check_view(view)
    return view


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


def check_decoder(view: View, device: torch.device, store: object = None) -> None:
    """Refuse a view that is decoded by a GPU where the work is not done on one.

    Args:
        store: whose view it is, where it is one's.

    Raises:
        UsageError: it is.
        MismatchError: it is, and a store's.
    """
    if view.decode != "cuda" or device.type == "cuda":
        return
    if store is not None:
        raise MismatchError(
            f"store {store}: its teacher saw what a GPU decoded (data.decode cuda), which cannot be replayed on "
            f"{device}; use --device cuda on a machine with one, or write a store with another data.decode"
        )
    raise UsageError(
        f"data.decode=cuda: decodes on a GPU, the work is done on {device}; give --device cuda, or data.decode=torch"
    )


def empty_bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8)


@dataclass(frozen=True)
class Transform:
    """What makes a model's inputs of images: what is drawn, image by image, then the arithmetic of the whole batch."""

    pixels: Callable[[Any], Image.Image | Tensor]
    """RGB image, or an encoded one -> RGB image of `size` px, or uint8 `[3, size, size]`."""
    size: int
    mean: Colour
    std: Colour
    erase: Callable[[Tensor], Tensor] | None = None
    """timm's RandomErasing, in place."""
    frame: int | None = None
    """The size in which boxes are drawn, where it is not that of the images."""
    late: bool = False
    """Images are decoded when their crop is drawn."""
    on_gpu: TensorView | None = None
    """What a GPU does in place of `pixels`."""
    mixing: Mixing | None = None
    """What is drawn for two images that are mixed; None where none are."""
    short_side: int = 0
    """Pixels to which the short side of a larger image is brought first; 0 for none."""

    def __call__(self, images: Sequence[Image.Image], seed: int, view: int, sample_ids: Sequence[int]) -> Tensor:
        """The inputs that view number `view` makes of some samples: float32 `[batch, 3, size, size]`, normalised.

        Each depends on (seed, view, sample id) alone, and is mixed with no other. The generators are left seeded.
        """
        drawn = self.draw(images, seed, view, sample_ids)
        assert isinstance(drawn, Pixels)
        return self.inputs(drawn)

    def read(self, source: Source, sample_id: int) -> Image.Image | Encoded:
        """An image of a source as it is drawn from: decoded, or, where the crop decides how, encoded.

        Raises:
            UnreadableImage: it cannot be read, or is no image.
        """
        return self.fetch(source, sample_id, with_crc=False)[0]

    def fetch(self, source: Source, sample_id: int, with_crc: bool) -> tuple[Image.Image | Encoded, int | None]:
        """The same, and the CRC-32 of its content where that is asked for."""
        if self.late:
            content = source.content(sample_id)
            image = source.encoded(sample_id, content) or source.decode(sample_id, content)
            return image, zlib.crc32(content) if with_crc else None
        if with_crc:
            image, crc = source.read_with_crc(sample_id)
            return self.reduced(image), crc
        return self.reduced(source.read(sample_id)), None

    def draw(
        self, images: Sequence[Image.Image | Encoded], seed: int, view: int, sample_ids: Sequence[int]
    ) -> Pixels | Undecoded:
        """What is drawn for some samples; the rest is arithmetic."""
        drawing = self.drawing(len(images), 1)
        for image, sample_id in zip(images, sample_ids, strict=True):
            drawing.add(image if isinstance(image, Encoded) else self.reduced(image), [(seed, view)], sample_id)
        return drawing.drawn()

    def pixels_of(self, source: Source, seed: int, view: int, sample_id: int) -> Pixels:
        """One sample's pixels.

        Raises:
            UnreadableImage: it cannot be read or is no image.
        """
        drawn = self.draw([self.read(source, sample_id)], seed, view, [sample_id])
        if isinstance(drawn, Pixels):
            return drawn
        pixels, unreadable = drawn.made(torch.device("cuda"))
        for error in unreadable.values():
            raise error
        return pixels

    def drawing(self, samples: int, views: int, empty: Callable[[int], Tensor] = empty_bytes) -> "Drawing":
        """A batch of at most so many samples, to be drawn one after the other.

        Args:
            empty: gives so many bytes to draw into.
        """
        return DeferredDrawing(self) if self.on_gpu else PixelDrawing(self, samples, views, empty)

    def reduced(self, image: Image.Image) -> Image.Image:
        """An image as the draws begin with it, the same for every view; `draw` itself begins so."""
        return reduced(image, self.short_side)

    def inputs(self, pixels: Pixels) -> Tensor:
        """float32 `[batch, 3, size, size]`, normalised, erased, then mixed, on the device of the pixels."""
        return pixels.inputs(self.mean, self.std)

    def box(self, seed: int, view: int, sample_id: int) -> Box | None:
        """What is erased of a sample's view."""
        if self.erase is None:
            return None
        seed_everything(derive("erase", seed, view, sample_id))
        # timm draws box and noise while it fills them in: so it fills a canvas that is not a number elsewhere.
        size = self.frame or self.size
        canvas = self.erase(torch.full((3, size, size), torch.nan))
        rows, columns = (~canvas[0].isnan()).nonzero().T
        if len(rows) == 0:
            return None
        top, left = int(rows[0]), int(columns[0])
        box = Box(top, left, canvas[:, top : int(rows[-1]) + 1, left : int(columns[-1]) + 1].clone())
        return box if size == self.size else box.scaled(self.size / size)


class Drawing(Protocol):
    """A batch that is drawn sample by sample, so that a process holds one decoded image at a time."""

    def add(self, image: Image.Image | Encoded, drawn: Sequence[tuple[int, int]], sample_id: int) -> None:
        """One more sample, by each of these (seed, view); where it raises, the sample is not in the batch.

        Raises:
            UnreadableImage: it is decoded here, and cannot be.
        """
        ...

    def drawn(self) -> Pixels | Undecoded:
        """All samples by the first view, then by the next."""
        ...


class PixelDrawing:
    """Pixels, each view written into its place in the batch."""

    def __init__(self, transform: Transform, samples: int, views: int, empty: Callable[[int], Tensor]) -> None:
        shape = (views, samples, 3, transform.size, transform.size)
        self.transform, self.samples, self.boxes = transform, 0, [list[Box | None]() for _ in range(views)]
        self.images = empty(math.prod(shape)).view(shape)

    def add(self, image: Image.Image | Encoded, drawn: Sequence[tuple[int, int]], sample_id: int) -> None:
        for place, (seed, view) in enumerate(drawn):
            seed_everything(derive("view", seed, view, sample_id))
            pixels, into = self.transform.pixels(image), self.images[place, self.samples]
            if isinstance(pixels, Tensor):
                into.copy_(pixels)
            else:
                into.numpy()[:] = np.asarray(pixels).transpose(2, 0, 1)
        for boxes, (seed, view) in zip(self.boxes, drawn, strict=True):
            boxes.append(self.transform.box(seed, view, sample_id))
        self.samples += 1

    def drawn(self) -> Pixels:
        return Pixels.of(self.images[:, : self.samples].flatten(0, 1), list(itertools.chain(*self.boxes)))


class DeferredDrawing:
    """What a GPU makes pixels of."""

    def __init__(self, transform: Transform) -> None:
        assert transform.on_gpu is not None
        self.transform, self.view = transform, transform.on_gpu
        self.given: list[Given] = []
        self.samples: list[list[tuple[Look, Box | None]]] = []

    def add(self, image: Image.Image | Encoded, drawn: Sequence[tuple[int, int]], sample_id: int) -> None:
        given, looks = Given.of(image), []
        for seed, view in drawn:
            seed_everything(derive("view", seed, view, sample_id))
            looks.append(self.view.draw(header_of(image)))
        boxes = [self.transform.box(seed, view, sample_id) for seed, view in drawn]
        self.given.append(given)
        self.samples.append(list(zip(looks, boxes, strict=True)))

    def drawn(self) -> Undecoded:
        by_view = [drawn for view in zip(*self.samples, strict=True) for drawn in view]
        return Undecoded.of(self.view, self.given, by_view)


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
    return Transform(_images(pixels.transforms), view.image_size, view.mean, view.std)


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
    erase = RandomErasing(view.reprob, mode="pixel", device="cpu") if view.reprob else None
    made = partial(
        Transform,
        size=own.image_size,
        mean=own.mean,
        std=own.std,
        erase=erase,
        frame=view.image_size,
        mixing=mixing,
        short_side=view.short_side,
    )
    if view.decode in TENSORS:
        tensors = _tensor_view(view, own)
        return made(tensors, late=True, on_gpu=tensors if view.decode == "cuda" else None)
    asked = replace(view, image_size=own.image_size, interpolation=own.interpolation)
    crop, secondary = _pipeline(asked, own.image_size / view.image_size)
    return made(_images([_crop(view, own), *crop[1:], *secondary]), late=view.decode == "reduced")


def _images(steps: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Image.Image]:
    """Some transforms of images, one after the other; what would make a tensor is left out."""
    return transforms.Compose([step for step in steps if not isinstance(step, MaybePILToTensor)])


def _centre(view: View, own: View) -> Transform:
    """The centre crop of an evaluation, seen by another model."""
    if own.image_size == view.image_size:
        return eval_transform(replace(view, interpolation=own.interpolation))
    place = CentreCrop(view.image_size, view.crop_pct, view.interpolation)
    look = Elsewhere(place, own.image_size, evaluated(own.interpolation))
    return Transform(look, own.image_size, own.mean, own.std)


def _pipeline(view: View, ratio: float = 1.0) -> tuple[list[Any], list[Any]]:
    """timm's transforms of images in two groups: crop and flips; policy and colours."""
    trivial = view.auto_augment == TRIVIAL
    groups = create_transform(
        view.image_size,
        is_training=True,
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
    crop, secondary = (list(group.transforms) for group in groups[:2])
    if trivial:
        secondary.insert(0, Trivial(evaluated(view.interpolation), ratio))
    if ratio != 1:
        secondary = [in_proportion(transform, ratio) for transform in secondary]
    return crop, secondary


def _crop(view: View, own: View) -> Crop:
    resize = RESIZES[view.resize]
    if view.augment == "rrc":
        # A part of the image itself, whose box does not depend on the size.
        return RandomResizedCrop(own.image_size, view.scale, view.ratio, own.interpolation, resize)
    kind = PadCrop if view.augment == "pad-crop" else SimpleCrop
    if own.image_size == view.image_size:
        return kind(view.image_size, view.padding, own.interpolation, resize)
    return Elsewhere(kind(view.image_size, view.padding, view.interpolation), own.image_size, own.interpolation)


def _tensor_view(view: View, own: View) -> TensorView:
    crop = RandomResizedCrop(own.image_size, view.scale, view.ratio, own.interpolation)
    # torchvision turns tensors by no other filter.
    policy = Trivial("bilinear", own.image_size / view.image_size) if view.auto_augment else None
    return TensorView(crop, view.hflip, view.vflip, policy)


def check_view(view: View) -> None:
    """
    Raises:
        UsageError: `resize` or `decode` does not go with the rest of the view.
    """
    if (view.resize, view.decode) == ("pillow", "full"):
        return
    asked = "data.resize=torch" if view.decode == "full" else f"data.decode={view.decode}"
    if view.short_side and view.decode != "full":
        raise UsageError(f"{asked}: decodes for each crop, and data.short_side resizes before; leave one of them out")
    if view.mixes and view.decode == "cuda":
        raise UsageError(
            f"{asked}: does not mix images; give data.decode=torch, or leave out data.mixup and data.cutmix"
        )
    if view.augment == "none":
        raise UsageError(f"{asked}: is of training views, and data.augment is none, an evaluation's; leave it out")
    if view.resize == "torch" or view.decode in TENSORS:
        filters = [*(kind.name.lower() for kind in TORCHS), RANDOM]
        if view.interpolation not in filters:
            raise UsageError(
                f"{asked}: torch has no filter {view.interpolation!r}; give data.interpolation {', '.join(filters)}"
            )
    if view.decode in TENSORS:
        others = {name: getattr(view, name) for name in PILLOWS if getattr(view, name) != PILLOWS[name]}
        if view.augment != "rrc":
            others["augment"] = view.augment
        if view.auto_augment not in ("", TRIVIAL):
            others["auto_augment"] = view.auto_augment
        if others:
            found = ", ".join(f"{name} {value}" for name, value in others.items())
            raise UsageError(
                f"{asked}: has augment rrc, flips, auto_augment trivial and reprob, not {found}; "
                "leave that out, or give data.decode=full"
            )


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
