"""What packed attention should cost on Hopper by arithmetic: predictions, never measurements.

    python -m benchmarks.model [--case WORD ...] [--device H200] [--markdown PATH]

For each case and design it counts tiles, matrix work, bytes and launches exactly, from the same
intervals that the kernels read, and schedules the tiles over the SMs. Times follow from public
peak figures and the assumptions below, as a range: from everything inside a block of keys at the
same time (matrix units, exponentials, ordinary arithmetic) to one after another. A measured time
above the range says that something else limits a kernel; below it, that an assumption is wrong.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from packed_attn_kernels.configurations import BY_KEYS, KernelName, Problem, configuration

from benchmarks.regimes import benchmark_cases, chosen_cases
from tests.cases import Case

Ints = NDArray[np.int64]

# Assumptions, not public figures: starting a program; its first loads and its last stores; starting
# a kernel. All programs are taken to fill an SM each (8 warps at 255 registers a thread).
PROGRAM_SECONDS = 0.3e-6
TILE_SECONDS = 0.7e-6
LAUNCH_SECONDS = 4e-6
# Per score: scale and subtract, maximum, sum, correction, conversion (forward); the same order of
# work backward. What is not modelled: caches, and the atomic additions of a fused backward.
ARITHMETIC_OPERATIONS = 5
# Products over head_dim and over value_head_dim of each kernel.
PRODUCTS: dict[KernelName, tuple[int, int]] = {
    "forward": (1, 1),
    "dkdv": (2, 2),
    "dk": (2, 1),
    "dv": (1, 1),
    "dq": (2, 1),
    "fused": (3, 2),
}


@dataclass(frozen=True)
class Device:
    """Public figures of a GPU: NVIDIA's data sheets and the Hopper whitepaper."""

    name: str
    bandwidth: float  # bytes a second
    flops: float = 989.4e12  # dense bf16
    sms: int = 132
    clock: float = 1.83e9  # at which 132 SMs x 4096 operations give `flops`
    exponentials: int = 16  # a clock and SM
    lanes: int = 128  # float32 operations a clock and SM


DEVICES = {"H100": Device("H100 SXM", 3.35e12), "H200": Device("H200", 4.8e12)}


@dataclass(frozen=True)
class Design:
    """How a kernel cuts the stream into tiles and hands them out.

    tiling: "grid" cuts the stream every so many rows; "listed" begins anew at each document of
        two tiles or more, as the kernels' list of tiles does; "per_document" gives no tile two
        documents and launches as many programs for each as the longest one needs.
    persistent: as many programs as SMs, each taking every 132nd tile.
    """

    name: str
    tiling: Literal["grid", "listed", "per_document"]
    heavy_first: bool
    persistent: bool
    fused: bool


DESIGNS = (
    Design("grid", "grid", False, False, False),
    Design("listed, heavy first", "listed", True, False, False),
    Design("listed, heavy first, persistent", "listed", True, True, False),
    Design("listed, heavy first, fused backward", "listed", True, False, True),
    Design("a grid per document", "per_document", False, False, True),
)


@dataclass(frozen=True)
class Prediction:
    """One kernel, or several added up, on one case.

    balance: the work of all SMs over 132 times that of the busiest one.
    seconds: (all units of an SM at once, one after another).
    """

    useful_flops: float
    done_flops: float
    bytes_moved: float
    launches: int
    programs: int
    balance: float
    seconds: tuple[float, float]

    @property
    def useful_share(self) -> float:
        """Of the matrix work, what visible pairs need."""
        return self.useful_flops / self.done_flops if self.done_flops else 1.0

    @property
    def tflops(self) -> tuple[float, float]:
        """Useful TFLOP/s, fastest and slowest."""
        return self.useful_flops / self.seconds[0] / 1e12, self.useful_flops / self.seconds[
            1
        ] / 1e12


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="*", default=[], help="words of which a name holds one")
    parser.add_argument("--device", choices=DEVICES, default="H200")
    parser.add_argument("--markdown", type=Path, help="where the table goes besides the screen")
    options = parser.parse_args(arguments)
    device = DEVICES[options.device]
    lines = [
        f"Predictions for {device.name} from public peak figures: no GPU has measured any of this.",
        "",
        "| case | design | useful share | forward | TFLOP/s | backward | TFLOP/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in chosen_cases(benchmark_cases(), options.case):
        for design in DESIGNS:
            lines.append(_row(case, design, device))
    text = "\n".join(lines)
    print(text)
    if options.markdown is not None:
        options.markdown.write_text(text + "\n")


def predict(case: Case, design: Design, device: Device, backward: bool = False) -> Prediction:
    """The forward or the whole backward of one case.

    Useful FLOPs are those of visible pairs: two products forward, five backward, however many a
    design computes.
    """
    if not backward:
        return _predict_pass(case, design, device, "forward")
    passes = _problem(case, design.fused).keys_kernels + (() if design.fused else ("dq",))
    parts = [_predict_pass(case, design, device, name) for name in passes]
    query_rows = sum(case.lengths) * case.num_heads
    # The kernel that makes delta reads out and dout once; the fused one adds into float32 dq.
    value_dim = case.value_head_dim or case.head_dim
    extra = 2.0 * 2 * value_dim * query_rows + (8.0 * case.head_dim * query_rows) * design.fused
    seconds = extra / device.bandwidth + (1 + design.fused) * LAUNCH_SECONDS
    return Prediction(
        _useful_flops(case, 3, 2),
        sum(part.done_flops for part in parts),
        sum(part.bytes_moved for part in parts) + extra,
        len(parts) + 1 + design.fused,
        sum(part.programs for part in parts),
        min(part.balance for part in parts),
        (
            seconds + sum(part.seconds[0] for part in parts),
            seconds + sum(part.seconds[1] for part in parts),
        ),
    )


def visible_pairs(case: Case) -> int:
    """How many (query, key) pairs of one head see each other.

    Raises:
        ValueError: a forest with a window or chunks, whose mask is no plain sum of intervals.
    """
    seen = case.layout().visibility(case.causal, case.window_size, chunk_size=case.chunk_size)
    if seen.halves == "both":
        raise ValueError(f"{case.name}: a forest with a window or chunks is not modelled")
    return int((seen.query_stop.long() - seen.query_start.long()).sum())


def tiles(case: Case, design: Design, rows: int) -> list[tuple[int, int]]:
    """(first, stop) rows of each program of one head, empty ones too; q and k share the stream."""
    total = sum(case.lengths)
    if design.tiling == "grid":
        return [(at, min(at + rows, total)) for at in range(0, total, rows)]
    lengths = _tree_lengths(case)
    if design.tiling == "per_document":
        most = -(-max(lengths, default=0) // rows)
        cut, begin = [], 0
        for n in lengths:
            begin += n
            stops = [min(begin, begin - n + (tile + 1) * rows) for tile in range(most)]
            cut += [(min(begin, begin - n + tile * rows), stop) for tile, stop in enumerate(stops)]
        return cut
    sections, begin = [0], 0
    for n in lengths:
        if n >= 2 * rows and begin:
            sections.append(begin)
        begin += n
    return [
        (at, min(at + rows, stop))
        for first, stop in pairwise([*sections, total])
        for at in range(first, stop, rows)
    ]


def blocks_walked(case: Case, cut: Sequence[tuple[int, int]], columns: int, by: str) -> Ints:
    """How many blocks of `columns` each tile walks; by "query" its rows are queries, else keys."""
    seen = case.layout().visibility(case.causal, case.window_size, chunk_size=case.chunk_size)
    key_side = (seen.key_start.numpy(), seen.key_stop.numpy())
    query_side = (seen.query_start.numpy(), seen.query_stop.numpy())
    start, stop = key_side if by == "query" else query_side
    walked = np.zeros(len(cut), np.int64)
    for n, (first, last) in enumerate(cut):
        live = stop[first:last] > start[first:last]
        if not live.any():
            continue
        low, high = start[first:last][live].min(), stop[first:last][live].max()
        if seen.halves == "query" and by == "query":
            walked[n] = _blocks_some_row_sees(query_side, low, high, first, last, columns)
        else:
            walked[n] = -(-(int(high) - int(low)) // columns)
    return walked


def makespan(costs: NDArray[np.float64], slots: int, persistent: bool) -> float:
    """When the last slot is done.

    Programs go to the slot that is free first, in order; persistent ones own every slots-th tile.
    """
    if persistent:
        return max((float(costs[slot::slots].sum()) for slot in range(slots)), default=0.0)
    free = [0.0] * slots
    for cost in costs:
        heapq.heapreplace(free, free[0] + cost)
    return max(free)


def _predict_pass(case: Case, design: Design, device: Device, name: KernelName) -> Prediction:
    chosen = configuration(name, _problem(case, design.fused))
    by_keys = name in BY_KEYS
    rows, columns = chosen.BLOCK_M, chosen.BLOCK_N
    if by_keys:
        rows, columns = columns, rows
    cut = tiles(case, design, rows)
    walked = blocks_walked(case, cut, columns, "key" if by_keys else "query")
    # A tile of keys walks the queries of all heads of its group.
    per_tile = walked * (case.num_heads // case.num_kv_heads if by_keys else 1)
    heads = case.num_kv_heads if by_keys else case.num_heads
    flops, seconds = _block_cost(case, device, name, rows * columns)
    spans, balance = [], 1.0
    for block in seconds:
        costs = np.tile(_tile_costs(per_tile, walked > 0, design, block), heads)
        spans.append(makespan(costs, device.sms, design.persistent))
        balance = float(costs.sum()) / (device.sms * spans[-1]) if spans[-1] else 1.0
    moved = _bytes(case, name)
    memory = moved / device.bandwidth
    return Prediction(
        _useful_flops(case, 1, 1) if name == "forward" else 0.0,
        float(walked.sum()) * case.num_heads * flops,
        moved,
        1,
        device.sms if design.persistent else len(cut) * heads,
        balance,
        (LAUNCH_SECONDS + max(spans[0], memory), LAUNCH_SECONDS + max(spans[1], memory)),
    )


def _tile_costs(
    blocks: Ints, works: NDArray[np.bool_], design: Design, block_seconds: float
) -> NDArray[np.float64]:
    costs = blocks * block_seconds + np.where(works, TILE_SECONDS, 0.0)
    if design.heavy_first:
        costs = np.sort(costs)[::-1]
    return costs if design.persistent else costs + PROGRAM_SECONDS


def _block_cost(
    case: Case, device: Device, name: KernelName, scores: int
) -> tuple[float, tuple[float, float]]:
    """FLOPs of one block of one head, and its seconds: overlapped and one after another."""
    over_dim, over_value = PRODUCTS[name]
    value_dim = case.value_head_dim or case.head_dim
    flops = 2.0 * scores * (over_dim * case.head_dim + over_value * value_dim)
    parts = (
        flops / (device.flops / device.sms),
        scores / (device.exponentials * device.clock),
        ARITHMETIC_OPERATIONS * scores / (device.lanes * device.clock),
    )
    return flops, (max(parts), sum(parts))


def _useful_flops(case: Case, over_dim: int, over_value: int) -> float:
    value_dim = case.value_head_dim or case.head_dim
    products = over_dim * case.head_dim + over_value * value_dim
    return 2.0 * visible_pairs(case) * products * case.num_heads


def _bytes(case: Case, name: KernelName) -> float:
    """What must cross the memory bus once: operands in, results out, two bytes an element."""
    tokens, value_dim = sum(case.lengths), case.value_head_dim or case.head_dim
    queries = tokens * case.num_heads * case.head_dim
    keys = tokens * case.num_kv_heads * case.head_dim
    values = tokens * case.num_kv_heads * value_dim
    outputs = tokens * case.num_heads * value_dim
    elements = queries + keys + values + outputs
    elements += keys * (name in ("dkdv", "dk", "fused")) + values * (
        name in ("dkdv", "dv", "fused")
    )
    elements += queries * (name == "dq")
    return 2.0 * elements + 4.0 * tokens * case.num_heads * (1 if name == "forward" else 2)


def _problem(case: Case, fused: bool) -> Problem:
    return Problem(
        case.head_dim,
        case.value_head_dim or case.head_dim,
        case.num_heads // case.num_kv_heads,
        2,
        "either" if case.parents is None else "query",
        has_softcap=case.softcap is not None,
        has_sinks=case.sinks,
        has_alibi=case.alibi,
        fused=fused,
    )


def _tree_lengths(case: Case) -> list[int]:
    """Tokens of each root with all that continues it: for a tile, a tree is one document."""
    if case.parents is None:
        return list(case.lengths)
    trees: list[int] = []
    for n, parent in zip(case.lengths, case.parents):
        if parent == -1:
            trees.append(n)
        else:
            trees[-1] += n
    return trees


def _blocks_some_row_sees(
    query_side: tuple[NDArray, NDArray], low: int, high: int, first: int, last: int, columns: int
) -> int:
    """A late answer of a forest skips its earlier siblings."""
    start, stop = query_side[0][low:high], query_side[1][low:high]
    seen = (start < last) & (stop > first)
    padded = np.pad(seen, (0, -len(seen) % columns))
    return int(padded.reshape(-1, columns).any(1).sum())


def _row(case: Case, design: Design, device: Device) -> str:
    cells = []
    for backward in (False, True):
        found = predict(case, design, device, backward)
        fast, slow = (1e3 * s for s in found.seconds)
        high, low = found.tflops
        cells += [f"{fast:.3g} to {slow:.3g} ms", f"{low:.0f} to {high:.0f}"]
    share = predict(case, design, device).useful_share
    return f"| {case.name} | {design.name} | {share:.2f} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
