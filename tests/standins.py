"""Modules that stand in for flash-attn 2, 3 and 4 and torch's varlen attention where none can run.

Each has the signature of the real function, records its arguments, insists on what the real kernel
insists on, and answers with the reference: in documents from `cu_seqlens` alone, padding attended
over as in the real ones, and an lse whose gradient is ignored or not, as in the real one.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from packed_attn import DocumentLayout, attention
from packed_attn.backends import flash3, machine


class Recorder:
    """The arguments of every call, by name, defaults filled in."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            self.calls.append(dict(bound.arguments))
            return function(*args, **kwargs)

        return recorded


def install(name: str, monkeypatch: pytest.MonkeyPatch, major: int = 9) -> Recorder:
    """Puts the stand-in for backend `name` in place, on a CPU that passes for a GPU."""
    monkeypatch.setattr(machine, "gpu_reasons", lambda *_, **__: [])
    monkeypatch.setattr(machine, "capability", lambda _: (major, 0))
    # It would be the first recorded call; what it asks has a test of its own.
    monkeypatch.setattr(flash3, "_has_softcap", lambda _: True)
    recorder = Recorder()
    module, functions = STANDINS[name]
    for function in functions:
        recorded = recorder(function) if "varlen" in function.__name__ else function
        real = module.startswith("torch.")
        target = import_module(module) if real else _module(module, monkeypatch)
        monkeypatch.setattr(target, function.__name__, recorded, raising=False)
    return recorder


def _module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, its parents in place too."""
    parts = name.split(".")
    for n in range(1, len(parts) + 1):
        path = ".".join(parts[:n])
        if not isinstance(sys.modules.get(path), _Standin):
            monkeypatch.setitem(sys.modules, path, _Standin(path))
    return sys.modules[name]


class _Standin(ModuleType):
    pass


def _flash2(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    assert dropout_p == 0.0
    assert block_table is None
    assert alibi_slopes is None or alibi_slopes.dtype == torch.float32
    _check_one_query(cu_seqlens_q, max_seqlen_q, causal, window_size)
    window_size = _bounded(window_size, causal, max_seqlen_k)
    out, lse = _answer(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale, causal, window_size, softcap, slopes=alibi_slopes, blind=torch.inf,
    )  # fmt: skip
    return (out, _ignores_gradient(lse), None) if return_attn_probs else out


def _flash3(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    assert attention_chunk == 0
    out, lse = _answer(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale, causal, window_size, softcap,
    )  # fmt: skip
    return (out, _ignores_gradient(lse)) if return_attn_probs else out


def _flash4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    gather_kv_indices=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    block_sparse_tensors=None,
    aux_tensors=None,
    aux_scalars=None,
    return_lse=False,
    scheduler_metadata=None,
    seqlen_k_per_split=None,
    disable_scheduler_metadata=False,
):
    left, right = window_size
    assert left is None or left >= 0
    assert right is None or right >= 0
    window = (-1 if left is None else left, -1 if right is None else right)
    out, lse = _answer(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale, causal, window, softcap, sinks=learnable_sink,
    )  # fmt: skip
    return out, lse if return_lse else None


def _flash4_backward(q, k, v, out, dout, lse, dlse=None, learnable_sink=None):
    """Never called: its parameters tell the version."""


def _torch(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert type(window_size) is tuple
    causal = window_size == (-1, 0)
    _check_one_query(cu_seq_q, max_q, causal, window_size)
    window_size = _bounded(window_size, causal, max_k)
    out, lse = _answer(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
        scale, causal, window_size, 0.0, blind=torch.inf,
    )  # fmt: skip
    return (out, _ignores_gradient(lse)) if return_aux is not None and return_aux.lse else out


for _function, _name in (
    (_flash2, "flash_attn_varlen_func"),
    (_flash3, "flash_attn_varlen_func"),
    (_flash4, "flash_attn_varlen_func"),
    (_flash4_backward, "_flash_attn_bwd"),
    (_torch, "varlen_attn"),
):
    _function.__name__ = _name

STANDINS: dict[str, tuple[str, tuple[Callable[..., Any], ...]]] = {
    "flash2": ("flash_attn.flash_attn_interface", (_flash2,)),
    "flash3": ("flash_attn_interface", (_flash3,)),
    "flash4": ("flash_attn.cute.interface", (_flash4, _flash4_backward)),
    "torch_varlen": ("torch.nn.attention.varlen", (_torch,)),
}


def _answer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    *,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    blind: float = -torch.inf,
) -> tuple[Tensor, Tensor]:
    """The reference, after the checks of the real kernels. `blind`: lse of rows without a key."""
    for x in (q, k, v):
        assert x.dtype in (torch.bfloat16, torch.float16)
        assert x.shape[0] > 0
        assert x.stride(-1) == 1
    for cu, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
        assert cu.dtype == torch.int32
        assert cu.is_contiguous()
        assert type(longest) is int
        assert longest >= int(cu.diff().max())
    assert all(-1 <= side < 2**31 for side in window_size)
    out, lse = attention(
        q,
        k,
        v,
        DocumentLayout.from_cu_seqlens(cu_seqlens_q),
        key_layout=DocumentLayout.from_cu_seqlens(cu_seqlens_k),
        causal=causal,
        window_size=window_size,
        softmax_scale=softmax_scale,
        softcap=softcap or None,
        alibi_slopes=slopes,
        sinks=sinks,
        backend="reference",
        return_lse=True,
    )
    return out, lse.masked_fill(lse == -torch.inf, blind)


def _check_one_query(
    cu_seqlens_q: Tensor, max_seqlen_q: int, causal: bool, window_size: tuple[int, int]
) -> None:
    """flash-attn 2 folds heads into rows where one query is the most, one for each document."""
    if max_seqlen_q == 1:
        assert int(cu_seqlens_q[-1]) == cu_seqlens_q.numel() - 1


def _bounded(window_size: tuple[int, int], causal: bool, max_seqlen_k: int) -> tuple[int, int]:
    """The window that flash-attn 2 makes of one: sides past the bound on keys are unlimited, and an
    unlimited side beside a limited one is the bound."""
    left, right = window_size[0], 0 if causal else window_size[1]
    left, right = (-1 if side >= max_seqlen_k else side for side in (left, right))
    if left < 0 <= right:
        left = max_seqlen_k
    elif right < 0 <= left:
        right = max_seqlen_k
    return left, right


class _IgnoresGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lse: Tensor) -> Tensor:
        return lse.view_as(lse)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return torch.zeros_like(grads[0])


def _ignores_gradient(lse: Tensor) -> Any:
    return _IgnoresGradient.apply(lse)
