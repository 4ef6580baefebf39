"""Rectangles of documents batched by size over CPU attention, forward and backward.

No mask spans two documents: `rectangles.py` plans which queries and keys are one call, `softmax.py`
computes a call. Outputs and gradients are written into one packed tensor each: under autograd,
slices of q, k and v would each allocate a gradient of full size. Documents share no product, so
what is not finite stays in its document. Where a token is in several calls (a shared prompt, the
keys of a window), results add up in the plan's order: gradients are the same bits from run to run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from packed_attn.buckets import Bucket
from packed_attn.rectangles import Call, Limits, MaskKind, Plan, Span, plan_rectangles
from packed_attn.request import AttentionRequest, beyond_intervals
from packed_attn.softmax import (
    SCORE_ELEMENTS,
    Dropout,
    Scores,
    fused_backward,
    fused_forward,
    written_backward,
    written_forward,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Elements of q (tokens x heads x head_dim) from which documents are read where they lie. Measured
# on two AVX2 cores, as is the next.
VIEW_ELEMENTS = 2**15
# Elements of q in one call: more of them leave the cache, and their buffers come from the
# operating system page by page, which made a backward of short documents up to twice as slow.
CALL_ELEMENTS = 2**18
# Elements of a call's mask, where a long document has that many in 16 rows.
MASK_ELEMENTS = 2**22
# Scores of one call and one head of k and v, likewise.
WRITTEN_ELEMENTS = 4 * SCORE_ELEMENTS


def reasons_against(request: AttentionRequest) -> list[str]:
    """Why this backend cannot run the request; empty when it can."""
    reasons = []
    if request.q.device.type != "cpu":
        reasons.append(f"it computes on the CPU, but q is on {request.q.device}")
    if request.q.dtype not in DTYPES:
        reasons.append(
            f"it computes float32, float64, bfloat16 and float16, but q is {request.q.dtype}"
        )
    return reasons + beyond_intervals(request)


def run(request: AttentionRequest) -> tuple[Tensor, Tensor | None]:
    """out `[total_queries, num_heads, value_head_dim]` and lse `[num_heads, total_queries]`."""
    left, right = request.window_size
    layout, key_layout = request.layout, request.key_layout
    slopes = request.alibi_slopes
    # Autocast would turn the products inside into half precision.
    with torch.autocast("cpu", enabled=False):
        out, lse = cpu_attention(
            request.q,
            request.k,
            request.v,
            request.sinks,
            slopes,
            request.dropout_seed,
            layout.cu_seqlens,
            None if key_layout is None else key_layout.cu_seqlens,
            layout.parents,
            layout.padding,
            None if key_layout is None else key_layout.padding,
            layout.prefix(request.prefix_lengths),
            request.softmax_scale,
            request.softcap,
            left,
            0 if request.causal else right,
            request.chunk_size,
            request.dropout_p,
            slopes is not None and slopes.requires_grad,
        )
    return out, lse if request.return_lse else None


@torch.library.custom_op("packed_attn::cpu_attention", mutates_args=(), device_types="cpu")
def cpu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    dropout_seed: Tensor | None,
    cu_seqlens: Tensor,
    key_cu_seqlens: Tensor | None,
    parents: Tensor | None,
    padding: Tensor | None,
    key_padding: Tensor | None,
    prefix: Tensor | None,
    softmax_scale: float,
    softcap: float | None,
    window_left: int,
    window_right: int,
    chunk_size: int | None,
    dropout_p: float,
    slopes_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Packed attention as one operator: host lengths are read inside, out of a compiler's sight.

    Args:
        q: `[total_queries, num_heads, head_dim]`.
        k, v: `[total_keys, num_kv_heads, head_dim or value_head_dim]`.
        sinks, alibi_slopes: `[num_heads]` or None.
        dropout_seed: int64 `[1]` or None.
        cu_seqlens, key_cu_seqlens: int32 `[num_documents + 1]`; None is self attention.
        parents: int32 `[num_documents]` or None.
        padding, key_padding: bool `[num_documents]` or None.
        prefix: int64 `[num_documents]` or None.
        window_left, window_right: positions seen besides a query's own, -1 is unlimited; causal
            is 0 to the right.
        slopes_gradient: whether the backward is asked for the gradient of alibi_slopes.

    Returns:
        out `[total_queries, num_heads, value_head_dim]` in q's dtype, and lse
        `[num_heads, total_queries]`, float32 or float64, sinks counted.
    """
    job = _Job(
        q, k, v, alibi_slopes, dropout_seed, cu_seqlens, key_cu_seqlens, parents, padding,
        key_padding, prefix, softmax_scale, softcap, window_left, window_right, chunk_size,
        dropout_p, slopes_gradient,
    )  # fmt: skip
    plan, merges = job.plan, job.plan.queries_overlap
    # One row past the stream takes what padding computes.
    shape, wide = (q.shape[0] + 1, q.shape[1]), _compute_dtype(q)
    narrow = not merges and sinks is None
    out = q.new_empty(*shape, v.shape[-1], dtype=q.dtype if narrow else wide)
    lse = q.new_empty(shape, dtype=wide)
    _fill(((0, shape[0]),) if merges else plan.unseen_queries, (out, 0.0), (lse, -torch.inf))
    forward = written_forward if job.written else fused_forward
    for call in plan.calls:
        rows, rows_lse = forward(*job.operands(call), job.scores(call))
        if merges:
            rows, rows_lse = _merged(call.queries.rows(out), call.queries.rows(lse), rows, rows_lse)
        _write(out, call.queries, rows)
        _write(lse, call.queries, rows_lse)
    out, lse = out[:-1], lse[:-1]
    if sinks is not None:
        out, lse = _with_sinks(out, lse, sinks)
    return out.to(q.dtype), lse.t()


@cpu_attention.register_fake
def _(q, k, v, *_) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[-1])
    return out, q.new_empty(q.shape[0], q.shape[1], dtype=_compute_dtype(q)).t()


@torch.library.custom_op("packed_attn::cpu_attention_backward", mutates_args=(), device_types="cpu")
def cpu_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    dropout_seed: Tensor | None,
    cu_seqlens: Tensor,
    key_cu_seqlens: Tensor | None,
    parents: Tensor | None,
    padding: Tensor | None,
    key_padding: Tensor | None,
    prefix: Tensor | None,
    softmax_scale: float,
    softcap: float | None,
    window_left: int,
    window_right: int,
    chunk_size: int | None,
    dropout_p: float,
    slopes_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `cpu_attention` in q, k, v, sinks and alibi_slopes; the last two are empty
    where none is asked for."""
    job = _Job(
        q, k, v, alibi_slopes, dropout_seed, cu_seqlens, key_cu_seqlens, parents, padding,
        key_padding, prefix, softmax_scale, softcap, window_left, window_right, chunk_size,
        dropout_p, slopes_gradient,
    )  # fmt: skip
    plan = job.plan
    dq = _zero_gradient(q, plan.queries_overlap, plan.unseen_queries)
    dk, dv = (_zero_gradient(x, plan.keys_overlap, plan.unseen_keys) for x in (k, v))
    grad_slopes = lse.new_zeros(q.shape[1] if slopes_gradient else 0)
    lse = lse.t()
    grad_sinks = lse.new_zeros(0)
    grad_lse = None if grad_lse is None else grad_lse.t()
    if sinks is not None:
        grad_sinks = _sinks_gradient(grad_out, grad_lse, out, lse, sinks)
    # Rows that see nothing have lse -inf; with any finite number, their weights are 0.
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    backward = written_backward if job.written else fused_backward
    for call in plan.calls:
        rows_grad, rows_grad_lse = (_gradient_rows(x, call.queries) for x in (grad_out, grad_lse))
        assert rows_grad is not None
        rows_out, rows_lse = call.queries.rows(out).to(lse.dtype), call.queries.rows(lse)
        scores = job.scores(call)
        operands = job.operands(call)
        got = backward(rows_grad, rows_grad_lse, *operands, rows_out, rows_lse, scores)
        _write(dq, call.queries, got.q, add=plan.queries_overlap)
        _write(dk, call.keys, got.k, add=plan.keys_overlap)
        _write(dv, call.keys, got.v, add=plan.keys_overlap)
        if got.slopes is not None:
            grad_slopes += got.slopes
    dq, dk, dv = (grad[:-1].to(q.dtype) for grad in (dq, dk, dv))
    return dq, dk, dv, grad_sinks, grad_slopes


@cpu_attention_backward.register_fake
def _(grad_out, grad_lse, out, lse, q, k, v, sinks, *rest):
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    heads, slopes_gradient = q.shape[1], rest[-1]
    per_head = [
        lse.new_empty(heads if wanted else 0) for wanted in (sinks is not None, slopes_gradient)
    ]
    return dq, dk, dv, *per_head


def _setup_context(ctx, inputs, output) -> None:
    tensors, ctx.options = inputs[:12], inputs[12:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx, grad_out: Tensor | None, grad_lse: Tensor | None):
    out, lse, *tensors = ctx.saved_tensors
    sinks, slopes = tensors[3:5]
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    dq, dk, dv, grad_sinks, grad_slopes = cpu_attention_backward(
        grad_out, grad_lse, out, lse, *tensors, *ctx.options
    )
    per_head = (
        None if sinks is None else grad_sinks.to(sinks.dtype),
        grad_slopes.to(slopes.dtype) if ctx.options[-1] else None,
    )
    return dq, dk, dv, *per_head, *[None] * 14


cpu_attention.register_autograd(_backward, setup_context=_setup_context)


@dataclass(frozen=True, eq=False)
class _Job:
    """The arguments of both operators, and what each batch of rectangles computes with."""

    q: Tensor
    k: Tensor
    v: Tensor
    alibi_slopes: Tensor | None
    dropout_seed: Tensor | None
    cu_seqlens: Tensor
    key_cu_seqlens: Tensor | None
    parents: Tensor | None
    padding: Tensor | None
    key_padding: Tensor | None
    prefix: Tensor | None
    softmax_scale: float
    softcap: float | None
    window_left: int
    window_right: int
    chunk_size: int | None
    dropout_p: float
    slopes_gradient: bool
    masks: dict[tuple[int, int, int], _Mask] = field(default_factory=dict)

    @property
    def written(self) -> bool:
        """Whether the fused kernel cannot compute this and products are written out."""
        return self.softcap is not None or self.dropout_seed is not None or self.slopes_gradient

    @property
    def kind(self) -> MaskKind:
        return MaskKind(
            self.window_left, self.window_right, self.chunk_size, self.alibi_slopes is not None
        )

    @cached_property
    def plan(self) -> Plan:
        """The rectangles of these documents."""
        heads, group = self.q.shape[1], self.q.shape[1] // self.k.shape[1]
        token_elements = heads * max(self.q.shape[2], self.v.shape[2])
        mask_heads = 1 if self.alibi_slopes is None else heads
        limits = Limits(
            view_tokens=-(-VIEW_ELEMENTS // token_elements),
            call_tokens=max(1, CALL_ELEMENTS // token_elements),
            pair_elements=max(group, mask_heads) if self.written else mask_heads,
            elements=WRITTEN_ELEMENTS if self.written else MASK_ELEMENTS,
            holds_scores=self.written,
        )
        return plan_rectangles(
            self.cu_seqlens,
            self.key_cu_seqlens,
            self.parents,
            self.padding,
            self.key_padding,
            self.prefix,
            self.kind,
            limits,
        )

    def operands(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of q, k and v in the dtype that computes."""
        wide = _compute_dtype(self.q)
        sides = ((self.q, call.queries), (self.k, call.keys), (self.v, call.keys))
        q, k, v = (side.rows(x).to(wide) for x, side in sides)
        return q, k, v

    def scores(self, call: Call) -> Scores:
        """How this call's scores follow from its products."""
        if call.is_causal and not self.written and self.alibi_slopes is None:
            return Scores(self.softmax_scale, None, None, True, None, None, None)
        mask = self.masks.get(call.shared) if call.shared is not None else None
        if mask is None:
            mask = self._mask(call)
        if call.shared is not None:
            self.masks[call.shared] = mask
        dropout = None
        if self.dropout_seed is not None:
            tokens = _tokens(call.queries), _tokens(call.keys)
            dropout = Dropout(self.dropout_seed, self.dropout_p, *tokens)
        distance = mask.distance if self.slopes_gradient else None
        return Scores(
            self.softmax_scale, self.softcap, mask.added, False, mask.blind, dropout, distance
        )

    def _mask(self, call: Call) -> _Mask:
        slopes, wide = self.alibi_slopes, _compute_dtype(self.q)
        if not call.hides and slopes is None:
            return _Mask(None, None, None)
        visible = call.visible(self.kind)
        seen = visible.any(-1)
        blind = None if seen.all() else ~seen
        if slopes is None:
            added = torch.zeros(visible.shape, dtype=wide).masked_fill_(~visible, -torch.inf)
            return _Mask(added[:, None], blind, None)
        i, j = call.query_positions[:, :, None], call.key_positions[:, None, :]
        distance = (i - j).abs().to(wide)
        added = -slopes.to(wide)[:, None, None] * distance[:, None]
        return _Mask(added.masked_fill_(~visible[:, None], -torch.inf), blind, distance)


@dataclass(frozen=True, eq=False)
class _Mask:
    """What is added to a call's scores, rows that see nothing, and the distances of ALiBi."""

    added: Tensor | None
    blind: Tensor | None
    distance: Tensor | None


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Half precision is computed in float32: torch's backward would sum gradients in bfloat16,
    rounding at every block, and without matrix units for it takes 4 to 10 times as long."""
    return torch.promote_types(x.dtype, torch.float32)


def _tokens(bucket: Bucket) -> Tensor:
    """int64 `[batch, length]`: the token of each row."""
    if bucket.tokens is None:
        tokens = torch.arange(bucket.start, bucket.start + bucket.batch * bucket.length)
    else:
        tokens = bucket.tokens
    return tokens.view(bucket.batch, bucket.length)


def _fill(spans: tuple[Span, ...], *tensors: tuple[Tensor, float]) -> None:
    """Tokens that no call covers get the given value."""
    for start, stop in spans:
        for x, value in tensors:
            x[start:stop] = value


def _zero_gradient(x: Tensor, overlaps: bool, unseen: tuple[Span, ...]) -> Tensor:
    """Memory for the gradient of x, 0 where no call writes it or where calls add up."""
    wide = _compute_dtype(x) if overlaps else x.dtype
    gradient = x.new_empty(x.shape[0] + 1, *x.shape[1:], dtype=wide)
    _fill(((0, x.shape[0] + 1),) if overlaps else unseen, (gradient, 0.0))
    return gradient


def _gradient_rows(x: Tensor | None, bucket: Bucket) -> Tensor | None:
    """A bucket's rows of an output's gradient in the dtype that computes.

    Rows of padding repeat their document's last token; without a gradient they add nothing.
    """
    if x is None:
        return None
    rows = bucket.rows(x).to(_compute_dtype(x))
    if bucket.pads is not None:
        rows.flatten(0, 1).index_fill_(0, bucket.pads, 0.0)
    return rows


def _write(x: Tensor, bucket: Bucket, rows: Tensor, *, add: bool = False) -> None:
    """Rows `[batch, length, ...]` into x `[total_tokens + 1, ...]`, or onto what it holds."""
    rows = rows.flatten(0, 1)
    if bucket.targets is None:
        here = x[bucket.start : bucket.start + rows.shape[0]]
        here.add_(rows) if add else here.copy_(rows)
    else:
        # No token is twice in a bucket, so this adds up as index_add_ would, in one pass.
        rows = rows + x.index_select(0, bucket.targets) if add else rows
        x.index_copy_(0, bucket.targets, rows.to(x.dtype))


def _merged(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of two sets of keys as of one: `[batch, n, heads, dim]`, `[batch, n, heads]`."""
    both = torch.logaddexp(lse, more_lse)
    finite = both.masked_fill(both == -torch.inf, 0.0)
    first, second = (torch.exp(x - finite)[..., None] for x in (lse, more_lse))
    return out * first + more * second, both


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """out `[tokens, heads, dim]` and lse `[tokens, heads]` with each head's sink counted."""
    blind = lse == -torch.inf
    with_sink = torch.logaddexp(lse, sinks.to(lse.dtype))
    # A sink of -inf, one turned off, would make its rows that see nothing exp(-inf - -inf).
    kept = torch.exp(lse - with_sink).masked_fill_(blind, 0.0)
    return out * kept[..., None], with_sink.masked_fill_(blind, -torch.inf)


def _sinks_gradient(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, sinks: Tensor
) -> Tensor:
    """`[num_heads]`: a sink has value 0, so its dS is -P * rowsum(grad_out * out), summed."""
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    weights = torch.exp(sinks.to(lse.dtype) - lse)
    return -(weights * delta).masked_fill_(lse == -torch.inf, 0.0).sum(0)
