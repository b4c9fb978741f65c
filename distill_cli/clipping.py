"""Gradient clipping, after all parts of a batch and all ranks have added up."""

from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from distill_cli.objectives import Objective
from distill_cli.optim import TrainConfig
from distill_cli.students.second_head import second_head
from distill_cli.tensors import whole


def clip_gradients(objective: Objective, config: TrainConfig) -> Tensor:
    """Clip the gradients in place; gives their norm before that, over all parameters.

    `norm` bounds that norm, `value` each component, `agc` the norm of each unit's gradient by that of its weights.

    Paper: `agc`: Brock et al. 2021, arXiv:2102.06171, eq. 3; as there, and in timm, not on the classifier.
    """
    trained = [parameter for parameter in objective.parameters() if parameter.grad is not None]
    norm = whole(get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None]))
    if config.clip_grad and config.clip_mode == "norm":
        clip_grads_with_norm_(trained, config.clip_grad, norm)
    elif config.clip_grad:
        heads = _classifier(objective.student) if config.clip_mode == "agc" else set()
        clipped = [parameter for parameter in trained if parameter not in heads]
        dispatch_clip_grad(clipped, config.clip_grad, config.clip_mode)
    return norm


def _classifier(student: nn.Module) -> set[nn.Parameter]:
    """The parameters of a timm model's classifier, or classifiers."""
    found: nn.Module | tuple[nn.Module, ...] = getattr(student, "get_classifier", tuple)()
    heads = found if isinstance(found, tuple) else (found,)
    second = second_head(student)
    heads = heads if second is None else (*heads, second)
    return {parameter for head in heads for parameter in head.parameters()}
