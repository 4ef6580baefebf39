"""flash-attn 3 where only its library is at hand: `flash_attn_varlen_func` over its operators.

The library registers `flash_attn_3::fwd` and `flash_attn_3::bwd` with torch. xformers 0.0.34 holds
one in its wheel on PyPI (`xformers/flash_attn_3/_C.so`), which loads into later versions of torch
than that wheel asks for. `FLASH3_LIBRARY` names the file; benchmarks and tests then
find the backend `flash3` as where flash-attn 3 is installed.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import Tensor

VARIABLE = "FLASH3_LIBRARY"
# What both operators take beside tensors of tokens, by its names there.
DOCUMENTS = (
    "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "is_causal",
    "window_size_left", "window_size_right", "softcap",
)  # fmt: skip


def load() -> None:
    """Loads the library that the environment names, if it does, in place of flash-attn 3."""
    if path := os.environ.get(VARIABLE):
        torch.ops.load_library(path)
        sys.modules["flash_attn_interface"] = sys.modules[__name__]


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """out, or (out, lse) with `return_attn_probs`, as `flash_attn_interface` has it.

    Shapes and dtypes as in `flash.Call`; lse `[num_heads, total_queries]` in float32, whose
    gradient is ignored.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out, lse = _forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal,
        *window_size, softcap, deterministic,
    )  # fmt: skip
    return (out, lse) if return_attn_probs else out


@torch.library.custom_op("benchmarks::flash3_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    given = (
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, left, right,
        softcap,
    )  # fmt: skip
    documents = dict(zip(DOCUMENTS, given))
    # The kernels of split documents are for generation, and would be asked for by default.
    out, lse, *_ = torch.ops.flash_attn_3.fwd(q, k, v, **documents, num_splits=1)
    return out, lse


@torch.library.custom_op("benchmarks::flash3_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _empty(q), _empty(k), _empty(v)
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    given = (
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, left, right,
        softcap,
    )  # fmt: skip
    documents = dict(zip(DOCUMENTS, given))
    dq, dk, dv = grads
    torch.ops.flash_attn_3.bwd(
        grad_out, q, k, v, out, lse, dq, dk, dv, **documents, deterministic=deterministic
    )
    return grads


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    tokens, heads, _head_dim = q.shape
    out = q.new_empty(tokens, heads, v.shape[-1])
    return out, q.new_empty(heads, tokens, dtype=torch.float32)


@_backward.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q), _empty(k), _empty(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *numbers = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)
    ctx.numbers = numbers
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_out: Tensor | None, _grad_lse: Tensor | None) -> tuple[Any, ...]:
    numbers = ctx.numbers
    absent = [None] * (2 + len(numbers))
    if grad_out is None:
        return None, None, None, *absent
    grads = _backward(grad_out, *ctx.saved_tensors, *numbers)
    return *grads, *absent


torch.library.register_autograd("benchmarks::flash3_forward", _gradients, setup_context=_save)
