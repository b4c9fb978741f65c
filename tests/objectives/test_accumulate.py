"""A batch in parts has the gradient of the whole, on one rank and on two."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small import SETTING, make_batch, make_student, part
from torch import Tensor, nn

from distill_cli.accumulate import backward, cut
from distill_cli.data.batch import Batch
from distill_cli.distributed import World
from distill_cli.objectives import Objective, build
from distill_cli.objectives.deit import DeiTConfig
from distill_cli.objectives.supervised import SupervisedConfig

ALONE = World(torch.device("cpu"))
CONFIGS = {"supervised": SupervisedConfig(), "deit-soft": DeiTConfig(distillation="soft", temperature=2.0)}


def gradients(objective: Objective, model: nn.Module, batch: Batch, parts: int, world: World) -> dict[str, Tensor]:
    objective.zero_grad()
    backward(model, batch, parts, world, "fp32")
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("parts", [2, 3, 7, 8, 99])
def test_any_number_of_parts_has_the_gradient_and_the_losses_of_the_whole(case: str, parts: int) -> None:
    objective, batch = build(CONFIGS[case], make_student(), SETTING).train(), make_batch(8)
    whole = gradients(objective, objective, batch, 1, ALONE)
    torch.testing.assert_close(gradients(objective, objective, batch, parts, ALONE), whole, rtol=1e-5, atol=1e-6)
    one, many = (backward(objective, batch, count, ALONE, "fp32") for count in (1, parts))
    torch.testing.assert_close(many.total, one.total)
    torch.testing.assert_close(dict(many.parts), dict(one.parts))


def test_one_part_is_a_plain_backward_pass_bit_for_bit() -> None:
    objective, batch = build(DeiTConfig(), make_student(), SETTING).train(), make_batch(8)
    found = gradients(objective, objective, batch, 1, ALONE)
    objective.zero_grad()
    losses = objective(batch)
    losses.total.backward()
    assert all(torch.equal(found[name], p.grad) for name, p in objective.named_parameters() if p.grad is not None)
    assert torch.equal(backward(objective, batch, 1, ALONE, "fp32").total, losses.total)


@pytest.mark.parametrize(("size", "parts", "sizes"), [(8, 3, [2, 3, 3]), (8, 4, [2] * 4), (2, 5, [1, 1]), (7, 1, [7])])
def test_parts_are_as_even_as_can_be_and_none_is_empty(size: int, parts: int, sizes: list[int]) -> None:
    assert [len(piece) for piece in cut(make_batch(size), parts)] == sizes


@pytest.mark.parametrize("kind", ["fixed", "ragged", "sampled", "mixed"])
def test_the_parts_together_are_the_batch(kind: str) -> None:
    batch = make_batch(7, kind=kind)
    pieces = list(cut(batch, 3))
    for name in ("images", "labels"):
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(batch, name))
    assert [i for piece in pieces for i in piece.sample_ids] == list(batch.sample_ids)
    assert batch.teacher is not None
    for name in ("class_id", "log_prob", "log_tail", "counts"):
        rows = torch.cat([getattr(piece.teacher, name) for piece in pieces])
        assert torch.equal(rows, getattr(batch.teacher, name))


def test_each_sample_of_a_part_keeps_its_view() -> None:
    batch = replace(make_batch(6), views=(3, 5))
    assert batch.each_view.tolist() == [3, 3, 3, 5, 5, 5]
    assert [view for piece in cut(batch, 4) for view in piece.each_view] == [3, 3, 3, 5, 5, 5]


def work_as_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    world = World(torch.device("cpu"), rank, 2)
    objective = build(DeiTConfig(), make_student(), SETTING).train()
    model = world.wrap(objective)
    reductions = 0

    def count(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        nonlocal reductions
        reductions += 1
        return dist.all_reduce(bucket.buffer() / 2, async_op=True).get_future().then(lambda done: done.value()[0])

    model.register_comm_hook(None, count)
    batch = part(make_batch(8), 4 * rank, 4 * rank + 4)
    found = {}
    for parts in (1, 3):
        reductions = 0
        found[parts] = gradients(objective, model, batch, parts, world)
        found[f"reductions-{parts}"] = reductions
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")
def test_two_ranks_add_up_once_and_have_the_gradient_of_one_process(tmp_path: Path) -> None:
    method = "spawn" if torch.cuda.is_available() else "fork"
    torch.multiprocessing.start_processes(work_as_rank, (str(tmp_path),), nprocs=2, start_method=method)
    objective = build(DeiTConfig(), make_student(), SETTING).train()
    alone = gradients(objective, objective, make_batch(8), 1, ALONE)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        for parts in (1, 3):
            torch.testing.assert_close(found[parts], alone, rtol=1e-5, atol=1e-6)
        assert found["reductions-1"] == found["reductions-3"] > 0
