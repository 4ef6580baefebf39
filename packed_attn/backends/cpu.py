"""Documents grouped by length and batched over torch's fused CPU attention, forward and backward.

No mask spans two documents. Every call computes whole documents: long ones, and runs of equal ones,
where they lie in the stream; short ones gathered by length (see `buckets.py`). Outputs and
gradients are written into one packed tensor each: under autograd, slices of q, k and v would each
allocate a gradient of full size. Documents share no product, so what is not finite stays in its
document.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from packed_attn.buckets import Bucket, Plan, plan_buckets
from packed_attn.request import AttentionRequest

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Elements of q (tokens x heads x head_dim) from which documents are read where they lie. Measured
# on two AVX2 cores, as is the next.
VIEW_ELEMENTS = 2**15
# Elements of q in one call: more of them leave the cache, and their buffers come from the
# operating system page by page, which made a backward of short documents up to twice as slow.
CALL_ELEMENTS = 2**18
# Columns added to head_dim where lse has a gradient: one is used, eight keep rows aligned.
FOLD_WIDTH = 8

_fused_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def reasons_against(request: AttentionRequest) -> list[str]:
    """Why this backend cannot run the request; empty when it can."""
    reasons = []
    if request.q.device.type != "cpu":
        reasons.append(f"it computes on the CPU, but q is on {request.q.device}")
    if request.q.dtype not in DTYPES:
        reasons.append(
            f"it computes float32, float64, bfloat16 and float16, but q is {request.q.dtype}"
        )
    if request.layout.is_forest:
        reasons.append("it has no forests: a document sees no tokens but its own")
    if request.key_layout is not None:
        reasons.append("it has no cross attention (key_layout)")
    if request.prefix_lengths is not None:
        reasons.append("it has no prefix mask (prefix_lengths)")
    if request.softcap is not None:
        reasons.append("torch's fused CPU attention has no softcap")
    if request.alibi_slopes is not None:
        reasons.append("it has no ALiBi (alibi_slopes)")
    if request.dropout_p > 0.0:
        reasons.append("torch's fused CPU attention has no dropout")
    return reasons


def run(request: AttentionRequest) -> tuple[Tensor, Tensor | None]:
    """out `[total_tokens, num_heads, value_head_dim]` and lse `[num_heads, total_tokens]`."""
    left, right = request.window_size
    out, lse = cpu_attention(
        request.q,
        request.k,
        request.v,
        request.sinks,
        request.layout.cu_seqlens,
        request.layout.padding,
        request.softmax_scale,
        request.causal,
        left,
        right,
        request.chunk_size,
    )
    return out, lse if request.return_lse else None


@torch.library.custom_op("packed_attn::cpu_attention", mutates_args=(), device_types="cpu")
def cpu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor,
    padding: Tensor | None,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Packed attention as one operator: host lengths are read inside, out of a compiler's sight.

    Args:
        q: `[total_tokens, num_heads, head_dim]`.
        k, v: `[total_tokens, num_kv_heads, head_dim or value_head_dim]`.
        sinks: `[num_heads]` or None.
        cu_seqlens: int32 `[num_documents + 1]`.
        padding: bool `[num_documents]` or None.
        window_left, window_right: positions seen besides a query's own, -1 is unlimited.

    Returns:
        out `[total_tokens, num_heads, value_head_dim]` in q's dtype, and lse
        `[num_heads, total_tokens]`, float32 or float64, sinks counted.
    """
    total_tokens, num_heads, _ = q.shape
    plan = _plan(q, v, cu_seqlens, padding, causal, chunk_size)
    # One row past the stream takes what padding computes.
    out = q.new_empty(total_tokens + 1, num_heads, v.shape[-1])
    lse = q.new_empty(total_tokens + 1, num_heads, dtype=_compute_dtype(q))
    _fill_unseen(plan, (out, 0.0), (lse, -torch.inf))
    group, width = num_heads // k.shape[1], max(q.shape[-1], v.shape[-1])
    for bucket in plan.buckets:
        rows, rows_lse = _fused_forward(
            _heads(_operand(q, bucket, width)),
            _heads(_operand(k, bucket, width, group)),
            _heads(_operand(v, bucket, width, group)),
            is_causal=causal,
            attn_mask=_window_mask(bucket.length, causal, window_left, window_right, lse.dtype),
            scale=softmax_scale,
        )
        if sinks is not None:
            rows, rows_lse = _with_sinks(rows, rows_lse, sinks)
        _write(out, bucket, _heads(rows))
        _write(lse, bucket, _heads(rows_lse))
    return out[:total_tokens], lse[:total_tokens].t()


@cpu_attention.register_fake
def _(q, k, v, sinks, *_) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[-1])
    return out, q.new_empty(q.shape[0], q.shape[1], dtype=_compute_dtype(q)).t()


@torch.library.custom_op("packed_attn::cpu_attention_backward", mutates_args=(), device_types="cpu")
def cpu_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    padding: Tensor | None,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `cpu_attention` in q, k, v and sinks (an empty tensor without sinks)."""
    total_tokens = q.shape[0]
    plan = _plan(q, v, cu_seqlens, padding, causal, chunk_size)
    grads = [x.new_empty(total_tokens + 1, *x.shape[1:]) for x in (q, k, v)]
    _fill_unseen(plan, *((grad, 0.0) for grad in grads))
    grad_sinks = lse.new_zeros(0 if sinks is None else sinks.shape[0])
    group, width = q.shape[1] // k.shape[1], max(q.shape[-1], v.shape[-1])
    width += 0 if grad_lse is None else FOLD_WIDTH
    for bucket in plan.buckets:
        rows_grad, rows_out, rows_lse = _output_side(grad_out, grad_lse, out, lse, bucket, width)
        if sinks is not None:
            grad_sinks += _sinks_gradient(rows_grad, rows_out, rows_lse, sinks)
        bucket_grads = _fused_backward(
            _heads(rows_grad),
            _heads(_operand(q, bucket, width)),
            _heads(_operand(k, bucket, width, group)),
            _heads(_operand(v, bucket, width, group)),
            _heads(rows_out),
            _heads(rows_lse),
            dropout_p=0.0,
            is_causal=causal,
            attn_mask=_window_mask(bucket.length, causal, window_left, window_right, lse.dtype),
            scale=softmax_scale,
        )
        for grad, rows in zip(grads, bucket_grads):
            _write(grad, bucket, _heads(rows))
    dq, dk, dv = (grad[:total_tokens] for grad in grads)
    return dq, dk, dv, grad_sinks if sinks is None else grad_sinks.to(sinks.dtype)


@cpu_attention_backward.register_fake
def _(grad_out, grad_lse, q, k, v, sinks, out, lse, *_) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, lse.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, sinks, cu_seqlens, padding, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, sinks, *output, cu_seqlens, padding)


def _backward(ctx, grad_out: Tensor | None, grad_lse: Tensor | None):
    q, k, v, sinks, out, lse, cu_seqlens, padding = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    dq, dk, dv, grad_sinks = cpu_attention_backward(
        grad_out, grad_lse, q, k, v, sinks, out, lse, cu_seqlens, padding, *ctx.options
    )
    return dq, dk, dv, None if sinks is None else grad_sinks, *[None] * 7


cpu_attention.register_autograd(_backward, setup_context=_setup_context)


def _plan(
    q: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    padding: Tensor | None,
    causal: bool,
    chunk_size: int | None,
) -> Plan:
    token_elements = q.shape[1] * max(q.shape[2], v.shape[2])
    return plan_buckets(
        cu_seqlens,
        padding,
        chunk_size=chunk_size,
        pad_lengths=causal,
        view_tokens=-(-VIEW_ELEMENTS // token_elements),
        call_tokens=max(1, CALL_ELEMENTS // token_elements),
    )


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Half precision is computed in float32: torch's backward would sum gradients in bfloat16,
    rounding at every block, and without matrix units for it takes 4 to 10 times as long."""
    return torch.promote_types(x.dtype, torch.float32)


def _fill_unseen(plan: Plan, *tensors: tuple[Tensor, float]) -> None:
    """Tokens that no document covers get the given value."""
    for start, stop in plan.unseen:
        for x, value in tensors:
            x[start:stop] = value


def _operand(x: Tensor, bucket: Bucket, width: int, group: int = 1) -> Tensor:
    """Rows as torch's kernel takes them: `[batch, length, heads * group, width]`.

    The kernel wants one head_dim for q, k and v, so columns of zeros make up for what is missing,
    and as many heads of k and v as of q: expanding them costs less than a call per group member.
    """
    rows = bucket.rows(x).to(_compute_dtype(x))
    if x.shape[-1] < width:
        rows = F.pad(rows, (0, width - x.shape[-1]))
    elif rows.stride(-1) != 1:
        rows = rows.contiguous()
    return rows if group == 1 else rows.repeat_interleave(group, dim=2)


def _heads(x: Tensor) -> Tensor:
    """Swaps tokens and heads: torch's kernel has heads first, and strides of its own choice."""
    return x.transpose(1, 2)


def _output_side(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    bucket: Bucket,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """A bucket's rows of grad_out, out and lse, with the gradient of lse folded in.

    The kernel computes dS = P * (grad_out @ V^T - rowsum(grad_out * out)), and lse adds
    P * grad_lse. One more column, 1 in grad_out, -grad_lse in out and 0 in V, does just that.
    """
    rows_grad, rows_out = _operand(grad_out, bucket, width), _operand(out, bucket, width)
    if grad_lse is not None:
        rows_grad[..., -1] = 1.0
        rows_out[..., -1] = -bucket.rows(grad_lse.t())
    if bucket.pads is not None:
        # Rows of padding repeat their document's last token; without a gradient they add nothing.
        rows_grad.view(-1, *rows_grad.shape[2:]).index_fill_(0, bucket.pads, 0.0)
    return rows_grad, rows_out, bucket.rows(lse.t())


def _write(x: Tensor, bucket: Bucket, rows: Tensor) -> None:
    """Rows `[batch, length, heads, width]` into x `[total_tokens + 1, heads, dim]`.

    Columns of zeros are dropped, and groups of heads summed where x has fewer.
    """
    rows = rows.flatten(0, 1)
    if rows.ndim == 3:
        rows = rows[..., : x.shape[2]]
    if rows.shape[1] != x.shape[1]:
        rows = rows.unflatten(1, (x.shape[1], -1)).sum(2)
    if bucket.targets is None:
        x[bucket.start : bucket.start + rows.shape[0]] = rows
    else:
        x.index_copy_(0, bucket.targets, rows.to(x.dtype))


def _window_mask(
    length: int, causal: bool, left: int, right: int, dtype: torch.dtype
) -> Tensor | None:
    """0 inside the window and -inf outside, `[length, length]`, one for all documents and heads
    of a bucket; None where the window hides nothing."""
    hides_left = 0 <= left < length - 1
    hides_right = not causal and 0 <= right < length - 1
    if not (hides_left or hides_right):
        return None
    place = torch.arange(length)
    ahead = place[None, :] - place[:, None]
    mask = torch.zeros(length, length, dtype=dtype)
    if hides_left:
        mask.masked_fill_(ahead < -left, -torch.inf)
    if hides_right:
        mask.masked_fill_(ahead > right, -torch.inf)
    return mask


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse, heads first, with each head's sink counted in the softmax."""
    with_sink = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    return out * torch.exp(lse - with_sink)[..., None], with_sink


def _sinks_gradient(grad_out: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """`[num_heads]`: a sink has value 0, so its dS is -P * rowsum(grad_out * out), summed."""
    weights = torch.exp(sinks.to(lse.dtype) - lse)
    return -(weights * (grad_out * out).sum(-1)).sum((0, 1))
