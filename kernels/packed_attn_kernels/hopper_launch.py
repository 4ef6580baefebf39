"""Launches `hopper_forward.py`, and says what it and `hopper_backward.py` cannot run.

A kernel's module is imported by its first launch: other GPUs and the interpreter need no Gluon.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from packed_attn_kernels import configurations, gpu
from packed_attn_kernels.configurations import HopperConfiguration, Problem
from packed_attn_kernels.rules import INTERPRETED

if TYPE_CHECKING:
    from packed_attn_kernels.launch import Inputs

HopperKernel = Literal["forward", "backward"]

# Query rows of a warpgroup, as in `hopper_forward.py`; a tile has two.
ROWS = 64
# Bytes that addresses and row strides of a matrix must be multiples of to be copied (TMA).
ALIGNMENT = 16
# The kernel starts the other warps itself.
HOPPER_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def reasons_against_hopper(inputs: Inputs) -> list[str]:
    """Why the portable forward must run; empty where the Hopper kernel may."""
    problem = inputs.problem
    if (problem.width, problem.itemsize, problem.halves) not in configurations.HOPPER_FORWARD:
        return ["HOPPER_FORWARD does not name this head_dim, element size and mask"]
    reasons = _reasons_against("forward", inputs)
    for name, x in (("q", inputs.q), ("k", inputs.k), ("v", inputs.v)):
        if x.data_ptr() % ALIGNMENT:
            reasons.append(f"{name} does not begin at a multiple of {ALIGNMENT} bytes")
    if configurations.tile_rows(problem)[0] != 2 * ROWS:
        reasons.append(f"it needs tiles of {2 * ROWS} rows")
    return reasons


def reasons_against_hopper_backward(inputs: Inputs) -> list[str]:
    """Why a portable backward must run; empty where the Hopper kernel may.

    Nothing but what `faster_backward` knows too decides, unless "fused" was asked for by name.
    """
    problem = inputs.problem
    reasons = _reasons_against("backward", inputs)
    if not problem.fused:
        reasons.append("it adds dq in any order")
    if any(configurations.tile_rows(x)[1] != 2 * ROWS for x in (problem, split_problem(problem))):
        reasons.append(f"it needs tiles of {2 * ROWS} keys")
    return reasons


@lru_cache
def split_problem(problem: Problem) -> Problem:
    """The problem of the kernels that repair."""
    return replace(problem, fused=False)


def reasons_against_hopper_kernel(
    kernel: HopperKernel, problem: Problem, capability: tuple[int, int]
) -> list[str]:
    """What a problem or a GPU has that this Hopper kernel does not take.

    What HOPPER_FORWARD does not name is no reason here: tuning times it all the same.
    """
    reasons = []
    if problem.itemsize != 2:
        reasons.append("it needs half precision")
    if problem.head_dim != problem.value_dim or problem.head_dim not in configurations.HOPPER:
        reasons.append("it needs head_dim 64, 128 or 256, of v too")
    if problem.has_alibi or problem.has_dropout:
        reasons.append("it has neither ALiBi nor dropout")
    if kernel == "backward":
        if (problem.width, problem.itemsize) not in configurations.HOPPER_BACKWARD:
            reasons.append("HOPPER_BACKWARD does not name this head_dim and element size")
        if problem.halves == "both":
            reasons.append("it knows the half of the rule that keys hold alone")
        if problem.has_softcap:
            reasons.append("it has no softcap")
    if INTERPRETED or torch.version.hip is not None or capability[0] != 9:
        reasons.append("it needs an NVIDIA GPU of compute capability 9.x")
    return reasons


def _reasons_against(kernel: HopperKernel, inputs: Inputs) -> list[str]:
    reasons = [*_kernel_reasons(kernel, inputs.problem, gpu.capability(inputs.q.device))]
    return reasons + reasons_against_hopper_inputs(
        inputs.softmax_scale, q=inputs.q, k=inputs.k, v=inputs.v
    )


# A layer asks at every step; `reasons_against_hopper_kernel` itself a compiler traces.
@lru_cache
def _kernel_reasons(
    kernel: HopperKernel, problem: Problem, capability: tuple[int, int]
) -> tuple[str, ...]:
    return tuple(reasons_against_hopper_kernel(kernel, problem, capability))


def reasons_against_hopper_inputs(softmax_scale: float, **tensors: Tensor) -> list[str]:
    """What a scale or named tensors have that neither Hopper kernel takes; reads strides alone."""
    reasons = [] if softmax_scale > 0.0 else ["it needs a positive softmax_scale"]
    for name, x in tensors.items():
        if _matrix(x) is None:
            reasons.append(f"the strides {x.stride()} of {name} show no matrix that can be copied")
    return reasons


def launch_hopper_forward(inputs: Inputs, arguments: dict[str, Any]) -> None:
    """Fills the out and lse of `arguments`, which are those of the portable kernel."""
    problem = inputs.problem
    chosen = configurations.HOPPER[problem.head_dim]
    heads, tiles = inputs.q.shape[1], inputs.tiles[0].shape[0]
    items = heads * tiles
    if items == 0:
        return
    from packed_attn_kernels.hopper_forward import ITEMS, hopper_forward_kernel

    views = {}
    for name, rows in (("q", ROWS), ("k", chosen.BLOCK_N), ("v", chosen.BLOCK_N)):
        views |= described(name, arguments[f"{name}_ptr"], rows)
    key_blocks = inputs.tiles[3]
    for name in ("query_start", "query_stop"):
        line = arguments[f"{name}_ptr"] if problem.halves != "either" else None
        views[f"{name}_desc"] = None if line is None else described_line(line, chosen.BLOCK_N)
    shared = (
        "out_ptr", "lse_ptr", "sinks_ptr", "tiles_ptr", "key_start_ptr", "key_stop_ptr",
        "softmax_scale", "softcap", "total_queries", "out_stride_t", "out_stride_h",
    )  # fmt: skip
    views |= {name: arguments[name] for name in shared}
    views |= {"group": problem.group, "heads": heads, "items": items}
    views |= {"blocks_ptr": key_blocks, "key_blocks": key_blocks.shape[1]}
    views["flags_ptr"] = inputs.q.new_zeros(ITEMS.value + items, dtype=torch.int32)
    grid = (min(items, _multiprocessors(inputs.q.device)),)
    for confined in (False, True):
        constants = hopper_constants(problem, chosen, confined)
        hopper_forward_kernel[grid](**views, **constants, **HOPPER_OPTIONS)


def hopper_constants(
    problem: Problem, chosen: HopperConfiguration, confined: bool = False
) -> dict[str, Any]:
    """The compile-time arguments of the Hopper forward, or of its repair of leaks, by name."""
    return {
        "HEAD_DIM": problem.head_dim,
        "BLOCK_N": chosen.BLOCK_N,
        # The repair keeps a block of v for each warpgroup besides, and its speed is no matter.
        "STAGES": 1 if confined else chosen.stages,
        "PRODUCER_REGISTERS": chosen.producer_registers,
        "CONSUMER_REGISTERS": chosen.consumer_registers,
        "Q_SLOTS": chosen.q_slots,
        "OUT_IN_Q": chosen.out_in_q,
        "AHEAD": chosen.ahead and not confined,
        "CARRIED": chosen.carried and not confined,
        "TURNS": chosen.turns and not confined,
        "UNROLLED": chosen.unrolled,
        "CONFINED": confined,
        **configurations.halves_constants("forward", problem.halves),
        "HAS_SOFTCAP": problem.has_softcap,
        "HAS_SINKS": problem.has_sinks,
    }


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def copyable(x: Tensor) -> Tensor:
    """The tensor, or a copy of it where its place or strides keep TMA from copying blocks."""
    if _matrix(x) is not None and x.data_ptr() % ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


@lru_cache
def block_layout(rows: int, head_dim: int) -> Any:
    """How a block `[rows, head_dim]` of half precision stands in shared memory."""
    from triton.experimental.gluon import language as gl

    # Both dtypes of half precision have the same layout.
    block = [rows, head_dim]
    return gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)  # pyright: ignore[reportCallIssue]


def described(name: str, x: Tensor, rows: int) -> dict[str, Any]:
    """The kernel's arguments for blocks of `rows` rows of a tensor `[tokens, heads, head_dim]`."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    matrix = _matrix(x)
    if matrix is None:
        raise ValueError(f"{name} must show a matrix, but its strides are {x.stride()}")
    shape, row_step, column_step = matrix
    block = [rows, x.shape[2]]
    strides = [x.stride(0), 1]
    return {
        f"{name}_desc": TensorDescriptor(x, shape, strides, block, block_layout(*block)),
        f"{name}_row_step": row_step,
        f"{name}_column_step": column_step,
    }


@lru_cache
def line_layout() -> Any:
    """How a block of a line of 32 bits stands in shared memory."""
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout(0, 32, rank=1)


def described_line(x: Tensor, length: int) -> Any:
    """A contiguous tensor of 32 bits as a line, for blocks of `length`."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(x, [x.numel()], [1], [length], line_layout())


def _matrix(x: Tensor) -> tuple[list[int], int, int] | None:
    """A tensor `[tokens, heads, head_dim]` as one matrix whose rows are a token's stride apart.

    Returns (its shape, the rows and the columns from one head to the next): heads stand beside
    each other in a token's row, or below each other; None where neither is so or the hardware
    could not copy it wherever it begins. Rows past the last token of a head are zeros or the next
    head's.
    """
    tokens, heads, head_dim = x.shape
    row, head, _ = x.stride()
    size = x.itemsize
    if tokens == 0 or row * size % ALIGNMENT or row < head_dim:
        return None
    columns = (heads - 1) * head + head_dim
    if columns <= row:
        return [tokens, columns], 0, head
    rows = (heads - 1) * (head // row) + tokens
    if head % row == 0 and rows < 2**31:
        return [rows, head_dim], head // row, 0
    return None
