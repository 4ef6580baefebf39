"""`interval_attention` and the `torch.library` operators under it: fake, autograd, compile-safe."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from packed_attn_kernels.configurations import LARGEST_TOKEN_STRIDE
from packed_attn_kernels.launch import Inputs, launch_backward, launch_forward

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_HEAD_DIM = 256


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor,
    key_stop: Tensor,
    query_start: Tensor,
    query_stop: Tensor,
    *,
    softmax_scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    halves: Literal["either", "query", "both"] = "either",
) -> tuple[Tensor, Tensor]:
    """Softmax attention in which query i sees key j if and only if

        key_start[i] <= j < key_stop[i]   and   query_start[j] <= i < query_stop[j]

    Args:
        q: `[total_queries, heads, head_dim]`, bfloat16, float16 or float32. Any strides with a
            contiguous last dimension are read in place; so for k, v and the output's gradient.
        k: `[total_keys, kv_heads, head_dim]`; heads is a multiple of kv_heads.
        v: `[total_keys, kv_heads, value_head_dim]`.
        key_start, key_stop: int32 `[total_queries]`; an empty interval sees nothing.
        query_start, query_stop: int32 `[total_keys]`; an empty interval is seen by nobody.
        softmax_scale: factor of q.k.
        softcap: scores become `softcap * tanh(scores / softcap)`; None is off.
        sinks: `[heads]`: a learned logit per head with no value.
        halves: which half of the rule decides alone: "either" (they are transposes of each
            other), "query" (query_start and query_stop) or "both". A query with an empty interval
            sees nothing in every case.

    Returns:
        out `[total_queries, heads, value_head_dim]` in q's dtype and lse
        `[heads, total_queries]`, float32, natural log, sinks counted. Both are differentiable.
        A row that sees nothing has out 0, lse -inf and gradient 0. A NaN or infinity reaches
        only rows that may see it: outputs that may see a non-finite row of v become NaN.

    Raises:
        ValueError: names the argument, the rule and the value.
    """
    _check_heads(q, k, v)
    for name, vector, rows in (
        ("key_start", key_start, q.shape[0]),
        ("key_stop", key_stop, q.shape[0]),
        ("query_start", query_start, k.shape[0]),
        ("query_stop", query_stop, k.shape[0]),
    ):
        if vector.dtype != torch.int32 or list(vector.shape) != [rows]:
            raise ValueError(
                f"{name} must be int32 of shape [{rows}], "
                f"got {vector.dtype} of shape {list(vector.shape)}"
            )
    _check_modifiers(q, softmax_scale, softcap, sinks, halves)
    return torch.ops.packed_attn.interval_forward(
        q, k, v, key_start, key_stop, query_start, query_stop,
        sinks, softmax_scale, softcap, halves,
    )  # fmt: skip


@torch.library.custom_op("packed_attn::interval_forward", mutates_args=())
def _interval_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor,
    key_stop: Tensor,
    query_start: Tensor,
    query_stop: Tensor,
    sinks: Tensor | None,
    softmax_scale: float,
    softcap: float | None,
    halves: str,
) -> tuple[Tensor, Tensor]:
    inputs = Inputs(
        _readable(q),
        _readable(k),
        _readable(v),
        key_start.contiguous(),
        key_stop.contiguous(),
        query_start.contiguous(),
        query_stop.contiguous(),
        _vector(sinks),
        softmax_scale,
        softcap,
        halves,
    )
    return launch_forward(inputs)


@_interval_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor,
    key_stop: Tensor,
    query_start: Tensor,
    query_stop: Tensor,
    sinks: Tensor | None,
    softmax_scale: float,
    softcap: float | None,
    halves: str,
) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    return out, q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("packed_attn::interval_backward", mutates_args=())
def _interval_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_start: Tensor,
    key_stop: Tensor,
    query_start: Tensor,
    query_stop: Tensor,
    sinks: Tensor | None,
    softmax_scale: float,
    softcap: float | None,
    halves: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(
        _readable(q),
        _readable(k),
        _readable(v),
        key_start.contiguous(),
        key_stop.contiguous(),
        query_start.contiguous(),
        query_stop.contiguous(),
        _vector(sinks),
        softmax_scale,
        softcap,
        halves,
    )
    out, dout = _readable(out), _readable(dout)
    return launch_backward(inputs, out, lse.contiguous(), dout, _vector(dlse))


@_interval_backward.register_fake
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_start: Tensor,
    key_stop: Tensor,
    query_start: Tensor,
    query_stop: Tensor,
    sinks: Tensor | None,
    softmax_scale: float,
    softcap: float | None,
    halves: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dsinks = lse.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return dq, dk, dv, dsinks


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.softmax_scale, ctx.softcap, ctx.halves = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, key_start, key_stop, query_start, query_stop, sinks, out, lse = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv, dsinks = torch.ops.packed_attn.interval_backward(
        dout, dlse, q, k, v, out, lse, key_start, key_stop, query_start, query_stop,
        sinks, ctx.softmax_scale, ctx.softcap, ctx.halves,
    )  # fmt: skip
    intervals = (None, None, None, None)
    return dq, dk, dv, *intervals, None if sinks is None else dsinks, None, None, None


_interval_forward.register_autograd(_backward, setup_context=_save)


def _readable(x: Tensor) -> Tensor:
    """The tensor itself, or a copy where it has strides that the kernels do not take."""
    in_place = x.stride(2) == 1 and x.stride(0) < LARGEST_TOKEN_STRIDE
    return x if in_place else x.contiguous()


def _vector(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(f"{name} must have shape [tokens, heads, dim], got {list(x.shape)}")
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            raise ValueError(
                "q, k and v must share a dtype, bfloat16, float16 or float32, "
                f"but {name} is {x.dtype}"
            )
        if x.device != q.device:
            raise ValueError(f"q, k and v must share a device, but {name} is on {x.device}")
        if x.shape[2] % 8 or not 8 <= x.shape[2] <= LARGEST_HEAD_DIM:
            raise ValueError(
                f"head_dim must be a multiple of 8 up to {LARGEST_HEAD_DIM}, "
                f"but {name} has {x.shape[2]}"
            )
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k has head_dim {k.shape[2]}, but q has {q.shape[2]}")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"k and v must agree in tokens and heads, but k is {list(k.shape)} "
            f"and v {list(v.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"heads of q must be a multiple of heads of k, got {q.shape[1]} and {k.shape[1]}"
        )


def _check_modifiers(
    q: Tensor, softmax_scale: float, softcap: float | None, sinks: Tensor | None, halves: str
) -> None:
    if not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")
    if sinks is not None and list(sinks.shape) != [q.shape[1]]:
        raise ValueError(f"sinks must have shape [{q.shape[1]}], got {list(sinks.shape)}")
    if halves not in ("either", "query", "both"):
        raise ValueError(f"halves must be 'either', 'query' or 'both', got {halves!r}")
