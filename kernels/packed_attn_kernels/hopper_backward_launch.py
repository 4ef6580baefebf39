"""Launches the backward of `hopper_backward.py` and what follows it."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from packed_attn_kernels import configurations
from packed_attn_kernels.backward_repair import (
    repair_dkdv_kernel,
    repair_dq_kernel,
    shares_cast_kernel,
)
from packed_attn_kernels.configurations import HopperBackwardConfiguration, KernelName, Problem
from packed_attn_kernels.hopper_launch import (
    HOPPER_OPTIONS,
    ROWS,
    copyable,
    described,
    described_line,
    split_problem,
)

if TYPE_CHECKING:
    from packed_attn_kernels.launch import Inputs

# Programs of a kernel that repairs: what they cost is paid where nothing is broken too.
PROGRAMS = 264
# Floats behind the sums for the flag; they keep the sums' end aligned.
FLAG = 16
# Rows and columns of a share of dq in memory: it is of 64 queries and 64 columns.
SHARE = [128, 32]


def launch_hopper_backward(
    inputs: Inputs, arguments: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in their inputs' dtypes, contiguous; arguments are those of the portable dq."""
    q, k, v = inputs.q, inputs.k, inputs.v
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    strides = {}
    for name, x in (("dq", dq), ("dk", dk), ("dv", dv)):
        strides |= {f"{name}_stride_t": x.stride(0), f"{name}_stride_h": x.stride(1)}
    row_lse = arguments["row_lse_ptr"]
    # One tensor, so that one launch clears it: the flag stands behind the sums.
    cleared = row_lse.new_zeros(row_lse.numel() * q.shape[2] + FLAG)
    sums, flag = cleared[:-FLAG], cleared[-FLAG:].view(torch.int32)
    arguments = arguments | strides | {"dq_ptr": dq, "dk_ptr": dk, "dv_ptr": dv, "flag_ptr": flag}
    _launch_gradients(inputs, arguments, sums)
    _launch_shares_cast(inputs, arguments, sums)
    _launch_backward_repair(inputs, arguments)
    return dq, dk, dv


def _launch_gradients(inputs: Inputs, arguments: dict[str, Any], sums: Tensor) -> None:
    from packed_attn_kernels.hopper_backward import hopper_backward_kernel

    problem, tiles = inputs.problem, inputs.tiles[1]
    chosen = configurations.HOPPER_BACKWARD_TABLE[problem.head_dim]
    views = {}
    for name, rows in (("q", chosen.BLOCK_M), ("k", ROWS), ("v", ROWS), ("dout", chosen.BLOCK_M)):
        views |= described(name, copyable(arguments[f"{name}_ptr"]), rows)
    for name in ("row_lse", "delta"):
        views[f"{name}_desc"] = described_line(arguments[f"{name}_ptr"], chosen.BLOCK_M)
    shared = (
        "dk_ptr", "dv_ptr", "flag_ptr", "query_start_ptr", "query_stop_ptr", "softmax_scale",
        "padded_queries",
    )  # fmt: skip
    hopper_backward_kernel[tiles.shape[0], inputs.k.shape[1]](
        **views,
        **{name: arguments[name] for name in shared},
        sums_desc=_shares(sums),
        tiles_ptr=tiles,
        stride_t=arguments["dk_stride_t"],
        stride_h=arguments["dk_stride_h"],
        group=problem.group,
        **hopper_backward_constants(problem, chosen),
        **HOPPER_OPTIONS,
    )


def _launch_shares_cast(inputs: Inputs, arguments: dict[str, Any], sums: Tensor) -> None:
    _, heads, head_dim = inputs.q.shape
    grid = (arguments["padded_queries"] // ROWS, heads, head_dim // ROWS)
    shares_cast_kernel[grid](
        **_taken(shares_cast_kernel, arguments),
        **{"dq_sums_ptr": sums, "HEAD_DIM": head_dim},
        **HOPPER_OPTIONS,
    )


def _launch_backward_repair(inputs: Inputs, arguments: dict[str, Any]) -> None:
    problem = split_problem(inputs.problem)
    heads, kv_heads = inputs.q.shape[1], inputs.k.shape[1]
    kernels: tuple[tuple[Any, KernelName, Tensor, dict[str, int]], ...] = (
        (repair_dkdv_kernel, "dkdv", inputs.tiles[1], {"kv_heads": kv_heads}),
        (repair_dq_kernel, "dq", inputs.tiles[2], {"heads": heads}),
    )
    for kernel, name, tiles, counts in kernels:
        kernel[(PROGRAMS,)](
            **_taken(kernel, arguments),
            **counts | {"tiles_ptr": tiles, "tiles": tiles.shape[0]},
            **backward_repair_constants(name, problem),
            **configurations.options(name, problem),
        )


def _taken(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a kernel has."""
    return {name: arguments[name] for name in kernel.arg_names if name in arguments}


def hopper_backward_constants(
    problem: Problem, chosen: HopperBackwardConfiguration
) -> dict[str, Any]:
    """The compile-time arguments of the Hopper backward, by name."""
    return {
        "HEAD_DIM": problem.head_dim,
        "BLOCK_M": chosen.BLOCK_M,
        "STAGES": chosen.stages,
        "PRODUCER_REGISTERS": chosen.producer_registers,
        "CONSUMER_REGISTERS": chosen.consumer_registers,
    }


def backward_repair_constants(kernel: KernelName, problem: Problem) -> dict[str, Any]:
    """The compile-time arguments of a kernel that repairs the backward, by name."""
    names = ("GROUP", "HEAD_DIM", "BLOCK_M", "BLOCK_N")
    if kernel == "dq":
        names += ("SPAN", "KEY_HALF", "QUERY_HALF")
    constants = configurations.constants(kernel, problem)
    return {name: constants[name] for name in names}


@lru_cache
def share_layout() -> Any:
    """How a share of dq, as `SHARE`, stands in shared memory."""
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for(SHARE, gl.float32)  # pyright: ignore[reportCallIssue]


def _shares(sums: Tensor) -> Any:
    """Sums of dq as a matrix of shares."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    columns = SHARE[1]
    shape = [sums.numel() // columns, columns]
    return TensorDescriptor(sums, shape, [columns, 1], SHARE, share_layout())
