"""Crops that are places in the image itself, so that two models can look at one place at two sizes."""

import math
import random
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torchvision.transforms import functional as F

RESAMPLING = {kind.name.lower(): kind for kind in Image.Resampling}
RANDOM = "random"
"""timm's interpolation that is drawn for each image, of these two; an evaluation, which draws nothing, takes the
second."""
DRAWN = ("bilinear", "bicubic")


@dataclass(frozen=True)
class Place:
    """A square of `size` px in an image that is first resized to width x height; it may reach over the edge."""

    width: int
    height: int
    left: int
    top: int
    size: int

    def box(self, image: Image.Image) -> tuple[float, float, float, float]:
        """Its left, top, right and bottom edge in pixels of the image itself."""
        x, y = image.width / self.width, image.height / self.height
        return self.left * x, self.top * y, (self.left + self.size) * x, (self.top + self.size) * y


class Crop(Protocol):
    """What a view takes of an image."""

    reflect: bool
    """Beyond its edge the image is mirrored; else black."""

    def draw(self, image: Image.Image) -> tuple[Place, Image.Resampling]:
        """The place, and how the image is resized for it; all that is drawn."""
        ...


class PadCrop:
    """A crop of `size` px from the image with `padding` px of black around it: the augmentation of small images."""

    reflect = False

    def __init__(self, size: int, padding: int, interpolation: str) -> None:
        self.size, self.padding, self.interpolation = size, padding, interpolation

    def draw(self, image: Image.Image) -> tuple[Place, Image.Resampling]:
        resampling = resampling_of(self.interpolation)
        x, y = (random.randint(-self.padding, self.padding) for _ in range(2))
        return Place(self.size, self.size, x, y, self.size), resampling

    def __call__(self, image: Image.Image) -> Image.Image:
        return cut(image, *self.draw(image))


class SimpleCrop:
    """The short side resized to `size` px, and a crop of it with `padding` px mirrored around it: an image is seen
    nearly whole.

    Paper: Touvron et al. 2022, arXiv:2204.07118, 4.1 ("simple random crop"; `--src` of their code).
    """

    reflect = True

    def __init__(self, size: int, padding: int, interpolation: str) -> None:
        self.size, self.padding, self.interpolation = size, padding, interpolation

    def draw(self, image: Image.Image) -> tuple[Place, Image.Resampling]:
        resampling = resampling_of(self.interpolation)
        width, height = short_side(image, self.size)
        top, left = (
            int(torch.randint(0, side + 2 * self.padding - self.size + 1, ())) - self.padding
            for side in (height, width)
        )
        return Place(width, height, left, top, self.size), resampling

    def __call__(self, image: Image.Image) -> Image.Image:
        place, resampling = self.draw(image)
        resized = resize(image, place.width, place.height, resampling)
        padded = F.pad(resized, [self.padding], padding_mode="reflect")
        left, top = place.left + self.padding, place.top + self.padding
        return padded.crop((left, top, left + self.size, top + self.size))


class CentreCrop:
    """The middle of an image, as timm evaluates; nothing is drawn."""

    reflect = False

    def __init__(self, size: int, crop_pct: float, interpolation: str) -> None:
        self.size, self.short, self.interpolation = size, math.floor(size / crop_pct), evaluated(interpolation)

    def draw(self, image: Image.Image) -> tuple[Place, Image.Resampling]:
        width, height = short_side(image, self.short)
        left, top = (_middle(side, self.size) for side in (width, height))
        return Place(width, height, left, top, self.size), RESAMPLING[self.interpolation]


class Elsewhere:
    """The place that another crop draws, seen at a size of one's own: from the image itself, not from the crop."""

    def __init__(self, crop: Crop, size: int, interpolation: str) -> None:
        self.crop, self.size, self.interpolation = crop, size, interpolation

    def __call__(self, image: Image.Image) -> Image.Image:
        place, drawn = self.crop.draw(image)
        resampling = drawn if self.interpolation == RANDOM else RESAMPLING[self.interpolation]
        return look(image, place.box(image), self.size, resampling, self.crop.reflect)


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


def resize(image: Image.Image, width: int, height: int, resampling: Image.Resampling) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), resampling)


def cut(image: Image.Image, place: Place, resampling: Image.Resampling) -> Image.Image:
    """What lies at a place, with black beyond the edge."""
    resized = resize(image, place.width, place.height, resampling)
    return resized.crop((place.left, place.top, place.left + place.size, place.top + place.size))


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
