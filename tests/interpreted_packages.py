"""flash-linear-attention and mamba_ssm in triton's interpreter, on the CPU.

`prepare` comes before they are imported, in a process of TRITON_INTERPRET=1. Their kernels and
launches are untouched. What the interpreter lacks is put around them: no clock to tune with, no
CUDA device, plain numbers from a `range` (one kernel asks them for `.to`), and no CUDA code, which
mamba_ssm imports and its Triton kernels do not call.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from triton.runtime import autotuner, interpreter


class _AnyDevice(contextlib.nullcontext[None]):
    def __init__(self, device: Any) -> None:
        super().__init__()


def _range(*bounds: Any) -> Iterator[Any]:
    for x in builtins.range(*map(int, bounds)):
        yield interpreter.interpreter_semantic.to_tensor(x)


def prepare() -> None:
    """Once, before either package is imported."""
    made = autotuner.Autotuner.__init__

    def first(tuner: Any, function: Any, names: Any, configs: Any, *rest: Any, **kw: Any) -> None:
        made(tuner, function, names, configs[:1], *rest, **kw)

    autotuner.Autotuner.__init__ = first
    torch.cuda.device = _AnyDevice  # type: ignore[assignment,misc]
    torch.cuda.get_device_properties = lambda _: SimpleNamespace(multi_processor_count=2)  # type: ignore[assignment,return-value]
    if find_spec("fla") is not None:
        module: Any = importlib.import_module("fla.ops.common.chunk_delta_h")
        module.range = _range
    if find_spec("mamba_ssm") is not None:
        sys.modules.setdefault("selective_scan_cuda", ModuleType("selective_scan_cuda"))
        importlib.import_module("mamba_ssm")
