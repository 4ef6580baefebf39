"""The launch configuration of every kernel: literal tables, read by the launches and the gate.

Keyed on the padded head_dim and the element size, never on the number of tokens: a new batch
compiles nothing. TABLE is Hopper's, the other tables say where another row is taken. The compile
gate holds the rows of half precision to no spills on the GPUs that take them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

KernelName = Literal["forward", "delta", "dkdv", "dk", "dv", "dq", "fused", "dq_cast"]

Halves = Literal["either", "query", "both"]

# Whose rows a GPU takes, by how it multiplies and by its shared memory: see `gpu.py`.
Architecture = Literal["ampere", "hopper"]

# Kernels whose tiles are keys.
BY_KEYS: tuple[KernelName, ...] = ("dkdv", "dk", "dv", "fused")

# Offsets inside a block are 32-bit, and a block has at most 128 rows.
LARGEST_TOKEN_STRIDE = 2**24
# Rows of the delta kernel, which also pads lse and delta: every BLOCK_M below divides it.
DELTA_BLOCK = 128
# Tokens that one look for visible blocks covers in a forest; every block divides it.
SPAN = 1024
# Keys of a block of `Tiles.blocks`; every block of the Hopper forward divides it.
KEY_BLOCK = 128


@dataclass(frozen=True)
class Configuration:
    """Tile sizes and pipeline of one kernel. BLOCK_M counts queries, BLOCK_N keys."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    stages: int


@dataclass(frozen=True)
class HopperConfiguration:
    """Keys of a block and slots of its ring.

    `q_slots`: items whose q is in shared memory. `out_in_q`: out passes through q's place and has
    none of its own. `ahead`: an item begins before the one before it ends, with two slots of q.
    `carried`: a block's weights are multiplied when the next block's scores are; `turns`, with it:
    the warpgroups begin their products in turns. `unrolled`: blocks of one round of the loop.
    Registers are those of a thread; twice the consumers' and the producer's make at most 504.
    """

    BLOCK_N: int
    stages: int
    q_slots: int = 1
    out_in_q: bool = False
    ahead: bool = False
    carried: bool = False
    turns: bool = False
    unrolled: int = 2
    producer_registers: int = 24
    consumer_registers: int = 240


@dataclass(frozen=True)
class HopperBackwardConfiguration:
    """Queries of a block, slots of its ring; registers of a thread as in `HopperConfiguration`."""

    BLOCK_M: int
    stages: int
    producer_registers: int = 24
    consumer_registers: int = 240


@dataclass(frozen=True)
class Problem:
    """What a kernel is specialised for."""

    head_dim: int
    value_dim: int
    group: int
    itemsize: int
    halves: Halves
    has_softcap: bool
    has_sinks: bool
    has_alibi: bool = False
    has_dropout: bool = False
    fused: bool = False  # one backward kernel with atomic additions, instead of dkdv and dq
    architecture: Architecture = "hopper"

    @property
    def block_d(self) -> int:
        return padded(self.head_dim)

    @property
    def block_dv(self) -> int:
        # Where v's blocks are 16 or 32 columns wide beside wider ones of k, triton 3.6 miscompiles
        # the forward's walk without NaNs: on an H200 the first 16 rows of a tile alone are right.
        narrowest = min(64, self.block_d) if self.itemsize == 2 else 16
        return max(padded(self.value_dim), narrowest)

    @property
    def keys_kernels(self) -> tuple[KernelName, ...]:
        """The backward kernels whose tiles are keys; their tiles have the same rows."""
        if self.fused:
            return ("fused",)
        return ("dk", "dv") if (self.width, self.itemsize) == (256, 2) else ("dkdv",)

    @property
    def is_lean(self) -> bool:
        """Whether a modifier or the mask asks for smaller tiles."""
        return self.halves == "both" or self.has_alibi or self.has_dropout

    @property
    def width(self) -> int:
        """The table's head_dim: 64, 128 or 256."""
        widest = max(self.block_d, self.block_dv)
        return 64 if widest <= 64 else 128 if widest <= 128 else 256


# (kernel, largest padded head_dim, bytes an element): configuration
Table = dict[tuple[KernelName, int, int], Configuration]

# Half precision: the rows of the first product (queries; keys in the kernels by keys) are 16 a
# warp, or warpgroups compute the same scores twice. What limits a tile are registers: the 255 of a
# thread hold the accumulators, and each wgmma of a loop keeps its operands' addresses in two more.
TABLE: Table = {
    ("forward", 64, 2): Configuration(128, 64, 8, 3),
    ("forward", 128, 2): Configuration(128, 64, 8, 3),
    ("forward", 256, 2): Configuration(128, 16, 8, 2),
    ("forward", 64, 4): Configuration(64, 32, 4, 2),
    ("forward", 128, 4): Configuration(64, 32, 8, 1),
    ("forward", 256, 4): Configuration(32, 16, 8, 1),
    ("dkdv", 64, 2): Configuration(64, 128, 8, 2),
    ("dkdv", 128, 2): Configuration(32, 128, 8, 3),
    ("dk", 256, 2): Configuration(16, 128, 8, 1),
    ("dv", 256, 2): Configuration(16, 128, 8, 1),
    ("dkdv", 64, 4): Configuration(32, 64, 4, 1),
    ("dkdv", 128, 4): Configuration(32, 32, 4, 1),
    ("dkdv", 256, 4): Configuration(16, 16, 4, 1),
    ("dq", 64, 2): Configuration(128, 64, 8, 2),
    ("dq", 128, 2): Configuration(128, 64, 8, 2),
    ("dq", 256, 2): Configuration(128, 16, 8, 1),
    ("dq", 64, 4): Configuration(64, 32, 4, 1),
    ("dq", 128, 4): Configuration(32, 32, 4, 1),
    ("dq", 256, 4): Configuration(16, 16, 4, 1),
}

# Smaller tiles where both halves of the rule, ALiBi or dropout need registers of their own.
LEAN: Table = {
    ("forward", 128, 2): Configuration(128, 32, 8, 2),
    ("forward", 256, 2): Configuration(128, 16, 8, 1),
    ("dkdv", 64, 2): Configuration(32, 128, 8, 2),
    ("dkdv", 128, 2): Configuration(16, 128, 8, 2),
    ("dq", 64, 2): Configuration(128, 32, 8, 2),
    ("dq", 128, 2): Configuration(128, 32, 8, 2),
}

# Where a head_dim that is no power of two is padded to 128: masked columns need registers too.
PADDED: Table = {
    ("forward", 128, 2): Configuration(128, 32, 8, 2),
    ("dkdv", 128, 2): Configuration(16, 128, 8, 2),
}

# Where a warp multiplies by itself (mma.sync), operands take registers too: q of a forward tile, k
# and v of a tile of keys stay in them. These rows fit the 99 KB of shared memory that a block has
# on the smallest GPUs (RTX 30 to RTX 50, L4); an A100 has more.
AMPERE: Table = {
    ("forward", 128, 2): Configuration(128, 32, 8, 3),
    ("forward", 256, 2): Configuration(64, 32, 8, 2),
    ("dkdv", 64, 2): Configuration(32, 128, 8, 2),
    ("dkdv", 128, 2): Configuration(16, 128, 8, 2),
    ("dk", 256, 2): Configuration(32, 32, 8, 1),
    ("dv", 256, 2): Configuration(32, 32, 8, 1),
    ("dq", 64, 2): Configuration(128, 32, 8, 2),
    ("dq", 128, 2): Configuration(128, 32, 8, 2),
    ("dq", 256, 2): Configuration(32, 32, 8, 1),
}
AMPERE_LEAN: Table = {
    ("dk", 256, 2): Configuration(16, 32, 8, 1),
    ("dv", 256, 2): Configuration(16, 32, 8, 1),
    ("dq", 128, 2): Configuration(128, 16, 8, 2),
    ("dq", 256, 2): Configuration(16, 32, 4, 1),
}

# What `benchmarks/tune.py` times beside the rows above; some spill a little and may yet be faster.
CANDIDATES: dict[tuple[KernelName, int, int], tuple[Configuration, ...]] = {
    ("forward", 64, 2): (
        Configuration(128, 128, 8, 2),
        Configuration(128, 64, 8, 2),
        Configuration(64, 64, 4, 3),
    ),
    ("forward", 128, 2): (
        Configuration(128, 64, 8, 2),
        Configuration(128, 128, 8, 2),
        Configuration(64, 64, 4, 2),
    ),
    ("forward", 256, 2): (Configuration(128, 32, 8, 1), Configuration(64, 32, 4, 2)),
    ("dkdv", 64, 2): (
        Configuration(32, 128, 8, 3),
        Configuration(64, 128, 8, 3),
        Configuration(64, 64, 4, 2),
    ),
    ("dkdv", 128, 2): (
        Configuration(32, 128, 8, 2),
        Configuration(64, 128, 8, 2),
        Configuration(32, 64, 4, 2),
    ),
    ("dk", 256, 2): (Configuration(32, 128, 8, 1),),
    ("dv", 256, 2): (Configuration(32, 128, 8, 1),),
    ("dq", 64, 2): (
        Configuration(128, 64, 8, 3),
        Configuration(128, 128, 8, 2),
        Configuration(64, 64, 4, 2),
    ),
    ("dq", 128, 2): (
        Configuration(128, 32, 8, 3),
        Configuration(128, 64, 8, 1),
        Configuration(64, 64, 4, 2),
    ),
    ("dq", 256, 2): (Configuration(128, 32, 8, 1), Configuration(64, 16, 4, 1)),
}

# The same on GPUs of Ampere's kind.
AMPERE_CANDIDATES: dict[tuple[KernelName, int, int], tuple[Configuration, ...]] = {
    ("forward", 64, 2): (Configuration(128, 64, 8, 2), Configuration(64, 64, 4, 2)),
    ("forward", 128, 2): (Configuration(128, 64, 8, 2), Configuration(64, 32, 4, 2)),
    ("forward", 256, 2): (Configuration(64, 16, 8, 2), Configuration(64, 32, 8, 1)),
    ("dkdv", 64, 2): (Configuration(64, 128, 8, 2), Configuration(32, 64, 4, 2)),
    ("dkdv", 128, 2): (Configuration(16, 128, 8, 1), Configuration(32, 32, 4, 2)),
    ("dk", 256, 2): (Configuration(32, 32, 8, 2), Configuration(32, 16, 4, 1)),
    ("dv", 256, 2): (Configuration(32, 32, 8, 2), Configuration(32, 16, 4, 1)),
    ("dq", 64, 2): (Configuration(128, 64, 8, 2), Configuration(64, 64, 4, 2)),
    ("dq", 128, 2): (Configuration(128, 16, 8, 2), Configuration(64, 32, 8, 1)),
    ("dq", 256, 2): (Configuration(32, 16, 8, 1), Configuration(16, 32, 4, 1)),
}

# One kernel for dk, dv and, by atomic additions in float32, dq. At 256 its five products spill
# 1.8 kB in half precision: not one for `FUSED_IS_FASTER`.
FUSED: dict[tuple[int, int], Configuration] = {
    (64, 2): Configuration(32, 128, 8, 2),
    (128, 2): Configuration(16, 128, 8, 2),
    (256, 2): Configuration(16, 128, 8, 1),
    (64, 4): Configuration(32, 64, 4, 1),
    (128, 4): Configuration(32, 32, 4, 1),
    (256, 4): Configuration(16, 16, 4, 1),
}

# (largest padded head_dim, bytes an element) for which `deterministic=False` takes the portable
# fused backward. Empty: on an H100 it takes 1.7 times as long as the split one.
FUSED_IS_FASTER: frozenset[tuple[int, int]] = frozenset()

# Largest padded head_dim: configuration of the Hopper forward, which is for half precision.
HOPPER: dict[int, HopperConfiguration] = {
    64: HopperConfiguration(128, 3),
    128: HopperConfiguration(128, 2),
    256: HopperConfiguration(64, 2, out_in_q=True, unrolled=1),
}


def _ahead(stages: int, **order: bool) -> HopperConfiguration:
    return HopperConfiguration(128, stages, q_slots=2, out_in_q=True, ahead=True, **order)


# What `benchmarks/tune.py` times beside them.
HOPPER_CANDIDATES: dict[int, tuple[HopperConfiguration, ...]] = {
    64: (
        _ahead(3),
        _ahead(3, carried=True),
        _ahead(3, carried=True, turns=True),
        HopperConfiguration(128, 3, q_slots=2, out_in_q=True),
        HopperConfiguration(128, 4),
    ),
    128: (
        _ahead(2),
        _ahead(2, carried=True),
        _ahead(2, carried=True, turns=True),
        HopperConfiguration(128, 2, q_slots=2, out_in_q=True),
        HopperConfiguration(128, 3, out_in_q=True),
    ),
    256: (
        HopperConfiguration(64, 2, out_in_q=True, carried=True),
        HopperConfiguration(64, 2, out_in_q=True, carried=True, turns=True),
        HopperConfiguration(32, 4, out_in_q=True),
    ),
}

# (largest padded head_dim, bytes an element, halves of the rule) for which a Hopper GPU takes that
# forward: 1.2 to 1.9 times as fast as the portable one (benchmarks/notes.md). (256, 2) and forests
# have not yet run on a GPU.
HOPPER_FORWARD: frozenset[tuple[int, int, Halves]] = frozenset(
    {(64, 2, "either"), (128, 2, "either")}
)

# Queries of a block of the Hopper backward: its dq has two shares of 64 rows and columns.
HOPPER_BACKWARD_TABLE: dict[int, HopperBackwardConfiguration] = {
    64: HopperBackwardConfiguration(128, 2),
    128: HopperBackwardConfiguration(64, 2),
}

# The same of the Hopper backward: 0.5 to 0.8 of the split one's time, however long documents are.
HOPPER_BACKWARD: frozenset[tuple[int, int]] = frozenset({(64, 2), (128, 2)})


def configuration(kernel: KernelName, problem: Problem) -> Configuration:
    """The table's row for a problem."""
    if kernel in ("delta", "dq_cast"):
        # dq_cast holds a whole block, transposed: at 4 warps triton 3.6 spills it.
        return Configuration(DELTA_BLOCK, 0, 8 if kernel == "dq_cast" else 4, 1)
    if kernel == "fused":
        return FUSED[problem.width, problem.itemsize]
    key = (kernel, problem.width, problem.itemsize)
    return table_of(key, problem)[key]


def table_of(key: tuple[KernelName, int, int], problem: Problem) -> Table:
    """The table whose row a problem takes: the most special one that has the key."""
    is_padded = (problem.head_dim, problem.value_dim) != (problem.block_d, problem.block_dv)
    tables = [
        (AMPERE_LEAN, problem.architecture == "ampere" and problem.is_lean),
        (AMPERE, problem.architecture == "ampere"),
        (LEAN, problem.is_lean),
        (PADDED, is_padded),
        (TABLE, True),
    ]
    return next(table for table, is_meant in tables if is_meant and key in table)


def tile_rows(problem: Problem) -> tuple[int, int, int]:
    """Rows of a tile of the forward, of the kernel that makes dk and dv, and of dq."""
    keys = configuration(problem.keys_kernels[0], problem).BLOCK_N
    return configuration("forward", problem).BLOCK_M, keys, configuration("dq", problem).BLOCK_M


def capacity(rows: int, block: int) -> int:
    """The most tiles that a list can need: documents that begin one have at least two tiles."""
    return -(-3 * rows // (2 * block))


def constants(
    kernel: KernelName, problem: Problem, chosen: Configuration | None = None
) -> dict[str, Any]:
    """The compile-time arguments of a kernel, by name; `chosen` replaces the table's row."""
    chosen = chosen or configuration(kernel, problem)
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
        | halves_constants(kernel, problem.halves)
    )
    if kernel in BY_KEYS:
        constants["FUSED"] = kernel == "fused"
        constants["WITH_DK"], constants["WITH_DV"] = kernel != "dv", kernel != "dk"
    if kernel == "forward":
        constants["HAS_SINKS"] = problem.has_sinks
    return constants


def options(
    kernel: KernelName, problem: Problem, chosen: Configuration | None = None
) -> dict[str, Any]:
    """The compiler's options for a kernel; `chosen` replaces the table's row."""
    chosen = chosen or configuration(kernel, problem)
    # Said aloud because triton 3.10 changes its default.
    fusion = {"enable_fp_fusion": True}
    return fusion | {"num_warps": chosen.num_warps, "num_stages": chosen.stages}


def padded(dim: int) -> int:
    """The power of two, 16 at least, that a tile holds `dim` columns in."""
    return max(16, 1 << (dim - 1).bit_length())


def halves_constants(kernel: KernelName, halves: Halves) -> dict[str, bool]:
    """Which halves of the mask rule decide: where either would do, the one the tile's rows hold."""
    if halves == "either":
        return {"KEY_HALF": kernel not in BY_KEYS, "QUERY_HALF": kernel in BY_KEYS}
    return {"KEY_HALF": halves == "both", "QUERY_HALF": True}
