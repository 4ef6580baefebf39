"""The launch configuration of every kernel: one literal table, read by the launches and the gate.

Keyed on the padded head_dim and the element size, never on the number of tokens: a new batch
compiles nothing. The compile gate holds the rows of half precision to no spills on sm_90.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

KernelName = Literal["forward", "delta", "dkdv", "dq"]

# Offsets inside a block are 32-bit, and a block has at most 128 rows.
LARGEST_TOKEN_STRIDE = 2**24
# Rows of the delta kernel, which also pads lse and delta: every BLOCK_M below divides it.
DELTA_BLOCK = 128
# Keys that one look for visible blocks covers in a forest; every BLOCK_N divides it.
SPAN = 1024


@dataclass(frozen=True)
class Configuration:
    """Tile sizes and pipeline of one kernel. BLOCK_M counts queries, BLOCK_N keys."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    stages: int


@dataclass(frozen=True)
class Problem:
    """What a kernel is specialised for."""

    head_dim: int
    value_dim: int
    group: int
    itemsize: int
    halves: Literal["either", "query", "both"]
    has_softcap: bool
    has_sinks: bool

    @property
    def block_d(self) -> int:
        return padded(self.head_dim)

    @property
    def block_dv(self) -> int:
        return padded(self.value_dim)


# (kernel, largest padded head_dim, bytes an element): configuration
TABLE: dict[tuple[KernelName, int, int], Configuration] = {
    ("forward", 64, 2): Configuration(128, 64, 8, 3),
    ("forward", 128, 2): Configuration(128, 64, 8, 2),
    ("forward", 256, 2): Configuration(64, 32, 8, 1),
    ("forward", 64, 4): Configuration(64, 32, 4, 2),
    ("forward", 128, 4): Configuration(64, 32, 8, 1),
    ("forward", 256, 4): Configuration(32, 16, 8, 1),
    ("dkdv", 64, 2): Configuration(64, 128, 8, 2),
    ("dkdv", 128, 2): Configuration(32, 128, 8, 3),
    ("dkdv", 256, 2): Configuration(32, 64, 8, 1),
    ("dkdv", 64, 4): Configuration(32, 64, 4, 1),
    ("dkdv", 128, 4): Configuration(32, 32, 4, 1),
    ("dkdv", 256, 4): Configuration(16, 16, 4, 1),
    ("dq", 64, 2): Configuration(128, 64, 8, 2),
    ("dq", 128, 2): Configuration(128, 64, 8, 2),
    ("dq", 256, 2): Configuration(64, 32, 8, 1),
    ("dq", 64, 4): Configuration(64, 32, 4, 1),
    ("dq", 128, 4): Configuration(32, 32, 4, 1),
    ("dq", 256, 4): Configuration(16, 16, 4, 1),
}

# Both halves of the rule need more registers; only a forest with a window or chunks has both.
BOTH_HALVES: dict[tuple[KernelName, int, int], Configuration] = {
    ("dkdv", 64, 2): Configuration(32, 128, 8, 2),
    ("dkdv", 128, 2): Configuration(32, 64, 8, 2),
}


def configuration(kernel: KernelName, problem: Problem) -> Configuration:
    """The table's row for a problem."""
    if kernel == "delta":
        return Configuration(DELTA_BLOCK, 0, 4, 1)
    largest = max(problem.block_d, problem.block_dv)
    width = next(w for w in (64, 128, 256) if largest <= w)
    key = (kernel, width, problem.itemsize)
    if problem.halves == "both" and key in BOTH_HALVES:
        return BOTH_HALVES[key]
    return TABLE[key]


def constants(kernel: KernelName, problem: Problem) -> dict[str, Any]:
    """The compile-time arguments of a kernel, by name."""
    chosen = configuration(kernel, problem)
    common = {"VALUE_DIM": problem.value_dim, "BLOCK_DV": problem.block_dv}
    if kernel == "delta":
        return common | {"BLOCK_M": chosen.BLOCK_M, "HAS_SINKS": problem.has_sinks}
    constants = (
        common
        | {
            "GROUP": problem.group,
            "HEAD_DIM": problem.head_dim,
            "BLOCK_D": problem.block_d,
            "BLOCK_M": chosen.BLOCK_M,
            "BLOCK_N": chosen.BLOCK_N,
            "LOOP_STAGES": chosen.stages,
            "HAS_SOFTCAP": problem.has_softcap,
            "ACCURATE": problem.itemsize == 4,
        }
        | _halves(kernel, problem.halves)
    )
    if kernel != "dkdv":
        constants["SPAN"] = SPAN
    if kernel == "forward":
        constants["HAS_SINKS"] = problem.has_sinks
    return constants


def options(kernel: KernelName, problem: Problem) -> dict[str, Any]:
    """The compiler's options for a kernel."""
    chosen = configuration(kernel, problem)
    # Said aloud because triton 3.10 changes its default.
    fusion = {"enable_fp_fusion": True}
    return fusion | {"num_warps": chosen.num_warps, "num_stages": chosen.stages}


def padded(dim: int) -> int:
    """The power of two, 16 at least, that a tile holds `dim` columns in."""
    return max(16, 1 << (dim - 1).bit_length())


def _halves(kernel: KernelName, halves: str) -> dict[str, bool]:
    """Which halves of the mask rule decide: where either would do, the one the tile's rows hold."""
    if halves == "either":
        return {"KEY_HALF": kernel != "dkdv", "QUERY_HALF": kernel == "dkdv"}
    return {"KEY_HALF": halves == "both", "QUERY_HALF": True}
