"""Softmax attention of one batch, forward and backward: torch's fused CPU kernel, or written out.

The fused kernel is the faster; products written out also take a softcap, dropout, and give the
gradient of ALiBi slopes. Both get rows `[batch, length, heads, dim]` of float32 or float64, and
recompute the weights from lse in the backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from packed_attn.dropout import keep

# Scores held at once where products are written out, a call's smallest piece aside: more leave the
# cache. Measured on an AVX2 core.
SCORE_ELEMENTS = 2**18
# Columns added to head_dim where lse has a gradient: one is used, eight keep rows aligned.
FOLD_WIDTH = 8

_fused_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True, eq=False)
class Dropout:
    """What `packed_attn.dropout.keep` needs: seed int64 `[1]`, and the tokens of queries
    `[batch, n]` and of keys `[batch, m]`."""

    seed: Tensor
    p: float
    queries: Tensor
    keys: Tensor

    def factor(self, heads: Tensor, dtype: torch.dtype) -> Tensor:
        """What multiplies the weights, `[batch, *heads.shape, n, m]`."""
        ones = [1] * heads.ndim
        i = self.queries.view(-1, *ones, self.queries.shape[1], 1)
        j = self.keys.view(-1, *ones, 1, self.keys.shape[1])
        kept = keep(self.seed, i, j, heads[..., None, None], self.p)
        return kept.to(dtype).div_(1.0 - self.p)


@dataclass(frozen=True, eq=False)
class Scores:
    """How scores follow from products.

    Attributes:
        mask: added to the scores, `[batch or 1, heads or 1, n, m]`, or None.
        is_causal: mask above the diagonal, in place of `mask`.
        blind: bool `[batch or 1, n]`, rows that see nothing, or None without any.
        distance: `[batch or 1, n, m]`, |i - j|, where the slopes of ALiBi have a gradient.
    """

    softmax_scale: float
    softcap: float | None
    mask: Tensor | None
    is_causal: bool
    blind: Tensor | None
    dropout: Dropout | None
    distance: Tensor | None


@dataclass(frozen=True, eq=False)
class Gradients:
    """Rows as the inputs are; slopes `[heads]` or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    slopes: Tensor | None = None


def fused_forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """out `[batch, n, heads, value_head_dim]` and lse `[batch, n, heads]`."""
    group, width = q.shape[2] // k.shape[2], max(q.shape[-1], v.shape[-1])
    out, lse = _fused_forward(
        _operand(q, width),
        _operand(k, width, group),
        _operand(v, width, group),
        is_causal=scores.is_causal,
        attn_mask=scores.mask,
        scale=scores.softmax_scale,
    )
    if scores.blind is not None:
        lse = lse.masked_fill(scores.blind[:, None], -torch.inf)
    return out.transpose(1, 2)[..., : v.shape[-1]], lse.transpose(1, 2)


def fused_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scores: Scores,
) -> Gradients:
    """Gradients of `fused_forward`. `out` and `lse` may count keys of other calls too.

    The kernel computes dS = P * (grad_out @ V^T - rowsum(grad_out * out)), and lse adds
    P * grad_lse. One more column, 1 in grad_out, -grad_lse in out and 0 in V, does just that.
    """
    group, width = q.shape[2] // k.shape[2], max(q.shape[-1], v.shape[-1])
    if grad_lse is not None:
        width += FOLD_WIDTH
        grad_out, out = (F.pad(x, (0, width - x.shape[-1])) for x in (grad_out, out))
        grad_out[..., -1] = 1.0
        out[..., -1] = -grad_lse
    dq, dk, dv = _fused_backward(
        _operand(grad_out, width),
        _operand(q, width),
        _operand(k, width, group),
        _operand(v, width, group),
        _operand(out, width),
        lse.transpose(1, 2),
        dropout_p=0.0,
        is_causal=scores.is_causal,
        attn_mask=scores.mask,
        scale=scores.softmax_scale,
    )
    return Gradients(_rows(dq, q), _rows(dk, k), _rows(dv, v))


def _operand(x: Tensor, width: int, group: int = 1) -> Tensor:
    """Rows as torch's kernel takes them: `[batch, heads * group, length, width]`.

    The kernel wants one head_dim for q, k and v, so columns of zeros make up for what is missing,
    and as many heads of k and v as of q: expanding them costs less than a call per group member.
    """
    if x.shape[-1] < width:
        x = F.pad(x, (0, width - x.shape[-1]))
    elif x.stride(-1) != 1:
        x = x.contiguous()
    return (x if group == 1 else x.repeat_interleave(group, dim=2)).transpose(1, 2)


def _rows(gradient: Tensor, like: Tensor) -> Tensor:
    """Back to rows: columns of zeros are dropped, and groups of heads summed."""
    rows = gradient.transpose(1, 2)[..., : like.shape[-1]]
    return rows if rows.shape[2] == like.shape[2] else rows.unflatten(2, (like.shape[2], -1)).sum(3)


def written_forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """`fused_forward` in products written out, a few heads of k and v at a time."""
    batch, n, heads, _ = q.shape
    out = q.new_empty(batch, n, heads, v.shape[-1])
    lse = q.new_empty(batch, n, heads)
    for piece in _pieces(q, k):
        weights, _ = _capped(piece.queries(q), piece.keys(k), scores, piece)
        largest = weights.amax(-1, keepdim=True)
        largest.masked_fill_(largest == -torch.inf, 0.0)
        weights.sub_(largest).exp_()
        total = weights.sum(-1, keepdim=True)
        if scores.dropout is not None:
            weights.mul_(piece.dropout(scores.dropout, weights.dtype))
        rows = torch.bmm(weights, piece.keys(v)).div_(total.masked_fill(total == 0.0, 1.0))
        piece.write(out, rows)
        piece.write(lse[..., None], largest + total.log())
    return out, lse


def written_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scores: Scores,
) -> Gradients:
    """`fused_backward` in products written out, the gradient of the slopes too."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    slopes = None if scores.distance is None else q.new_zeros(q.shape[2])
    delta = (grad_out * out).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    for piece in _pieces(q, k):
        rows_q, rows_k = piece.queries(q), piece.keys(k)
        rows_grad = piece.queries(grad_out)
        weights, tanh = _capped(rows_q, rows_k, scores, piece)
        weights.sub_(piece.queries(lse[..., None])).exp_()
        grad_weights = torch.bmm(rows_grad, piece.keys(v).transpose(1, 2))
        dropped = weights
        if scores.dropout is not None:
            factor = piece.dropout(scores.dropout, weights.dtype)
            grad_weights.mul_(factor)
            dropped = weights * factor
        piece.write_keys(dv, torch.bmm(dropped.transpose(1, 2), rows_grad))
        grad_scores = grad_weights.sub_(piece.queries(delta[..., None])).mul_(weights)
        if slopes is not None:
            assert scores.distance is not None
            by_head = piece.by_head(grad_scores) * scores.distance[:, None]
            slopes[piece.query_heads] = -by_head.sum((0, 2, 3))
        if tanh is not None:
            grad_scores.mul_(tanh.square_().neg_().add_(1.0))
        grad_scores.mul_(scores.softmax_scale)
        piece.write(dq, torch.bmm(grad_scores, rows_k))
        piece.write_keys(dk, torch.bmm(grad_scores.transpose(1, 2), rows_q))
    return Gradients(dq, dk, dv, slopes)


def _capped(
    rows_q: Tensor, rows_k: Tensor, scores: Scores, piece: _Piece
) -> tuple[Tensor, Tensor | None]:
    """Scores with softcap and mask, `[batch * kv_heads, group * n, m]`, and the tanh of the cap."""
    products, tanh = torch.bmm(rows_q, rows_k.transpose(1, 2)), None
    if scores.softcap is None:
        products.mul_(scores.softmax_scale)
    else:
        tanh = products.mul_(scores.softmax_scale / scores.softcap).tanh_()
        products = tanh * scores.softcap
    if scores.mask is not None:
        by_head = piece.by_head(products)
        by_head.add_(scores.mask[:, piece.query_heads] if scores.mask.shape[1] > 1 else scores.mask)
    return products, tanh


@dataclass(frozen=True)
class _Piece:
    """Some heads of k and v with the query heads of their group, as a batch of products."""

    batch: int
    group: int
    first: int
    stop: int

    @property
    def query_heads(self) -> slice:
        return slice(self.first * self.group, self.stop * self.group)

    def queries(self, x: Tensor) -> Tensor:
        """`[batch, n, heads, dim]` -> `[batch * kv_heads, group * n, dim]`."""
        rows = x[:, :, self.query_heads].unflatten(2, (-1, self.group))
        return rows.permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(0, 1)

    def keys(self, x: Tensor) -> Tensor:
        """`[batch, m, kv_heads, dim]` -> `[batch * kv_heads, m, dim]`."""
        return x[:, :, self.first : self.stop].transpose(1, 2).flatten(0, 1)

    def by_head(self, x: Tensor) -> Tensor:
        """`[batch * kv_heads, group * n, m]` as `[batch, heads, n, m]`, a view."""
        return x.view(self.batch, (self.stop - self.first) * self.group, -1, x.shape[-1])

    def write(self, x: Tensor, rows: Tensor) -> None:
        x[:, :, self.query_heads] = self.by_head(rows).transpose(1, 2)

    def write_keys(self, x: Tensor, rows: Tensor) -> None:
        x[:, :, self.first : self.stop] = rows.unflatten(0, (self.batch, -1)).transpose(1, 2)

    def dropout(self, dropout: Dropout, dtype: torch.dtype) -> Tensor:
        """The factors of the weights, in their shape."""
        heads = torch.arange(self.query_heads.start, self.query_heads.stop)
        factor = dropout.factor(heads, dtype)
        kv_heads = self.stop - self.first
        return factor.unflatten(1, (kv_heads, self.group)).flatten(2, 3).flatten(0, 1)


def _pieces(q: Tensor, k: Tensor) -> list[_Piece]:
    """Heads of k and v in pieces of about SCORE_ELEMENTS scores, one head at least."""
    (batch, n, heads, _), kv_heads = q.shape, k.shape[2]
    group = heads // kv_heads
    step = max(1, SCORE_ELEMENTS // max(1, batch * group * n * k.shape[1]))
    return [
        _Piece(batch, group, first, min(first + step, kv_heads))
        for first in range(0, kv_heads, step)
    ]
