"""Times candidates of one case on rotating inputs: their kernels by CUDA graphs, and the host."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.graphs import Capture
from benchmarks.timing import host_microseconds, paired_milliseconds
from packed_attn.errors import first_line
from tests.cases import Inputs

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
Call = Callable[[], object]

# Short calls are timed several at once, over at least as many milliseconds: starting a graph takes
# some microseconds that a training step, which starts the next kernel early, does not see.
SPAN, MOST_REPEATS = 1.0, 50
# Milliseconds that the rounds of one direction of a case should take together, and fewest rounds.
BUDGET, FEWEST = 1500.0, 5
# A candidate this many times slower than ours is timed for fewer rounds.
SLOW, ROUNDS_OF_SLOW = 10.0, 3
HOST_BUDGET, HOST_CALLS = 100.0, (3, 20)


@dataclass(frozen=True)
class Candidate:
    """One function on all rotating inputs: calls of each direction, and the same in Python.

    `eager` holds why the calls are no replays of graphs; empty where they are.
    """

    forwards: Sequence[Call]
    backwards: Sequence[Call]
    host_forward: Call
    host_both: Call
    eager: tuple[str, ...]


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median and quartiles of the rounds."""

    median: float
    quartiles: tuple[float, float]
    rounds: int


@dataclass(frozen=True)
class Timings:
    """Of one candidate; host: microseconds of an eager forward, and of forward and backward.

    peak_bytes: what an eager forward and backward take on the GPU at once, above the inputs.
    """

    forward: Timing
    backward: Timing
    host_us: tuple[float, float]
    eager: tuple[str, ...]
    peak_bytes: int | None


class Timer:
    """Prepares functions on the rotating inputs and lets them take turns."""

    def __init__(self, rotating: Sequence[Inputs], device: str) -> None:
        self._device = device
        self._leaves = [
            tuple(x.detach().requires_grad_() for x in (one.q, one.k, one.v)) for one in rotating
        ]
        self._grads = [one.grad_out for one in rotating]
        self._capture = Capture() if device == "cuda" else None

    def prepared(self, function: Function) -> Candidate:
        """The function's calls; graphs on CUDA, unless it cannot be captured."""

        def forward(n: int) -> Tensor:
            return function(*self._leaves[n])

        def both() -> object:
            return torch.autograd.grad(forward(0), self._leaves[0], self._grads[0])

        eager = ("no CUDA",)
        if self._capture is not None:
            try:
                forwards, backwards = self._captured(forward, self._capture)
                return Candidate(forwards, backwards, lambda: forward(0), both, ())
            except Exception as error:  # a compiler or a library raises anything
                eager = (f"{type(error).__name__}: {first_line(error)}",)
                torch.cuda.synchronize()
        numbers = range(len(self._leaves))
        outs = [forward(n) for n in numbers]
        backwards = [self._backward(outs[n], n) for n in numbers]
        for backward in backwards:  # what raises is to raise here, where it is one candidate's
            backward()
        return Candidate(
            [lambda n=n: forward(n) for n in numbers],
            backwards,
            lambda: forward(0),
            both,
            eager,
        )

    def measure(
        self, candidates: Mapping[str, Candidate], rounds: int, ours: str
    ) -> dict[str, Timings]:
        """Timings by name; rounds are fewer where they take long or a candidate is far slower than
        `ours`."""
        forward = self._timed({n: c.forwards for n, c in candidates.items()}, rounds, ours)
        backward = self._timed({n: c.backwards for n, c in candidates.items()}, rounds, ours)
        found = {}
        for name, candidate in candidates.items():
            both = forward[name].median + backward[name].median
            fewest, most = HOST_CALLS
            calls = max(fewest, min(most, int(HOST_BUDGET / both)))
            host = tuple(
                round(host_microseconds(call, self._device, calls), 1)
                for call in (candidate.host_forward, candidate.host_both)
            )
            peak = _peak_bytes(candidate.host_both) if self._device == "cuda" else None
            found[name] = Timings(
                forward[name], backward[name], (host[0], host[1]), candidate.eager, peak
            )
        return found

    def _captured(
        self, forward: Callable[[int], Tensor], capture: Capture
    ) -> tuple[list[Call], list[Call]]:
        numbers = range(len(self._leaves))
        forwards = [capture.graph(lambda n=n: forward(n)) for n in numbers]
        backwards = []
        for n in numbers:
            out = capture.run(lambda n=n: forward(n))
            assert isinstance(out, Tensor)
            backwards.append(_Kept(capture.graph(self._backward(out, n)), out))
        return forwards, backwards

    def _backward(self, out: Tensor, n: int) -> Call:
        leaves, grad = self._leaves[n], self._grads[n]
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    def _timed(
        self, calls: Mapping[str, Sequence[Call]], rounds: int, ours: str
    ) -> dict[str, Timing]:
        once = paired_milliseconds(
            {name: rotating(each, 1) for name, each in calls.items()}, self._device, 1, warmup=1
        )
        repeats = spanning(once) if self._device == "cuda" else dict.fromkeys(calls, 1)
        spans = {name: once[name][0] * repeats[name] for name in calls}
        most = max(min(rounds, FEWEST), min(rounds, int(BUDGET / max(sum(spans.values()), 1e-3))))
        slow = SLOW * once[ours][0] if ours in once else math.inf
        each = {name: min(most, ROUNDS_OF_SLOW) if once[name][0] > slow else most for name in calls}
        turns = {name: rotating(calls[name], repeats[name]) for name in calls}
        times = paired_milliseconds(turns, self._device, each, warmup=1)
        return {name: _timing([t / repeats[name] for t in times[name]]) for name in calls}


@dataclass(frozen=True)
class _Kept:
    """A replay of a backward, and the forward's output, whose saved tensors the graph reads."""

    replay: Call
    out: Tensor

    def __call__(self) -> object:
        return self.replay()


def _peak_bytes(call: Call) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    resident = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - resident


def spanning(once: Mapping[str, Sequence[float]]) -> dict[str, int]:
    """How many calls make `SPAN`, at most `MOST_REPEATS`, by name and what one takes."""
    return {n: min(MOST_REPEATS, math.ceil(SPAN / max(ms[0], 1e-3))) for n, ms in once.items()}


def rotating(calls: Sequence[Call], repeats: int) -> Callable[[int], object]:
    """`repeats` of the calls one after the other; the next round goes on where one ends."""

    def run(round_: int) -> None:
        for n in range(repeats):
            calls[(round_ * repeats + n) % len(calls)]()

    return run


def _timing(milliseconds: list[float]) -> Timing:
    if len(milliseconds) == 1:
        milliseconds = milliseconds * 2
    low, median, high = statistics.quantiles(milliseconds, n=4, method="inclusive")
    return Timing(round(median, 4), (round(low, 4), round(high, 4)), len(milliseconds))
