"""What the tests of objectives share: a small student with a distillation token, and batches for it."""

from dataclasses import replace
from typing import Any

import timm
import torch
from dense import some
from torch import Tensor, nn

from distill_cli.data.batch import Batch, MixedLabels
from distill_cli.live_teacher import LiveTeacher
from distill_cli.objectives import Setting
from distill_cli.sparse import SparseLogits, keep_mass, sample_tail, top_k
from distill_cli.teachers import Frozen

CLASSES = 5
SETTING = Setting(28)
KINDS = ("fixed", "ragged", "sampled", "mixed")
"""Of rows: three classes each; two to four; two and the classes of four draws; three each, of mixed images."""


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


def make_plain(seed: int = 0) -> nn.Module:
    """A ViT of two blocks with a class token alone, whose classifier is one linear layer."""
    torch.manual_seed(seed)
    shape = {"img_size": 28, "patch_size": 7, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **shape)


def make_live(seed: int = 5, **arguments: Any) -> LiveTeacher:
    """A ViT that is wider and deeper than the student, without its second token, and normalises by other values."""
    torch.manual_seed(seed)
    shape = {"img_size": 28, "patch_size": 7, "embed_dim": 64, "depth": 3, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224.augreg_in21k", num_classes=CLASSES, **(shape | arguments))
    model.eval().requires_grad_(False)
    frozen = Frozen("teacher", model, weights_sha256="", num_classes=CLASSES, classes=None)
    return LiveTeacher(frozen, SETTING.mean, SETTING.std, torch.device("cpu"))


def make_batch(size: int = 8, seed: int = 1, kind: str = "fixed") -> Batch:
    """Noise, labels, and rows of a kind."""
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        images=torch.randn(size, 3, 28, 28, generator=generator),
        labels=torch.randint(CLASSES, (size,), generator=generator),
        sample_ids=torch.arange(size).numpy(),
        views=(0,),
        teacher=make_rows(3 * torch.randn(size, CLASSES, generator=generator), kind),
        mixed=make_mixed(size, generator) if kind == "mixed" else None,
    )


def make_mixed(size: int, generator: torch.Generator) -> MixedLabels:
    """Labels of partners and lambdas, the last of which is 1."""
    lam = torch.rand(size, generator=generator)
    lam[-1] = 1
    return MixedLabels(torch.randint(CLASSES, (size,), generator=generator), lam)


def make_rows(logits: Tensor, kind: str = "fixed") -> SparseLogits:
    if kind == "ragged":
        return keep_mass(top_k(logits, 4), 0.9, min_k=2)
    if kind == "sampled":
        uniform = torch.linspace(0, 0.99, len(logits), dtype=torch.float64)
        return sample_tail(logits, 2, 4, uniform)
    return top_k(logits, 3)


def part(batch: Batch, start: int, stop: int) -> Batch:
    """Some samples of a batch."""
    assert batch.teacher is not None
    images, labels, ids = (values[start:stop] for values in (batch.images, batch.labels, batch.sample_ids))
    rows = some(batch.teacher, slice(start, stop))
    mixed = batch.mixed and batch.mixed.at(slice(start, stop))
    return replace(batch, images=images, labels=labels, sample_ids=ids, teacher=rows, mixed=mixed)
