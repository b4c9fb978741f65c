"""What a view has drawn of some samples, as bytes; and the arithmetic that makes a model's input of it, anywhere."""

import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from distill_cli.config import Colour
from distill_cli.data.mixing import Mix


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
class Mixture:
    """How the inputs of a batch are made of images, each of two."""

    pairs: Tensor
    """int64 `[batch, 2]`: the places of an input's own image and of its partner's; twice its own where not mixed."""
    share: Tensor
    """float32 `[batch]`: of its own image, outside the box."""
    boxes: Tensor
    """int64 `[batch, 4]`: top, bottom, left, right of what is the partner's alone; zeros where there is no box."""

    @classmethod
    def of(cls, drawn: Sequence[int], batch: Sequence[int], mixes: Sequence[Mapping[int, Mix]]) -> "Mixture":
        """The mixture of a batch's inputs.

        Args:
            drawn: the samples of the images, in their order, the same in each view: the batch's, and partners that it
                lacks.
            batch: the samples of the inputs.
            mixes: of each view, by sample, what is mixed into it.
        """
        place = {sample_id: number for number, sample_id in enumerate(drawn)}
        inputs = [(view * len(drawn), i, of.get(i)) for view, of in enumerate(mixes) for i in batch]
        return cls(
            torch.tensor([(first + place[i], first + place[mix.partner if mix else i]) for first, i, mix in inputs]),
            torch.tensor([mix.lam if mix and mix.box is None else 1.0 for *_, mix in inputs]),
            torch.tensor([(mix and mix.box) or (0, 0, 0, 0) for *_, mix in inputs]),
        )

    def mixed(self, images: Tensor) -> Tensor:
        """w x + (1 - w) x' of normalised images `[images, 3, size, size]`: w is the share, and 0 in the box."""
        line = torch.arange(images.shape[-1], device=images.device)
        top, bottom, left, right = self.boxes[:, :, None].unbind(1)
        rows, columns = (line >= top) & (line < bottom), (line >= left) & (line < right)
        inside = (rows[:, :, None] & columns[:, None, :])[:, None]
        weight = torch.where(inside, 0.0, self.share[:, None, None, None])
        own, other = images[self.pairs[:, 0]], images[self.pairs[:, 1]]
        # Three roundings, none of them fused, so that an image's place in a batch has no part in its bits.
        return own.mul_(weight).add_(other.mul_(1 - weight))

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Its tensors."""
        return self.pairs, self.share, self.boxes


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
    mixture: Mixture | None = None
    """None: each image is an input."""

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
        mixture = self.mixture and Mixture(*map(change, self.mixture.parts))
        return replace(self, images=change(self.images), noise=change(self.noise), mixture=mixture)

    def checksum(self, place: int) -> int:
        """The CRC-32 of an image's bytes and, where it is erased, of top, left, height, width (int32) and the noise."""
        crc, box = zlib.crc32(self.images[place].cpu().numpy().tobytes()), self.boxes[place]
        if box is None:
            return crc
        crc = zlib.crc32(struct.pack("<4i", box.top, box.left, *box.noise.shape[1:]), crc)
        return zlib.crc32(box.noise.cpu().numpy().astype("<f4", copy=False).tobytes(), crc)

    def inputs(self, mean: Colour, std: Colour) -> Tensor:
        """float32 `[batch, 3, size, size]`, normalised, erased, then mixed; on the device where the pixels are."""
        shift, scale = (torch.tensor(colour, device=self.images.device).view(3, 1, 1) for colour in (mean, std))
        if self.images.device.type == "cpu":
            inputs = _in_cache(self.images, shift, scale)
        else:
            inputs = self.images.float().div_(255).sub_(shift).div_(scale)
        for place, box in enumerate(self.boxes):
            if box is not None:
                height, width = box.noise.shape[1:]
                inputs[place, :, box.top : box.top + height, box.left : box.left + width] = box.noise
        return inputs if self.mixture is None else self.mixture.mixed(inputs)


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
