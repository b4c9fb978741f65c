"""Bytes of a loss on logits, forward and backward, as a multiple of the logits themselves; of TinyMIM's relations.

    python benchmarks/memory.py [--batch 1024 --classes 21841 --k 100] [--device cuda]

The peak counts the logits, their gradient and every temporary; teachers' rows are there before. On the CPU it is the
sum of all allocations and frees that torch's profiler reports, kernels' own included; on CUDA that of its allocator.
"""

import argparse
import itertools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from distill_cli.data.batch import Batch
from distill_cli.objectives.dist import DISTConfig
from distill_cli.objectives.logits import LogitsConfig, soft_loss
from distill_cli.objectives.tinymim import relation_divergence
from distill_cli.sparse import top_k

Divergence = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

LOSSES = {
    "cross-entropy": LogitsConfig(),
    "temperature 2": LogitsConfig(temperature=2.0),
    "bucket": LogitsConfig(tail="bucket"),
    "renormalise": LogitsConfig(tail="renormalise"),
    "standardise": LogitsConfig(standardise=True),
    "jsd": LogitsConfig(divergence="jsd"),
    "dkd": LogitsConfig(divergence="dkd"),
    "dist, inter": LogitsConfig(divergence=DISTConfig(intra=0)),
    "dist": LogitsConfig(divergence=DISTConfig()),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--classes", type=int, default=21841)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    given = parser.parse_args()
    shape = given.batch, given.classes, given.k, given.device
    print(f"{'loss':16}{'float32':>9}{'bfloat16':>9}")
    for name, config in LOSSES.items():
        ratios = [loss_ratio(config, *shape, dtype) for dtype in (torch.float32, torch.bfloat16)]
        print(f"{name:16}" + "".join(f"{ratio:9.2f}" for ratio in ratios), flush=True)
    ratios = [dense_ratio(*shape, dtype) for dtype in (torch.float32, torch.bfloat16)]
    print(f"{'dense target':16}" + "".join(f"{ratio:9.2f}" for ratio in ratios))
    print(f"\n{'relation':16}{'float32':>9}{'s':>9}")
    for name, divergence in {"tinymim": relation_divergence, "whole maps": whole_divergence}.items():
        began = time.monotonic()
        ratio = relation_ratio(divergence, 128, 16, 197, given.device)
        print(f"{name:16}{ratio:9.2f}{time.monotonic() - began:9.2f}")


def loss_ratio(
    config: LogitsConfig, batch: int, classes: int, k: int, device: torch.device, dtype: torch.dtype
) -> float:
    """The peak of one loss and its gradient over the bytes of the logits."""
    torch.manual_seed(0)
    rows = top_k(torch.randn(batch, classes), k).to(device)
    labels = torch.randint(classes, (batch,), device=device)
    seen = Batch(images=labels, labels=labels, sample_ids=labels.cpu().numpy(), views=(0,))
    values = torch.randn(batch, classes, dtype=dtype)

    def work() -> None:
        logits = values.to(device, copy=True).requires_grad_()
        soft_loss(logits, rows, config, config.temperature, seen).backward()

    return peak_bytes(work, device) / (values.numel() * values.element_size())


def dense_ratio(batch: int, classes: int, k: int, device: torch.device, dtype: torch.dtype) -> float:
    """The same of a target of batch x classes, as TinyViT's code makes it."""
    torch.manual_seed(0)
    rows = top_k(torch.randn(batch, classes), k).to(device)
    values = torch.randn(batch, classes, dtype=dtype)

    def work() -> None:
        logits = values.to(device, copy=True).requires_grad_()
        rest = rows.log_tail.exp() / (classes - k)
        target = rest.unsqueeze(-1).repeat(1, classes).scatter_(-1, rows.class_id, rows.log_prob.exp())
        torch.sum(-target * F.log_softmax(logits, dim=-1), dim=-1).mean().backward()

    return peak_bytes(work, device) / (values.numel() * values.element_size())


def relation_ratio(divergence: Divergence, batch: int, heads: int, tokens: int, device: torch.device) -> float:
    """The peak of one relation's divergence and its gradient over the bytes of the student's map."""
    torch.manual_seed(0)
    ours, theirs = (torch.randn(2, batch, heads, tokens, dim, device=device) / dim**0.5 for dim in (48, 64))
    query, key = (each.clone().requires_grad_() for each in ours)
    peak = peak_bytes(lambda: divergence(query, key, *theirs).backward(), device)
    return peak / (4 * batch * heads * tokens**2)


def whole_divergence(query: Tensor, key: Tensor, teacher_query: Tensor, teacher_key: Tensor) -> Tensor:
    """The same with whole maps."""
    ours, theirs = ((q @ k.mT).log_softmax(-1) for q, k in ((query, key), (teacher_query, teacher_key)))
    return F.kl_div(ours, theirs, reduction="sum", log_target=True) / ours[..., 0].numel()


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most that `work` has allocated at once, beyond what was there."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    moved = sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in moved))


if __name__ == "__main__":
    main()
