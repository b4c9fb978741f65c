"""A ViT on some of its patches."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from distill_cli.students.masked import gather, grid_of, only_patches, visible_tokens

STUDENTS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_base_patch16_clip_224.openai": {},
    "vit_base_patch16_siglip_224": {},
    "vit_small_patch14_reg4_dinov2": {"patch_size": 16},
    "flexivit_small": {"dynamic_img_size": True},
}


def make(name: str) -> Any:
    torch.manual_seed(0)
    shape = {"img_size": 64, "embed_dim": 24, "depth": 3, "num_heads": 2} | STUDENTS[name]
    return timm.create_model(name, **shape).eval()


def orders(count: int) -> Tensor:
    return torch.rand(2, count, generator=torch.Generator().manual_seed(1)).argsort(dim=1)


@pytest.mark.parametrize("name", STUDENTS)
def test_with_all_patches_in_any_order_it_is_the_whole_model(name: str) -> None:
    vit, images = make(name), torch.randn(2, 3, 64, 64)
    assert grid_of(vit, 64) == (4, 4)
    order, found = orders(16), {}
    vit.blocks[1].register_forward_hook(lambda *args: found.update(block=args[2]))
    whole = vit.forward_features(images)
    block = found["block"]
    inside, last = visible_tokens(vit, images, order, [2])
    prefix = vit.num_prefix_tokens
    for ours, theirs in ((last, whole), (inside[2], block)):
        assert ours is not None
        torch.testing.assert_close(ours[:, :prefix], theirs[:, :prefix], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours[:, prefix:], gather(theirs[:, prefix:], order), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STUDENTS)
def test_of_the_others_nothing_is_seen(name: str) -> None:
    vit, images, keep = make(name), torch.randn(2, 3, 64, 64), orders(16)[:, :5]
    spoilt = torch.randn(2, 3, 64, 64)
    for image, places in enumerate(keep.tolist()):
        for place in places:
            row, column = 16 * (place // 4), 16 * (place % 4)
            spoilt[image, :, row : row + 16, column : column + 16] = images[
                image, :, row : row + 16, column : column + 16
            ]
    (one, _), (other, _) = (visible_tokens(vit, seen, keep, [1, 3], stop=True) for seen in (images, spoilt))
    assert one.keys() == other.keys() == {1, 3}
    for block, tokens in one.items():
        assert tokens.shape == (2, vit.num_prefix_tokens + 5, 24)
        torch.testing.assert_close(tokens, other[block])


def test_afterwards_it_is_as_it_was_also_where_a_pass_fails() -> None:
    vit = make("vit_tiny_patch16_224")
    with pytest.raises(RuntimeError), only_patches(vit, orders(16)):
        vit(torch.randn(3, 3, 64, 64))
    assert not vit.patch_drop._forward_hooks
    assert vit.forward_features(torch.randn(3, 3, 64, 64)).shape == (3, 17, 24)
