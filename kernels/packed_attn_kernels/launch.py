"""Launches the kernels on plain tensors: grids, strides, workspaces; not differentiable.

Outputs and workspaces come from `torch.empty`: the kernels write every element that anyone reads.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
import triton
from torch import Tensor

from packed_attn_kernels import configurations
from packed_attn_kernels.backward import delta_kernel, dkdv_kernel
from packed_attn_kernels.backward_queries import dq_cast_kernel, dq_kernel
from packed_attn_kernels.configurations import DELTA_BLOCK, Halves, KernelName, Problem
from packed_attn_kernels.forward import forward_kernel
from packed_attn_kernels.gpu import architecture
from packed_attn_kernels.hopper_backward_launch import launch_hopper_backward
from packed_attn_kernels.hopper_launch import (
    launch_hopper_forward,
    reasons_against_hopper,
    reasons_against_hopper_backward,
)

# Words of the generator are compared as signed ones.
SIGNED = 2**31


@dataclass(frozen=True, eq=False)
class Inputs:
    """The inputs of one call; shapes as in `interval_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    intervals: tuple[Tensor, ...]  # key_start, key_stop, query_start, query_stop
    positions: tuple[Tensor, ...]  # of queries and keys; empty without ALiBi
    tiles: tuple[Tensor, ...]  # lists of the forward, of keys and of dq; blocks of keys
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    dropout_seed: Tensor | None
    softmax_scale: float
    softcap: float | None
    dropout_p: float
    halves: str
    fused: bool

    @cached_property
    def problem(self) -> Problem:
        """What the kernels are specialised for."""
        return Problem(
            head_dim=self.q.shape[-1],
            value_dim=self.v.shape[-1],
            group=self.q.shape[1] // self.k.shape[1],
            itemsize=self.q.itemsize,
            halves=cast(Halves, self.halves),
            has_softcap=self.softcap is not None,
            has_sinks=self.sinks is not None,
            has_alibi=self.alibi_slopes is not None,
            has_dropout=self.dropout_seed is not None,
            fused=self.fused,
            architecture=architecture(self.q.device),
        )

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The kernel arguments that the forward, dk and dv, and dq share."""
        key_start, key_stop, query_start, query_stop = self.intervals
        query_position, key_position = self.positions or (None, None)
        has_dropout = self.dropout_seed is not None
        return {
            "q_ptr": self.q,
            "k_ptr": self.k,
            "v_ptr": self.v,
            "alibi_ptr": self.alibi_slopes,
            "seed_ptr": self.dropout_seed,
            "key_start_ptr": key_start,
            "key_stop_ptr": key_stop,
            "query_start_ptr": query_start,
            "query_stop_ptr": query_stop,
            "query_position_ptr": query_position,
            "key_position_ptr": key_position,
            "softmax_scale": self.softmax_scale,
            "softcap": self.softcap,
            "dropout_threshold": dropout_threshold(self.dropout_p) if has_dropout else None,
            "dropout_scale": 1.0 / (1.0 - self.dropout_p) if has_dropout else None,
            "total_queries": self.q.shape[0],
            "total_keys": self.k.shape[0],
            **_strides(q=self.q, k=self.k, v=self.v),
        }


def dropout_threshold(dropout_p: float) -> int:
    """The smallest word that keeps a weight, `dropout_p * 2^32` rounded, less 2^31."""
    return min(round(dropout_p * 2**32), 2**32 - 1) - SIGNED


def launch_forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """out `[total_queries, heads, value_dim]` and lse `[heads, total_queries]`, natural."""
    total_queries, heads, _ = inputs.q.shape
    out = inputs.q.new_empty(total_queries, heads, inputs.v.shape[-1])
    lse = inputs.q.new_empty(heads, total_queries, dtype=torch.float32)
    tiles = inputs.tiles[0]
    results = {"out_ptr": out, "lse_ptr": lse, "tiles_ptr": tiles, **_strides(out=out)}
    arguments = inputs.arguments | results | {"sinks_ptr": inputs.sinks}
    if not reasons_against_hopper(inputs):
        with on_device(inputs.q.device):
            launch_hopper_forward(inputs, arguments)
        return out, lse
    _launch("forward", (tiles.shape[0], heads), inputs, arguments)
    return out, lse


def launch_backward(
    inputs: Inputs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv in their inputs' dtypes, contiguous, and dsinks (empty without sinks)."""
    row_lse, delta, dsinks = _launch_delta(inputs, out, lse, dout, dlse)
    arguments = inputs.arguments | {
        "dout_ptr": dout,
        "row_lse_ptr": row_lse,
        "delta_ptr": delta,
        "padded_queries": row_lse.shape[1],
        **_strides(dout=dout),
    }
    if not reasons_against_hopper_backward(inputs):
        with on_device(inputs.q.device):
            dq, dk, dv = launch_hopper_backward(inputs, arguments)
        return dq, dk, dv, dsinks
    sums = None
    if inputs.fused:
        sums = lse.new_zeros(*row_lse.shape, inputs.problem.block_d)
    dk, dv = _launch_keys(inputs, arguments, sums)
    dq = inputs.q.new_empty(inputs.q.shape)
    if sums is None:
        tiles = inputs.tiles[2]
        gradient = {"dq_ptr": dq, "tiles_ptr": tiles, **_strides(dq=dq)}
        _launch("dq", (tiles.shape[0], dq.shape[1]), inputs, arguments | gradient)
    else:
        _launch_cast(inputs, sums, row_lse, dq)
    return dq, dk, dv, dsinks


def _launch_keys(
    inputs: Inputs, arguments: dict[str, Any], sums: Tensor | None
) -> tuple[Tensor, Tensor]:
    dk, dv = inputs.k.new_empty(inputs.k.shape), inputs.v.new_empty(inputs.v.shape)
    tiles = inputs.tiles[1]
    gradients = {"dk_ptr": dk, "dv_ptr": dv, "dq_sums_ptr": sums, "tiles_ptr": tiles}
    gradients |= _strides(dk=dk, dv=dv)
    grid = (tiles.shape[0], dk.shape[1])
    for kernel in inputs.problem.keys_kernels:
        _launch(kernel, grid, inputs, arguments | gradients)
    return dk, dv


def _launch_cast(inputs: Inputs, sums: Tensor, row_lse: Tensor, dq: Tensor) -> None:
    arguments = {
        "dq_sums_ptr": sums,
        "row_lse_ptr": row_lse,
        "dq_ptr": dq,
        "softmax_scale": inputs.softmax_scale,
        "total_queries": dq.shape[0],
        "padded_queries": row_lse.shape[1],
        **_strides(dq=dq),
    }
    rows = configurations.configuration("dq_cast", inputs.problem).BLOCK_M
    _launch("dq_cast", (row_lse.shape[1] // rows, dq.shape[1]), inputs, arguments)


def _launch_delta(
    inputs: Inputs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    total_queries, heads, _ = inputs.q.shape
    tiles = triton.cdiv(total_queries, DELTA_BLOCK)
    row_lse, delta = lse.new_empty(2, heads, tiles * DELTA_BLOCK).unbind()
    partial = None if inputs.sinks is None else lse.new_empty(tiles, heads)
    arguments = {
        "out_ptr": out,
        "dout_ptr": dout,
        "lse_ptr": lse,
        "dlse_ptr": dlse,
        "sinks_ptr": inputs.sinks,
        "row_lse_ptr": row_lse,
        "delta_ptr": delta,
        "dsinks_ptr": partial,
        "total_queries": total_queries,
        "padded_queries": tiles * DELTA_BLOCK,
        **_strides(out=out, dout=dout),
    }
    _launch("delta", (tiles, heads), inputs, arguments)
    if partial is None or inputs.sinks is None:
        return row_lse, delta, lse.new_empty(0)
    return row_lse, delta, partial.sum(0).to(inputs.sinks.dtype)


KERNELS: dict[KernelName, Any] = {
    "forward": forward_kernel,
    "delta": delta_kernel,
    "dkdv": dkdv_kernel,
    "dk": dkdv_kernel,
    "dv": dkdv_kernel,
    "dq": dq_kernel,
    "fused": dkdv_kernel,
    "dq_cast": dq_cast_kernel,
}


def _launch(
    kernel: KernelName, grid: tuple[int, int], inputs: Inputs, arguments: dict[str, Any]
) -> None:
    if 0 in grid:
        return
    constants = configurations.constants(kernel, inputs.problem)
    options = configurations.options(kernel, inputs.problem)
    with on_device(inputs.q.device):
        KERNELS[kernel][grid](**arguments, **constants, **options)


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Strides of token and head, in elements, as the kernels name them."""
    strides = {}
    for name, x in tensors.items():
        strides[f"{name}_stride_t"], strides[f"{name}_stride_h"] = x.stride(0), x.stride(1)
    return strides


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
