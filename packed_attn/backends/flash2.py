"""flash-attn 2: `flash_attn.flash_attn_varlen_func`. Matched to the signature of 2.8.

Not yet run on a GPU.
"""

from __future__ import annotations

from torch import Tensor

from packed_attn.backends import flash, machine
from packed_attn.request import AttentionRequest

MODULE = "flash_attn.flash_attn_interface"


def reasons_against(request: AttentionRequest) -> list[str]:
    """Why flash-attn 2 cannot run the request; empty when it can."""
    reasons = machine.gpu_reasons(request) or machine.package_reasons(MODULE, "flash-attn")
    reasons += flash.shared_reasons(request)
    reasons += flash.modifier_reasons(request, softcap=True, alibi=True)
    reasons += flash.head_dim_reasons(request, one_size=True)
    reasons += flash.grid_reasons(request)
    reasons += flash.overflow_reasons(request)
    if request.alibi_slopes is not None:
        if request.alibi_slopes.requires_grad:
            reasons.append("gives no gradient to alibi_slopes")
        if request.return_lse:
            # Under a causal mask its kernel leaves out the part of the bias that a row shares.
            reasons.append("its lse is shifted with alibi_slopes")
    return reasons


def run(request: AttentionRequest) -> tuple[Tensor, Tensor | None]:
    """out `[total_queries, num_heads, head_dim]` and lse."""
    return flash.run(request, lambda call: _attend(request, call), "flash2")


def _attend(request: AttentionRequest, call: flash.Call) -> tuple[Tensor, Tensor | None]:
    slopes = request.alibi_slopes
    result = machine.function(MODULE, "flash_attn_varlen_func")(
        call.q,
        call.k,
        call.v,
        cu_seqlens_q=call.cu_seqlens_q,
        cu_seqlens_k=call.cu_seqlens_k,
        max_seqlen_q=call.max_seqlen_q,
        max_seqlen_k=call.max_seqlen_k,
        softmax_scale=request.softmax_scale,
        causal=request.causal,
        window_size=call.window_size,
        softcap=request.softcap or 0.0,
        alibi_slopes=None if slopes is None else slopes.float(),
        deterministic=request.deterministic,
        return_attn_probs=request.return_lse,
    )
    return (result[0], result[1]) if request.return_lse else (result, None)
