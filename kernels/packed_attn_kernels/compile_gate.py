"""Compiles a kernel for a GPU on a machine without one and reads its machine code.

Uses the ptxas, cuobjdump and nvdisasm inside the triton wheel, and the same configurations that
the launches use.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from packed_attn_kernels.backward_repair import (
    repair_dkdv_kernel,
    repair_dq_kernel,
    shares_cast_kernel,
)
from packed_attn_kernels.configurations import (
    HOPPER,
    HOPPER_BACKWARD_TABLE,
    Architecture,
    Configuration,
    HopperBackwardConfiguration,
    HopperConfiguration,
    KernelName,
    Problem,
    constants,
    options,
)
from packed_attn_kernels.hopper_backward_launch import (
    SHARE,
    backward_repair_constants,
    hopper_backward_constants,
    share_layout,
)
from packed_attn_kernels.hopper_launch import (
    HOPPER_OPTIONS,
    ROWS,
    block_layout,
    hopper_constants,
    line_layout,
)
from packed_attn_kernels.launch import KERNELS

FLOAT32 = (
    "lse_ptr",
    "dlse_ptr",
    "row_lse_ptr",
    "delta_ptr",
    "dsinks_ptr",
    "sinks_ptr",
    "alibi_ptr",
    "dq_sums_ptr",
)
# Columns that a block may have.
TENSOR_MEMORY = 512


@dataclass(frozen=True)
class Gpu:
    """What a block may have of a GPU, whose rows of the table it takes, and how it multiplies."""

    shared_memory: int  # bytes
    architecture: Architecture
    product: str  # its instruction of the machine code


# By compute capability: A100; RTX 30; RTX 40, L4 and L40S; H100 and H200; B200; RTX 50.
GPUS = {
    80: Gpu(163 * 1024, "ampere", "HMMA"),
    86: Gpu(99 * 1024, "ampere", "HMMA"),
    89: Gpu(99 * 1024, "ampere", "HMMA"),
    90: Gpu(227 * 1024, "hopper", "HGMMA"),
    100: Gpu(227 * 1024, "hopper", "UTCHMMA"),
    120: Gpu(99 * 1024, "ampere", "HMMA"),
}


def instructions(sm: int) -> dict[str, str]:
    """The instruction of a GPU's machine code that a count of `Resources` counts."""
    return {
        "products": GPUS[sm].product,
        "tensor_copies": "UTMALDG",
        "register_changes": "USETMAXREG",
    }


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs. Bytes, except registers a thread and instruction counts."""

    registers: int
    stack: int
    shared_memory: int
    spills: int  # local loads and stores
    products: int  # of matrices; these three by `instructions`
    tensor_copies: int = 0  # blocks copied by TMA
    register_changes: int = 0  # registers handed from one role of warps to another
    races: int = 0  # see `unordered_products`
    tensor_memory: int = 0  # columns, which data centers' Blackwell has

    def faults(self, *needed: str, sm: int = 90) -> list[str]:
        """Why the gate must stay shut, in sentences; `needed` are counts that must not be 0."""
        faults, limit = [], GPUS[sm].shared_memory
        if self.stack or self.spills:
            faults.append(f"spills: {self.stack} bytes of stack, {self.spills} local accesses")
        if self.shared_memory > limit:
            faults.append(f"{self.shared_memory} bytes of shared memory, over {limit}")
        if self.tensor_memory > TENSOR_MEMORY:
            faults.append(f"{self.tensor_memory} columns of tensor memory, over {TENSOR_MEMORY}")
        faults += [f"no {instructions(sm)[name]}" for name in needed if not getattr(self, name)]
        if self.races:
            faults.append(f"{self.races} products may read operands before they are stored")
        return faults


def compile_kernel(
    kernel: KernelName,
    problem: Problem,
    element: str,
    chosen: Configuration | None = None,
    sm: int = 90,
) -> Resources:
    """The resources of a kernel as the launch would compile it for `element` ("bf16", ...).

    `chosen` replaces the table's configuration, which is that of the problem's architecture.
    """
    function = KERNELS[kernel]
    values = constants(kernel, problem, chosen)
    signature = {name: _argument_type(name, element) for name in function.arg_names}
    values |= dict.fromkeys(_absent_arguments(kernel, problem) & set(function.arg_names))
    return compile_function(function, signature, values, options(kernel, problem, chosen), sm=sm)


def compile_hopper_forward(
    problem: Problem,
    element: str,
    chosen: HopperConfiguration | None = None,
    confined: bool = False,
) -> Resources:
    """The resources of the Hopper forward or its repair; imported here, as by its launch."""
    from triton.experimental.gluon._runtime import GluonASTSource

    from packed_attn_kernels.hopper_forward import hopper_forward_kernel

    chosen = chosen or HOPPER[problem.head_dim]
    values = hopper_constants(problem, chosen, confined)
    values |= dict.fromkeys(_absent_arguments("forward", problem) & {"sinks_ptr", "softcap"})
    signature = {name: _argument_type(name, element) for name in hopper_forward_kernel.arg_names}
    for name, rows in (("q", ROWS), ("k", chosen.BLOCK_N), ("v", chosen.BLOCK_N)):
        block = [rows, problem.head_dim]
        signature[f"{name}_desc"] = f"tensordesc<{element}{block},{block_layout(*block)!r}>"
    for name in ("query_start_desc", "query_stop_desc"):
        signature[name] = f"tensordesc<i32{[chosen.BLOCK_N]},{line_layout()!r}>"
        values |= {name: None} if problem.halves == "either" else {}
    return compile_function(
        hopper_forward_kernel, signature, values, HOPPER_OPTIONS, source=GluonASTSource
    )


def compile_hopper_backward(
    problem: Problem, element: str, chosen: HopperBackwardConfiguration | None = None
) -> Resources:
    """The resources of the Hopper backward; its module is imported here, as by its launch."""
    from triton.experimental.gluon._runtime import GluonASTSource

    from packed_attn_kernels.hopper_backward import hopper_backward_kernel

    chosen = chosen or HOPPER_BACKWARD_TABLE[problem.head_dim]
    signature = {name: _argument_type(name, element) for name in hopper_backward_kernel.arg_names}
    for name, rows in (("q", chosen.BLOCK_M), ("k", ROWS), ("v", ROWS), ("dout", chosen.BLOCK_M)):
        block = [rows, problem.head_dim]
        signature[f"{name}_desc"] = f"tensordesc<{element}{block},{block_layout(*block)!r}>"
    for name in ("row_lse_desc", "delta_desc"):
        signature[name] = f"tensordesc<fp32{[chosen.BLOCK_M]},{line_layout()!r}>"
    signature["sums_desc"] = f"tensordesc<fp32{SHARE},{share_layout()!r}>"
    values = hopper_backward_constants(problem, chosen)
    return compile_function(
        hopper_backward_kernel, signature, values, HOPPER_OPTIONS, source=GluonASTSource
    )


def compile_shares_cast(problem: Problem, element: str) -> Resources:
    """The resources of the kernel that makes dq from the sums of the Hopper backward."""
    signature = {name: _argument_type(name, element) for name in shares_cast_kernel.arg_names}
    values = {"HEAD_DIM": problem.head_dim}
    return compile_function(shares_cast_kernel, signature, values, HOPPER_OPTIONS)


def compile_backward_repair(kernel: KernelName, problem: Problem, element: str) -> Resources:
    """The resources of the kernel that does "dkdv" or "dq" again after the Hopper backward."""
    function = {"dkdv": repair_dkdv_kernel, "dq": repair_dq_kernel}[kernel]
    signature = {name: _argument_type(name, element) for name in function.arg_names}
    values = backward_repair_constants(kernel, problem)
    return compile_function(function, signature, values, options(kernel, problem))


def compile_function(
    function: Any,
    signature: dict[str, str],
    values: dict[str, Any],
    launch: dict[str, Any],
    source: Any = ASTSource,
    sm: int = 90,
) -> Resources:
    """The resources of a triton function with aligned pointers and strides.

    Args:
        signature: triton's type of each argument, by name.
        values: constants by name, None for what is absent; they go before the signature.
        launch: num_warps and other options of the compiler.
        source: the class of triton's that reads the function; Gluon has its own.
        sm: compute capability, a key of `GPUS`.
    """
    types = signature | dict.fromkeys(values, "constexpr")
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (position,): aligned
        for position, name in enumerate(function.arg_names)
        if name not in values and (name.endswith("_ptr") or "_stride_" in name)
    }
    constexprs = {(function.arg_names.index(name),): value for name, value in values.items()}
    parsed = source(function, signature=types, constexprs=constexprs, attrs=attributes)
    return _resources(triton.compile(parsed, target=GPUTarget("cuda", sm, 32), options=launch), sm)


def _absent_arguments(kernel: KernelName, problem: Problem) -> set[str]:
    """Arguments that the launch passes as None."""
    needed = {
        "dlse_ptr": False,
        "sinks_ptr": problem.has_sinks,
        "dsinks_ptr": problem.has_sinks,
        "softcap": problem.has_softcap,
        "alibi_ptr": problem.has_alibi,
        "query_position_ptr": problem.has_alibi,
        "key_position_ptr": problem.has_alibi,
        "seed_ptr": problem.has_dropout,
        "dropout_threshold": problem.has_dropout,
        "dropout_scale": problem.has_dropout,
        "dq_sums_ptr": kernel in ("fused", "dq_cast"),
    }
    return {name for name, is_needed in needed.items() if not is_needed}


def _argument_type(name: str, element: str) -> str:
    if name in ("softmax_scale", "softcap", "dropout_scale"):
        return "fp32"
    if not name.endswith("_ptr"):
        return "i32"
    if name in FLOAT32:
        return "*fp32"
    if name == "seed_ptr":
        return "*i64"
    if name.removesuffix("_ptr").endswith(
        ("_start", "_stop", "_position", "tiles", "flags", "flag")
    ):
        return "*i32"
    return f"*{element}"


def _resources(compiled: Any, sm: int) -> Resources:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage!r}")
    return Resources(
        registers=int(found[1]),
        stack=int(found[2]),
        shared_memory=compiled.metadata.shared,
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        races=unordered_products(compiled.asm["ptx"]),
        tensor_memory=compiled.metadata.tmem_size or 0,
        **{
            count: len(re.findall(rf"\b{name}\b", code)) for count, name in instructions(sm).items()
        },
    )


def unordered_products(ptx: str) -> int:
    """How many wgmma may read an operand in shared memory before another thread's store of it.

    Each storing thread must pass a fence between the proxies and then the barrier. Triton 3.6 puts
    the fence before the product, behind a barrier that some other exchange through shared memory
    has brought: then the stores of slower warps are not ordered, and bits change now and then.
    Tiles are stored as vectors; what is narrower belongs to a reduction. Stores of an earlier block
    of the program are long over.
    """
    races, stored, fenced, synced, in_group = 0, False, False, True, False
    for line in ptx.splitlines():
        if re.search(r"\bst\.shared\.v\d\.b(32|64)\b|\bstmatrix\b", line):
            stored, fenced, synced = True, False, False
        elif line.startswith("$L__"):
            stored = False
        elif "fence.proxy.async" in line:
            fenced, synced = stored, not stored
        elif re.search(r"\bbar\.sync\b|\bbarrier\.(cta\.)?sync\b", line):
            synced = synced or fenced
        elif "wgmma.mma_async" in line and not in_group:
            races += stored and not (fenced and synced)
            stored, in_group = False, True
        elif "wgmma.commit_group" in line:
            in_group = False
    return races


def _output(*command: Any) -> str:
    return subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True
    ).stdout
