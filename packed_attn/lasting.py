"""Tensors that are made once and serve later calls, whatever call made them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

_Made = TypeVar("_Made")


def lasting(make: Callable[[], _Made]) -> _Made:
    """What `make` gives, of tensors that a later call may use in any mode.

    Those made in inference mode could never be saved for a backward, and those made inside a
    transform of torch.func belong to it.
    """
    if torch.compiler.is_compiling() or not (
        torch.is_inference_mode_enabled() or torch._C._are_functorch_transforms_active()
    ):
        return make()
    with torch.inference_mode(False), temporarily_clear_interpreter_stack():
        return make()
