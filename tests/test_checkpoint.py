from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from distill_cli.checkpoint import checkpoint_path, checkpoints, load_checkpoint, snapshot
from distill_cli.ema import build_ema
from distill_cli.errors import DamagedError
from distill_cli.objectives import Setting
from distill_cli.objectives.supervised import Supervised, SupervisedConfig
from distill_cli.optim import OPTIMIZERS, TrainConfig, build_optimizer

MakeOptimizer = Callable[[nn.Module], Optimizer]


def _model(width: int = 5) -> nn.Module:
    """Convolution, batch norm with its buffers, and a layer that no loss reaches."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width * 4, 2))
        model.unused = nn.Linear(2, 2)
    return model


def _adamw(model: nn.Module) -> Optimizer:
    """Two groups, as weight decay wants them."""
    flat = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    rest = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    return AdamW([{"params": rest, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}], lr=0.01)


def _save(
    run: Path, step: int, model: nn.Module, optimizer: Optimizer, state: dict, ema: nn.Module | None = None
) -> Path:
    path = checkpoint_path(run, step)
    path.parent.mkdir(exist_ok=True)
    snapshot(step, model, optimizer, state, ema).write(path)
    return path


def _amsgrad(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=0.01, amsgrad=True)


def _momentum(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.01, momentum=0.9)


def _plain(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.01)


def _train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        images = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad(set_to_none=True)
        model(images).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("make", [_adamw, _amsgrad, _momentum, _plain])
def test_a_continued_training_is_the_same_bitwise(tmp_path: Path, make: MakeOptimizer) -> None:
    whole = _model()
    _train(whole, make(whole), range(3))
    first = _model()
    optimizer = make(first)
    _train(first, optimizer, range(2))
    path = _save(tmp_path, 2, first, optimizer, {})
    second = _model()
    optimizer = make(second)
    _train(second, optimizer, range(7, 8))
    load_checkpoint(path, second, optimizer)
    _train(second, optimizer, range(2, 3))
    assert all(torch.equal(whole.state_dict()[name], tensor) for name, tensor in second.state_dict().items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whatever_optimizer_timm_has_continues_bitwise(tmp_path: Path, name: str) -> None:
    def make(model: nn.Module) -> Optimizer:
        config = TrainConfig(opt=name, lr=0.01)
        return build_optimizer(Supervised(model, SupervisedConfig(), Setting(28)), config)

    test_a_continued_training_is_the_same_bitwise(tmp_path, make)


def test_the_average_comes_back_bitwise_with_the_weights(tmp_path: Path) -> None:
    model, config = _model(), TrainConfig(ema_decay=0.9)
    ema, fresh = build_ema(model, config), build_ema(model, config)
    assert ema is not None
    assert fresh is not None
    _train(model, _adamw(model), range(2))
    ema.update(model, 7)
    path = _save(tmp_path, 2, model, _adamw(model), {}, ema)
    other = _model()
    load_checkpoint(path, other, _adamw(other), fresh)
    for saved, loaded in ((model, other), (ema, fresh)):
        assert all(torch.equal(saved.state_dict()[name], value) for name, value in loaded.state_dict().items())
    assert not torch.equal(model[0].weight, fresh.module[0].weight)


def test_a_checkpoint_without_the_average_is_no_checkpoint_of_a_run_with_one(tmp_path: Path) -> None:
    model = _model()
    path = _save(tmp_path, 2, model, _adamw(model), {})
    with pytest.raises(DamagedError, match="not a readable checkpoint"):
        load_checkpoint(path, model, _adamw(model), build_ema(model, TrainConfig(ema_decay=0.9)))


def test_the_state_comes_back_with_its_step(tmp_path: Path) -> None:
    model, state = _model(), {"images": 12, "train_s": 0.1, "identity": {"data": None, "name": "é"}}
    path = _save(tmp_path, 7, model, _adamw(model), state)
    assert load_checkpoint(path, model, _adamw(model)) == {**state, "step": 7}


def test_a_failed_save_keeps_the_former_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    former = _save(tmp_path, 1, model, _adamw(model), {})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        _save(tmp_path, 2, model, _adamw(model), {})
    assert list((tmp_path / "checkpoints").iterdir()) == [former]


def test_a_new_run_has_no_checkpoints(tmp_path: Path) -> None:
    assert checkpoints(tmp_path) == []


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_checkpoint_cut_short_is_damaged(tmp_path: Path, kept: int) -> None:
    model = _model()
    path = _save(tmp_path, 1, model, _adamw(model), {})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DamagedError, match=r"step-00000001.safetensors: not a readable checkpoint") as caught:
        load_checkpoint(path, model, _adamw(model))
    assert caught.value.exit_code == 4


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    wide = _model(6)
    path = _save(tmp_path, 1, wide, _adamw(wide), {})
    with pytest.raises(DamagedError, match="size mismatch"):
        load_checkpoint(path, _model(5), _adamw(_model(5)))


def _saved(run: Path) -> bytes:
    """The bytes of the checkpoint of a training of two steps."""
    run.mkdir()
    model = _model()
    optimizer = _adamw(model)
    _train(model, optimizer, range(2))
    return _save(run, 2, model, optimizer, {"b": 1, "a": 2}).read_bytes()


def test_equal_trainings_are_equal_bytes_in_every_process(tmp_path: Path, other_process: ProcessPoolExecutor) -> None:
    assert _saved(tmp_path / "here") == other_process.submit(_saved, tmp_path / "there").result()


def test_what_an_optimiser_kept_lies_in_memory_as_its_parameter_does(tmp_path: Path) -> None:
    """A fused kernel reads both by one index; on disk there is one order."""
    models = [nn.Conv2d(4, 3, 3).to(memory_format=torch.channels_last) for _ in range(2)]
    one, other = (torch.optim.AdamW(model.parameters()) for model in models)
    models[0](torch.randn(2, 4, 5, 5)).square().mean().backward()
    one.step()
    snapshot(1, models[0], one, {}).write(tmp_path / "a.safetensors")
    load_checkpoint(tmp_path / "a.safetensors", models[1], other)
    slot = other.state[models[1].weight]["exp_avg"]
    assert (
        slot.stride()
        == models[1].weight.stride()
        != torch.empty_like(slot, memory_format=torch.contiguous_format).stride()
    )
    assert torch.equal(slot, one.state[models[0].weight]["exp_avg"])
