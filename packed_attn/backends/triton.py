"""Our interval kernels in Triton as a backend: CUDA, or any device under TRITON_INTERPRET=1."""

from __future__ import annotations

import os
import sys
from typing import Any, Literal

import torch
from torch import Tensor

from packed_attn.backends import machine
from packed_attn.request import AttentionRequest, beyond_intervals
from packed_attn.visibility import HAS_TRITON, Visibility

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = range(8, 257, 8)
# Before it, triton fails on the kernels' products where they go through tensor memory (B200).
TENSOR_MEMORY_SINCE = (3, 8)


def reasons_against(request: AttentionRequest) -> list[str]:
    """Why the kernels cannot run the request. Imports neither triton nor the kernels."""
    reasons = _machine_reasons(request)
    if request.q.dtype not in DTYPES:
        reasons.append(f"runs bfloat16, float16 and float32, not {request.q.dtype}")
    for name, x in (("head_dim", request.q), ("value head_dim", request.v)):
        if x.shape[-1] not in HEAD_DIMS:
            reasons.append(f"{name} must be a multiple of 8 from 8 to 256, not {x.shape[-1]}")
    if request.alibi_slopes is not None and request.alibi_slopes.requires_grad:
        reasons.append("gives no gradient in alibi_slopes, which requires one")
    return reasons + beyond_intervals(request)


def run(request: AttentionRequest) -> tuple[Tensor, Tensor | None]:
    """See `packed_attn_kernels.interval_attention`."""
    from packed_attn_kernels import interval_attention

    visibility = request.visibility()
    alibi_slopes = request.alibi_slopes
    backward = _backward(request, visibility)
    out, lse = interval_attention(
        request.q,
        request.k,
        request.v,
        visibility.key_start,
        visibility.key_stop,
        visibility.query_start,
        visibility.query_stop,
        softmax_scale=request.softmax_scale,
        softcap=request.softcap,
        sinks=request.sinks,
        alibi_slopes=None if alibi_slopes is None else alibi_slopes.float(),
        positions=(visibility.query_position, visibility.key_position),
        dropout_p=request.dropout_p,
        dropout_seed=request.dropout_seed,
        halves=visibility.halves,
        backward=backward,
        tiles=_tiles(request, visibility, backward),
    )
    return out, lse if request.return_lse else None


def _backward(request: AttentionRequest, visibility: Visibility) -> Literal["split", "fused"]:
    """split gives the same bits every time, in other documents where one has a NaN too; fused is
    taken where it was measured to be faster."""
    from packed_attn_kernels import faster_backward

    asked = request.deterministic or request.confine_nonfinite
    if asked or machine.must_be_deterministic() or _interpreted():
        return "split"
    return faster_backward(
        request.q,
        request.k,
        request.v,
        machine.capability(request.q.device),
        softmax_scale=request.softmax_scale,
        halves=visibility.halves,
        has_softcap=request.softcap is not None,
        has_alibi=request.alibi_slopes is not None,
        has_dropout=request.dropout_p > 0.0,
    )


def _tiles(
    request: AttentionRequest, visibility: Visibility, backward: Literal["split", "fused"]
) -> Any:
    """The lists of tiles, cached with the mask: all layers of its kind share them."""
    from packed_attn_kernels import plan_tiles, tile_problem, tile_rows

    problem = tile_problem(
        request.q, request.k, request.v, halves=visibility.halves, backward=backward
    )
    vectors = (
        visibility.key_start,
        visibility.key_stop,
        visibility.query_start,
        visibility.query_stop,
    )
    key = ("triton tiles", tile_rows(problem))
    return visibility.once(key, lambda: plan_tiles(*vectors, problem))


def _machine_reasons(request: AttentionRequest) -> list[str]:
    if not HAS_TRITON:
        return ["triton is not installed"]
    if _interpreted():
        return []
    if request.q.device.type != "cuda":
        return [
            f"needs a CUDA device, but q is on {request.q.device} "
            "(TRITON_INTERPRET=1, set before triton is imported, interprets the kernels anywhere)"
        ]
    return machine.gpu_reasons(request) or _compiler_reasons(request)


def _compiler_reasons(request: AttentionRequest) -> list[str]:
    version = machine.version("triton")
    if version is None or version >= TENSOR_MEMORY_SINCE or request.q.dtype == torch.float32:
        return []
    if machine.capability(request.q.device)[0] != 10:
        return []
    have, need = (".".join(map(str, v)) for v in (version, TENSOR_MEMORY_SINCE))
    return [
        f"triton {have} fails to compile half precision for compute capability 10.x, {need} does"
    ]


@machine.constant  # a compiler cannot follow it to where it was set
def _interpreted() -> bool:
    """Whether the kernels are interpreted; once they are imported, the environment is too late."""
    kernels = sys.modules.get("packed_attn_kernels.rules")
    if kernels is not None:
        return kernels.INTERPRETED
    return os.environ.get("TRITON_INTERPRET") == "1"
