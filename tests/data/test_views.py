import json
import os
import random
import struct
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.data.auto_augment import auto_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

from distill_cli.data.crops import reduced
from distill_cli.data.idx import ArraySource
from distill_cli.data.pixels import Box, Pixels
from distill_cli.data.views import (
    SEEN,
    DataConfig,
    Transform,
    View,
    eval_transform,
    resolve_view,
    stored_view,
    student_view,
    train_transform,
)
from distill_cli.errors import MismatchError, UsageError
from distill_cli.randomness import derive, preserved, seed_everything

MODEL = {
    "input_size": (3, 48, 48),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
    "crop_pct": 0.9,
}
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "none": {"augment": "none"},
    "rrc": {"augment": "rrc"},
    "rrc bilinear": {"augment": "rrc", "interpolation": "bilinear", "scale": (0.5, 1.0)},
    "pad-crop": {"augment": "pad-crop", "image_size": 28, "padding": 4},
    "random interpolation": {"augment": "rrc", "interpolation": "random"},
    "random interpolation, pad-crop": {"augment": "pad-crop", "interpolation": "random"},
    "src": {"augment": "src"},
    "rrc by torch": {"augment": "rrc", "interpolation": "random", "resize": "torch"},
    "src by torch": {"augment": "src", "resize": "torch"},
    "pad-crop by torch": {"augment": "pad-crop", "interpolation": "bilinear", "resize": "torch"},
    "tensors": {"augment": "rrc", "decode": "torch", "reprob": 0.5, "vflip": 0.3},
    "tensors, trivial": {"augment": "rrc", "decode": "torch", "interpolation": "random", "auto_augment": "trivial"},
    "src, random interpolation": {"augment": "src", "interpolation": "random", "padding": 0},
    "randaugment": {"auto_augment": "rand-m9-mstd0.5-inc1"},
    "randaugment, random interpolation": {"auto_augment": "rand-m9-n3-mstd101-p1", "interpolation": "random"},
    "randaugment, weighted": {"auto_augment": "rand-m9-t3aw"},
    "autoaugment": {"auto_augment": "original-mstd0.5"},
    "autoaugment v0": {"auto_augment": "v0"},
    "augmix": {"auto_augment": "augmix-m3-w3"},
    "augmix, blended": {"auto_augment": "augmix-m5-w4-d2-b1"},
    "deit iii": {"auto_augment": "3a", "color_jitter": 0.3},
    "deit iii, 21k": {"auto_augment": "3a", "color_jitter": 0.3, "augment": "src"},
    "trivial": {"auto_augment": "trivial", "interpolation": "bilinear"},
    "color jitter": {"color_jitter": 0.4},
    "color jitter and hue": {"color_jitter": (0.4, 0.4, 0.2, 0.1), "color_jitter_prob": 0.8},
    "simclr": {"color_jitter": (0.8, 0.8, 0.8, 0.2), "color_jitter_prob": 0.8, "grayscale_prob": 0.2,
               "gaussian_blur_prob": 0.5},
    "vertical flip": {"vflip": 0.5},
    "erasing": {"reprob": 1.0},
    "short side": {"augment": "rrc", "short_side": 30},
    "all": {"auto_augment": "rand-m9-mstd0.5-inc1", "reprob": 1.0, "augment": "pad-crop"},
}  # fmt: skip
RANDOM = [name for name in AUGMENTATIONS if name != "none"]


@pytest.fixture(autouse=True)
def _generators() -> Iterator[None]:
    """A transform leaves the generators seeded; its caller restores them."""
    with preserved():
        yield


def _view(name: str) -> View:
    return resolve_view(DataConfig(**AUGMENTATIONS[name]), MODEL)


def _one(transform: Transform, picture: Image.Image, seed: int = 0, view: int = 0, sample_id: int = 0) -> torch.Tensor:
    return transform([picture], seed, view, [sample_id])[0]


def _inputs(view: View, pictures: list[Image.Image], batches: list[list[int]]) -> dict[int, np.ndarray]:
    """The inputs of samples in these batches, the generators disturbed before each."""
    transform, inputs = train_transform(view), {}
    for ids in batches:
        random.random(), np.random.random(ids[0]), torch.rand(3)
        batch = transform([pictures[i % len(pictures)] for i in ids], 7, 1, ids)
        inputs |= dict(zip(ids, batch.numpy(), strict=True))
    return inputs


@pytest.fixture(scope="module")
def pictures(images: ArraySource) -> list[Image.Image]:
    """8 real images, coloured, 60 x 40."""
    mix = np.stack([np.roll(images.images[:8], 3 * c, axis=2) for c in range(3)], axis=-1)
    return [Image.fromarray(image).resize((60, 40)) for image in mix]


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_view_replays_bitwise_in_another_order_and_other_batches(name: str, pictures: list[Image.Image]) -> None:
    shuffled = random.Random(1).sample(range(12), 12)
    one = _inputs(_view(name), pictures, [list(range(12))])
    other = _inputs(_view(name), pictures, [shuffled[:5], shuffled[5:6], shuffled[6:]])
    assert all(np.array_equal(one[i], other[i]) for i in one)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_view_replays_bitwise_in_another_process(
    name: str, pictures: list[Image.Image], other_process: ProcessPoolExecutor
) -> None:
    here = _inputs(_view(name), pictures, [[3, 1]])
    there = other_process.submit(_inputs, _view(name), pictures, [[1, 2], [3]]).result()
    assert all(np.array_equal(here[i], there[i]) for i in here)


def _forbidden(*_: object, **__: object) -> None:
    raise AssertionError("a draw from another generator")


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_view_draws_from_the_three_seeded_generators_alone(
    name: str, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All else that could decide something is forbidden, or other than before."""
    ids = list(range(24))
    expected = _inputs(_view(name), pictures, [ids])
    for owner, generator in (
        (os, "urandom"), (time, "time"), (time, "time_ns"), (uuid, "uuid4"), (np.random, "default_rng"),
        (np.random, "RandomState"), (np.random, "SeedSequence"), (torch, "Generator"), (random, "SystemRandom"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, generator, _forbidden)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads % 2 + 1)
    try:
        found = _inputs(_view(name), pictures, [ids])
    finally:
        torch.set_num_threads(threads)
    assert all(np.array_equal(expected[i], found[i]) for i in ids)


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("axis", ["seed", "view", "sample_id"])
def test_another_sample_view_or_seed_is_another_draw(name: str, axis: str, pictures: list[Image.Image]) -> None:
    """Of eight draws, since two may coincide."""
    transform = train_transform(_view(name))
    assert len({_one(transform, pictures[0], **{axis: n}).numpy().tobytes() for n in range(8)}) > 1


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_view_is_a_normalised_float_image(name: str, pictures: list[Image.Image]) -> None:
    view = _view(name)
    inputs = train_transform(view)(pictures[:2], 0, 0, [0, 1])
    assert (inputs.dtype, tuple(inputs.shape)) == (torch.float32, (2, 3, view.image_size, view.image_size))
    assert inputs.isfinite().all()


@pytest.mark.parametrize("view", [0, 5])
def test_no_augmentation_is_timms_own_evaluation_in_every_view(pictures: list[Image.Image], view: int) -> None:
    config = resolve_data_config({}, model=timm.create_model("test_vit.r160_in1k"))
    ours = train_transform(resolve_view(DataConfig(augment="none"), config))
    theirs = create_transform(**config, is_training=False)
    assert torch.equal(ours(pictures, 3, view, range(8)), torch.stack([theirs(picture) for picture in pictures]))


def test_a_random_crop_is_timms_own_augmentation(pictures: list[Image.Image]) -> None:
    view = _view("randaugment")
    theirs = create_transform(
        48, is_training=True, auto_augment=view.auto_augment, interpolation="bicubic", mean=view.mean, std=view.std
    )
    for i, picture in enumerate(pictures):
        seed_everything(derive("view", 0, 2, i))
        expected = theirs(picture)
        assert torch.equal(_one(train_transform(view), picture, 0, 2, i), expected)


def _drawn(view: View, picture: Image.Image, i: int) -> torch.Tensor:
    return train_transform(view).draw([picture], 0, 2, [i]).images[0]


def _seeded(theirs: Callable[[Image.Image], torch.Tensor], picture: Image.Image, i: int) -> torch.Tensor:
    seed_everything(derive("view", 0, 2, i))
    return theirs(picture)


def test_deit_iiis_augmentation_is_its_own_code_transform_by_transform(pictures: list[Image.Image]) -> None:
    """`--src --ThreeAugment --color-jitter 0.3`: crop, flip, one of three, jitter."""
    theirs = transforms.Compose(
        [
            transforms.Resize(48, transforms.InterpolationMode.BICUBIC),
            transforms.RandomCrop(48, padding=4, padding_mode="reflect"),
            transforms.RandomHorizontalFlip(),
            auto_augment_transform("3a", {"img_mean": (128, 102, 76)}),
            transforms.ColorJitter(0.3, 0.3, 0.3),
            transforms.PILToTensor(),
        ]
    )
    for i, picture in enumerate(pictures * 3):
        assert torch.equal(_drawn(_view("deit iii, 21k"), picture, i), _seeded(theirs, picture, i))


def test_trivial_augment_is_torchvisions_between_flip_and_tensor(pictures: list[Image.Image]) -> None:
    bilinear = transforms.InterpolationMode.BILINEAR
    theirs = transforms.Compose(
        [
            RandomResizedCropAndInterpolation(48, interpolation="bilinear"),
            transforms.RandomHorizontalFlip(),
            transforms.TrivialAugmentWide(interpolation=bilinear),
            transforms.PILToTensor(),
        ]
    )
    for i, picture in enumerate(pictures * 3):
        assert torch.equal(_drawn(_view("trivial"), picture, i), _seeded(theirs, picture, i))


def test_timms_own_options_are_timms(pictures: list[Image.Image]) -> None:
    view = _view("simclr")
    theirs = create_transform(
        48, is_training=True, color_jitter=(0.8, 0.8, 0.8, 0.2), color_jitter_prob=0.8, grayscale_prob=0.2,
        gaussian_blur_prob=0.5, interpolation="bicubic", normalize=False,
    )  # fmt: skip
    for i, picture in enumerate(pictures * 3):
        assert torch.equal(_drawn(view, picture, i), _seeded(theirs, picture, i))


def test_a_random_interpolation_is_timms(pictures: list[Image.Image]) -> None:
    view = _view("randaugment, random interpolation")
    theirs = create_transform(
        48, is_training=True, auto_augment=view.auto_augment, interpolation="random", mean=view.mean, normalize=False
    )
    for i, picture in enumerate(pictures):
        assert torch.equal(_drawn(view, picture, i), _seeded(theirs, picture, i))


def test_a_random_interpolation_is_evaluated_by_bicubic(picture: Image.Image) -> None:
    view = _view("random interpolation")
    bicubic = eval_transform(replace(view, interpolation="bicubic"))
    assert torch.equal(_one(eval_transform(view), picture), _one(bicubic, picture))


@pytest.mark.parametrize("policy", ["rand-x9", "randd", "v1", "augmix-q3", "3b", "trivial-m9"])
def test_a_policy_that_is_none_is_refused(policy: str) -> None:
    with pytest.raises(UsageError, match=rf"^data.auto_augment: '{policy}' is no policy of timm.*; give one such as"):
        resolve_view(DataConfig(auto_augment=policy), MODEL)


def test_erasing_with_certainty_draws_noise_over_a_box(pictures: list[Image.Image]) -> None:
    plain, erased = (_one(train_transform(replace(_view("rrc"), reprob=p)), pictures[0]) for p in (0.0, 1.0))
    rows, columns = (plain != erased).any(0).nonzero().T
    box = erased[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert (plain != erased).float().mean() < 0.5
    assert (plain != erased).sum() == box.numel()


def test_a_pad_crop_without_padding_or_flip_keeps_the_image(picture: Image.Image) -> None:
    view = replace(_view("pad-crop"), padding=0, hflip=0.0, crop_pct=1.0)
    assert torch.equal(_one(train_transform(view), picture), _one(eval_transform(view), picture))


def test_a_pad_crop_shifts_the_image_over_black(picture: Image.Image) -> None:
    view = replace(_view("pad-crop"), hflip=0.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    whole = torch.nn.functional.pad(_one(eval_transform(replace(view, crop_pct=1.0)), picture), (4,) * 4)
    crops = [whole[:, y : y + 28, x : x + 28] for x in range(9) for y in range(9)]
    shifts = [
        [torch.equal(_one(train_transform(view), picture, sample_id=i), crop) for crop in crops] for i in range(40)
    ]
    assert all(any(row) for row in shifts)
    assert len({row.index(True) for row in shifts}) > 20


@pytest.mark.parametrize(("size", "augment"), [(28, "pad-crop"), (32, "pad-crop"), (33, "rrc"), (224, "rrc")])
def test_small_images_are_padded_and_larger_ones_zoomed_into(size: int, augment: str) -> None:
    assert resolve_view(DataConfig(image_size=size), MODEL).augment == augment


def test_a_recipe_goes_before_the_model_and_the_model_before_defaults() -> None:
    view = resolve_view(DataConfig(mean=(0.1, 0.2, 0.3), hflip=0.0), MODEL)
    assert (view.mean, view.hflip, view.std, view.image_size) == ((0.1, 0.2, 0.3), 0.0, MODEL["std"], 48)
    assert (view.scale, view.padding, view.reprob) == ((0.08, 1.0), 2, 0.0)


def test_a_stored_view_is_taken_as_it_is() -> None:
    view = _view("randaugment")
    assert stored_view(DataConfig(auto_augment=view.auto_augment), asdict(view)) == view
    assert stored_view(DataConfig(), {**asdict(view), "mean": list(view.mean)}) == view


def test_a_plan_of_thirteen_fields_has_the_others_at_their_defaults() -> None:
    table = json.loads(json.dumps(_view("randaugment").table))
    assert len(table) == 13
    assert stored_view(DataConfig(), table) == _view("randaugment")
    assert stored_view(DataConfig(), table).table == table


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_view_comes_back_from_its_plan(name: str) -> None:
    table = json.loads(json.dumps(_view(name).table))
    assert stored_view(DataConfig(**AUGMENTATIONS[name]), table) == _view(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warp": 1}, "S: its transform has warp 1, which this program cannot replay; update distill"),
        ({"augment": "later"}, "S: its transform has augment 'later', which this program cannot replay;"),
        ({"hflip": None}, "S: its transform has hflip None, which this program cannot replay;"),
    ],
)
def test_a_plan_of_a_later_program_is_refused_in_one_line(change: dict[str, object], message: str) -> None:
    with pytest.raises(MismatchError, match=message) as caught:
        stored_view(DataConfig(), {**_view("rrc").table, **change}, "S")
    assert (caught.value.exit_code, "\n" in str(caught.value)) == (3, False)


# The short side.


@pytest.mark.parametrize("size", [(60, 40), (40, 61), (30, 30), (20, 90)])
def test_an_image_is_reduced_once_and_never_enlarged(size: tuple[int, int], pictures: list[Image.Image]) -> None:
    image = pictures[0].resize(size)
    found = reduced(image, 30)
    assert min(found.size) == min(30, min(size))
    assert found.width / found.height == pytest.approx(size[0] / size[1], abs=1 / 30)
    assert reduced(found, 30).tobytes() == found.tobytes()
    assert reduced(image, 0).tobytes() == image.tobytes()


@pytest.mark.parametrize("name", ["none", "rrc", "pad-crop", "src", "all"])
def test_a_view_of_a_short_side_is_that_of_the_smaller_image(name: str, pictures: list[Image.Image]) -> None:
    view = replace(_view(name), short_side=30)
    small = [image.resize((45, 30), Image.Resampling.BICUBIC) for image in pictures]
    for student in (view, replace(view, image_size=24)):
        found = train_transform(view, student)(pictures, 1, 2, range(8))
        assert torch.equal(found, train_transform(replace(view, short_side=0), student)(small, 1, 2, range(8)))


def test_an_evaluation_sees_images_as_they_are(pictures: list[Image.Image]) -> None:
    view = _view("none")
    assert torch.equal(
        eval_transform(replace(view, short_side=30))(pictures, 0, 0, range(8)),
        eval_transform(view)(pictures, 0, 0, range(8)),
    )


def test_a_short_side_stands_in_a_plan_and_none_does_not() -> None:
    assert "short_side" not in _view("rrc").table
    assert _view("short side").table["short_side"] == 30
    with pytest.raises(MismatchError, match=r"data\.short_side: 20 asked, the store has 30; leave it out"):
        stored_view(DataConfig(short_side=20), _view("short side").table)
    with pytest.raises(MismatchError, match=r"data\.short_side: 20 asked, the store has 0"):
        student_view(DataConfig(short_side=20), _view("rrc"), {name: getattr(_view("rrc"), name) for name in SEEN})


def test_a_plan_that_lacks_a_field_is_refused() -> None:
    table = {name: value for name, value in _view("rrc").table.items() if name != "scale"}
    with pytest.raises(MismatchError, match=r"^S: its transform has no scale, which this program cannot replay"):
        stored_view(DataConfig(), table, "S")


def test_asking_a_store_for_another_view_names_both_values() -> None:
    with pytest.raises(MismatchError, match=r"data\.reprob: 0\.5 asked, the store has 0\.0; leave it out, or write"):
        stored_view(DataConfig(reprob=0.5), asdict(_view("rrc")))


def test_a_checksum_is_of_what_is_drawn_and_not_of_the_arithmetic() -> None:
    image = torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2)
    box = Box(0, 1, torch.zeros(3, 1, 1))
    turned = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    images = torch.stack([image, turned, image + 1, image, image])
    pixels = Pixels.of(images, [None, None, None, box, replace(box, top=1)])
    plain, same, other, erased, elsewhere = map(pixels.checksum, range(5))
    assert plain == same == zlib.crc32(bytes(range(12)))
    assert len({plain, other, erased, elsewhere}) == 4
    assert erased == zlib.crc32(bytes(range(12)) + struct.pack("<4i", 0, 1, 1, 1) + bytes(12))


def test_the_arithmetic_is_the_same_to_the_bit_image_by_image_and_on_the_whole_batch() -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(2, 3, 4, 1)
    shift, scale = (torch.tensor(colour).view(3, 1, 1) for colour in (MODEL["mean"], MODEL["std"]))
    whole = images.float().div_(255).sub_(shift).div_(scale)
    assert torch.equal(Pixels.of(images, [None, None]).inputs(MODEL["mean"], MODEL["std"]), whole)  # type: ignore[arg-type]


def test_what_is_drawn_makes_the_inputs(pictures: list[Image.Image]) -> None:
    transform = train_transform(replace(_view("rrc"), reprob=0.5))
    pixels = transform.draw(pictures[:4] * 4, 0, 0, range(16))
    assert pixels.images.dtype == torch.uint8
    assert {box is None for box in pixels.boxes} == {True, False}
    assert torch.equal(transform.inputs(pixels), transform(pictures[:4] * 4, 0, 0, range(16)))
