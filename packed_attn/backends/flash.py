"""What the flash-attn backends share: what none of them can do, and how a request is handed over.

Their kernels know documents by `cu_seqlens` and the longest one by a host integer, which the layout
reads once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from packed_attn.backends.hidden import run_without_hidden
from packed_attn.request import AttentionRequest, beyond_intervals

DTYPES = (torch.bfloat16, torch.float16)
# Documents are one dimension of a grid in flash-attn 2 and 3, and CUDA allows no more.
LARGEST_GRID = 65535
# Rows that flash-attn 2 adds to its float32 gradient of q for each document.
ROWS_PER_DOCUMENT = 128
INT32_LIMIT = 2**31


@dataclass(frozen=True)
class Call:
    """A request as flash-attn's varlen functions take it.

    Shapes: q `[total_queries, num_heads, head_dim]`, k `[total_keys, num_kv_heads, head_dim]`,
    v `[total_keys, num_kv_heads, value_head_dim]`, their last dimension contiguous; cu_seqlens
    int32 `[num_documents + 1]`. In `window_size` -1 is unlimited; causal is `(left, 0)`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    window_size: tuple[int, int]


Peer = Callable[[Call], tuple[Tensor, Tensor | None]]


def shared_reasons(request: AttentionRequest) -> list[str]:
    """What no flash-attn kernel does."""
    reasons = []
    if request.q.dtype not in DTYPES:
        reasons.append(f"runs bfloat16 and float16, not {request.q.dtype}")
    if request.layout.is_forest:
        reasons.append("has no forests: a document sees no tokens but its own")
    if request.chunk_size is not None:
        reasons.append("has no chunks (chunk_size) with gradients")
    if request.prefix_lengths is not None:
        reasons.append("has no prefix mask (prefix_lengths)")
    if request.dropout_p > 0.0:
        reasons.append("drops other weights than dropout_seed says")
    if request.confine_nonfinite:
        reasons.append("is not known to keep NaN and Inf in their document (confine_nonfinite)")
    return reasons


def modifier_reasons(
    request: AttentionRequest, *, softcap: bool = False, sinks: bool = False, alibi: bool = False
) -> list[str]:
    """Score modifiers that the request has and a kernel without them does not."""
    reasons = []
    if request.softcap is not None and not softcap:
        reasons.append("has no softcap")
    if request.sinks is not None and not sinks:
        reasons.append("has no sinks")
    if request.alibi_slopes is not None and not alibi:
        reasons.append("has no ALiBi (alibi_slopes)")
    return reasons + beyond_intervals(request)


def head_dim_reasons(request: AttentionRequest, *, one_size: bool) -> list[str]:
    """Head sizes outside 8 to 256 in steps of 8; `one_size`: v's must be q's."""
    head_dim, value_head_dim = request.q.shape[-1], request.v.shape[-1]
    reasons = [
        f"{name} must be a multiple of 8 from 8 to 256, not {dim}"
        for name, dim in (("head_dim", head_dim), ("value head_dim", value_head_dim))
        if dim not in range(8, 257, 8)
    ]
    if one_size and value_head_dim != head_dim:
        reasons.append(
            f"value head_dim must be head_dim, but they are {value_head_dim} and {head_dim}"
        )
    return reasons


def grid_reasons(request: AttentionRequest) -> list[str]:
    """More documents than a CUDA grid has blocks in its second and third dimension."""
    documents = request.layout.num_documents
    if documents <= LARGEST_GRID:
        return []
    return [f"takes at most {LARGEST_GRID} documents, but the layout has {documents}"]


def overflow_reasons(request: AttentionRequest) -> list[str]:
    """Requests whose backward in flash-attn 2 would address past 2^31 elements and fault.

    Refused with gradients or without: checkpointing runs a layer once each way, and both must be
    the same backend.
    """
    head_dim = request.q.shape[-1]
    step = 32 if head_dim <= 128 else 64
    rounded = -(-head_dim // step) * step
    tokens, documents = request.layout.total_tokens, request.layout.num_documents
    elements = (tokens + ROWS_PER_DOCUMENT * documents) * request.num_heads * rounded
    if elements < INT32_LIMIT:
        return []
    return [
        f"its backward faults from 2^31 elements on, and ({tokens} tokens + {ROWS_PER_DOCUMENT} x "
        f"{documents} documents) x {request.num_heads} heads x {rounded} are {elements}"
    ]


def run(
    request: AttentionRequest, peer: Peer, name: str, *, lse_has_gradient: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Hands the request to `peer` and makes its answer ours.

    Args:
        peer: returns out and, where `request.return_lse`, lse `[num_heads, total_queries]`.
        name: of the backend, for messages.
        lse_has_gradient: whether the peer's lse is differentiable. Others ignore the gradient of
            lse, silently; it is computed here, at the cost of one more forward and backward. With
            a softcap it is not, and a loss that uses lse raises NotImplementedError.
    """

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        out, lse = peer(_call(request, q, k, v))
        if lse is None or lse_has_gradient:
            return out, lse
        differentiable = _Lse.apply(lse.detach(), q, k, request, peer, name)
        assert isinstance(differentiable, Tensor)
        return out, differentiable

    return run_without_hidden(request, kernel)


def _call(request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> Call:
    longest_query, longest_key = request.layout.max_seqlen, request.keys.max_seqlen
    left, right = request.window_size
    right = 0 if request.causal else right
    return Call(
        _readable(q),
        _readable(k),
        _readable(v),
        request.layout.cu_seqlens,
        request.keys.cu_seqlens,
        # Where one query is the most, flash-attn 2 takes every document to have one, and an empty
        # document is an error. The bound may be larger than the longest document.
        max(2, longest_query),
        # flash-attn 2 takes a window that reaches this far to the right for none, and an unlimited
        # side beside a limited one for this: wrong where a document has more queries.
        max(longest_query, longest_key),
        # A window that hides nothing is no window, and a wide one would not fit in 32 bits.
        (-1 if left >= longest_key - 1 else left, -1 if right >= longest_query else right),
    )


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _Lse(torch.autograd.Function):
    """lse with its gradient, for kernels that ignore it.

    With P the attention weights and g the gradient of lse, the gradient in the scores is P * g. So
    that in q is scale * g * (P k), one attention with k for v, and that in k is
    scale * P^T (g * q), the gradient in v of that attention where its output has g * q.
    """

    @staticmethod
    def forward(
        ctx, lse: Tensor, q: Tensor, k: Tensor, request: AttentionRequest, peer: Peer, name: str
    ) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.request, ctx.peer, ctx.name = request, peer, name
        return lse.view_as(lse)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        (q, k), request = ctx.saved_tensors, ctx.request
        if request.softcap is not None or request.sinks is not None:
            raise NotImplementedError(
                f"backend {ctx.name!r} gives no gradient to lse with a softcap or sinks: use one "
                "that does (triton, flex, cpu, reference), or a loss without lse"
            )
        rows = request.softmax_scale * grad_outputs[0].t()[..., None]
        with torch.enable_grad():
            values = k.detach().requires_grad_()
            weighted, _ = ctx.peer(_call(request, q.detach(), k.detach(), values))
            (grad_k,) = torch.autograd.grad(weighted, values, (rows * q).to(q.dtype))
        return None, (rows * weighted.detach()).to(q.dtype), grad_k, None, None, None
