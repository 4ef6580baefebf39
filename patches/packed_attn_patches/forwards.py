"""What stands on a module of a patched model in place of its forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


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
