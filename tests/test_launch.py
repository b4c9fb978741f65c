"""`--gpus N`: what it takes from the command line, and what it refuses."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distill_cli import launch as module
from distill_cli.errors import DistillError, UsageError
from distill_cli.launch import launch, without_gpus


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["train", "--gpus", "2", "--out", "x"], ["train", "--out", "x"]),
        (["train", "--gpus=2", "--out", "x"], ["train", "--out", "x"]),
        (["train", "--out", "x", "--gpus", "2"], ["train", "--out", "x"]),
        (["train", "--out", "--gpus-of-mine"], ["train", "--out", "--gpus-of-mine"]),
    ],
)
def test_the_option_is_taken_out_and_nothing_else(words: list[str], kept: list[str]) -> None:
    assert without_gpus(words) == kept


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UsageError, match=r"--gpus 2: this machine has 1 CUDA devices; give as many, or --device cpu"):
        launch(2, None, [])
    with pytest.raises(UsageError, match="--gpus 0: give at least 1"):
        launch(0, "cpu", [])


def test_ranks_do_not_start_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="--gpus: this is one of several ranks already"):
        launch(2, "cpu", [])


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where a program in the command's place is written to."""
    path = tmp_path / "program.py"
    popen = subprocess.Popen
    monkeypatch.setattr(
        "subprocess.Popen", lambda command, **options: popen([sys.executable, str(path), *command[3:]], **options)
    )
    return path


def test_each_rank_has_its_place_and_its_share_of_the_cores(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    program.write_text(
        "import os, sys\n"
        "names = 'RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'OMP_NUM_THREADS'\n"
        "open(sys.argv[1] + os.environ['RANK'], 'w').write(' '.join(os.environ[name] for name in names))\n"
    )
    assert launch(2, "cpu", [f"{tmp_path}/rank"]) == 0
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == [
        f"{rank} {rank} 2 127.0.0.1 {threads}" for rank in (0, 1)
    ]


def test_the_code_is_that_of_the_first_rank_that_fails(program: Path) -> None:
    program.write_text(
        "import os, sys, time\ntime.sleep(0.5 * int(os.environ['RANK']))\nsys.exit(3 + int(os.environ['RANK']))\n"
    )
    assert launch(2, "cpu", []) == 3


def test_a_rank_that_is_killed_is_named_and_the_others_are_ended(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE_S", 0.5)
    program.write_text(
        "import os, signal, time\n"
        "if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(600)\n"
    )
    with pytest.raises(DistillError, match=r"rank 1: was killed \(SIGKILL\); run the same command again to go on"):
        launch(2, "cpu", [])


def test_a_signal_reaches_every_rank_once(program: Path, tmp_path: Path) -> None:
    program.write_text(
        "import os, signal, sys, time\n"
        "def note(number, frame):\n"
        "    with open(sys.argv[1], 'a') as file: file.write(f'{number}\\n')\n"
        "    time.sleep(0.3)\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, note)\n"
        "if os.environ['RANK'] == '0':\n"
        "    time.sleep(1)\n"
        "    os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)\n"
    )
    before = signal.getsignal(signal.SIGTERM)
    assert launch(2, "cpu", [str(tmp_path / "notes")]) == 143
    assert (tmp_path / "notes").read_text().split() == [str(int(signal.SIGTERM))] * 2
    assert signal.getsignal(signal.SIGTERM) == before
