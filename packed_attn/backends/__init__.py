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
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

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


def run(name: str, request: AttentionRequest) -> tuple[Tensor, Tensor | None]:
    """out and lse by the backend that `select` gives.

    A backward that is itself to be differentiated raises, but on the reference: some backends would
    leave second derivatives out without a word. Compiled regions refuse it themselves.
    """
    backend = select(name, request)
    out, lse = backend.run(request)
    if backend is not _LOADED.get("reference") and not torch.compiler.is_compiling():
        for x in (out, lse):
            if x is not None and x.requires_grad:
                x.register_hook(_refuse_second_derivatives)
    return out, lse


def select(name: str, request: AttentionRequest) -> Backend:
    """The backend that runs this request: the named one, or the first that can.

    Raises:
        NotImplementedError: the named backend cannot, or none can, with every reason. A named
            backend is never replaced by another.
    """
    if name != "auto":
        backend = load(name)
        reasons = _reasons(backend, request)
        if reasons:
            raise NotImplementedError(f"backend {name!r} cannot run this: {'; '.join(reasons)}")
        return backend
    against = {}
    for candidate in BACKENDS:
        backend = load(candidate)
        against[candidate] = _reasons(backend, request)
        if not against[candidate]:
            if candidate == "reference" and request.q.is_cuda:
                del against[candidate]
                _warn_of_the_reference(_listed(against))
            return backend
    raise NotImplementedError("no backend can run this:" + _listed(against))


def _reasons(backend: Backend, request: AttentionRequest) -> list[str]:
    """The backend's own, and derivatives that the reference alone has: others would fail without
    a name, or give tangents of 0."""
    reasons = backend.reasons_against(request)
    if backend is _LOADED.get("reference") or torch.compiler.is_compiling():
        return reasons
    if torch._C._are_functorch_transforms_active():
        return [*reasons, "runs inside no transform of torch.func (vmap, grad, jvp and others)"]
    inputs = (request.q, request.k, request.v, request.sinks, request.alibi_slopes, request.bias)
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        return [*reasons, "has no forward-mode derivative"]
    return reasons


def _refuse_second_derivatives(gradient: Any) -> None:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "attention has no second derivative (create_graph=True): "
            "use backend='reference', which has"
        )


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
