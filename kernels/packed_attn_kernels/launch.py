"""Launches the kernels on plain tensors: grids, strides, workspaces; not differentiable.

Outputs and workspaces come from `torch.empty`: the kernels write every element that anyone reads.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import triton
from torch import Tensor

from packed_attn_kernels import configurations
from packed_attn_kernels.backward import delta_kernel, dkdv_kernel, dq_kernel
from packed_attn_kernels.configurations import DELTA_BLOCK, KernelName, Problem
from packed_attn_kernels.forward import forward_kernel


@dataclass(frozen=True, eq=False)
class Inputs:
    """The inputs of one call; shapes as in `interval_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_start: Tensor
    key_stop: Tensor
    query_start: Tensor
    query_stop: Tensor
    sinks: Tensor | None
    softmax_scale: float
    softcap: float | None
    halves: str

    @property
    def problem(self) -> Problem:
        """What the kernels are specialised for."""
        return Problem(
            head_dim=self.q.shape[-1],
            value_dim=self.v.shape[-1],
            group=self.q.shape[1] // self.k.shape[1],
            itemsize=self.q.itemsize,
            halves=cast(Literal["either", "query", "both"], self.halves),
            has_softcap=self.softcap is not None,
            has_sinks=self.sinks is not None,
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """The kernel arguments that every kernel but delta takes."""
        return {
            "q_ptr": self.q,
            "k_ptr": self.k,
            "v_ptr": self.v,
            "key_start_ptr": self.key_start,
            "key_stop_ptr": self.key_stop,
            "query_start_ptr": self.query_start,
            "query_stop_ptr": self.query_stop,
            "softmax_scale": self.softmax_scale,
            "softcap": self.softcap,
            "total_queries": self.q.shape[0],
            "total_keys": self.k.shape[0],
            **_strides(q=self.q, k=self.k, v=self.v),
        }


def launch_forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """out `[total_queries, heads, value_dim]` and lse `[heads, total_queries]`, natural."""
    total_queries, heads, _ = inputs.q.shape
    out = inputs.q.new_empty(total_queries, heads, inputs.v.shape[-1])
    lse = inputs.q.new_empty(heads, total_queries, dtype=torch.float32)
    arguments = inputs.arguments | {"out_ptr": out, "lse_ptr": lse, "sinks_ptr": inputs.sinks}
    tiles = triton.cdiv(total_queries, _configuration("forward", inputs).BLOCK_M)
    _launch("forward", (tiles, heads), inputs, arguments | _strides(out=out))
    return out, lse


def launch_backward(
    inputs: Inputs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv in their inputs' dtypes, contiguous, and dsinks (empty without sinks)."""
    row_lse, delta, dsinks = _launch_delta(inputs, out, lse, dout, dlse)
    dq, dk, dv = (x.new_empty(x.shape) for x in (inputs.q, inputs.k, inputs.v))
    arguments = inputs.arguments | {
        "dout_ptr": dout,
        "row_lse_ptr": row_lse,
        "delta_ptr": delta,
        "padded_queries": row_lse.shape[1],
        **_strides(dout=dout),
    }
    tiles = triton.cdiv(inputs.k.shape[0], _configuration("dkdv", inputs).BLOCK_N)
    gradients = {"dk_ptr": dk, "dv_ptr": dv, **_strides(dk=dk, dv=dv)}
    _launch("dkdv", (tiles, inputs.k.shape[1]), inputs, arguments | gradients)
    tiles = triton.cdiv(inputs.q.shape[0], _configuration("dq", inputs).BLOCK_M)
    gradients = {"dq_ptr": dq, **_strides(dq=dq)}
    _launch("dq", (tiles, inputs.q.shape[1]), inputs, arguments | gradients)
    return dq, dk, dv, dsinks


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
    "dq": dq_kernel,
}


def _launch(
    kernel: KernelName, grid: tuple[int, int], inputs: Inputs, arguments: dict[str, Any]
) -> None:
    if 0 in grid:
        return
    constants = configurations.constants(kernel, inputs.problem)
    options = configurations.options(kernel, inputs.problem)
    with _on(inputs.q.device):
        KERNELS[kernel][grid](**arguments, **constants, **options)


def _configuration(kernel: KernelName, inputs: Inputs) -> configurations.Configuration:
    return configurations.configuration(kernel, inputs.problem)


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Strides of token and head, in elements, as the kernels name them."""
    strides = {}
    for name, x in tensors.items():
        strides[f"{name}_stride_t"], strides[f"{name}_stride_h"] = x.stride(0), x.stride(1)
    return strides


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
