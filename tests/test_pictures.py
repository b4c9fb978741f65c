import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from distill_cli.data.idx import ArraySource
from distill_cli.data.views import Transform
from distill_cli.pictures import colours, data_uri, grid

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def test_inputs_have_the_colours_again_that_they_were_made_of(images: ArraySource) -> None:
    pixels = torch.from_numpy(np.asarray(images.read(0)).copy()).permute(2, 0, 1)
    inputs = Transform(lambda image: pixels, pixels.shape[-1], MEAN, STD)([images.read(0)], 0, 0, [0])
    assert (colours(inputs, MEAN, STD)[0] == np.asarray(images.read(0))).all()


def test_noise_beyond_black_and_white_is_clipped() -> None:
    inputs = torch.tensor([-100.0, 100.0]).expand(1, 3, 1, 2)
    assert colours(inputs, MEAN, STD).tolist() == [[[[0, 0, 0], [255, 255, 255]]]]


@pytest.mark.parametrize(("count", "shape"), [(1, (3, 4)), (2, (3, 10)), (4, (8, 10)), (5, (8, 16))])
def test_a_grid_is_near_to_a_square(count: int, shape: tuple[int, int]) -> None:
    pictures = np.full((count, 3, 4, 3), 9, np.uint8)
    sheet = grid(pictures)
    assert sheet.shape == (*shape, 3)
    assert sheet.sum() == pictures.sum()


def test_an_address_holds_the_image(images: ArraySource) -> None:
    kind, _, content = data_uri(images.read(0), 192).partition(",")
    assert kind == "data:image/png;base64"
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))) == np.asarray(images.read(0))).all()


def test_a_large_image_is_made_smaller(images: ArraySource) -> None:
    kind, _, content = data_uri(images.read(0).resize((2000, 1000)), 192).partition(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (192, 96)
