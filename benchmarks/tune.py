"""Times the candidate configurations of the kernels on a GPU and prints the table's best rows.

    python -m benchmarks.tune [--case WORD ...] [--rounds N]

For each case and kernel, the row of `configurations.TABLE` (or LEAN) and its CANDIDATES take turns
inside whole forwards and backwards, the other kernels at their rows. A candidate whose results
differ from the row's by more than rounding is wrong and is not timed. What is printed is the
fastest of each table key over the geometric mean of its cases, ready to be copied into the table.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from packed_attn_kernels import configurations
from packed_attn_kernels.configurations import CANDIDATES, LEAN, TABLE, Configuration, KernelName
from torch import Tensor

from benchmarks.regimes import benchmark_cases, chosen_cases
from benchmarks.timing import paired_milliseconds
from packed_attn import DocumentLayout, attention
from packed_attn.errors import first_line
from tests.cases import Case, Inputs

Key = tuple[KernelName, int, int]
Clock = Callable[..., dict[str, list[float]]]
DEFAULT_CASES = ("log_normal", "one_32k", "one_16k_256x64", "64x512")


@dataclass(frozen=True)
class Result:
    """A configuration's time on one case over that of the table's row; inf where it is wrong."""

    key: Key
    case: str
    configuration: Configuration
    ratio: float


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="*", default=DEFAULT_CASES, help="words of names")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("tune needs a CUDA device: an interpreted kernel has no time to tune")
    results = []
    for case in chosen_cases(benchmark_cases(), options.case):
        results += tune_case(case, "cuda", options.rounds, paired_milliseconds)
    print("\n".join(best_rows(results)))


def tune_case(case: Case, device: str, rounds: int, clock: Clock) -> list[Result]:
    """All candidates of the kernels that the case runs; `clock` is `paired_milliseconds`."""
    results = []
    for key in _keys(case):
        row = (LEAN if _is_lean(case) and key in LEAN else TABLE)[key]
        results += _tune_key(case, key, (row, *CANDIDATES.get(key, ())), device, rounds, clock)
    return results


def best_rows(results: Sequence[Result]) -> list[str]:
    """One line a key, as the table writes it, with its time over the present row's."""
    lines = []
    for key in dict.fromkeys(result.key for result in results):
        ratios: dict[Configuration, list[float]] = {}
        for result in results:
            if result.key == key:
                ratios.setdefault(result.configuration, []).append(result.ratio)
        means = {c: math.prod(r) ** (1 / len(r)) for c, r in ratios.items()}
        best = min(means, key=lambda c: means[c])
        tile = f"Configuration({best.BLOCK_M}, {best.BLOCK_N}, {best.num_warps}, {best.stages})"
        name, width, size = key
        lines.append(f'    ("{name}", {width}, {size}): {tile},  # {means[best]:.3f} of the row')
    return lines


def _tune_key(
    case: Case,
    key: Key,
    rows: Sequence[Configuration],
    device: str,
    rounds: int,
    clock: Clock,
) -> list[Result]:
    inputs = [case.inputs(seed, device=device) for seed in range(2)]
    layout = case.layout(device)
    calls, wanted = {}, None
    for row in rows:
        with _table_with(key, row):
            try:
                got = _both(case, inputs[0], layout)
            except RuntimeError as error:  # too much shared memory, no registers
                print(f"{case.name}, {key}, {row}: {first_line(error)}")
                continue
        wanted = wanted or got
        if _agree(got, wanted):
            calls[str(row)] = _call(case, key, row, inputs, layout)
        else:
            print(f"{case.name}, {key}, {row}: wrong, so not timed")
    times = {name: statistics.median(t) for name, t in clock(calls, device, rounds).items()}
    first = times[str(rows[0])]
    return [
        Result(key, case.name, row, times[str(row)] / first if str(row) in times else math.inf)
        for row in rows
    ]


def _keys(case: Case) -> list[Key]:
    """The table's keys of the kernels that a case runs."""
    tensors = case.inputs()
    problem = configurations.Problem(
        case.head_dim,
        case.value_head_dim or case.head_dim,
        case.num_heads // case.num_kv_heads,
        tensors.q.itemsize,
        "either",
        has_softcap=case.softcap is not None,
        has_sinks=case.sinks,
    )
    kernels: tuple[KernelName, ...] = ("forward", *problem.keys_kernels, "dq")
    return [(kernel, problem.width, problem.itemsize) for kernel in kernels]


def _is_lean(case: Case) -> bool:
    halves = (
        case.layout().visibility(case.causal, case.window_size, chunk_size=case.chunk_size).halves
    )
    return halves == "both" or case.alibi


@contextmanager
def _table_with(key: Key, row: Configuration) -> Iterator[None]:
    """dk and dv share a list of tiles, so one moves with the other's rows."""
    saved = dict(TABLE), dict(LEAN)
    for table in (TABLE, LEAN):
        for other in table:
            shares = {other[0], key[0]} == {"dk", "dv"} and other[1:] == key[1:]
            if other == key or (shares and table[other].BLOCK_N != row.BLOCK_N):
                table[other] = row
    try:
        yield
    finally:
        TABLE.update(saved[0])
        LEAN.update(saved[1])


def _call(
    case: Case, key: Key, row: Configuration, inputs: Sequence[Inputs], layout: DocumentLayout
) -> Callable[[int], object]:
    def run(round_: int) -> object:
        with _table_with(key, row):
            return _both(case, inputs[round_ % len(inputs)], layout, backward=key[0] != "forward")

    return run


def _both(
    case: Case, inputs: Inputs, layout: DocumentLayout, backward: bool = True
) -> tuple[Tensor, ...]:
    """out and, after the backward, the gradients. The layout keeps a list for each size of tile."""
    leaves = [x.detach().requires_grad_(backward) for x in (inputs.q, inputs.k, inputs.v)]
    out = attention(*leaves, layout, backend="triton", sinks=inputs.sinks, **case.kwargs())
    if not backward:
        return (out,)
    return out.detach(), *torch.autograd.grad(out, leaves, inputs.grad_out)


def _agree(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    eps = torch.finfo(got[0].dtype).eps
    return all(
        bool((a.float() - b.float()).abs().max() <= 8 * eps * b.float().abs().max())
        for a, b in zip(got, wanted)
    )


if __name__ == "__main__":
    main()
