"""Tokens that see nothing and tokens that nobody sees, kept from kernels that know neither.

Such kernels attend over padding, and what they leave in a row that sees nothing differs. With these
tokens 0 on the way in and on the way out, outputs and gradients are 0 whatever a kernel does there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from packed_attn.reference import reference_attention
from packed_attn.request import AttentionRequest

# q, k, v -> out [total_queries, num_heads, value_head_dim] and lse [num_heads, total_queries]
Kernel = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


def run_without_hidden(request: AttentionRequest, kernel: Kernel) -> tuple[Tensor, Tensor | None]:
    """Runs `kernel` on q, k and v: out 0, lse -inf and gradients 0 where nothing is seen.

    The kernel is not called for no queries or no keys, which kernels refuse.
    """
    if request.q.shape[0] == 0 or request.k.shape[0] == 0:
        # There is nothing to compute: the reference shapes the zeros.
        out, lse = reference_attention(request)
        return out, lse if request.return_lse else None
    if request.key_layout is None and request.layout.padding is None:
        # In self-attention without padding a token sees itself.
        return kernel(request.q, request.k, request.v)
    visibility = request.visibility()
    blind = visibility.key_start >= visibility.key_stop
    unseen = visibility.query_start >= visibility.query_stop
    q, k, v = _zeroed(request.q, blind), _zeroed(request.k, unseen), _zeroed(request.v, unseen)
    out, lse = kernel(q, k, v)
    return _zeroed(out, blind), None if lse is None else lse.masked_fill(blind, -torch.inf)


def _zeroed(x: Tensor, tokens: Tensor) -> Tensor:
    return x.masked_fill(tokens[:, None, None], 0.0)
