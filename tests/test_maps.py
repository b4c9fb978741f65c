"""One layout for what the layers of any architecture give."""

import pytest
import timm
import torch

from distill_cli.errors import UsageError
from distill_cli.students.maps import as_grid, as_tokens, pooled, resample
from distill_cli.students.taps import Taps

LAYERS = {
    "vit_tiny_patch16_224": ("blocks.1", 192, 4),
    "deit_tiny_distilled_patch16_224": ("blocks.1", 192, 4),
    "cait_xxs24_224": ("blocks.1", 192, 4),
    "swin_tiny_patch4_window7_224": ("layers.0", 96, 16),
    "convnext_atto": ("stages.1", 80, 8),
    "tiny_vit_5m_224": ("stages.1.blocks.0", 128, 8),
    "levit_128s": ("stages.0", 128, 4),
    "resnet18": ("layer2", 128, 8),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_grid_of_any_architecture(name):
    layer, channels, side = LAYERS[name]
    sized = {} if name in ("convnext_atto", "resnet18", "tiny_vit_5m_224") else {"img_size": 64}
    model = timm.create_model(name, **sized).eval()
    taps = Taps(model, [layer])
    with torch.no_grad():
        model(torch.zeros(2, 3, 64, 64))
    value = taps.take()[layer]
    grid, tokens = as_grid(value, model), as_tokens(value, model)
    assert grid.shape == (2, channels, side, side)
    assert torch.equal(tokens, grid.flatten(2).transpose(1, 2))
    assert torch.allclose(pooled(value, model), grid.mean(dim=(2, 3)), atol=1e-5)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_place_stays_where_it_is(layout):
    image = torch.arange(2 * 5 * 4 * 4.0).view(2, 5, 4, 4)
    value = image if layout == "NCHW" else image.permute(0, 2, 3, 1)
    assert torch.equal(as_grid(value, torch.nn.Identity()), image)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_where_all_sizes_are_equal_the_model_is_asked(layout):
    model = torch.nn.Identity()
    model.output_fmt = layout
    image = torch.arange(4 * 4 * 4.0).view(1, 4, 4, 4)
    assert torch.equal(as_grid(image if layout == "NCHW" else image.permute(0, 2, 3, 1), model), image)


def test_prefix_tokens_are_left_out():
    model = torch.nn.Identity()
    model.num_prefix_tokens = 2
    value = torch.arange(11.0).view(1, 11, 1)
    assert as_tokens(value, model).flatten().tolist() == list(range(2, 11))


@pytest.mark.parametrize("shape", [(2, 7, 3), (2, 3, 4, 5), (2, 3, 4, 5, 6), (2,)])
def test_what_is_no_square_grid(shape):
    with pytest.raises(UsageError, match=r"Identity: a layer's output \[2.*\] is no square"):
        as_tokens(torch.zeros(shape), torch.nn.Identity())


def test_tokens_in_another_order_are_refused():
    model = timm.create_model("hiera_tiny_224", img_size=64)
    with pytest.raises(UsageError, match="Hiera: a layer's output"):
        as_tokens(torch.zeros(1, 256, 96), model)


@pytest.mark.parametrize("side", [2, 3, 6, 8])
def test_resampled_the_mean_stays(side):
    grid = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    other = resample(grid, side)
    assert other.shape == (2, 3, side, side)
    constant = resample(torch.full((1, 1, 6, 6), 2.0), side)
    assert torch.allclose(constant, torch.full((1, 1, side, side), 2.0))
    if 6 % side == 0:
        assert torch.allclose(other.mean(dim=(2, 3)), grid.mean(dim=(2, 3)))
