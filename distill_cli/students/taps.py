"""Taps: what the modules inside a model make of its inputs, without a change to the model."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distill_cli.errors import UsageError, nearest

INPUT = ":input"
"""Behind a module's name: what goes in, not what comes out."""


class Taps:
    """Tensors inside a model, by the names of its modules, as its last forward pass had them.

    taps = Taps(model, ["blocks.8", "head:input"])
    outputs = model(images)
    inside = taps.take()
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], stop: bool = False, only_in_training: bool = False
    ) -> None:
        """
        Args:
            names: of modules, as `named_modules` has them, for their output; with `:input` behind it for their first
                input.
            stop: a forward pass ends once all of them are known; whoever calls the model catches `Enough`.
            only_in_training: passes of the model in evaluation leave no tensors here.

        Raises:
            UsageError: the model has no such module; the nearest names are given.
        """
        self.names = tuple(dict.fromkeys(names))
        self.stop = stop
        self._model, self._only_in_training = model, only_in_training
        self._found: dict[str, Tensor] = {}
        modules = {name: find_module(model, name.removesuffix(INPUT)) for name in self.names}
        self._hooks = [self._hook(module, name) for name, module in modules.items()]

    def take(self) -> Mapping[str, Tensor]:
        """What the last forward pass had; it is kept no longer."""
        found, self._found = self._found, {}
        return found

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, module: nn.Module, name: str) -> RemovableHandle:
        # A copy of the model, as an average of its weights is, has the same hooks: they know whose they are.
        def before(called: nn.Module, inputs: tuple[Any, ...]) -> None:
            if called is module:
                self._note(name, inputs[0])

        def after(called: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if called is module:
                self._note(name, output)

        if name.endswith(INPUT):
            return module.register_forward_pre_hook(before)
        return module.register_forward_hook(after)

    def _note(self, name: str, value: Any) -> None:
        if self._only_in_training and not self._model.training:
            return
        self._found[name] = value
        if self.stop and len(self._found) == len(self.names):
            raise Enough


class Enough(Exception):
    """A forward pass has come as far as is needed."""


@torch.no_grad()
def glimpse(model: nn.Module, names: Sequence[str], images: Tensor) -> Mapping[str, Tensor]:
    """What some layers make of images, by a pass in evaluation that leaves the model as it was.

    Raises:
        UsageError: the model has no such layer, does not use it, or it gives no tensor.
    """
    taps, training = Taps(model, names), model.training
    try:
        model.eval()(images)
    finally:
        model.train(training)
        taps.remove()
    found = taps.take()
    for name in taps.names:
        if not isinstance(found.get(name), Tensor):
            what = "gives no tensor" if name in found else "is in no forward pass"
            raise UsageError(f"{name}: of {type(model).__name__} {what}; name another layer")
    return found


def find_module(model: nn.Module, name: str) -> nn.Module:
    """A module by its name.

    Raises:
        UsageError: there is none of this name; the nearest are given.
    """
    modules = dict(model.named_modules())
    modules.pop("")
    if name not in modules:
        near = nearest(name, modules) or f"; it begins with {', '.join(list(modules)[:4])}"
        raise UsageError(f"{name}: {type(model).__name__} has no such layer{near}")
    return modules[name]
