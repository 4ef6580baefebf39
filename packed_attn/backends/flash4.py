"""flash-attn 4: `flash_attn.cute.flash_attn_varlen_func`, kernels for Hopper and Blackwell.

Matched to its `interface.py` of August 2026. Older ones have no gradient of sinks or of lse, which
shows in the parameters of their backward function. Not yet run on a GPU.
"""

from __future__ import annotations

from torch import Tensor

from packed_attn.backends import flash, machine
from packed_attn.request import AttentionRequest

MODULE = "flash_attn.cute.interface"
FUNCTION = "flash_attn_varlen_func"
HOPPER, BLACKWELL = 9, 10
# Head sizes of q and v on Blackwell, beside 8 to 128.
BLACKWELL_PAIRS = ((192, 128), (256, 256))


def reasons_against(request: AttentionRequest) -> list[str]:
    """Why flash-attn 4 cannot run the request; empty when it can."""
    reasons = machine.gpu_reasons(request, majors=(HOPPER, BLACKWELL))
    reasons = reasons or machine.package_reasons(MODULE, "flash-attn-4")
    if not reasons:
        reasons += _version_reasons(request) + _blackwell_reasons(request)
    reasons += flash.shared_reasons(request)
    reasons += flash.modifier_reasons(request, softcap=True, sinks=True)
    return reasons + flash.head_dim_reasons(request, one_size=False)


def run(request: AttentionRequest) -> tuple[Tensor, Tensor | None]:
    """out `[total_queries, num_heads, value_head_dim]` and lse, sinks counted."""
    return flash.run(
        request,
        lambda call: _attend(request, call),
        "flash4",
        lse_has_gradient=_lse_has_gradient(request),
    )


def _attend(request: AttentionRequest, call: flash.Call) -> tuple[Tensor, Tensor | None]:
    left, right = (None if side < 0 else side for side in call.window_size)
    sinks = request.sinks
    out, lse = machine.function(MODULE, FUNCTION)(
        call.q,
        call.k,
        call.v,
        cu_seqlens_q=call.cu_seqlens_q,
        cu_seqlens_k=call.cu_seqlens_k,
        max_seqlen_q=call.max_seqlen_q,
        max_seqlen_k=call.max_seqlen_k,
        softmax_scale=request.softmax_scale,
        causal=request.causal,
        window_size=(left, right),
        learnable_sink=None if sinks is None else sinks.float(),
        softcap=request.softcap or 0.0,
        deterministic=request.deterministic,
        return_lse=request.return_lse,
    )
    return out, lse


def _backward_takes(name: str) -> bool:
    return machine.takes(MODULE, "_flash_attn_bwd", name)


def _lse_has_gradient(request: AttentionRequest) -> bool:
    largest_on_blackwell = request.q.shape[-1] == 256 and _is_blackwell(request)
    return _backward_takes("dlse") and not largest_on_blackwell


def _version_reasons(request: AttentionRequest) -> list[str]:
    if not machine.takes(MODULE, FUNCTION, "return_lse"):
        return ["this version of flash-attn 4 does not return lse: it is older than March 2026"]
    if request.sinks is not None and not _backward_takes("learnable_sink"):
        return ["this version of flash-attn 4 gives no gradient to sinks"]
    return []


def _blackwell_reasons(request: AttentionRequest) -> list[str]:
    if not _is_blackwell(request):
        return []
    pair = request.q.shape[-1], request.v.shape[-1]
    reasons = []
    if max(pair) > 128 and pair not in BLACKWELL_PAIRS:
        reasons.append(
            "on Blackwell head_dim and value head_dim are up to 128, (192, 128) or (256, 256), "
            f"not {pair}"
        )
    if pair[0] == 256:
        for name, value in (("softcap", request.softcap), ("sinks", request.sinks)):
            if value is not None:
                reasons.append(f"on Blackwell has no {name} at head_dim 256")
    return reasons


def _is_blackwell(request: AttentionRequest) -> bool:
    return machine.capability(request.q.device)[0] == BLACKWELL
