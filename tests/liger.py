"""Liger's kernels on one model, for tests: what they change in transformers is put back."""

from __future__ import annotations

import sys
from typing import Any, Literal

import pytest
from torch import nn

from packed_attn import patch_model

Order = Literal["patch, liger", "liger, patch"]
ORDERS: tuple[Order, ...] = ("patch, liger", "liger, patch")


def apply_liger(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Trainer's `use_liger_kernel=True` does, until the test ends."""
    keep_modeling(type(model), monkeypatch)
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model)  # type: ignore[arg-type]
    assert "liger_kernel" in model.forward.__func__.__module__, "the loss is not Liger's"


def keep_modeling(model_class: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger replaces functions and classes of a model's module, and forwards of its classes."""
    modeling = sys.modules[model_class.__module__]
    for name, value in list(vars(modeling).items()):
        monkeypatch.setattr(modeling, name, value)
    monkeypatch.setattr(model_class, "forward", model_class.forward)


def interpret_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton's interpreter runs Liger's kernels: numbers given to one become tensors, as a
    compiler makes them, and libdevice is CUDA's."""
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import cross_entropy, fused_moe_kernels, geglu, rms_norm
    from triton.runtime import interpreter
    from triton.runtime.autotuner import Autotuner

    convert = interpreter._implicit_cvt

    def converted(arg: Any) -> Any:
        if not isinstance(arg, float):
            return convert(arg)
        handle = interpreter.TensorHandle(np.array([arg], np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: tl.math.rsqrt(x))
    for module in (cross_entropy, geglu):
        monkeypatch.setattr(module, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)
    for kernel in vars(fused_moe_kernels).values():
        if isinstance(kernel, Autotuner):  # which times its choices, on a GPU
            monkeypatch.setattr(kernel, "configs", kernel.configs[:1])


def both(model: Any, order: Order, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    """Patch and kernels on one model."""
    for step in order.split(", "):
        if step == "patch":
            patch_model(model, **settings)
        else:
            apply_liger(model, monkeypatch)
