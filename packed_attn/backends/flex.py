"""FlexAttention: torch's compiled attention, with the mask rule as its block mask.

The block mask is made from the intervals, tile by tile and never token by token, once for each kind
of mask, and is kept in the layout. Its shapes depend on total_tokens alone, so boundaries may
change without a recompilation. Key sets (key_indices) belong to one call: their block mask is made
for it, and a pair of tokens is looked up in the query's sorted set. It has run on an H100 and an
H200, but its conformance has not; on the CPU torch has no backward for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from packed_attn.backends import machine
from packed_attn.backends.hidden import run_without_hidden
from packed_attn.request import AttentionRequest
from packed_attn.visibility import Visibility

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = range(16, 257)
BLOCK = 128
INT32_LIMIT = 2**31


def reasons_against(request: AttentionRequest) -> list[str]:
    """Why FlexAttention cannot run the request; empty when it can."""
    reasons = machine.gpu_reasons(request)
    if request.q.dtype not in DTYPES:
        reasons.append(f"runs bfloat16, float16 and float32, not {request.q.dtype}")
    for name, x in (("head_dim", request.q), ("value head_dim", request.v)):
        if x.shape[-1] not in HEAD_DIMS:
            reasons.append(f"{name} must be from 16 to 256, not {x.shape[-1]}")
    # Measured: past it the last documents' gradients are wrong, and nothing is raised.
    largest = request.q.shape[0] * request.num_heads * max(request.q.shape[-1], request.v.shape[-1])
    if largest >= INT32_LIMIT:
        reasons.append(f"its gradients are wrong from 2^31 elements on, and q or out has {largest}")
    if request.dropout_p > 0.0:
        reasons.append("has no dropout")
    for name, learned in (("alibi_slopes", request.alibi_slopes), ("bias", request.bias)):
        if learned is not None and learned.requires_grad:
            reasons.append(f"gives no gradient to {name}")
    if request.confine_nonfinite:
        reasons.append(
            "does not keep NaN and Inf in their document: a zero weight does not stop a NaN "
            "in a tile that two documents share (confine_nonfinite)"
        )
    return reasons


def run(request: AttentionRequest) -> tuple[Tensor, Tensor | None]:
    """out `[total_queries, num_heads, value_head_dim]` and lse `[num_heads, total_queries]`."""
    return run_without_hidden(request, lambda q, k, v: _attend(request, q, k, v))


def _attend(
    request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor | None]:
    wants_lse = request.return_lse or request.sinks is not None
    result = _flex()(
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        score_mod=_score_mod(request),
        block_mask=_block_mask(request),
        scale=request.softmax_scale,
        enable_gqa=request.num_heads != request.num_kv_heads,
        return_aux=AuxRequest(lse=True) if wants_lse else None,
    )
    if not wants_lse:
        return result[0].transpose(0, 1), None
    out, lse = result[0][0].transpose(0, 1), result[1].lse[0]
    if request.sinks is not None:
        out, lse = _with_sinks(out, lse, request.sinks)
    return out, lse if request.return_lse else None


def block_mask(
    visibility: Visibility, block: int = BLOCK, key_indices: Tensor | None = None
) -> BlockMask:
    """The mask rule as FlexAttention takes it: which tiles hold something, which are full, and
    the rule itself for tiles that are neither.

    Costs `total_tokens + (total_tokens / block)^2`. Where both halves of the rule decide (a forest
    with a window), a tile in which each half shows something counts as holding something, though
    their common part may be empty: the rule then hides all of it. With key sets, no tile counts as
    full.

    Args:
        key_indices: `[total_queries, num_selected]`, as in `attention`.
    """
    queries, keys = visibility.key_start.numel(), visibility.query_start.numel()
    touched, full = _tiles(visibility.key_start, visibility.key_stop, keys, block)
    if visibility.halves != "either":
        by_key = _tiles(visibility.query_start, visibility.query_stop, queries, block)
        touched, full = touched & by_key[0].t(), full & by_key[1].t()
    mask_mod = _mask_mod(visibility)
    if key_indices is not None:
        touched, full = touched & _named_tiles(key_indices, keys, block), torch.zeros_like(full)
        mask_mod = _among(mask_mod, key_indices)
    return BlockMask.from_kv_blocks(
        *_ordered(touched & ~full),
        *_ordered(full),
        BLOCK_SIZE=block,
        mask_mod=mask_mod,
        seq_lengths=(queries, keys),
    )


def _tiles(start: Tensor, stop: Tensor, columns: int, block: int) -> tuple[Tensor, Tensor]:
    """Which tiles an interval touches, and which all rows of a tile cover: bool
    `[rows / block, columns / block]`, rounded up.

    Each row adds 1 where its run of tiles begins and takes it off where the run ends; a sum along
    the tiles then counts rows.
    """
    rows = start.numel()
    tiles = -(-rows // block), -(-columns // block)
    start, stop = start.long(), stop.long()
    empty = start >= stop
    row_tile = torch.arange(rows, device=start.device) // block

    def count(first: Tensor, last: Tensor) -> Tensor:
        last = torch.where(empty, first, torch.maximum(first, last))
        steps = torch.zeros(tiles[0] * (tiles[1] + 1), dtype=torch.int32, device=start.device)
        one = torch.ones_like(row_tile, dtype=torch.int32)
        steps.index_add_(0, row_tile * (tiles[1] + 1) + first, one)
        steps.index_add_(0, row_tile * (tiles[1] + 1) + last, -one)
        return steps.view(tiles[0], -1).cumsum(1)[:, :-1]

    touched = count(start // block, -(-stop // block)) > 0
    covered = count(-(-start // block), stop // block) == block
    return touched, covered


def _named_tiles(key_indices: Tensor, keys: int, block: int) -> Tensor:
    """Which tiles hold a key that some query of theirs names: bool `[rows, columns]`."""
    rows, columns = -(-key_indices.shape[0] // block), -(-keys // block)
    row = torch.arange(key_indices.shape[0], device=key_indices.device)[:, None] // block
    outside = (key_indices < 0) | (key_indices >= keys)
    column = (key_indices.long() // block).masked_fill(outside, columns)
    named = torch.zeros(rows, columns + 1, dtype=torch.bool, device=key_indices.device)
    named[row.expand_as(column), column] = True
    return named[:, :columns]


def _among(mask_mod: Callable[..., Tensor], key_indices: Tensor) -> Callable[..., Tensor]:
    """A mask that also asks whether the key is in the query's set, by halving: no T x T bits."""
    ordered = key_indices.sort(dim=1).values
    last = ordered.shape[1] - 1

    def among(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        place = torch.zeros_like(i + j)
        for step in _halvings(last + 1):
            further = (place + step).clamp(max=last)
            place = torch.where(ordered[i, further] <= j, further, place)
        return mask_mod(b, h, i, j) & (ordered[i, place] == j)

    def nothing(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return mask_mod(b, h, i, j) & (i < 0)

    return among if last >= 0 else nothing


def _halvings(size: int) -> list[int]:
    """Steps, powers of two from the largest, whose sums reach every place below `size`."""
    return [1 << bit for bit in reversed(range((size - 1).bit_length()))]


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of tiles the number of true ones, and their columns first: int32 `[1, 1, rows]` and
    `[1, 1, rows, columns]`."""
    order = torch.argsort(tiles.int(), dim=1, descending=True, stable=True)
    return tiles.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


def _mask_mod(visibility: Visibility) -> Callable[..., Tensor]:
    key_start, key_stop = visibility.key_start, visibility.key_stop
    query_start, query_stop = visibility.query_start, visibility.query_stop

    def by_query(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (key_start[i] <= j) & (j < key_stop[i])

    def by_both(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return by_query(b, h, i, j) & (query_start[j] <= i) & (i < query_stop[j])

    return by_query if visibility.halves == "either" else by_both


def _score_mod(request: AttentionRequest) -> Callable[..., Tensor] | None:
    softcap, slopes, bias = request.softcap, request.alibi_slopes, request.bias
    if slopes is None and bias is None:
        if softcap is None:
            return None

        def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return softcap * torch.tanh(score / softcap)

        return capped
    visibility = request.visibility()
    query_place, key_place = visibility.query_position, visibility.key_position

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        difference = key_place[j] - query_place[i]
        if slopes is not None:
            score = score - slopes[h] * difference.abs()
        if bias is not None:
            reach = bias.shape[1] // 2
            score = score + bias[h, difference.clamp(-reach, reach) + reach]
        return score

    return biased


def _block_mask(request: AttentionRequest) -> BlockMask:
    visibility = request.visibility()
    if request.key_indices is not None:
        return block_mask(visibility, key_indices=request.key_indices)
    return visibility.once("flex", lambda: block_mask(visibility))


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """A sink is one more logit with the value 0: it shrinks out and adds to lse."""
    # Rows that see nothing take no part: a sink of -inf, one turned off, would make them NaN.
    sink, blind = sinks.to(lse.dtype)[:, None], lse == -torch.inf
    finite = lse.masked_fill(blind, 0.0)
    kept = torch.sigmoid(finite - sink).masked_fill(blind, 0.0)
    with_sink = torch.logaddexp(finite, sink).masked_fill(blind, -torch.inf)
    return (out * kept.t()[..., None]).to(out.dtype), with_sink


def _flex() -> Callable[..., Any]:
    return flex_attention if torch.compiler.is_compiling() else _compiled()


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)
