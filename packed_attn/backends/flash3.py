"""flash-attn 3: `flash_attn_interface.flash_attn_varlen_func`, Hopper's own kernels.

Matched to the `hopper` folder of flash-attn 2.8 and later. Its function answers with lse since it
takes `return_attn_probs`; before, a request for lse is refused. Run on an H100. A build without
softcap (xformers ships one) says so only when it is called, so it is asked once.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from packed_attn.backends import flash, machine
from packed_attn.request import AttentionRequest

MODULE = "flash_attn_interface"
FUNCTION = "flash_attn_varlen_func"


def reasons_against(request: AttentionRequest) -> list[str]:
    """Why flash-attn 3 cannot run the request; empty when it can."""
    reasons = machine.gpu_reasons(request, majors=(9,))
    reasons = reasons or machine.package_reasons(MODULE, "flash-attn 3")
    if not reasons and request.return_lse and not _returns_lse():
        reasons.append("this version of flash-attn 3 does not return lse")
    reasons += flash.shared_reasons(request)
    reasons += flash.modifier_reasons(request, softcap=True)
    reasons += flash.head_dim_reasons(request, one_size=False)
    reasons += flash.grid_reasons(request)
    reasons += _head_dim_reasons(request)
    if not reasons and request.softcap is not None and not _has_softcap(request.q.device):
        reasons.append("this build of flash-attn 3 has no softcap")
    return reasons


def run(request: AttentionRequest) -> tuple[Tensor, Tensor | None]:
    """out `[total_queries, num_heads, value_head_dim]` and lse."""
    return flash.run(request, lambda call: _attend(request, call), "flash3")


def _attend(request: AttentionRequest, call: flash.Call) -> tuple[Tensor, Tensor | None]:
    result = machine.function(MODULE, FUNCTION)(
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
        deterministic=request.deterministic,
        **({"return_attn_probs": True} if request.return_lse else {}),
    )
    return (result[0], result[1]) if request.return_lse else (result, None)


def _returns_lse() -> bool:
    return machine.takes(MODULE, FUNCTION, "return_attn_probs")


@machine.constant
@lru_cache
def _has_softcap(device: torch.device) -> bool:
    """Whether one token can be attended to with a softcap."""
    x = torch.zeros(1, 1, 64, dtype=torch.bfloat16, device=device)
    bounds = torch.tensor([0, 1], dtype=torch.int32, device=device)
    try:
        machine.function(MODULE, FUNCTION)(x, x, x, bounds, bounds, 1, 1, causal=True, softcap=1.0)
    except RuntimeError:
        return False
    return True


def _head_dim_reasons(request: AttentionRequest) -> list[str]:
    head_dim, value_head_dim = request.q.shape[-1], request.v.shape[-1]
    reasons = []
    latent = 128 < head_dim <= 192 and 96 < value_head_dim <= 128
    if value_head_dim != head_dim and not latent:
        reasons.append(
            "value head_dim must be head_dim, or over 96 to 128 beside a head_dim over 128 to 192, "
            f"but they are {value_head_dim} and {head_dim}"
        )
    largest = max(head_dim, value_head_dim)
    if request.deterministic and largest > 192:
        reasons.append(f"its backward is deterministic up to head_dim 192, not {largest}")
    return reasons
