"""Packed attention on a GPU against every peer in one process, forward and backward.

    python -m benchmarks.bench_attention [--case WORD ...] [--seconds 150] [--json PATH] [--toy]

For each case every candidate is checked against float64 (`exact_head`) and a wrong one is not
timed. Forward and backward of the others are captured in CUDA graphs, one for each of a few random
inputs; replays take turns between CUDA events, and medians are printed beside the prediction of
`benchmarks.model`. What cannot be captured is timed as Python runs it, and marked "eager". Beside
the kernels' time stand the host's, microseconds until an eager call returns, and the memory that
an eager forward and backward take above their inputs. The card's own ceilings, a dense product and
a copy, are measured first.

Cases come in the order of their importance; what the limit of seconds leaves out is listed. The
result is written before each candidate runs: where one kills the process or never ends, `--resume`
goes on after the cases that are done, without that candidate. `--toy` runs the same code on the
CPU at toy sizes: its times mean nothing.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import flash3_library
from benchmarks.attention_report import ENDED, RAISED, WRONG, Report, Row
from benchmarks.attention_table import case_table
from benchmarks.candidates import Candidate, Timer
from benchmarks.ceilings import measured_ceilings
from benchmarks.exact_head import Wanted, faults, wanted
from benchmarks.peers import OURS, Peer, case_mask, compiling_each_shape, peers
from benchmarks.regimes import benchmark_cases, chosen_cases, real_cases, speed_cases, toy
from benchmarks.warm import warm
from packed_attn.errors import first_line
from tests.cases import Case, Inputs

RESULTS = Path(__file__).parent / "results" / "attention.json"
ROTATIONS = 3
ROUNDS = 15
# Seconds after which a candidate, or the timing of a case, is taken to never end.
HANGS = 100
DEAD = 3  # exit status where the GPU takes no more work from this process


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the suite; 1 where one of our own kernels was wrong or ended a run, 3 to `--resume`."""
    options = _parser().parse_args(arguments)
    if not options.toy and not torch.cuda.is_available():
        raise SystemExit("bench_attention needs a CUDA device; --toy runs its code without one")
    flash3_library.load()
    device = "cpu" if options.toy else "cuda"
    begin = time.monotonic()
    report = Report.read(options.json) if options.resume else Report(options.json, options.toy)
    report.give_up_running()
    cases = [case for case in _cases(options.case) if case.name not in report.done]
    cases = [toy(case) for case in cases] if options.toy else cases
    with compiling_each_shape():
        return _run(cases, device, options, report, begin)


def _run(
    cases: Sequence[Case],
    device: str,
    options: argparse.Namespace,
    report: Report,
    begin: float,
) -> int:
    """The cases until the seconds are over; the exit status."""
    if device == "cuda" and not options.resume:
        print(f"{warm(cases, device, report.without)} groups of kernels compiled", flush=True)
    if report.ceilings is None:
        sizes = (64, 2**16) if options.toy else ()
        report.ceilings = measured_ceilings(device, *sizes)
        if device == "cuda":
            torch.cuda.empty_cache()
    for number, case in enumerate(cases):
        report.left_out = [case.name for case in cases[number:]]
        if time.monotonic() - begin > options.seconds:
            break
        bench_case(case, device, options.rounds, report)
        if _is_dead(device):
            return DEAD
        if device == "cuda":
            torch.cuda.empty_cache()
    else:
        report.left_out = []
    report.write()
    if report.left_out:
        named = ", ".join(report.left_out)
        print(f"left out after {options.seconds} s: {named}", file=sys.stderr)
    return int(any(OURS in row.candidate and _is_wrong(row) for row in report.rows))


def bench_case(case: Case, device: str, rounds: int, report: Report) -> list[Row]:
    """Checks every candidate on the first of the rotating inputs and times those that are right."""
    rotating = [case.inputs(seed, device=device, drawn_on=device) for seed in range(ROTATIONS)]
    found = peers(case, rotating[0], device)
    want = wanted(case, rotating[0], case_mask(case, case.layout(device)))
    timer = Timer(rotating, device)
    candidates: dict[str, Candidate] = {}
    for name, peer in found.items():
        report.run(case.name, name)
        if name in report.without:
            peer = Peer(None, (f"{ENDED} at {report.without[name]}",), peer.exact)
        with _ended_after(HANGS, device):
            found[name], candidate = _prepared(case, rotating[0], peer, want, timer)
            if _is_dead(device):
                return []
        if candidate is not None:
            candidates[name] = candidate
    report.run(case.name, None)
    with _ended_after(HANGS, device):
        timings = timer.measure(candidates, rounds, OURS)
    rows = report.add(
        case,
        {name: peer.exact for name, peer in found.items()},
        {name: peer.reasons for name, peer in found.items()},
        timings,
    )
    print("\n" + case_table(report.cases[-1], rows), end="", flush=True)
    return rows


def _prepared(
    case: Case, inputs: Inputs, peer: Peer, want: Wanted, timer: Timer
) -> tuple[Peer, Candidate | None]:
    """A candidate whose results are right, or the peer with its reasons."""
    peer = _checked(case, inputs, peer, want)
    if peer.function is None:
        return peer, None
    try:
        return peer, timer.prepared(peer.function)
    except Exception as error:  # most likely no memory for all rotations
        return Peer(None, (_raised(error),), peer.exact), None


@contextmanager
def _ended_after(seconds: float, device: str) -> Iterator[None]:
    """Ends the process where the GPU does not come back: no exception would get through."""
    if device == "cuda":
        faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        if device == "cuda":
            faulthandler.cancel_dump_traceback_later()


def _cases(words: Sequence[str]) -> list[Case]:
    """The cases of the speed table in order, or those whose names hold a word, out of all."""
    real = real_cases(os.environ.get("PACKED_ATTN_DATA"))
    if not words:
        return speed_cases(real)
    return chosen_cases([*benchmark_cases(), *real], words)


def _checked(case: Case, inputs: Inputs, peer: Peer, want: Wanted) -> Peer:
    """The peer, or its reasons: what it raised or how far it is off."""
    if peer.function is None:
        return peer
    try:
        got = _both(peer.function, inputs)
        wrong = faults(case, got, want) if peer.exact else []
    except Exception as error:  # a compiler, a library or a kernel raises anything
        return Peer(None, (_raised(error),), peer.exact)
    return Peer(None, tuple(f"{WRONG}: {fault}" for fault in wrong)) if wrong else peer


def _is_wrong(row: Row) -> bool:
    return any(reason.startswith((WRONG, ENDED)) for reason in row.refused)


def _is_dead(device: str) -> bool:
    """Whether a kernel has faulted: nothing more runs in this process."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"the GPU is lost to this process, {_raised(error)}", file=sys.stderr)
        return True
    return False


def _both(function: Callable[..., Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, inputs.grad_out)


def _raised(error: Exception) -> str:
    return f"{RAISED} {type(error).__name__}: {first_line(error)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="*", default=[], help="words of which a name holds one")
    parser.add_argument("--seconds", type=float, default=150.0, help="no case begins after these")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="at most")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the figures go")
    parser.add_argument("--resume", action="store_true", help="go on where --json ends")
    parser.add_argument("--toy", action="store_true", help="run on the CPU at toy sizes")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
