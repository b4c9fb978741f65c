"""Pictures of what models see: inputs back to colours, several in one, one as text in a page."""

import base64
import io
import math

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from distill_cli.config import Colour

GAP = 2
"""Pixels between the pictures of a grid."""


def colours(inputs: Tensor, mean: Colour, std: Colour) -> NDArray[np.uint8]:
    """uint8 `[batch, height, width, 3]` of normalised inputs `[batch, 3, height, width]`; erased noise is clipped."""
    shift, scale = (torch.tensor(colour).view(3, 1, 1) for colour in (mean, std))
    pixels = (inputs.float().cpu() * scale + shift).clamp(0, 1).mul(255).round()
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).numpy()


def grid(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """One picture of several `[n, height, width, 3]`, as near to a square as they go, on black."""
    count, height, width, _ = pictures.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.zeros((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), np.uint8)
    for number, picture in enumerate(pictures):
        top, left = number // columns * (height + GAP), number % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def data_uri(image: Image.Image, most: int) -> str:
    """An RGB image as the address of itself, its longer side at most so many pixels; small ones lose nothing."""
    image = image.copy()
    image.thumbnail((most, most))
    small = max(image.size) <= 64
    content = io.BytesIO()
    image.save(content, "png" if small else "jpeg", quality=85)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(content.getvalue()).decode()}"
