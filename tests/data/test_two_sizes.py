"""A student of another size and other colours than its teacher's sees the same places and the same draws."""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_views import AUGMENTATIONS, MODEL
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms.functional import pil_to_tensor

from distill_cli.data.crops import CentreCrop, Elsewhere, PadCrop, SimpleCrop
from distill_cli.data.idx import ArraySource
from distill_cli.data.policies import Trivial
from distill_cli.data.views import SEEN, DataConfig, View, own_input, resolve_view, student_view, train_transform
from distill_cli.errors import MismatchError
from distill_cli.randomness import preserved, seed_everything

TEACHER, STUDENT = 48, 28
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


@pytest.fixture(autouse=True)
def _generators() -> Iterator[None]:
    with preserved():
        yield


def _views(size: int = STUDENT, **asked: Any) -> tuple[View, View]:
    """What the teacher sees and what a student of this size sees of it."""
    taught = resolve_view(DataConfig(**{"augment": "rrc", **asked, "image_size": TEACHER}), {**MODEL, **CLIP})
    own = own_input({**MODEL, "input_size": (3, size, size), "mean": (0.485, 0.456, 0.406)})
    own["interpolation"] = taught.interpolation
    return taught, student_view(DataConfig(), taught, own)


@pytest.fixture(scope="module")
def photographs(images: ArraySource) -> list[Image.Image]:
    """4 smooth images of three colours, 140 x 100 and 90 x 120."""
    mix = np.stack([np.roll(images.images[:4], 3 * c, axis=2) for c in range(3)], axis=-1)
    sizes = [(140, 100), (90, 120)] * 2
    return [Image.fromarray(image).resize(size, 3) for image, size in zip(mix, sizes, strict=True)]


def _map(width: int, height: int) -> Image.Image:
    """An image whose red is x and whose green is y."""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    return Image.fromarray(np.stack([x, y, np.full_like(x, 128)], axis=-1))


def _edges(pixels: torch.Tensor) -> list[float]:
    """The box of the map that a crop shows: left, right, top, bottom, by a line through its red and its green."""
    found = []
    for channel, axis in ((0, 0), (1, 1)):
        values = pixels[channel].double().mean(axis).numpy()
        inner = np.arange(4, len(values) - 4)
        slope, start = np.polyfit(inner + 0.5, values[4:-4] + 0.5, 1)
        found += [start, start + slope * len(values)]
    return found


def _tensor(pixels: Any) -> torch.Tensor:
    return pixels if isinstance(pixels, torch.Tensor) else pil_to_tensor(pixels)


@pytest.mark.parametrize(
    "asked",
    [
        {"augment": "rrc", "scale": (0.3, 1.0)},
        {"augment": "rrc", "scale": (0.3, 1.0), "resize": "torch"},
        {"augment": "rrc", "scale": (0.3, 1.0), "vflip": 0.5, "decode": "torch"},
        {"augment": "rrc", "scale": (0.3, 1.0), "interpolation": "random", "vflip": 0.5},
        {"augment": "none", "crop_pct": 0.9},
        {"augment": "src", "padding": 0},
        {"augment": "pad-crop", "padding": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [STUDENT, 96])
def test_the_pixels_of_both_show_one_box(asked: dict[str, Any], size: int) -> None:
    """The box is measured in what they see, flips included; an edge may be off by what a resize blurs."""
    taught, own = _views(size, **asked)
    ids, pictures = list(range(20)), [_map(230, 180), _map(150, 250)] * 10
    theirs = train_transform(taught).draw(pictures, 3, 1, ids).images
    ours = train_transform(taught, own).draw(pictures, 3, 1, ids).images
    assert (theirs.shape[-1], ours.shape[-1]) == (TEACHER, size)
    boxes = np.array([[*_edges(one), *_edges(other)] for one, other in zip(theirs, ours, strict=True)])
    assert np.abs(boxes[:, :4] - boxes[:, 4:]).max() < 1.5
    assert len({tuple(box.round()) for box in boxes}) > (4 if asked["augment"] == "rrc" else 1)


def test_a_random_crop_is_the_same_pixels_of_the_image(
    photographs: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes: list[tuple[int, ...]] = []
    draw = RandomResizedCropAndInterpolation.get_params

    def spy(*arguments: Any) -> tuple[int, ...]:
        boxes.append(draw(*arguments))
        return boxes[-1]

    monkeypatch.setattr(RandomResizedCropAndInterpolation, "get_params", staticmethod(spy))
    taught, own = _views(auto_augment="rand-m9-mstd0.5-inc1", reprob=0.5)
    for transform in (train_transform(taught), train_transform(taught, own)):
        transform.draw(photographs, 0, 0, range(4))
    assert boxes[:4] == boxes[4:]
    assert len(set(boxes)) == 4


@pytest.mark.parametrize(
    "crop", [PadCrop(48, 4, "bicubic"), SimpleCrop(48, 4, "random"), CentreCrop(48, 0.9, "bicubic")]
)
def test_the_place_of_a_crop_is_the_same_box_of_the_image(crop: Any, photographs: list[Image.Image]) -> None:
    """And what is beyond the image's edge is black, or mirrored, at either size."""
    for number, picture in enumerate(photographs * 5):
        seed_everything(number)
        place, resampling = crop.draw(picture)
        left, top, right, bottom = place.box(picture)
        assert right - left == pytest.approx(48 * picture.width / place.width)
        assert bottom - top == pytest.approx(48 * picture.height / place.height)
        seed_everything(number)
        same = Elsewhere(crop, 48, "random")(picture)
        resized = picture.resize((place.width, place.height), resampling)
        within = (
            max(0, place.left),
            max(0, place.top),
            min(place.width, place.left + 48),
            min(place.height, place.top + 48),
        )
        expected = np.asarray(resized.crop(within), int)
        x, y = within[0] - place.left, within[1] - place.top
        found = np.asarray(same, int)[y : y + expected.shape[0], x : x + expected.shape[1]]
        assert np.abs(found - expected)[2:-2, 2:-2].max() <= 8


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("size", [STUDENT, 64])
def test_all_draws_are_the_same_numbers(name: str, size: int, photographs: list[Image.Image]) -> None:
    """The three generators are left in the same state, and the pictures are one picture."""
    taught, own = _views(size, **AUGMENTATIONS[name])
    theirs, ours = train_transform(taught), train_transform(taught, own)
    differences = []
    for number, picture in enumerate(photographs * 6):
        seen, states = [], []
        for transform in (theirs, ours):
            seed_everything(number)
            seen.append(_tensor(transform.pixels(picture)))
            states.append((random.getstate(), np.random.get_state()[1:3], torch.get_rng_state().tolist()))
        assert str(states[0]) == str(states[1])
        halves = [torch.nn.functional.interpolate(one[None].float(), 14, mode="area") for one in seen]
        differences.append(float((halves[0] - halves[1]).abs().mean()))
    # Of 255; two pictures that are not one differ by 50 and more. Solarising and the like enlarge a small difference.
    assert np.median(differences) < 6
    assert np.quantile(differences, 0.9) < 20


def test_an_erased_box_is_the_same_share_of_the_image(photographs: list[Image.Image]) -> None:
    taught, own = _views(reprob=1.0)
    theirs, ours = (
        transform.draw(photographs * 5, 0, 0, range(20)).boxes
        for transform in (train_transform(taught), train_transform(taught, own))
    )
    for one, other in zip(theirs, ours, strict=True):
        assert one is not None
        assert other is not None
        edges = [
            (
                box.top / size,
                (box.top + box.noise.shape[1]) / size,
                box.left / size,
                (box.left + box.noise.shape[2]) / size,
            )
            for box, size in ((one, TEACHER), (other, STUDENT))
        ]
        assert np.abs(np.subtract(*edges)).max() <= 0.5 / STUDENT + 1e-9
    noise = torch.cat([box.noise.flatten() for box in ours if box is not None])
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_other_colours_alone_are_arithmetic(name: str, photographs: list[Image.Image]) -> None:
    taught, own = _views(TEACHER, **AUGMENTATIONS[name])
    theirs, ours = train_transform(taught), train_transform(taught, own)
    one, other = theirs.draw(photographs, 0, 0, range(4)), ours.draw(photographs, 0, 0, range(4))
    assert [one.checksum(i) for i in range(4)] == [other.checksum(i) for i in range(4)]
    assert (ours.mean, ours.std, theirs.mean) == (own.mean, own.std, taught.mean)
    mean, std = (torch.tensor(colour).view(3, 1, 1) for colour in (own.mean, own.std))
    plain = [i for i, box in enumerate(other.boxes) if box is None]
    assert torch.equal(ours.inputs(other)[plain], ((other.images.float() / 255 - mean) / std)[plain])


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_students_input_replays_bitwise(name: str, photographs: list[Image.Image]) -> None:
    taught, own = _views(**AUGMENTATIONS[name])
    whole = train_transform(taught, own)(photographs, 7, 1, range(4))
    parts = [train_transform(taught, own)([photographs[i]], 7, 1, [i]) for i in (2, 0, 3, 1)]
    assert torch.equal(whole[[2, 0, 3, 1]], torch.cat(parts))


def test_blurs_are_in_proportion() -> None:
    """A blur of the same radius in pixels would be nearly twice as strong at 28 px."""
    stripes = Image.fromarray(np.tile(np.repeat([0, 255], 60).astype(np.uint8), (120, 1))).convert("RGB")
    for asked in ({"auto_augment": "rand-m9-n1-p1-tBlur"}, {"gaussian_blur_prob": 1.0}):
        taught, own = _views(augment="src", padding=0, hflip=0.0, **asked)
        seen = []
        for transform, size in ((train_transform(taught), TEACHER), (train_transform(taught, own), STUDENT)):
            seed_everything(2)
            row = _tensor(transform.pixels(stripes))[0, size // 2].double()
            seen.append(float((row.diff().abs() / 255 * (torch.arange(size - 1) - (size - 2) / 2).abs()).sum()) / size)
        assert seen[1] == pytest.approx(seen[0], rel=0.35)


def test_a_translation_of_trivial_augment_is_in_proportion() -> None:
    space, scaled = (Trivial("bilinear", ratio)._augmentation_space(31) for ratio in (1.0, 0.5))
    whole, half = (values["TranslateX"][0].trunc() for values in (space, scaled))
    assert (whole[-1], half[-1]) == (32, 16)
    assert (half * 2 - whole).abs().max() <= 1
    assert torch.equal(space["Rotate"][0], scaled["Rotate"][0])


def test_what_a_student_sees_is_the_teachers_but_for_its_input() -> None:
    taught, own = _views(auto_augment="3a")
    assert {name for name, value in vars(own).items() if value != getattr(taught, name)} == {
        "image_size",
        "mean",
        "std",
    }
    asked = student_view(DataConfig(image_size=32, crop_pct=0.5), taught, vars(own))
    assert (asked.image_size, asked.crop_pct, asked.mean) == (32, 0.5, own.mean)
    assert asked == replace(own, image_size=32, crop_pct=0.5)
    assert set(SEEN) < set(vars(own))


@pytest.mark.parametrize(("stored", "asked"), [("random", "bicubic"), ("bilinear", "random")])
def test_a_drawn_interpolation_beside_one_that_is_not_is_refused(stored: str, asked: Any) -> None:
    taught, own = _views(interpolation=stored)
    message = (
        rf"^data\.interpolation: {asked} asked, the store has {stored}: one is drawn and the other is not, .*; leave"
    )
    with pytest.raises(MismatchError, match=message):
        student_view(DataConfig(interpolation=asked), taught, vars(own))
    assert student_view(DataConfig(), taught, {**vars(own), "interpolation": asked}).interpolation == stored


def test_another_draw_than_the_stores_is_refused() -> None:
    taught, own = _views()
    with pytest.raises(MismatchError, match=r"^data\.hflip: 0\.25 asked, the store has 0\.5; leave it out"):
        student_view(DataConfig(hflip=0.25), taught, vars(own))
