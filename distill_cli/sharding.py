"""FSDP2: weights, gradients and optimiser of a student in parts, one on each rank, each block whole while it works.

A file holds whole tensors, so a run may go on on another number of ranks, or without any of this.
"""

from collections.abc import Callable, Iterable, Iterator

from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from distill_cli.data.batch import Batch
from distill_cli.distributed import World
from distill_cli.errors import UsageError
from distill_cli.objectives import Objective
from distill_cli.recipe import Recipe

OPTIMIZERS = ("adamw", "adam", "sgd", "momentum", "lion")
"""That treat each component by itself. Others need a tensor's norm, as LAMB, or the whole matrix, as Muon."""


def check_sharding(recipe: Recipe) -> None:
    """
    Raises:
        UsageError: something looks at whole tensors, of which a rank has a part, or at a student as one graph.
    """
    if recipe.train.opt not in OPTIMIZERS:
        raise UsageError(
            f"runtime.fsdp: {recipe.train.opt} looks at whole tensors; "
            f"take one of {', '.join(OPTIMIZERS)}, or leave it out"
        )
    if recipe.train.clip_mode == "agc":
        raise UsageError("runtime.fsdp: clip_mode agc looks at whole tensors; give norm or value, or leave it out")
    if recipe.runtime.compile:
        raise UsageError(
            "runtime.fsdp: gathers weights between graphs, which is not compiled here; leave one of them out"
        )
    if recipe.runtime.channels_last is True:
        raise UsageError("runtime.fsdp: takes no weights that lie channels last; leave out runtime.channels_last")


def shard(objective: Objective, ema: ModelEmaV3 | None, world: World) -> None:
    """Deal the parameters of an objective, and of the average of its student, to the ranks, in place.

    The blocks of the student, as timm names them, are each a unit that is gathered before and freed after its work; the
    rest of the objective is one, which stays from forward to backward. A student without any is one unit.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    roots: list[tuple[nn.Module, nn.Module]] = [(objective, objective.student)]
    if ema is not None:
        roots.append((ema.module, ema.module))
    for root, student in roots:
        for block in blocks(student):
            fully_shard(block, mesh=mesh)
        fully_shard(root, mesh=mesh)
    # A forward pass of all ranks has to begin at the root.
    register_fsdp_forward_method(objective, "evaluated")
    if ema is not None:
        # foreach takes either parts or whole tensors, and buffers are whole.
        ema.foreach = False


def blocks(student: nn.Module) -> list[nn.Module]:
    """What stands in a student's lists called `blocks`, wherever they are."""
    found: list[nn.Module] = []
    for name, module in student.named_modules():
        if name.rpartition(".")[2] == "blocks" and isinstance(module, nn.Sequential | nn.ModuleList):
            found += [each for each in module if any(True for _ in each.parameters())]
    return found


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def in_step(batches: Iterable[Batch], passes: int, look: Callable[[], object]) -> Iterator[Batch]:
    """The batches of an evaluation, and as many passes of the model on every rank: a pass gathers its blocks from all.

    Args:
        passes: the most batches that a rank has.
        look: a pass of the model, of anything.
    """
    made = 0
    for batch in batches:
        if len(batch) == 0:
            look()
        made += 1
        yield batch
    for _ in range(passes - made):
        look()
