"""What stands on a module of a patched model in place of its forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import CellType, FunctionType
from typing import Any

from torch import nn


def with_names(
    forward: Callable[..., Any], functions: Callable[[FunctionType], Mapping[str, Any]]
) -> Callable[..., Any]:
    """`forward` with other functions under names of its module.

    The function is made anew around the same code: nothing that another model or thread sees is
    changed. Decorators around it are kept.

    Args:
        functions: given the innermost function, those other functions by name.
    """
    inner = getattr(forward, "__wrapped__", None)
    assert isinstance(forward, FunctionType)
    names, closure = forward.__globals__, forward.__closure__
    if inner is None:
        names = {**names, **functions(forward)}
    else:
        bounded = with_names(inner, functions)
        cells = closure or ()
        closure = tuple(CellType(bounded) if c.cell_contents is inner else c for c in cells)
    made = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, closure)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


class ModuleForward:
    """Does something around the forward of the module's class; picklable, and a deepcopy of the
    model holds a copy of it.

    Args:
        module: a part of the model, on which no other package is known to put a forward.
    """

    replaced: None = None

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def function(self) -> Callable[..., Any]:
        """What runs, given the module."""
        return type(self.module).forward

    @property
    def __signature__(self) -> inspect.Signature:
        """Models ask which keyword arguments their layers take."""
        return inspect.signature(self.function.__get__(self.module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError
