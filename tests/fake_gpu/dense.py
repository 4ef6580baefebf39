"""A backend of torch's operators that reads nothing on the host, as kernels read nothing: a CUDA
graph of the fake device can hold it. By the rule of intervals, over a T x T mask."""

from __future__ import annotations

import torch
from torch import Tensor

from packed_attn.request import AttentionRequest, beyond_intervals


def reasons_against(request: AttentionRequest) -> list[str]:
    return beyond_intervals(request) + (["has no dropout"] if request.dropout_p else [])


def run(request: AttentionRequest) -> tuple[Tensor, Tensor | None]:
    rule = request.visibility()
    q, k, v = (x.float() for x in (request.q, request.k, request.v))
    group = request.num_heads // request.num_kv_heads
    k, v = (x.unsqueeze(2).expand(-1, -1, group, -1).flatten(1, 2) for x in (k, v))
    i = torch.arange(q.shape[0], device=q.device)[:, None]
    j = torch.arange(k.shape[0], device=q.device)[None]
    seen = (rule.key_start[:, None] <= j) & (j < rule.key_stop[:, None])
    if rule.halves != "either":
        seen = seen & (rule.query_start <= i) & (i < rule.query_stop)
    scores = torch.einsum("ihd,jhd->hij", q, k) * request.softmax_scale
    if request.softcap is not None:
        scores = request.softcap * torch.tanh(scores / request.softcap)
    if request.alibi_slopes is not None:
        apart = (rule.query_position[:, None] - rule.key_position[None]).abs()
        scores = scores - request.alibi_slopes.float()[:, None, None] * apart
    scores = scores.masked_fill(~seen, -torch.inf)
    every = scores
    if request.sinks is not None:
        sink = request.sinks.float()[:, None, None].expand(-1, q.shape[0], 1)
        every = torch.cat([scores, sink], dim=-1)
    blind = ~seen.any(dim=-1)
    weights = torch.softmax(every.masked_fill(blind[:, None], 0.0), dim=-1)[..., : k.shape[0]]
    weights = weights.masked_fill(~seen, 0.0)
    out = torch.einsum("hij,jhd->ihd", weights, v).to(request.q.dtype).contiguous()
    lse = torch.logsumexp(every, dim=-1).masked_fill(blind, -torch.inf)
    return out, lse if request.return_lse else None
