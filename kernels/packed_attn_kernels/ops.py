"""`interval_attention` and the `torch.library` operators under it: fake, autograd, compile-safe."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from packed_attn_kernels.configurations import (
    FUSED_IS_FASTER,
    LARGEST_TOKEN_STRIDE,
    Halves,
    Problem,
    tile_rows,
)
from packed_attn_kernels.gpu import architecture
from packed_attn_kernels.hopper_launch import (
    reasons_against_hopper_inputs,
    reasons_against_hopper_kernel,
)
from packed_attn_kernels.launch import Inputs, launch_backward, launch_forward
from packed_attn_kernels.tiles import Tiles, plan_tiles

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
    alibi_slopes: Tensor | None = None,
    positions: tuple[Tensor, Tensor] | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    halves: Halves = "either",
    backward: Literal["split", "fused"] = "split",
    tiles: Tiles | None = None,
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
        alibi_slopes: float32 `[heads]`, without gradient: `slope * |position of the query - of the
            key|` is taken from the capped scores (Press, Smith, Lewis, "Train short, test long",
            2021). Needs `positions`.
        positions: int32 `[total_queries]` and `[total_keys]`.
        dropout_p: share of the weights that are dropped, in [0, 1); lse is without it.
        dropout_seed: int64 `[1]`, needed if dropout_p > 0. The weight of (head h, query i, key j)
            is kept if and only if the first word of Philox4x32-10, with the seed as key and
            (i, j, h, 0) as counter, is at least dropout_p * 2^32.
        halves: which half of the rule decides alone: "either" (they are transposes of each
            other), "query" (query_start and query_stop) or "both". A query with an empty interval
            sees nothing in every case.
        backward: "split" gives the same bits every time; "fused" adds dq atomically.
        tiles: what `plan_tiles` gives for these intervals; made here when it is None. Layers
            that share a mask share it.

    Returns:
        out `[total_queries, heads, value_head_dim]` in q's dtype and lse
        `[heads, total_queries]`, float32, natural log, sinks counted. Both are differentiable.
        A row that sees nothing has out 0, lse -inf and gradient 0. A NaN or infinity reaches
        only rows that may see it: outputs that may see a non-finite row of v become NaN.

    Raises:
        ValueError: names the argument, the rule and the value.
    """
    _check_heads(q, k, v)
    intervals = [key_start, key_stop, query_start, query_stop]
    names = ("key_start", "key_stop", "query_start", "query_stop")
    for name, vector, x in zip(names, intervals, (q, q, k, k)):
        _check_vector(name, vector, torch.int32, x.shape[0])
    _check_modifiers(q, softmax_scale, softcap, sinks, halves, backward)
    _check_alibi(q, k, alibi_slopes, positions)
    _check_dropout(dropout_p, dropout_seed)
    fused = backward == "fused"
    problem = tile_problem(q, k, v, halves=halves, backward=backward)
    if tiles is None:
        tiles = plan_tiles(key_start, key_stop, query_start, query_stop, problem)
    elif tiles.rows != tile_rows(problem):
        raise ValueError(f"tiles must have {tile_rows(problem)} rows, but they have {tiles.rows}")
    forward = _Eager.apply if _is_eager(q) else torch.ops.packed_attn.interval_forward
    return forward(
        q, k, v, intervals, [] if alibi_slopes is None or positions is None else list(positions),
        [tiles.forward, tiles.keys, tiles.dq, tiles.blocks], sinks, alibi_slopes,
        dropout_seed if dropout_p > 0.0 else None, softmax_scale, softcap, dropout_p, halves, fused,
    )  # fmt: skip


def tile_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    halves: Halves,
    backward: Literal["split", "fused"],
    has_softcap: bool = False,
    has_alibi: bool = False,
    has_dropout: bool = False,
) -> Problem:
    """What decides the tiles of a call; modifiers change none of their sizes."""
    return Problem(
        head_dim=q.shape[2],
        value_dim=v.shape[2],
        group=q.shape[1] // k.shape[1],
        itemsize=q.itemsize,
        halves=halves,
        has_softcap=has_softcap,
        has_sinks=False,
        has_alibi=has_alibi,
        has_dropout=has_dropout,
        fused=backward == "fused",
        architecture=architecture(q.device),
    )


def faster_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    capability: tuple[int, int],
    *,
    softmax_scale: float,
    halves: Halves,
    has_softcap: bool,
    has_alibi: bool,
    has_dropout: bool,
) -> Literal["split", "fused"]:
    """The backward that was measured to be the faster one; split where nothing was measured.

    Args:
        capability: compute capability of q's GPU.
    """
    problem = tile_problem(
        q,
        k,
        v,
        halves=halves,
        backward="fused",
        has_softcap=has_softcap,
        has_alibi=has_alibi,
        has_dropout=has_dropout,
    )
    reasons = reasons_against_hopper_kernel("backward", problem, capability)
    reasons += reasons_against_hopper_inputs(softmax_scale, q=q, k=k, v=v)
    if not reasons or (problem.width, problem.itemsize) in FUSED_IS_FASTER:
        return "fused"
    return "split"


@torch.library.custom_op("packed_attn::interval_forward", mutates_args=())
def _interval_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: list[Tensor],
    positions: list[Tensor],
    tiles: list[Tensor],
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    dropout_seed: Tensor | None,
    softmax_scale: float,
    softcap: float | None,
    dropout_p: float,
    halves: str,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    inputs = _inputs(
        q, k, v, intervals, positions, tiles, sinks, alibi_slopes, dropout_seed,
        softmax_scale, softcap, dropout_p, halves, fused,
    )  # fmt: skip
    return launch_forward(inputs)


@_interval_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    return out, q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


def _run_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: list[Tensor],
    positions: list[Tensor],
    tiles: list[Tensor],
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    dropout_seed: Tensor | None,
    softmax_scale: float,
    softcap: float | None,
    dropout_p: float,
    halves: str,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = _inputs(
        q, k, v, intervals, positions, tiles, sinks, alibi_slopes, dropout_seed,
        softmax_scale, softcap, dropout_p, halves, fused,
    )  # fmt: skip
    out, dout = _readable(out), _readable(dout)
    return launch_backward(inputs, out, lse.contiguous(), dout, _vector(dlse))


_interval_backward = torch.library.custom_op(
    "packed_attn::interval_backward", _run_backward, mutates_args=()
)


@_interval_backward.register_fake
def _(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: list[Tensor],
    positions: list[Tensor],
    tiles: list[Tensor],
    sinks: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dsinks = lse.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return dq, dk, dv, dsinks


def _inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: list[Tensor],
    positions: list[Tensor],
    tiles: list[Tensor],
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    dropout_seed: Tensor | None,
    *values: Any,
) -> Inputs:
    """Every tensor as the kernels read it."""
    return Inputs(
        _readable(q),
        _readable(k),
        _readable(v),
        _vectors(intervals),
        _vectors(positions),
        _vectors(tiles),
        _vector(sinks),
        _vector(alibi_slopes),
        _vector(dropout_seed),
        *values,
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, intervals, positions, tiles, sinks, alibi_slopes, seed, *ctx.values = inputs
    ctx.counts = [len(intervals), len(positions), len(tiles)]
    vectors = (*intervals, *positions, *tiles)
    ctx.save_for_backward(*output, q, k, v, sinks, alibi_slopes, seed, *vectors)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    dout: Tensor | None,
    dlse: Tensor | None,
    run: Callable[..., tuple[Tensor, ...]] = _interval_backward,
) -> tuple[Any, ...]:
    out, lse, q, k, v, sinks, alibi_slopes, seed, *vectors = ctx.saved_tensors
    lists = []
    for count in ctx.counts:
        lists.append(vectors[:count])
        vectors = vectors[count:]
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv, dsinks = run(
        dout, dlse, out, lse, q, k, v, *lists, sinks, alibi_slopes, seed, *ctx.values
    )
    nothing = [[None] * count for count in ctx.counts]
    rest = (None,) * (2 + len(ctx.values))
    return dq, dk, dv, *nothing, None if sinks is None else dsinks, *rest


_interval_forward.register_autograd(_backward, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The operators without what `torch.library` does around them in Python, which takes the host
    longer than all launches of a call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = launch_forward(_inputs(*inputs))
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]: of the decorated function
        ctx: Any, *grad_outputs: Tensor | None
    ) -> tuple[Any, ...]:
        gradients = _backward(ctx, *grad_outputs, run=_run_backward)
        return tuple(None if isinstance(x, list) else x for x in gradients)


def _is_eager(q: Tensor) -> bool:
    """Whether nobody looks on who must see operators: a compiler, a mode, a transform, a subclass
    of tensors."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or type(q) not in (Tensor, torch.nn.Parameter)
    )


def _readable(x: Tensor) -> Tensor:
    """The tensor itself, or a copy where it has strides that the kernels do not take."""
    in_place = x.stride(2) == 1 and x.stride(0) < LARGEST_TOKEN_STRIDE
    return x if in_place else x.contiguous()


def _vector(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _vectors(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in tensors)


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


def _check_vector(name: str, vector: Tensor, dtype: torch.dtype, length: int) -> None:
    if vector.dtype != dtype or list(vector.shape) != [length]:
        raise ValueError(
            f"{name} must be {str(dtype).removeprefix('torch.')} of shape [{length}], "
            f"got {vector.dtype} of shape {list(vector.shape)}"
        )


def _check_modifiers(
    q: Tensor,
    softmax_scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    halves: str,
    backward: str,
) -> None:
    if not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")
    if sinks is not None and list(sinks.shape) != [q.shape[1]]:
        raise ValueError(f"sinks must have shape [{q.shape[1]}], got {list(sinks.shape)}")
    if halves not in ("either", "query", "both"):
        raise ValueError(f"halves must be 'either', 'query' or 'both', got {halves!r}")
    if backward not in ("split", "fused"):
        raise ValueError(f"backward must be 'split' or 'fused', got {backward!r}")


def _check_alibi(
    q: Tensor, k: Tensor, alibi_slopes: Tensor | None, positions: tuple[Tensor, Tensor] | None
) -> None:
    if alibi_slopes is None:
        return
    _check_vector("alibi_slopes", alibi_slopes, torch.float32, q.shape[1])
    if alibi_slopes.requires_grad:
        raise ValueError("alibi_slopes must not require a gradient: the kernels give none")
    if positions is None:
        raise ValueError("positions must be given with alibi_slopes, got None")
    for name, vector, x in zip(("query", "key"), positions, (q, k)):
        _check_vector(f"positions of the {name} side", vector, torch.int32, x.shape[0])


def _check_dropout(dropout_p: float, dropout_seed: Tensor | None) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p > 0.0:
        if dropout_seed is None:
            raise ValueError(f"dropout_seed must be given with dropout_p {dropout_p}, got None")
        _check_vector("dropout_seed", dropout_seed, torch.int64, 1)
