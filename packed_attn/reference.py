"""The specification of packed attention: one document at a time, in plain torch, float64-able.

Nothing here knows of intervals. Each document gathers the keys it may see and its mask is written
from the positions, so the interval rule and every kernel are tested against something independent.
Autograd gives the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from packed_attn.dropout import keep
from packed_attn.host_values import is_padding
from packed_attn.request import AttentionRequest


def reference_attention(request: AttentionRequest) -> tuple[Tensor, Tensor]:
    """Attention, document by document.

    Returns:
        out `[total_queries, num_heads, value_head_dim]` in q's dtype, and lse
        `[num_heads, total_queries]`, the natural log of the sum of exponentials (a sink counted),
        float32 or float64. Rows that see nothing have out 0 and lse -inf.
    """
    # Autocast would turn the wide products below into half precision.
    with torch.autocast(request.q.device.type, enabled=False):
        parts = [_no_rows(request)]
        for document, length in enumerate(request.layout.lengths):
            if length > 0:
                parts.append(_attend_document(request, document))
    outs, lses = zip(*parts)
    return torch.cat(outs), torch.cat(lses, dim=1)


def _attend_document(request: AttentionRequest, document: int) -> tuple[Tensor, Tensor]:
    """out `[n, heads, dv]` and lse `[heads, n]` of one document's queries."""
    start, length = request.layout.starts[document], request.layout.lengths[document]
    keys = _key_tokens(request, document)
    if is_padding(request.layout, document) or keys.numel() == 0:
        out = request.q.new_zeros(length, request.num_heads, request.v.shape[-1])
        return out, out.new_full((request.num_heads, length), -torch.inf, dtype=_wide(request))
    q = request.q[start : start + length]
    queries = torch.arange(start, start + length, device=q.device)
    visible = _visible(request, document, length, keys.numel())
    if request.key_indices is not None:
        visible &= _selected(request.key_indices[queries], keys, request.k.shape[0])
    factor = _dropout_factor(request, queries, keys)
    return _attend(request, q, request.k[keys], request.v[keys], visible, factor)


def _no_rows(request: AttentionRequest) -> tuple[Tensor, Tensor]:
    """No rows that depend on every input: with nothing to see, gradients are 0 and not None."""
    inputs = (request.q, request.k, request.v, request.sinks, request.alibi_slopes, request.bias)
    nothing = torch.stack([x[:0].sum().to(_wide(request)) for x in inputs if x is not None]).sum()
    out = request.q.new_zeros(0, request.num_heads, request.v.shape[-1]) + nothing.to(
        request.q.dtype
    )
    return out, nothing.expand(request.num_heads, 0)


def _wide(request: AttentionRequest) -> torch.dtype:
    """Half precision accumulates in float32, as every kernel does."""
    return torch.promote_types(request.q.dtype, torch.float32)


def _key_tokens(request: AttentionRequest, document: int) -> Tensor:
    """Stream indices of the keys on the document's path, padding left out."""
    keys = request.keys
    spans = [
        torch.arange(keys.starts[d], keys.starts[d] + keys.lengths[d], device=keys.device)
        for d in keys.path(document)
        if not is_padding(keys, d)
    ]
    return torch.cat(spans) if spans else torch.empty(0, dtype=torch.long, device=keys.device)


def _visible(request: AttentionRequest, document: int, queries: int, keys: int) -> Tensor:
    """The mask of one document from positions, bool `[queries, keys]`; the last query of the
    document stands over its last key."""
    device = request.q.device
    i = torch.arange(queries, device=device)[:, None] + (keys - queries)
    j = torch.arange(keys, device=device)[None, :]
    left, right = request.window_size
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if request.causal:
        visible &= j <= i
    elif right >= 0:
        visible &= j - i <= right
    if request.prefix_lengths is not None:
        visible |= j < int(request.prefix_lengths[document])
    if left >= 0:
        visible &= i - j <= left
    if request.chunk_size is not None:
        visible &= torch.div(i, request.chunk_size, rounding_mode="floor") == torch.div(
            j, request.chunk_size, rounding_mode="floor"
        )
    return visible


def _selected(indices: Tensor, keys: Tensor, total_keys: int) -> Tensor:
    """Whether each query's indices name each key, bool `[queries, keys]`."""
    named = torch.zeros(indices.shape[0], total_keys + 1, dtype=torch.bool, device=indices.device)
    outside = (indices < 0) | (indices >= total_keys)
    named.scatter_(1, indices.long().masked_fill(outside, total_keys), True)
    return named[:, keys]


def _dropout_factor(request: AttentionRequest, queries: Tensor, keys: Tensor) -> Tensor | None:
    """What dropout multiplies the weights of these tokens by, `[heads, queries, keys]`."""
    if request.dropout_seed is None:
        return None
    h = torch.arange(request.num_heads, device=queries.device)[:, None, None]
    p = request.dropout_p
    kept = keep(request.dropout_seed, queries[:, None], keys, h, p)
    return kept.to(_wide(request)) / (1.0 - p)


def _attend(
    request: AttentionRequest,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    dropout_factor: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of one document: out `[n, heads, dv]` and lse `[heads, n]`."""
    group = request.num_heads // request.num_kv_heads
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    wide = _wide(request)
    scores = torch.einsum("ihd,jhd->hij", q.to(wide), k.to(wide)) * request.softmax_scale
    if request.softcap is not None:
        scores = request.softcap * torch.tanh(scores / request.softcap)
    i = torch.arange(q.shape[0], device=q.device)[:, None] + (k.shape[0] - q.shape[0])
    difference = torch.arange(k.shape[0], device=q.device)[None, :] - i
    if request.alibi_slopes is not None:
        scores = scores - request.alibi_slopes.to(wide)[:, None, None] * difference.abs()
    if request.bias is not None:
        reach = request.bias.shape[1] // 2
        scores = scores + request.bias.to(wide)[:, difference.clamp(-reach, reach) + reach]
    scores = scores.masked_fill(~visible, -torch.inf)
    blind = ~visible.any(dim=-1)
    if request.sinks is not None:
        # In a row that sees nothing, a sink of -inf, one turned off, would have a gradient of NaN.
        sink = request.sinks.to(wide)[:, None, None].expand(-1, q.shape[0], 1)
        sink = sink.masked_fill(blind[:, None], 0.0)
        lse = torch.logsumexp(torch.cat([scores, sink], dim=-1), dim=-1)
    else:
        lse = torch.logsumexp(scores, dim=-1)
    # A row that sees nothing has lse -inf, a sink or not; its weights are 0, not exp(-inf - -inf).
    lse = lse.masked_fill(blind, -torch.inf)
    finite = torch.where(lse == -torch.inf, torch.zeros_like(lse), lse)
    weights = torch.exp(scores - finite[..., None])
    if dropout_factor is not None:
        weights = weights * dropout_factor
    # The product is rounded once: a kernel that keeps the weights wide cannot be held to less.
    out = torch.einsum("hij,jhd->ihd", weights, v.to(wide)).to(q.dtype)
    return out, lse
