"""The ranks that do one piece of work together, as torchrun, srun or `--gpus` start them; one process is one rank.

And the signals that end the work: they are noted, and the loop in hand asks at the end of its step.
"""

import contextlib
import os
import re
import signal
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from distill_cli.config import RuntimeConfig
from distill_cli.errors import DistillError, Stopped, UsageError


@dataclass(frozen=True)
class World:
    """This process's place among the ranks, and its device."""

    device: torch.device
    rank: int = 0
    size: int = 1
    workers: int = 0
    """Loader processes of this rank."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the files and talks to the person."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module as DDP, where there are several ranks; one that is in parts is in step already."""
        if self.size == 1 or isinstance(module, FSDPModule):
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids)

    def synced(self, module: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around a forward and a backward pass: only in the last of a step do the ranks add up their gradients."""
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last)
        return contextlib.nullcontext() if last or not isinstance(module, DistributedDataParallel) else module.no_sync()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def largest(self, values: Tensor) -> Tensor:
        """The largest over all ranks, of each value."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def agree(self, number: int) -> int:
        """The largest of the ranks' numbers: one rank's signal stops all of them at the same step."""
        # On the host: nobody waits for a GPU.
        return number if self.size == 1 else int(self.largest(torch.tensor(number)).item())

    def count(self, number: int) -> int:
        """The sum of the ranks' numbers, on the host too."""
        return number if self.size == 1 else int(self.sum(torch.tensor(number)).item())

    def take_statistics(self, module: nn.Module) -> None:
        """Rank 0's of BatchNorm, on all ranks: those that a checkpoint holds."""
        if self.size > 1:
            for buffer in module.buffers():
                if buffer.is_floating_point():
                    dist.broadcast(buffer, 0)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def world(config: RuntimeConfig) -> Iterator[World]:
    """Join the ranks that torchrun started, or be one process alone.

    Raises:
        UsageError: the device is not there.
    """
    rank, size, local_rank = place_among_ranks(os.environ)
    device = find_device(config.device, local_rank)
    cores = len(os.sched_getaffinity(0))
    workers = default_workers(device, cores) if config.workers is None else config.workers
    if device.type == "cpu":
        set_threads(config.threads, cores - workers)
    if size == 1:
        yield World(device, workers=workers)
        return
    timeout = timedelta(seconds=config.timeout_s)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timeout))
    # torchrun keeps its store for the next attempt, whose ranks must not find the addresses of this one's.
    attempt = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=attempt, rank=rank, world_size=size, timeout=timeout)
    try:
        with _one_line_for_lost_ranks():
            yield World(device, rank, size, workers)
    finally:
        dist.destroy_process_group()


def place_among_ranks(environ: MutableMapping[str, str]) -> tuple[int, int, int]:
    """(rank, ranks, rank on this machine), by the environment of torchrun or, where that is not there, of srun.

    What torch needs to find the other ranks is added to the environment of srun.
    """
    if "WORLD_SIZE" in environ:
        return int(environ.get("RANK", 0)), int(environ["WORLD_SIZE"]), int(environ.get("LOCAL_RANK", 0))
    # Of the step, not of the job: a batch script is a single process of a job with many tasks.
    size = int(environ.get("SLURM_STEP_NUM_TASKS", 1))
    if size == 1 or "SLURM_PROCID" not in environ:
        return 0, 1, 0
    environ.setdefault("MASTER_ADDR", first_host(environ["SLURM_STEP_NODELIST"]))
    environ.setdefault("MASTER_PORT", str(20000 + int(environ["SLURM_JOB_ID"]) % 20000))
    return int(environ["SLURM_PROCID"]), size, int(environ.get("SLURM_LOCALID", 0))


def first_host(hosts: str) -> str:
    """The first of SLURM's list of hosts: `gpu[03-07,12],cpu1` -> `gpu03`."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", hosts, count=1).split(",")[0]


@contextlib.contextmanager
def _one_line_for_lost_ranks() -> Iterator[None]:
    """
    Raises:
        DistillError: the others cannot be reached any more; torch's errors for that are of many kinds.
    """
    try:
        yield
    except RuntimeError as error:
        said = " ".join(str(error).split())
        if not isinstance(error, dist.DistError) and not re.search(r"gloo|NCCL|Connection (closed|reset)", said):
            raise
        reason = re.sub(r"^\[[^]]*\] *", "", said).partition(". ")[0][:120]
        raise DistillError(f"another rank is gone ({reason}); run the same command again to go on") from error


def default_workers(device: torch.device, cores: int) -> int:
    """Loader processes where none are asked for: beside a GPU the loader may have every core."""
    return max(1, min(8, cores if device.type == "cuda" else cores // 4))


def set_threads(threads: int | None, free: int) -> None:
    """Give torch the threads asked for, else those of OMP_NUM_THREADS, else the cores that are free."""
    if threads is not None:
        torch.set_num_threads(threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, free))


def find_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that `--device` names: `auto`, `cpu`, `cuda`, `cuda:N`.

    Raises:
        UsageError: it is not one of these, or not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: not a device; give auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: not supported; give auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch finds no CUDA here; give --device cpu, or see distill doctor")
    index = local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices, from cuda:0 on")
    torch.cuda.set_device(index)
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda", index)


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Signals:
    """SIGINT, SIGTERM and SIGUSR1 (SLURM's warning), noted while the block runs; a second one acts at once.

    with Signals() as signals:
        for batch in batches:
            ...
            if signals.received: save, and raise stopped(signals.received, "…")
    """

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> "Signals":
        self._before = {number: signal.getsignal(number) for number in STOPPING}
        for number in self._before:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number


def stopped(number: int, message: str) -> Stopped:
    """The error that ends a command after a signal."""
    return Stopped(f"{signal.Signals(number).name}: {message}", number)
