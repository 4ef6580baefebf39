"""What stands on a module of a patched model in place of its forward."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from types import CellType, FunctionType
from typing import Any

import torch
from torch import nn

from packed_attn_patches.boundaries import CU_SEQLENS

# In which torch runs a module's hooks.
_HOOKED_CALL = nn.Module._call_impl.__code__


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
        module: whose forward this is; on a part of a model no other package is known to put one.
    """

    # What stood on the instance in place of its class's forward.
    replaced: Callable[..., Any] | None = None

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def function(self) -> Callable[..., Any]:
        """What runs, given the module."""
        return type(self.module).forward if self.replaced is None else self.replaced

    @property
    def __signature__(self) -> inspect.Signature:
        """Models ask which keyword arguments their layers take."""
        return inspect.signature(self.function.__get__(self.module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


def forward_of(called: Any) -> ModuleForward | None:
    """What the patch has put there, by itself or as a method."""
    found = getattr(called, "__func__", called)
    return found if isinstance(found, ModuleForward) else None


class EntranceForward(ModuleForward):
    """The forward of a model that has the patch's hook: who calls it past the hook is sent there.

    PEFT calls the forward of the model inside for AdaLoRA and X-LoRA, and before 0.21 for all
    adapters. Boundaries would not be read, and rows would run as one document each.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Accelerate's unwrap_model binds it to the model once more.
        args = args[1:] if args and args[0] is self.module else args
        if self._is_past_the_hook(kwargs):
            return self.module(*args, **kwargs)
        return self.entered(*args, **kwargs)

    def entered(self, *args: Any, **kwargs: Any) -> Any:
        """The forward itself, after the hooks."""
        return self.function(self.module, *args, **kwargs)

    def _is_past_the_hook(self, kwargs: Mapping[str, Any]) -> bool:
        if torch.compiler.is_compiling():  # which has no frames: the hook takes these away
            return any(kwargs.get(name) is not None for name in (*CU_SEQLENS, "seq_idx"))
        return not _is_called(self.module)


def _is_called(module: nn.Module) -> bool:
    """Whether a call of the module, which runs its hooks, is under way on this thread."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code is _HOOKED_CALL and frame.f_locals["self"] is module:
            return True
        frame = frame.f_back
    return False
