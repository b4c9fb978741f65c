"""Crops that are places in the image itself, so that two models can look at one place at two sizes.

What is drawn needs the size of an image alone, so a JPEG can be decoded when it is known how much of it is needed.
"""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import functional as F

from distill_cli.data.images import Encoded

RESAMPLING = {kind.name.lower(): kind for kind in Image.Resampling}
RANDOM = "random"
"""timm's interpolation that is drawn for each image, of these two; an evaluation, which draws nothing, takes the
second."""
DRAWN = ("bilinear", "bicubic")
TORCHS = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}
"""What torch calls the filters of Pillow that it has. (Its nearest neighbour is another pixel on ties.)"""

Resize = Callable[[Image.Image, int, int, Image.Resampling], Image.Image]
"""(image, width, height, filter) -> the image at this size."""


def resize(image: Image.Image, width: int, height: int, resampling: Image.Resampling) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), resampling)


def resize_by_torch(image: Image.Image, width: int, height: int, resampling: Image.Resampling) -> Image.Image:
    """By torch's kernel for bytes: the same filter as Pillow's, a level or two beside it in few pixels, and faster."""
    if image.size == (width, height):
        return image
    # Pillow keeps four bytes a pixel. Taken as they are nothing is packed, and torch is fastest with four channels.
    pixels = np.frombuffer(bytearray(image.tobytes("raw", "RGBX")), np.uint8).reshape(1, image.height, image.width, 4)
    made = resized(torch.from_numpy(pixels).permute(0, 3, 1, 2), width, height, resampling)
    return Image.frombytes("RGB", (width, height), made.permute(0, 2, 3, 1).numpy().tobytes(), "raw", "RGBX")


def resized(pixels: Tensor, width: int, height: int, resampling: Image.Resampling) -> Tensor:
    """uint8 `[batch, channels, height, width]` at another size, by torch.

    Args:
        pixels: uint8, or the same numbers as float32, since a GPU has no filters for bytes.
    """
    made = torch.nn.functional.interpolate(pixels, (height, width), mode=TORCHS[resampling], antialias=True)
    return made.round_().clamp_(0, 255).byte() if made.is_floating_point() else made


RESIZES: dict[str, Resize] = {"pillow": resize, "torch": resize_by_torch}


class Where(Protocol):
    """What is drawn of a crop's place."""

    def box(self, image: Image.Image) -> tuple[float, float, float, float]:
        """Its left, top, right and bottom edge in pixels of an image, of whatever size that was decoded."""
        ...


@dataclass(frozen=True)
class Place:
    """A square of `size` px in an image that is first resized to width x height; it may reach over the edge."""

    width: int
    height: int
    left: int
    top: int
    size: int

    def box(self, image: Image.Image) -> tuple[float, float, float, float]:
        x, y = image.width / self.width, image.height / self.height
        return self.left * x, self.top * y, (self.left + self.size) * x, (self.top + self.size) * y


@dataclass(frozen=True)
class Region:
    """A part of an image of width x height, by its edges."""

    width: int
    height: int
    edges: tuple[int, int, int, int]
    """Left, top, right, bottom."""

    def box(self, image: Image.Image) -> tuple[float, float, float, float]:
        x, y = image.width / self.width, image.height / self.height
        left, top, right, bottom = self.edges
        return left * x, top * y, right * x, bottom * y


class Crop(ABC):
    """What a view takes of an image."""

    reflect = False
    """Beyond its edge the image is mirrored; else black."""

    def __init__(self, size: int, interpolation: str, resize: Resize = resize) -> None:
        self.size, self.interpolation, self.resize = size, interpolation, resize

    def __call__(self, image: Image.Image | Encoded) -> Image.Image:
        """The crop, of `size` px. What is not decoded yet is decoded at a part of its size, if enough is left."""
        if isinstance(image, Image.Image):
            return self.cut(image, *self.draw(image))
        where, resampling = self.draw(image.header)
        return self.cut(image.decoded(reduction(where.box(image.header), self.size)), where, resampling)

    @abstractmethod
    def draw(self, image: Image.Image) -> tuple[Any, Image.Resampling]:
        """Where, and how the image is resized for it; all that is drawn. The image need not be decoded."""

    @abstractmethod
    def cut(self, image: Image.Image, where: Any, resampling: Image.Resampling) -> Image.Image:
        """What lies there."""


def reduction(box: tuple[float, float, float, float], size: int) -> int:
    """By how much a JPEG can be reduced so that a box of it keeps `size` px on each side: 8, 4, 2, or 1 for none."""
    left, top, right, bottom = box
    # A millionth of a pixel is the rounding of a box that is a place in a resized image.
    least = min(right - left, bottom - top) + 1e-6
    return next((by for by in (8, 4, 2) if least >= by * size), 1)


class RandomResizedCrop(Crop):
    """timm's: a part of the image of random area and shape."""

    def __init__(
        self,
        size: int,
        scale: tuple[float, float],
        ratio: tuple[float, float],
        interpolation: str,
        resize: Resize = resize,
    ) -> None:
        super().__init__(size, interpolation, resize)
        self.scale, self.ratio = scale, ratio

    def draw(self, image: Image.Image) -> tuple[Region, Image.Resampling]:
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(image, self.scale, self.ratio)
        region = Region(image.width, image.height, (left, top, left + width, top + height))
        return region, resampling_of(self.interpolation)

    def cut(self, image: Image.Image, where: Region, resampling: Image.Resampling) -> Image.Image:
        """Of a reduced image to whole pixels."""
        left, top, right, bottom = map(round, where.box(image))
        return self.resize(image.crop((left, top, right, bottom)), self.size, self.size, resampling)


class PadCrop(Crop):
    """A crop of `size` px from the image with `padding` px of black around it: the augmentation of small images."""

    def __init__(self, size: int, padding: int, interpolation: str, resize: Resize = resize) -> None:
        super().__init__(size, interpolation, resize)
        self.padding = padding

    def draw(self, image: Image.Image) -> tuple[Place, Image.Resampling]:
        resampling = resampling_of(self.interpolation)
        x, y = (random.randint(-self.padding, self.padding) for _ in range(2))
        return Place(self.size, self.size, x, y, self.size), resampling

    def cut(self, image: Image.Image, where: Place, resampling: Image.Resampling) -> Image.Image:
        resized = self.resize(image, where.width, where.height, resampling)
        return resized.crop((where.left, where.top, where.left + self.size, where.top + self.size))


class SimpleCrop(Crop):
    """The short side resized to `size` px, and a crop of it with `padding` px mirrored around it: an image is seen
    nearly whole.

    Paper: Touvron et al. 2022, arXiv:2204.07118, 4.1 ("simple random crop"; `--src` of their code).
    """

    reflect = True

    def __init__(self, size: int, padding: int, interpolation: str, resize: Resize = resize) -> None:
        super().__init__(size, interpolation, resize)
        self.padding = padding

    def draw(self, image: Image.Image) -> tuple[Place, Image.Resampling]:
        resampling = resampling_of(self.interpolation)
        width, height = short_side(image, self.size)
        top, left = (
            int(torch.randint(0, side + 2 * self.padding - self.size + 1, ())) - self.padding
            for side in (height, width)
        )
        return Place(width, height, left, top, self.size), resampling

    def cut(self, image: Image.Image, where: Place, resampling: Image.Resampling) -> Image.Image:
        resized = self.resize(image, where.width, where.height, resampling)
        padded = F.pad(resized, [self.padding], padding_mode="reflect")
        left, top = where.left + self.padding, where.top + self.padding
        return padded.crop((left, top, left + self.size, top + self.size))


class CentreCrop(Crop):
    """The middle of an image, as timm evaluates; nothing is drawn."""

    def __init__(self, size: int, crop_pct: float, interpolation: str) -> None:
        super().__init__(size, evaluated(interpolation))
        self.short = math.floor(size / crop_pct)

    def draw(self, image: Image.Image) -> tuple[Place, Image.Resampling]:
        width, height = short_side(image, self.short)
        left, top = (_middle(side, self.size) for side in (width, height))
        return Place(width, height, left, top, self.size), RESAMPLING[self.interpolation]

    def cut(self, image: Image.Image, where: Place, resampling: Image.Resampling) -> Image.Image:
        return look(image, where.box(image), self.size, resampling)


class Elsewhere(Crop):
    """The place that another crop draws, seen at a size of one's own: from the image itself, not from the crop.

    Its edges need be no whole pixels, so it is Pillow that resizes.
    """

    def __init__(self, crop: Crop, size: int, interpolation: str) -> None:
        super().__init__(size, interpolation)
        self.crop, self.reflect = crop, crop.reflect

    def draw(self, image: Image.Image) -> tuple[Where, Image.Resampling]:
        where, drawn = self.crop.draw(image)
        return where, drawn if self.interpolation == RANDOM else RESAMPLING[self.interpolation]

    def cut(self, image: Image.Image, where: Where, resampling: Image.Resampling) -> Image.Image:
        return look(image, where.box(image), self.size, resampling, self.reflect)


def resampling_of(interpolation: str) -> Image.Resampling:
    """How to resize: drawn where it is `random`, as timm draws it."""
    return RESAMPLING[random.choice(DRAWN) if interpolation == RANDOM else interpolation]


def evaluated(interpolation: str) -> str:
    """The interpolation of an evaluation."""
    return DRAWN[-1] if interpolation == RANDOM else interpolation


def short_side(image: Image.Image, size: int) -> tuple[int, int]:
    """Width and height of an image whose short side is resized to `size` px, as torchvision rounds the long one."""
    if image.width <= image.height:
        return size, int(size * image.height / image.width)
    return int(size * image.width / image.height), size


def reduced(image: Image.Image, size: int) -> Image.Image:
    """An image with a short side of at most `size` px (0: as it is), bicubic; one that is smaller stays as it is, so
    that once is as often."""
    if size == 0 or min(image.size) <= size:
        return image
    return image.resize(short_side(image, size), Image.Resampling.BICUBIC)


def look(
    image: Image.Image,
    box: tuple[float, float, float, float],
    size: int,
    resampling: Image.Resampling,
    reflect: bool = False,
) -> Image.Image:
    """What lies in a box, whose edges need be no whole pixels, resized to `size` px."""
    left, top, right, bottom = box
    # A millionth of a pixel is the rounding of a box that ends with the image.
    beyond = (-left, -top, right - image.width, bottom - image.height)
    padding = [max(0, math.ceil(pixels - 1e-6)) for pixels in beyond]
    if any(padding):
        image = F.pad(image, padding, padding_mode="reflect" if reflect else "constant")
    inside = (
        max(left + padding[0], 0.0),
        max(top + padding[1], 0.0),
        min(right + padding[0], image.width),
        min(bottom + padding[1], image.height),
    )
    return image.resize((size, size), resampling, box=inside)


def _middle(side: int, size: int) -> int:
    """Where torchvision's centre crop begins; what is missing of a smaller image is padded before it."""
    return -((size - side) // 2) if size > side else round((side - size) / 2)
