"""The launch configuration of every kernel: one literal table, read by the launches and the gate.

Keyed on the padded head_dim and the element size, never on the number of tokens: a new batch
compiles nothing. The compile gate holds the rows of half precision to no spills on sm_90.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

KernelName = Literal["forward", "delta", "dkdv", "dq", "fused", "dq_cast"]

# Offsets inside a block are 32-bit, and a block has at most 128 rows.
LARGEST_TOKEN_STRIDE = 2**24
# Rows of the delta kernel, which also pads lse and delta: every BLOCK_M below divides it.
DELTA_BLOCK = 128
# Tokens that one look for visible blocks covers in a forest; every block divides it.
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
    has_alibi: bool = False
    has_dropout: bool = False
    fused: bool = False  # one backward kernel with atomic additions, instead of dkdv and dq

    @property
    def block_d(self) -> int:
        return padded(self.head_dim)

    @property
    def block_dv(self) -> int:
        return padded(self.value_dim)

    @property
    def keys_kernel(self) -> Literal["dkdv", "fused"]:
        """The backward kernel whose tiles are keys."""
        return "fused" if self.fused else "dkdv"

    @property
    def width(self) -> int:
        """The table's head_dim: 64, 128 or 256."""
        return next(w for w in (64, 128, 256) if max(self.block_d, self.block_dv) <= w)


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

# One kernel for dk, dv and, by atomic additions in float32, dq.
FUSED: dict[tuple[int, int], Configuration] = {
    (64, 2): Configuration(32, 128, 8, 2),
    (128, 2): Configuration(32, 64, 8, 2),
    (256, 2): Configuration(32, 64, 8, 1),
    (64, 4): Configuration(32, 64, 4, 1),
    (128, 4): Configuration(32, 32, 4, 1),
    (256, 4): Configuration(16, 16, 4, 1),
}

# (largest padded head_dim, bytes an element) for which `deterministic=False` takes the fused
# backward. Empty, because no GPU has timed the two yet.
FUSED_IS_FASTER: frozenset[tuple[int, int]] = frozenset()

# Both halves of the rule need more registers; only a forest with a window or chunks has both.
BOTH_HALVES: dict[tuple[KernelName, int, int], Configuration] = {
    ("dkdv", 64, 2): Configuration(32, 128, 8, 2),
    ("dkdv", 128, 2): Configuration(32, 64, 8, 2),
}


def configuration(kernel: KernelName, problem: Problem) -> Configuration:
    """The table's row for a problem."""
    if kernel in ("delta", "dq_cast"):
        return Configuration(DELTA_BLOCK, 0, 4, 1)
    if kernel == "fused":
        return FUSED[problem.width, problem.itemsize]
    key = (kernel, problem.width, problem.itemsize)
    if problem.halves == "both" and key in BOTH_HALVES:
        return BOTH_HALVES[key]
    return TABLE[key]


def tile_rows(problem: Problem) -> tuple[int, int, int]:
    """Rows of a tile of the forward, of the kernel that makes dk and dv, and of dq."""
    keys = configuration(problem.keys_kernel, problem).BLOCK_N
    return configuration("forward", problem).BLOCK_M, keys, configuration("dq", problem).BLOCK_M


def constants(kernel: KernelName, problem: Problem) -> dict[str, Any]:
    """The compile-time arguments of a kernel, by name."""
    chosen = configuration(kernel, problem)
    if kernel == "delta":
        return {
            "VALUE_DIM": problem.value_dim,
            "BLOCK_DV": problem.block_dv,
            "BLOCK_M": chosen.BLOCK_M,
            "HAS_SINKS": problem.has_sinks,
            "ACCURATE": problem.itemsize == 4,
        }
    common = {"HEAD_DIM": problem.head_dim, "BLOCK_D": problem.block_d, "BLOCK_M": chosen.BLOCK_M}
    if kernel == "dq_cast":
        return common | {"SUM_BLOCK": configuration("fused", problem).BLOCK_M}
    constants = (
        common
        | {
            "GROUP": problem.group,
            "VALUE_DIM": problem.value_dim,
            "BLOCK_DV": problem.block_dv,
            "BLOCK_N": chosen.BLOCK_N,
            "SPAN": SPAN,
            "LOOP_STAGES": chosen.stages,
            "HAS_SOFTCAP": problem.has_softcap,
            "HAS_ALIBI": problem.has_alibi,
            "HAS_DROPOUT": problem.has_dropout,
            "ACCURATE": problem.itemsize == 4,
        }
        | _halves(kernel, problem.halves)
    )
    if kernel in ("dkdv", "fused"):
        constants["FUSED"] = kernel == "fused"
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
        by_keys = kernel in ("dkdv", "fused")
        return {"KEY_HALF": not by_keys, "QUERY_HALF": by_keys}
    return {"KEY_HALF": halves == "both", "QUERY_HALF": True}
