"""For pytest and for ranks: the devices, and a package that runs its reference on them.

Triton compiles for no such device. What it would do is a matter of its own tests; here it is what
stands around attention that must find its tensors on the right device. With TRITON_INTERPRET=1 the
kernels run on them, interpreted, and so do the tests that are meant for a GPU.
"""

from __future__ import annotations

from tests.fake_gpu import install  # before torch

# isort: split
from typing import Any

import torch
from packed_attn_kernels import bookkeeping, rules

from packed_attn import backends, visibility

native = install.native

_backends: Any = backends
_backends._warn_of_the_reference = lambda listed: None
if rules.INTERPRETED:
    from triton.runtime import interpreter

    _launch = interpreter.GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        native.captured(lambda: _launch(self, *args, **kwargs))
        return _launch(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = launch
else:
    bookkeeping.runs_on = lambda device: False
    visibility._runs_kernels = lambda device: False

# A routine of CUDA that counts whole numbers, as transformers' experts ask it to.
_histc = torch.histc


def histc(x: torch.Tensor, *args: Any, **rest: Any) -> torch.Tensor:
    return _histc(x.float(), *args, **rest).to(x.dtype)


torch.histc = histc
