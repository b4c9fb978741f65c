"""An exponential moving average of the student's weights, beside it."""

from timm.utils import ModelEmaV3
from torch import nn

from distill_cli.optim import TrainConfig


def build_ema(student: nn.Module, config: TrainConfig) -> ModelEmaV3 | None:
    """timm's average of a student's weights and buffers, or None where the recipe asks for none.

        ema = decay ema + (1 - decay) student    after each step; after the first, ema = student

    Whole numbers, as BatchNorm's count of batches, are copied. With `ema_warmup` the decay of step s, counted from 1,
    is min(ema_decay, 1 - s^(-2/3)): short while the student is young. The average is a model (`.module`) on the
    student's device.
    """
    if not config.ema_decay:
        return None
    ema = ModelEmaV3(student, decay=config.ema_decay, use_warmup=config.ema_warmup)
    ema.requires_grad_(False)
    return ema
