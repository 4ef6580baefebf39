"""The table of backends, in the order in which `backend="auto"` tries them.

A backend is a module of this package with two functions:

    reasons_against(request) -> list[str]     sentences; empty when it can run the request
    run(request) -> (out, lse or None)        out [total_queries, num_heads, value_head_dim]

`packed_attn.attention` imports them all beforehand, because a compiler cannot trace an import. That
costs nothing: a backend imports its own library when it runs.

Our kernels stand first on a GPU: they alone put short documents into one tile, confine NaN and
compile once whatever the boundaries are; of flash-attn the older stands first, which runs on more
GPUs. This is the order of what can run most, not of measured speed. FlashAttention's masks stand
before the CPU and the reference, which runs everything and is slow.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from typing import Protocol, cast

from torch import Tensor

from packed_attn.request import AttentionRequest

BACKENDS = (
    "triton",
    "flash2",
    "flash3",
    "flash4",
    "torch_varlen",
    "flex",
    "cpu",
    "reference",
)


class Backend(Protocol):
    """What a backend module offers."""

    def reasons_against(self, request: AttentionRequest) -> list[str]:
        """Why this backend cannot run the request; empty when it can."""
        ...

    def run(self, request: AttentionRequest) -> tuple[Tensor, Tensor | None]:
        """out `[total_queries, num_heads, value_head_dim]` and, when asked, lse."""
        ...


_LOADED: dict[str, Backend] = {}


def load(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        ValueError: no such backend.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(BACKENDS)}, got {name!r}")
    if name not in _LOADED:
        _LOADED[name] = cast(Backend, import_module(f"packed_attn.backends.{name}"))
    return _LOADED[name]


def select(name: str, request: AttentionRequest) -> Backend:
    """The backend that runs this request: the named one, or the first that can.

    Raises:
        NotImplementedError: the named backend cannot, or none can, with every reason. A named
            backend is never replaced by another.
    """
    if name != "auto":
        backend = load(name)
        reasons = backend.reasons_against(request)
        if reasons:
            raise NotImplementedError(f"backend {name!r} cannot run this: {'; '.join(reasons)}")
        return backend
    against = {}
    for candidate in BACKENDS:
        backend = load(candidate)
        against[candidate] = backend.reasons_against(request)
        if not against[candidate]:
            if candidate == "reference" and request.q.is_cuda:
                del against[candidate]
                _warn_of_the_reference(_listed(against))
            return backend
    raise NotImplementedError("no backend can run this:" + _listed(against))


def _listed(against: dict[str, list[str]]) -> str:
    return "".join(f"\n  {name}: {'; '.join(reasons)}" for name, reasons in against.items())


@cache
def _warn_of_the_reference(listed: str) -> None:
    """Once for the same reasons: a training step would say it in every layer."""
    warnings.warn(
        "packed-attn runs its reference on a GPU: exact, but slow. No other can run this:" + listed,
        RuntimeWarning,
        stacklevel=4,
    )
