"""The specification as a backend: runs everything, one document at a time."""

from __future__ import annotations

from torch import Tensor

from packed_attn.reference import reference_attention
from packed_attn.request import AttentionRequest


def reasons_against(request: AttentionRequest) -> list[str]:
    """The reference runs every request."""
    return []


def run(request: AttentionRequest) -> tuple[Tensor, Tensor | None]:
    """See `packed_attn.reference.reference_attention`."""
    out, lse = reference_attention(request)
    return out, lse if request.return_lse else None
