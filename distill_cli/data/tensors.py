"""Views made of tensors: decoded by torchvision, cropped, resized, flipped, one operation of TrivialAugment.

`data.decode = "torch"` does so in the loader's processes, `"cuda"` on the GPU, where nvJPEG decodes. All is drawn on
the CPU, from the seeded generators, and needs the header of an image alone; what is done then is the same code on every
device. The pixels are not the same on every device: nvJPEG and a GPU's filters round otherwise than libjpeg and a CPU.

Differs: of a rotation, shear or translation torchvision has no bicubic filter for tensors, so it is bilinear.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from distill_cli.data.crops import RandomResizedCrop, resized
from distill_cli.data.images import Encoded, UnreadableImage, unreadable
from distill_cli.data.pixels import Box, Pixels
from distill_cli.data.policies import Trivial
from distill_cli.randomness import preserved


@dataclass(frozen=True)
class Given:
    """An image as torchvision decodes it."""

    data: Tensor
    """uint8: the bytes of a JPEG in grey or colour; of any other image its pixels, by Pillow: `[3, height, width]`."""
    name: str

    @classmethod
    def of(cls, image: Image.Image | Encoded) -> "Given":
        """
        Raises:
            UnreadableImage: it is no image, or is not a JPEG and cannot be decoded.
        """
        name = str(image.name) if isinstance(image, Encoded) else ""
        if isinstance(image, Encoded):
            if image.header.format == "JPEG" and image.header.mode in ("RGB", "L"):
                return cls(torch.frombuffer(bytearray(image.content), dtype=torch.uint8), name)
            image = image.decoded()
        return cls(torch.from_numpy(np.array(image)).permute(2, 0, 1), name)


@dataclass(frozen=True)
class Look:
    """All that is drawn of one view of one image."""

    edges: tuple[int, int, int, int]
    """Left, top, right, bottom of the crop."""
    resampling: Image.Resampling
    flips: tuple[int, ...]
    """The dims that are turned around."""
    policy: int
    """Seeds what the policy draws."""


@dataclass(frozen=True)
class TensorView:
    """Random resized crop, flips and a policy, of tensors."""

    crop: RandomResizedCrop
    hflip: float
    vflip: float
    policy: Trivial | None

    def __call__(self, image: Image.Image | Encoded) -> Tensor:
        """One view of one image on the CPU: uint8 `[3, size, size]`.

        Raises:
            UnreadableImage: it is no image, or cannot be decoded.
        """
        look = self.draw(header_of(image))
        (found,) = decoded([Given.of(image)], torch.device("cpu"))
        if isinstance(found, UnreadableImage):
            raise found
        return self.make(found, look)

    def draw(self, image: Image.Image) -> Look:
        """All that is drawn; the image need not be decoded."""
        region, resampling = self.crop.draw(image)
        turns = ((-1, self.hflip), (-2, self.vflip))
        flips = tuple(dim for dim, probability in turns if probability and float(torch.rand(1)) < probability)
        return Look(region.edges, resampling, flips, int(torch.randint(2**62, ())))

    def make(self, image: Tensor, look: Look) -> Tensor:
        """uint8 `[3, height, width]` -> uint8 `[3, size, size]`, where the image is; leaves the generator seeded."""
        left, top, right, bottom = look.edges
        crop = image[None, :, top:bottom, left:right]
        pixels = resized(
            crop if crop.device.type == "cpu" else crop.float(), self.crop.size, self.crop.size, look.resampling
        )[0].flip(look.flips)
        if self.policy is None:
            return pixels
        torch.default_generator.manual_seed(look.policy)
        made: Tensor = self.policy(pixels)
        return made


@dataclass(frozen=True)
class Undecoded:
    """What is drawn for a batch whose images a GPU decodes; it becomes `Pixels` there."""

    view: TensorView
    given: Tensor
    """uint8: the data of one image after the other."""
    shapes: tuple[tuple[int, ...], ...]
    """Of each: `(bytes,)`, or `(3, height, width)`."""
    names: tuple[str, ...]
    looks: tuple[Look, ...]
    """Of all images by one view, then by the next."""
    boxes: tuple[Box | None, ...]
    """What is erased, in the same order."""

    @classmethod
    def of(cls, view: TensorView, given: Sequence[Given], drawn: Sequence[tuple[Look, Box | None]]) -> "Undecoded":
        """One tensor of all images: what travels between processes should be few and large."""
        data = torch.cat([one.data.flatten() for one in given])
        looks, boxes = zip(*drawn, strict=True)
        shapes, names = zip(*((tuple(one.data.shape), one.name) for one in given), strict=True)
        return cls(view, data, shapes, names, looks, boxes)

    def pin_memory(self) -> "Undecoded":
        """As it is: nvJPEG reads from ordinary memory."""
        return self

    def made(self, device: torch.device) -> tuple[Pixels, dict[int, UnreadableImage]]:
        """The pixels, on a device; and by their places the images that cannot be decoded, which have none."""
        pieces = self.given.split([math.prod(shape) for shape in self.shapes])
        images = decoded([Given(p.view(s), n) for p, s, n in zip(pieces, self.shapes, self.names, strict=True)], device)
        wrong = {place: image for place, image in enumerate(images) if isinstance(image, UnreadableImage)}
        there = [place for place in range(len(self.looks)) if place % len(images) not in wrong]
        size = self.view.crop.size
        pixels = torch.empty(len(there), 3, size, size, dtype=torch.uint8, device=device)
        with preserved():
            for into, place in zip(pixels, there, strict=True):
                into.copy_(self.view.make(images[place % len(images)], self.looks[place]))  # type: ignore[arg-type]
        made = Pixels.of(pixels, [self.boxes[place] for place in there])
        return replace(made, noise=made.noise.to(device)), wrong


def header_of(image: Image.Image | Encoded) -> Image.Image:
    return image.header if isinstance(image, Encoded) else image


def decoded(given: Sequence[Given], device: torch.device) -> list[Tensor | UnreadableImage]:
    """The images on a device, uint8 `[3, height, width]`; in place of one that cannot be decoded what is said of it."""
    encoded = [one for one in given if one.data.ndim == 1]
    try:
        images = iter(decode_jpeg([one.data for one in encoded], ImageReadMode.RGB, device) if encoded else ())
    except RuntimeError:
        # It does not say which.
        images = iter([_alone(one, device) for one in encoded])
    return [next(images) if one.data.ndim == 1 else one.data.to(device) for one in given]


def _alone(given: Given, device: torch.device) -> Tensor | UnreadableImage:
    try:
        image: Tensor = decode_jpeg(given.data, ImageReadMode.RGB, device)
    except RuntimeError as error:
        return unreadable(given.name, re.sub(r"^.*\.cpp:\d+, ", "", str(error).partition("\n")[0]))
    return image
