"""Times the candidate configurations of the kernels on a GPU and prints the table's best rows.

    python -m benchmarks.tune [--case WORD ...] [--kernel NAME ...] [--beside BACKEND ...]
        [--rounds N]

For each case and kernel that this GPU runs, the row of `configurations.TABLE` (AMPERE, HOPPER) and
its CANDIDATES take turns inside whole forwards and backwards, the other kernels at their rows, all
as replays of CUDA graphs. A Hopper forward that HOPPER_FORWARD does not name is timed beside the
portable kernel, and other backends where they are named. A candidate whose results differ from the
row's by more than rounding is wrong and is not timed. What is printed is the fastest of each table
key over the geometric mean of its cases, ready to be copied into the table.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from functools import partial
from typing import Any, Literal, get_args

import torch
from packed_attn_kernels import configurations
from packed_attn_kernels.configurations import (
    AMPERE,
    AMPERE_CANDIDATES,
    AMPERE_LEAN,
    CANDIDATES,
    HOPPER,
    HOPPER_CANDIDATES,
    LEAN,
    PADDED,
    TABLE,
    Configuration,
    Halves,
    HopperConfiguration,
    KernelName,
    Problem,
)
from packed_attn_kernels.gpu import architecture
from packed_attn_kernels.hopper_launch import reasons_against_hopper_kernel
from torch import Tensor

from benchmarks import flash3_library
from benchmarks.candidates import rotating, spanning
from benchmarks.graphs import Capture
from benchmarks.regimes import benchmark_cases, chosen_cases, run_case
from benchmarks.timing import paired_milliseconds
from packed_attn import DocumentLayout
from packed_attn.backends import BACKENDS
from packed_attn.errors import first_line
from tests.cases import Case, Inputs

TunedKernel = KernelName | Literal["hopper_forward"]
Key = tuple[TunedKernel, int, int]
Row = Configuration | HopperConfiguration | None  # None: the portable kernel, in Hopper's place
Clock = Callable[..., dict[str, list[float]]]
HALVES: tuple[Halves, ...] = get_args(Halves)
PORTABLE_TABLES = (TABLE, LEAN, PADDED, AMPERE, AMPERE_LEAN)
TABLES: tuple[dict[Any, Any], ...] = (*PORTABLE_TABLES, HOPPER)
INPUTS = 2  # that take turns
DEFAULT_CASES = ("log_normal", "one_32k", "one_16k_256x64", "64x512")


@dataclass(frozen=True)
class Result:
    """A configuration's time on one case over that of the table's row; inf where it is wrong."""

    key: Key
    case: str
    configuration: Row
    ratio: float


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="*", default=DEFAULT_CASES, help="words of names")
    parser.add_argument("--kernel", nargs="*", help="names, all by default")
    parser.add_argument("--beside", nargs="*", default=(), choices=BACKENDS, help="backends")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("tune needs a CUDA device: an interpreted kernel has no time to tune")
    flash3_library.load()
    results = []
    for case in chosen_cases(benchmark_cases(), options.case):
        results += tune_case(
            case, "cuda", options.rounds, kernel_milliseconds, options.kernel, options.beside
        )
    print("\n".join(best_rows(results)))


def kernel_milliseconds(
    calls: Mapping[str, Callable[[int], object]], device: str, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds that the kernels of a call take, by round: a graph of it for each input."""
    capture = Capture()
    graphs = {
        name: [capture.graph(partial(call, n)) for n in range(INPUTS)]
        for name, call in calls.items()
    }
    once = paired_milliseconds({n: rotating(each, 1) for n, each in graphs.items()}, device, 1)
    repeats = spanning(once)
    turns = {name: rotating(each, repeats[name]) for name, each in graphs.items()}
    times = paired_milliseconds(turns, device, rounds)
    return {name: [ms / repeats[name] for ms in found] for name, found in times.items()}


def tune_case(
    case: Case,
    device: str,
    rounds: int,
    clock: Clock,
    kernels: Sequence[str] | None = None,
    beside: Sequence[str] = (),
) -> list[Result]:
    """All candidates of the kernels that the case runs, or of those named; prints each.

    Args:
        clock: `kernel_milliseconds`.
        beside: other backends that are timed.
    """
    problem = problem_of(case, device)
    capability = torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
    results = []
    for key in keys_of(problem, capability):
        if kernels is None or key[0] in kernels:
            rows = rows_of(key, problem)
            results += _tune_key(case, key, rows, device, rounds, clock, beside)
    return results


def best_rows(results: Sequence[Result]) -> list[str]:
    """One line a key, as the table writes it, with its time over the present row's."""
    lines = []
    for key in dict.fromkeys(result.key for result in results):
        ratios: dict[Row, list[float]] = {}
        for result in results:
            if result.key == key:
                ratios.setdefault(result.configuration, []).append(result.ratio)
        means = {c: math.prod(r) ** (1 / len(r)) for c, r in ratios.items()}
        best = min(means, key=lambda c: means[c])
        lines.append(f"    {_line(key, best)},  # {means[best]:.3f} of the row")
    return lines


def _line(key: Key, row: Row) -> str:
    """As the table writes it."""
    name, width, size = key
    match row:
        case None:
            return f"not ({width}, {size}) in HOPPER_FORWARD"
        case HopperConfiguration():
            own = [
                f for f in fields(row) if f.default is MISSING or getattr(row, f.name) != f.default
            ]
            named = ", ".join(f"{f.name}={getattr(row, f.name)}" for f in own)
            return f"{width}: HopperConfiguration({named})"
        case Configuration():
            tile = f"{row.BLOCK_M}, {row.BLOCK_N}, {row.num_warps}, {row.stages}"
            return f'("{name}", {width}, {size}): Configuration({tile})'


def _tune_key(
    case: Case,
    key: Key,
    rows: Sequence[Row],
    device: str,
    rounds: int,
    clock: Clock,
    beside: Sequence[str],
) -> list[Result]:
    inputs = [case.inputs(seed, device=device) for seed in range(INPUTS)]
    layout = case.layout(device)
    calls, wanted = {}, None
    for row in rows:
        with _table_with(key, row):
            try:
                got = run_case(case, inputs[0], layout)
            except RuntimeError as error:  # too much shared memory, no registers
                print(f"{case.name}, {key}, {row}: {first_line(error)}")
                continue
        wanted = wanted or got
        if _agree(got, wanted):
            calls[str(row)] = call_of(case, key, row, inputs, layout)
        else:
            print(f"{case.name}, {key}, {row}: wrong, so not timed")
    for name in beside:
        call = call_of(case, key, None, inputs, layout, name)
        try:
            call(0)
        except (RuntimeError, NotImplementedError) as error:  # NotImplementedError: its reasons
            print(f"{case.name}, {key}, {name}: {first_line(error)}")
            continue
        calls[name] = call
    times = {name: statistics.median(t) for name, t in clock(calls, device, rounds).items()}
    first = times[str(rows[0])]
    for name, found in times.items():
        print(f"{case.name}, {key}, {name}: {found:.4f} ms, {found / first:.3f} of the row")
    return [
        Result(key, case.name, row, times[str(row)] / first if str(row) in times else math.inf)
        for row in rows
    ]


def keys_of(problem: Problem, capability: tuple[int, int]) -> list[Key]:
    """The table's keys of the kernels that a GPU runs."""
    size = problem.width, problem.itemsize
    reasons = partial(reasons_against_hopper_kernel, problem=problem, capability=capability)
    forward: TunedKernel = "forward" if reasons("forward") else "hopper_forward"
    backward = (*problem.keys_kernels, "dq") if reasons("backward") else ()
    return [(kernel, *size) for kernel in (forward, *backward)]


def rows_of(key: Key, problem: Problem) -> tuple[Row, ...]:
    """What the table has, then the candidates."""
    kernel, *size = key
    if kernel == "hopper_forward":
        rows = HOPPER[size[0]], *HOPPER_CANDIDATES.get(size[0], ())
        named = (*size, problem.halves) in configurations.HOPPER_FORWARD
        return rows if named else (None, *rows)
    portable = kernel, *size
    more = AMPERE_CANDIDATES if problem.architecture == "ampere" else CANDIDATES
    return configurations.table_of(portable, problem)[portable], *more.get(portable, ())


def problem_of(case: Case, device: str = "cpu") -> Problem:
    visibility = case.layout().visibility(case.causal, case.window_size, chunk_size=case.chunk_size)
    return Problem(
        case.head_dim,
        case.value_head_dim or case.head_dim,
        case.num_heads // case.num_kv_heads,
        case.dtype.itemsize,
        visibility.halves,
        has_softcap=case.softcap is not None,
        has_sinks=case.sinks,
        has_alibi=case.alibi,
        architecture=architecture(torch.device(device)),
    )


@contextmanager
def _table_with(key: Key, row: Row) -> Iterator[None]:
    """dk and dv share a list of tiles, so one moves with the other's rows."""
    saved = [dict(table) for table in TABLES]
    named = configurations.HOPPER_FORWARD
    if isinstance(row, Configuration):
        for table in PORTABLE_TABLES:
            for other in table:
                shares = {other[0], key[0]} == {"dk", "dv"} and other[1:] == key[1:]
                if other == key or (shares and table[other].BLOCK_N != row.BLOCK_N):
                    table[other] = row
    elif row is not None:
        HOPPER[key[1]] = row
        configurations.HOPPER_FORWARD = named | {(*key[1:], halves) for halves in HALVES}
    else:
        configurations.HOPPER_FORWARD = frozenset(x for x in named if x[:2] != key[1:])
    try:
        yield
    finally:
        for table, rows in zip(TABLES, saved):
            table.update(rows)
        configurations.HOPPER_FORWARD = named


def call_of(
    case: Case,
    key: Key,
    row: Row,
    inputs: Sequence[Inputs],
    layout: DocumentLayout,
    backend: str = "triton",
) -> Callable[[int], object]:
    backward = "forward" not in key[0]

    def run(round_: int) -> object:
        with _table_with(key, row):
            return run_case(case, inputs[round_ % len(inputs)], layout, backend, backward=backward)

    return run


def _agree(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    eps = torch.finfo(got[0].dtype).eps
    return all(
        bool((a.float() - b.float()).abs().max() <= 8 * eps * b.float().abs().max())
        for a, b in zip(got, wanted)
    )


if __name__ == "__main__":
    main()
