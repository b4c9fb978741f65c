import contextlib
import math
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distill_cli.config import RuntimeConfig
from distill_cli.distributed import (
    Signals,
    World,
    _one_line_for_lost_ranks,
    default_workers,
    find_device,
    first_host,
    place_among_ranks,
    set_threads,
    stopped,
    world,
)
from distill_cli.divergence import Guard
from distill_cli.errors import DistillError, UsageError
from distill_cli.history import Window
from distill_cli.objectives import Losses

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_the_work_goes_on(number: signal.Signals) -> None:
    with Signals() as signals:
        assert signals.received == 0
        os.kill(os.getpid(), number)
        assert signals.received == number


def test_the_handlers_of_before_are_back_afterwards() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    with contextlib.suppress(ZeroDivisionError), Signals():
        assert [signal.getsignal(number) for number in numbers] != before
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_acts_at_once(number: signal.Signals) -> None:
    child = os.fork()
    if child == 0:
        with Signals():
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -number


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)])
def test_what_a_signal_ends_exits_as_a_shell_would_have_it(number: int, code: int) -> None:
    error = stopped(number, "runs/a: saved at step 3")
    assert error.exit_code == code
    assert str(error) == f"{signal.Signals(number).name}: runs/a: saved at step 3"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpu", "--device gpu: not a device; give auto, cpu, cuda or cuda:N"),
        ("", "--device : not a device; give auto, cpu, cuda or cuda:N"),
        ("meta", "--device meta: not supported; give auto, cpu, cuda or cuda:N"),
        ("cuda:999", "--device cuda:999: "),
    ],
)
def test_a_device_that_is_not_there_is_refused(name: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_device(name)
    assert str(caught.value).startswith(said)


def test_cuda_is_refused_with_advice_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="torch finds no CUDA here; give --device cpu, or see distill doctor"):
        find_device("cuda")


def test_auto_takes_the_cpu_where_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == CPU


def test_one_process_alone_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with world(RuntimeConfig(device="cpu", workers=3, threads=torch.get_num_threads())) as alone:
        assert alone == World(CPU, rank=0, size=1, workers=3)
        assert not dist.is_initialized()
        assert alone.is_main
        assert alone.agree(signal.SIGTERM) == signal.SIGTERM
        assert alone.sum(torch.tensor([2.0])).tolist() == [2]


@pytest.mark.parametrize(
    ("device", "cores", "workers"), [("cpu", 1, 1), ("cpu", 16, 4), ("cuda", 16, 8), ("cuda", 2, 2)]
)
def test_the_loader_leaves_a_cpu_the_cores_that_it_computes_with(device: str, cores: int, workers: int) -> None:
    assert default_workers(torch.device(device), cores) == workers


@pytest.mark.parametrize(
    ("asked", "omp", "free", "threads"),
    [(2, "1", 7, [2]), (2, None, 7, [2]), (None, "1", 7, []), (None, None, 7, [7]), (None, None, -1, [1])],
)
def test_threads_are_those_asked_for_else_openmps_else_the_cores_that_are_free(
    asked: int | None, omp: str | None, free: int, threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    set_threads(asked, free)
    assert given == threads


def test_a_module_stays_as_it_is_in_a_world_of_one() -> None:
    module = nn.Linear(1, 1)
    assert World(CPU).wrap(module) is module


def work_as_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    here = World(CPU, rank, 2)
    here.barrier()
    found = {
        "is_main": here.is_main,
        "agree": here.agree(signal.SIGTERM if rank else 0),
        "quiet": here.agree(0),
        "sum": here.sum(torch.tensor([1.0, rank], dtype=torch.float64)).tolist(),
        "count": here.count(3 + rank),
        "grants": grants(here, math.inf if rank else 1.0),
        "window": window(here),
        "wrapped": isinstance(here.wrap(nn.Linear(1, 1)), DistributedDataParallel),
    }
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def grants(here: World, loss: float) -> bool:
    """Whether a step whose gradient is finite is made."""
    guard = Guard(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1), here)
    return guard.grants(Losses(torch.tensor(loss), {}), torch.tensor(1.0))


def window(here: World) -> dict[str, float]:
    """Losses 1 and 5 of ranks with 3 and 1 of a step's images, whose gradient has the norm 7."""
    seen = Window(here)
    seen.add(1, Losses(torch.tensor(1.0 + 4 * here.rank), {}), torch.tensor(7.0), 4, 0.0, (3, 1)[here.rank] / 4)
    found = seen.flush()
    return {name: found[name] for name in ("loss", "grad_norm")}


def test_two_ranks_agree_on_a_signal_and_add_up(tmp_path: Path) -> None:
    method = "spawn" if torch.cuda.is_available() else "fork"
    torch.multiprocessing.start_processes(work_as_rank, (str(tmp_path),), nprocs=2, start_method=method)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert [rank.pop("is_main") for rank in ranks] == [True, False]
    assert [rank.pop("window") for rank in ranks] == 2 * [{"loss": 2.0, "grad_norm": 7.0}]
    assert ranks == 2 * [
        {"agree": signal.SIGTERM, "quiet": 0, "sum": [2, 1], "count": 7, "grants": False, "wrapped": True}
    ]


# Who one is.

STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "12345"}


def test_alone_without_torchrun_or_srun() -> None:
    assert place_among_ranks({}) == (0, 1, 0)


def test_a_rank_of_torchrun() -> None:
    assert place_among_ranks({"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1"}) == (5, 8, 1)


def test_a_rank_of_srun_finds_the_others() -> None:
    environ = {**STEP, "SLURM_STEP_NODELIST": "gpu[03-04]"}
    assert place_among_ranks(environ) == (2, 4, 0)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("gpu03", "32345")


def test_torchrun_below_srun_is_torchrun() -> None:
    environ = {**STEP, "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    assert place_among_ranks(environ) == (1, 2, 1)


def test_a_batch_script_of_a_job_with_many_tasks_is_one_process() -> None:
    batch = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "gpu[03-04]"}
    assert place_among_ranks(batch) == (0, 1, 0)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu[03-07,12],cpu1", "gpu03"),
        ("cpu1,gpu[1-2]", "cpu1"),
        ("n[7,9]", "n7"),
        ("a-b[1-2]-c", "a-b1-c"),
    ],
)
def test_the_first_host_of_a_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_a_lost_rank_is_one_line() -> None:
    said = "[/src/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:1. This is typically caused by"
    expected = r"^another rank is gone \(Connection closed by peer .*\); run the same"
    with pytest.raises(DistillError, match=expected), _one_line_for_lost_ranks():
        raise RuntimeError(said)


def test_other_errors_are_not_taken_for_lost_ranks() -> None:
    with pytest.raises(RuntimeError, match="shapes do not match"), _one_line_for_lost_ranks():
        raise RuntimeError("shapes do not match")
