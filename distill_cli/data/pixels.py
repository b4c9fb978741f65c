"""What a view has drawn of some samples, as bytes; and the arithmetic that makes a model's input of it, anywhere."""

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from distill_cli.config import Colour


@dataclass(frozen=True)
class Box:
    """A box of noise in place of an image's pixels."""

    top: int
    left: int
    noise: Tensor
    """float32 `[3, height, width]`, in normalised units."""

    def scaled(self, ratio: float) -> "Box":
        """The box in an image of another size, its edges rounded, its noise drawn anew."""
        height, width = self.noise.shape[1:]
        (top, bottom), (left, right) = (
            (round(start * ratio), round((start + length) * ratio))
            for start, length in ((self.top, height), (self.left, width))
        )
        return Box(top, left, torch.randn(3, max(1, bottom - top), max(1, right - left)))


@dataclass(frozen=True)
class Pixels:
    """What is drawn for a batch, before the arithmetic that follows: the same bytes on every device.

    Boxes lie in two tensors, since what travels between processes and to a device should be few and large.
    """

    images: Tensor
    """uint8 `[batch, 3, size, size]`."""
    edges: tuple[tuple[int, int, int, int, int], ...]
    """Of each box that is erased: its image's place in the batch, top, left, height, width."""
    noise: Tensor
    """float32: `[3, height, width]` of one box after the other."""

    @classmethod
    def of(cls, images: Tensor, boxes: Sequence[Box | None]) -> "Pixels":
        """A batch of images and what is erased of each."""
        there = [(place, box) for place, box in enumerate(boxes) if box is not None]
        edges = tuple((place, box.top, box.left, *box.noise.shape[1:]) for place, box in there)
        noise = torch.cat([box.noise.flatten() for _, box in there]) if there else torch.empty(0)
        return cls(images, edges, noise)

    @cached_property
    def boxes(self) -> tuple[Box | None, ...]:
        """What is erased of each image."""
        found: list[Box | None] = [None] * len(self.images)
        pieces = self.noise.split([3 * height * width for *_, height, width in self.edges])
        for (place, top, left, height, width), piece in zip(self.edges, pieces, strict=True):
            found[place] = Box(top, left, piece.view(3, height, width))
        return tuple(found)

    def to(self, device: torch.device) -> "Pixels":
        return self._each(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> "Pixels":
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Pixels":
        return replace(self, images=change(self.images), noise=change(self.noise))

    def checksum(self, place: int) -> int:
        """The CRC-32 of an image's bytes and, where it is erased, of top, left, height, width (int32) and the noise."""
        crc, box = zlib.crc32(self.images[place].cpu().numpy().tobytes()), self.boxes[place]
        if box is None:
            return crc
        crc = zlib.crc32(struct.pack("<4i", box.top, box.left, *box.noise.shape[1:]), crc)
        return zlib.crc32(box.noise.cpu().numpy().astype("<f4", copy=False).tobytes(), crc)

    def inputs(self, mean: Colour, std: Colour) -> Tensor:
        """float32 `[batch, 3, size, size]`, normalised, with what is erased; on the device where the pixels are."""
        shift, scale = (torch.tensor(colour, device=self.images.device).view(3, 1, 1) for colour in (mean, std))
        if self.images.device.type == "cpu":
            inputs = _in_cache(self.images, shift, scale)
        else:
            inputs = self.images.float().div_(255).sub_(shift).div_(scale)
        for place, box in enumerate(self.boxes):
            if box is not None:
                height, width = box.noise.shape[1:]
                inputs[place, :, box.top : box.top + height, box.left : box.left + width] = box.noise
        return inputs


def _in_cache(images: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(images / 255 - shift) / scale on a CPU, by numpy, one image after the other: a third of the time of the batch as
    a whole, which does not fit a cache, and of torch's threads, which wait for each other after each operation."""
    inputs = np.empty(images.shape, np.float32)
    for into, image in zip(inputs, images.numpy(), strict=True):
        into[:] = image
        into /= np.float32(255)
        into -= shift.numpy()
        into /= scale.numpy()
    return torch.from_numpy(inputs)
