"""What a view does to the pixels of its crop: timm's policies and jitter, and torchvision's TrivialAugment.

For a student of another input size every draw is the same; what timm and torchvision measure in pixels is brought into
proportion here, by `ratio`, the student's size over the teacher's: the radius of a blur and TrivialAugment's
translation. (timm's other translations are shares of the size, and colours do not know it. The sharpness filter of
Pillow is of 3 x 3 px at any size.)
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from PIL import Image, ImageFilter
from timm.data import auto_augment
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as F

TRIVIAL = "trivial"


class Trivial(transforms.TrivialAugmentWide):
    """One operation of random strength.

    Paper: Müller and Hutter 2021, arXiv:2103.10158; torchvision's, for its range of 32 px.
    Differs: with a ratio other than 1 a translation is rounded down to whole pixels at either size, so that the two
        are within one of them.
    """

    def __init__(self, interpolation: str, ratio: float = 1.0) -> None:
        super().__init__(interpolation=transforms.InterpolationMode(interpolation))
        self.ratio = ratio

    def _augmentation_space(self, num_bins: int) -> dict[str, tuple[Tensor, bool]]:
        space = super()._augmentation_space(num_bins)
        if self.ratio != 1:
            for name in ("TranslateX", "TranslateY"):
                pixels, signed = space[name]
                # A little more, so that float32 does not fall short of a whole number that is meant.
                space[name] = (pixels.trunc() * self.ratio + 1e-4, signed)
        return space


class Blur(transforms.GaussianBlur):
    """torchvision's, in proportion."""

    def __init__(self, blur: transforms.GaussianBlur, ratio: float) -> None:
        super().__init__([2 * round(side // 2 * ratio) + 1 for side in blur.kernel_size], blur.sigma)
        self.ratio = ratio

    def forward(self, image: Image.Image) -> Image.Image:
        sigma = self.get_params(*self.sigma) * self.ratio
        return F.gaussian_blur(image, list(self.kernel_size), [sigma, sigma])


def in_proportion(transform: Callable[..., Any], ratio: float) -> Callable[..., Any]:
    """A transform of timm's training pipeline with its blurs in proportion; changed in place where it can be."""
    for operation in _operations(transform):
        if "Blur" in operation.name:
            vars(operation)["aug_fn"] = partial(_blurred, operation.aug_fn, ratio)
    if isinstance(transform, transforms.RandomApply):
        applied = [
            Blur(one, ratio) if isinstance(one, transforms.GaussianBlur) else one for one in transform.transforms
        ]
        return transforms.RandomApply(applied, transform.p)
    return transform


def _operations(transform: object) -> Sequence[auto_augment.AugmentOp]:
    if isinstance(transform, auto_augment.AutoAugment):
        return [operation for policy in transform.policy for operation in policy]
    if isinstance(transform, auto_augment.RandAugment | auto_augment.AugMixAugment):
        return list(transform.ops)
    return []


def _blurred(blur: Any, ratio: float, image: Image.Image, *level: float, **_: Any) -> Image.Image:
    """What one of timm's blurs does, which draws its radius itself."""
    return blur(_Canvas(image, ratio), *level)


class _Canvas:
    """Stands for an image that is filtered once: by a radius in proportion."""

    def __init__(self, image: Image.Image, ratio: float) -> None:
        self.image, self.ratio = image, ratio

    def filter(self, blur: ImageFilter.GaussianBlur) -> Image.Image:
        assert isinstance(blur.radius, int | float)
        return self.image.filter(ImageFilter.GaussianBlur(blur.radius * self.ratio))
