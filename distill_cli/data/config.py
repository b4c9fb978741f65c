"""What a recipe says of its images, and what stands in a store's plan: the fields of a view."""

from dataclasses import MISSING, fields
from typing import Annotated, Any, Literal

from pydantic import Field

from distill_cli.config import Colour, Fraction, Natural, NonNegative, Positive, PositiveFloat, Range, section

Augment = Literal["none", "rrc", "pad-crop", "src"]
Resizing = Literal["pillow", "torch"]
Decoding = Literal["full", "reduced", "torch", "cuda"]
Interpolation = Literal["bilinear", "bicubic", "nearest", "random"]
Hue = Annotated[float, Field(ge=0, le=0.5)]
Jitter = NonNegative | tuple[NonNegative, NonNegative, NonNegative] | tuple[NonNegative, NonNegative, NonNegative, Hue]


@section
class DataConfig:
    """Where the images are and what their views are; a field left out comes from the store, else from the model."""

    path: str | None = None
    """`--data`: a folder, an IDX folder, a list, an HDF5 file, `wds:…`, `hf:…`, `timm:…`, or `sample`."""
    val: str | None = None
    """Other data to validate on, where `path` has no validation split."""
    root: str | None = None
    """Of a list: what its paths are relative to; of `timm:NAME`: where the data set lies."""
    cache: str | None = None
    """A folder for decoded images, which changes no pixel of what a model sees."""
    cache_listing: bool = True
    """Keep the listing of a large tree, and the index of tars, in the user's cache."""
    cache_gb: PositiveFloat | None = None
    """Bound of the tars that are fetched from URLs; what was not read for longest goes first. By default none."""
    labelled: bool = True
    """False: ignore the classes of the data (a teacher of other classes, unlabelled folders)."""
    skip_unreadable: bool = False
    """Go on without images that cannot be decoded, and count them."""
    augment: Augment | None = None
    """`none` (the model's own evaluation transform), `rrc` (random resized crop), `src` (DeiT III's simple random
    crop) or `pad-crop`; by default `pad-crop` up to 32 px and `rrc` above, as TinyViT does."""
    input: Literal["teacher", "student"] | None = None
    """`student`: what is left out of a student's image size, mean, std, interpolation and crop_pct is the student's
    own; by default it is what the teacher of its store saw. The crops and all that is drawn are the store's in either
    case."""
    short_side: Natural | None = None
    """Pixels of an image's short side before the view begins: larger images are resized to it, whatever is cached; 0,
    the default, leaves them as they are. An evaluation sees images as they are."""
    image_size: Positive | None = None
    """Pixels of a side of the model's input."""
    mean: Colour | None = None
    std: Colour | None = None
    interpolation: Interpolation | None = None
    """`random` draws bilinear or bicubic for each image, as timm's training does, and evaluates by bicubic."""
    crop_pct: PositiveFloat | None = None
    """Evaluation: the share of the resized image's side that the centre crop keeps."""
    scale: Range | None = None
    """`rrc`: share of the image's area that a crop covers; (0.08, 1)."""
    ratio: Range | None = None
    """`rrc`: width over height of a crop; (3/4, 4/3)."""
    padding: Natural | None = None
    """Pixels around the image before the crop: black ones of `pad-crop`, 2; mirrored ones of `src`, 4."""
    hflip: Fraction | None = None
    """Probability of a horizontal flip, with any crop; 0.5."""
    color_jitter: Jitter | None = None
    """Strength of brightness, contrast and saturation jitter; 0. Three numbers tell them apart, a fourth is hue. Not
    used beside `auto_augment` other than timm's `3a`, as in timm."""
    auto_augment: str | None = None
    """timm's string of a policy, such as `rand-m9-mstd0.5-inc1`, or `trivial` for torchvision's TrivialAugmentWide;
    empty for none."""
    reprob: Fraction | None = None
    """Probability of random erasing, in pixel mode; 0."""
    vflip: Fraction | None = None
    """Probability of a vertical flip; 0."""
    color_jitter_prob: Fraction | None = None
    """Probability of the colour jitter; 1."""
    grayscale_prob: Fraction | None = None
    """Probability of taking the colours away; 0."""
    gaussian_blur_prob: Fraction | None = None
    """Probability of torchvision's Gaussian blur of 23 px; 0."""
    mixup: NonNegative | None = None
    """Alpha of Mixup's beta distribution; 0 for none."""
    cutmix: NonNegative | None = None
    """Alpha of CutMix's; 0 for none."""
    mixup_prob: Fraction | None = None
    """Probability that a pair of images is mixed at all, where `mixup` or `cutmix` is given; 1."""
    mixup_switch_prob: Fraction | None = None
    """Probability of CutMix, where both are given; 0.5."""
    resize: Resizing | None = None
    """What resizes a crop: `pillow`; or `torch`, which is faster and a level or two beside it in few pixels."""
    decode: Decoding | None = None
    """`full`; `reduced`: a JPEG at 1/2, 1/4 or 1/8 of its sides where the crop keeps as many pixels as the input has;
    `torch`, `cuda`: decoded, cropped and augmented as tensors, by the loader's processes or on the GPU."""


@section
class View:
    """A resolved view: all that decides the pixels of a model's input. It stands in a store's plan.

    The fields with a default have come since the first stores.
    """

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
    color_jitter: Jitter
    auto_augment: str
    reprob: Fraction
    vflip: Fraction = 0.0
    color_jitter_prob: Fraction = 1.0
    grayscale_prob: Fraction = 0.0
    gaussian_blur_prob: Fraction = 0.0
    short_side: Natural = 0
    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0
    mixup_prob: Fraction = 1.0
    mixup_switch_prob: Fraction = 0.5
    resize: Resizing = "pillow"
    decode: Decoding = "full"

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others."""
        return bool(self.mixup or self.cutmix) and self.mixup_prob > 0

    @property
    def table(self) -> dict[str, Any]:
        """As it stands in a plan: a field that has come since is left out at its default, so that an old plan and a
        new one of the same view are the same."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            field.name: list(values[field.name]) if isinstance(values[field.name], tuple) else values[field.name]
            for field in fields(self)
            if field.default is MISSING or values[field.name] != field.default
        }


TENSORS = ("torch", "cuda")
"""Values of `decode` by which a view is made of tensors from the start."""

DEFAULTS = {
    "scale": (0.08, 1.0),
    "ratio": (3 / 4, 4 / 3),
    "padding": 2,
    "hflip": 0.5,
    "color_jitter": 0.0,
    "auto_augment": "",
    "reprob": 0.0,
}


SEEN = ("image_size", "mean", "std", "interpolation", "crop_pct")
"""The fields of a view in which a student may differ from its teacher: how the two look, not where."""


def said(config: DataConfig) -> dict[str, Any]:
    """The fields of a view that a recipe states."""
    values = {field.name: getattr(config, field.name) for field in fields(View)}
    return {name: value for name, value in values.items() if value is not None}
