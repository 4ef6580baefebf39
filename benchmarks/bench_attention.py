"""Packed attention on a GPU against every peer in one process, forward and backward.

    python -m benchmarks.bench_attention [--case WORD ...] [--seconds 480] [--json PATH] [--toy]

For each case every candidate is checked against float64 (`exact_head`) and a wrong one is not
timed. Then all take turns on rotating random inputs between CUDA events, and medians are printed
beside the prediction of `benchmarks.model`. `--toy` runs the same code on the CPU at toy sizes:
its times mean nothing. What the limit of seconds leaves out is listed in the result.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.exact_head import faults
from benchmarks.model import DESIGNS, DEVICES, predict, visible_pairs
from benchmarks.peers import OURS, Peer, peers
from benchmarks.regimes import benchmark_cases, chosen_cases, real_cases, toy
from benchmarks.timing import paired_milliseconds
from packed_attn.facts import gpu_facts, machine_facts
from tests.cases import Case, Inputs

RESULTS = Path(__file__).parent / "results" / "attention.json"
ROTATIONS = 3
ROUNDS = 15
HEAD = """\
| case | candidate | forward, ms | TFLOP/s | to ours | backward, ms | TFLOP/s | to ours |
|---|---|---|---|---|---|---|---|"""
PACKAGES = ("torch", "triton", "transformers", "flash-attn", "flash-attn-4", "nvidia-cudnn-cu13")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one direction: median and quartiles of the rounds; useful TFLOP/s."""

    median: float
    quartiles: tuple[float, float]
    tflops: float


@dataclass(frozen=True)
class Row:
    """One candidate on one case: two timings, or why there are none."""

    case: str
    candidate: str
    exact: bool
    forward: Timing | None
    backward: Timing | None
    refused: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the suite; 1 where one of our own kernels was wrong."""
    options = _parser().parse_args(arguments)
    if not options.toy and not torch.cuda.is_available():
        raise SystemExit("bench_attention needs a CUDA device; --toy runs its code without one")
    device = "cpu" if options.toy else "cuda"
    every = [*benchmark_cases(), *real_cases(os.environ.get("PACKED_ATTN_DATA"))]
    cases = chosen_cases(every, options.case)
    begin, rows, done = time.monotonic(), [], []
    print(HEAD)
    for case in [toy(case) for case in cases] if options.toy else cases:
        if time.monotonic() - begin > options.seconds:
            break
        done.append(case)
        rows += bench_case(case, device, options.rounds)
    left_out = [case.name for case in cases[len(done) :]]
    if left_out:
        print(f"left out after {options.seconds} s: {', '.join(left_out)}", file=sys.stderr)
    _write(options.json, done, rows, left_out, options.toy)
    return int(any(row.candidate == OURS and row.exact and _wrong(row) for row in rows))


def bench_case(case: Case, device: str, rounds: int) -> list[Row]:
    """Checks every candidate on the first of the rotating inputs and times those that are right."""
    rotating = [case.inputs(seed, device=device) for seed in range(ROTATIONS)]
    found = peers(case, rotating[0], device)
    found = {name: _checked(case, rotating[0], peer) for name, peer in found.items()}
    able = {name: peer.function for name, peer in found.items() if peer.function is not None}
    with torch.no_grad():
        forward = paired_milliseconds(_forwards(able, rotating), device, rounds)
    backward = paired_milliseconds(_backwards(able, rotating), device, rounds)
    rows = []
    for name, peer in found.items():
        timings = [None, None]
        if name in able:
            flops = _useful_flops(case)
            timings = [_timing(forward[name], flops), _timing(backward[name], 2.5 * flops)]
        rows.append(Row(case.name, name, peer.exact, timings[0], timings[1], peer.reasons))
    for row in rows:
        print(_markdown(row, rows), flush=True)
    return rows


def _checked(case: Case, inputs: Inputs, peer: Peer) -> Peer:
    """The peer, or its reasons: what it raised or how far it is off."""
    if peer.function is None:
        return peer
    try:
        got = _both(peer.function, inputs)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
        return Peer(None, (f"raised {type(error).__name__}: {error}".split("\n")[0],), peer.exact)
    if not peer.exact:
        return peer
    seen = case.layout(inputs.q.device).visibility(
        case.causal, case.window_size, chunk_size=case.chunk_size
    )
    wrong = faults(case, inputs, got, seen)
    return Peer(None, tuple(f"{WRONG}: {fault}" for fault in wrong)) if wrong else peer


WRONG = "wrong, so not timed"


def _wrong(row: Row) -> bool:
    return any(reason.startswith(WRONG) for reason in row.refused)


def _both(function: Callable[..., Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
    leaves = _leaves(inputs)
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, inputs.grad_out)


def _leaves(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    return q, k, v


def _forwards(
    able: Mapping[str, Callable[..., Tensor]], rotating: Sequence[Inputs]
) -> dict[str, Callable[[int], object]]:
    def call(function: Callable[..., Tensor]) -> Callable[[int], object]:
        def run(round_: int) -> object:
            inputs = rotating[round_ % len(rotating)]
            return function(inputs.q, inputs.k, inputs.v)

        return run

    return {name: call(function) for name, function in able.items()}


def _backwards(
    able: Mapping[str, Callable[..., Tensor]], rotating: Sequence[Inputs]
) -> dict[str, Callable[[int], object]]:
    """The forward of each rotation is kept, so that a call runs the backward alone."""

    def call(function: Callable[..., Tensor]) -> Callable[[int], object]:
        leaves = [_leaves(inputs) for inputs in rotating]
        outs = [function(*leaf) for leaf in leaves]

        def run(round_: int) -> object:
            n = round_ % len(rotating)
            return torch.autograd.grad(outs[n], leaves[n], rotating[n].grad_out, retain_graph=True)

        return run

    return {name: call(function) for name, function in able.items()}


def _useful_flops(case: Case) -> float:
    value_dim = case.value_head_dim or case.head_dim
    return 2.0 * visible_pairs(case) * case.num_heads * (case.head_dim + value_dim)


def _timing(milliseconds: list[float], flops: float) -> Timing:
    low, median, high = statistics.quantiles(milliseconds, n=4)
    return Timing(round(median, 4), (round(low, 4), round(high, 4)), round(flops / median / 1e9, 1))


def _markdown(row: Row, rows: Sequence[Row]) -> str:
    if row.forward is None or row.backward is None:
        return f"| {row.case} | {row.candidate} | {'; '.join(row.refused)} | | | | | |"
    ours = next((other for other in rows if other.candidate == OURS), None)
    cells = []
    for direction in ("forward", "backward"):
        timing, base = getattr(row, direction), ours and getattr(ours, direction)
        ratio = f"{timing.median / base.median:.2f}x" if base else ""
        cells += [f"{timing.median:.3f}", f"{timing.tflops:.0f}", ratio]
    mark = "" if row.exact else " (not exact)"
    return f"| {row.case} | {row.candidate}{mark} | {' | '.join(cells)} |"


def _write(
    path: Path, cases: Sequence[Case], rows: Sequence[Row], left_out: list[str], is_toy: bool
) -> None:
    report = {
        "machine": machine_facts(*PACKAGES) | gpu_facts(),
        "toy": is_toy,
        "rounds_rotate_over": ROTATIONS,
        "cases": [_described(case) for case in cases],
        "rows": [asdict(row) for row in rows],
        "left_out": left_out,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")


def _described(case: Case) -> dict[str, Any]:
    """The case and what the model predicted for it, milliseconds from fastest to slowest."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    device = DEVICES["H200" if "H200" in gpu else "H100"]
    design = next(d for d in DESIGNS if d.name == "listed, heavy first")
    predicted = {
        direction: [round(1e3 * s, 4) for s in predict(case, design, device, backward).seconds]
        for direction, backward in (("forward", False), ("backward", True))
    }
    shape = (case.num_heads, case.num_kv_heads, case.head_dim, case.value_head_dim or case.head_dim)
    return {
        "name": case.name,
        "tokens": sum(case.lengths),
        "documents": len(case.lengths),
        "heads, kv heads, head_dim, value_head_dim": shape,
        "mask and modifiers": case.kwargs() | {"sinks": case.sinks},
        "visible_pairs": visible_pairs(case),
        f"predicted for {device.name}, ms": predicted,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="*", default=[], help="words of which a name holds one")
    parser.add_argument("--seconds", type=float, default=480.0, help="no case begins after these")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the figures go")
    parser.add_argument("--toy", action="store_true", help="run on the CPU at toy sizes")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
