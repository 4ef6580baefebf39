"""torch's own varlen attention: `torch.nn.attention.varlen.varlen_attn` (flash-attn 2 inside).

Matched to torch 2.12 and 2.13. Grouped queries need its `enable_gqa`, which came with 2.12. Where a
user has activated another flash implementation for all of torch, it is what runs here. Run on an
H100 with torch 2.11.
"""

from __future__ import annotations

import torch
from torch import Tensor

from packed_attn.backends import flash, machine
from packed_attn.request import AttentionRequest

MODULE = "torch.nn.attention.varlen"
FUNCTION = "varlen_attn"


def reasons_against(request: AttentionRequest) -> list[str]:
    """Why torch's varlen attention cannot run the request; empty when it can."""
    reasons = machine.gpu_reasons(request)
    if request.num_heads != request.num_kv_heads and not _takes_groups():
        reasons.append(f"torch {torch.__version__} has no grouped queries in {FUNCTION}")
    if request.deterministic and not torch.are_deterministic_algorithms_enabled():
        reasons.append("is deterministic only under torch.use_deterministic_algorithms(True)")
    reasons += flash.shared_reasons(request)
    reasons += flash.modifier_reasons(request)
    reasons += flash.head_dim_reasons(request, one_size=True)
    reasons += flash.grid_reasons(request)
    return reasons + flash.overflow_reasons(request)


def run(request: AttentionRequest) -> tuple[Tensor, Tensor | None]:
    """out `[total_queries, num_heads, head_dim]` and lse."""
    return flash.run(request, lambda call: _attend(request, call), "torch_varlen")


def _attend(request: AttentionRequest, call: flash.Call) -> tuple[Tensor, Tensor | None]:
    # One window says both: torch takes (-1, 0) for its causal kernel.
    left, right = call.window_size
    result = machine.function(MODULE, FUNCTION)(
        call.q,
        call.k,
        call.v,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        call.max_seqlen_q,
        call.max_seqlen_k,
        scale=request.softmax_scale,
        window_size=(left, 0 if request.causal else right),
        return_aux=_aux() if request.return_lse else None,
        **({"enable_gqa": True} if request.num_heads != request.num_kv_heads else {}),
    )
    return (result[0], result[1]) if request.return_lse else (result, None)


def _aux() -> object:
    return machine.function(MODULE, "AuxRequest")(lse=True)


def _takes_groups() -> bool:
    return machine.takes(MODULE, FUNCTION, "enable_gqa")
