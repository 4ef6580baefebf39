"""The table of backends, in the order in which `backend="auto"` tries them.

A backend is a module of this package with two functions:

    reasons_against(request) -> list[str]     sentences; empty when it can run the request
    run(request) -> (out, lse or None)        out [total_queries, num_heads, value_head_dim]

It is imported by name when it is considered, so none costs anything until then.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

from torch import Tensor

from packed_attn.request import AttentionRequest

BACKENDS = ("triton", "cpu", "reference")


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
    # A dictionary, because a compiler can trace a look-up and cannot trace an import.
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
            return backend
    lines = [f"  {candidate}: {'; '.join(reasons)}" for candidate, reasons in against.items()]
    raise NotImplementedError("no backend can run this:\n" + "\n".join(lines))
