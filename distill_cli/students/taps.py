"""Taps: what the modules inside a model make of its inputs, without a change to the model."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from distill_cli.errors import UsageError, nearest

INPUT = ":input"
"""Behind a module's name: what goes in, not what comes out."""


class Taps:
    """Tensors inside a model, by the names of its modules, as its last forward pass had them.

    taps = Taps(model, ["blocks.8", "head:input"])
    outputs = model(images)
    inside = taps.take()
    """

    def __init__(self, model: nn.Module, names: Sequence[str], stop: bool = False) -> None:
        """
        Args:
            names: of modules, as `named_modules` has them, for their output; with `:input` behind it for their first
                input.
            stop: a forward pass ends once all of them are known; whoever calls the model catches `Enough`.

        Raises:
            UsageError: the model has no such module; the nearest names are given.
        """
        self.names = tuple(dict.fromkeys(names))
        self.stop = stop
        self._found: dict[str, Tensor] = {}
        for name in self.names:
            module = find_module(model, name.removesuffix(INPUT))
            if name.endswith(INPUT):
                module.register_forward_pre_hook(lambda _, inputs, name=name: self._note(name, inputs[0]))
            else:
                module.register_forward_hook(lambda _, inputs, output, name=name: self._note(name, output))

    def take(self) -> Mapping[str, Tensor]:
        """What the last forward pass had; it is kept no longer."""
        found, self._found = self._found, {}
        return found

    def _note(self, name: str, value: Any) -> None:
        self._found[name] = value
        if self.stop and len(self._found) == len(self.names):
            raise Enough


class Enough(Exception):
    """A forward pass has come as far as is needed."""


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
