"""What the tests of objectives share: a small student with a distillation token, and batches for it."""

from dataclasses import replace

import timm
import torch
from torch import nn

from distill_cli.data.loader import Batch
from distill_cli.sparse import top_k

CLASSES = 5


def make_student(seed: int = 0) -> nn.Module:
    """DeiT of two blocks: with a token, without BatchNorm and drop path."""
    torch.manual_seed(seed)
    return timm.create_model(
        "deit_tiny_distilled_patch16_224",
        num_classes=CLASSES,
        img_size=28,
        patch_size=7,
        embed_dim=48,
        depth=2,
        num_heads=3,
    )


def make_batch(size: int = 8, seed: int = 1) -> Batch:
    """Noise, labels, and rows of three classes."""
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        images=torch.randn(size, 3, 28, 28, generator=generator),
        labels=torch.randint(CLASSES, (size,), generator=generator),
        sample_ids=torch.arange(size).numpy(),
        view=0,
        teacher=top_k(3 * torch.randn(size, CLASSES, generator=generator), 3),
    )


def part(batch: Batch, start: int, stop: int) -> Batch:
    """Some samples of a batch."""
    assert batch.teacher is not None
    rows = batch.teacher._each(lambda part: part[start:stop])
    images, labels, ids = (values[start:stop] for values in (batch.images, batch.labels, batch.sample_ids))
    return replace(batch, images=images, labels=labels, sample_ids=ids, teacher=rows)
