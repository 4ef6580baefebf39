"""Paired timing: candidates take turns in one process, so that a busy machine slows all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def paired_seconds(
    candidates: Mapping[str, Callable[[], object]],
    runs: int = 9,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each candidate in each of `runs` rounds; a round runs every candidate once.

    The order turns from round to round, so that none always follows the same neighbour.

    Args:
        clock: what reads the time: wall time, or `time.process_time` where other processes would
            disturb it.
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names * warmup:
        candidates[name]()
    for round_ in range(runs):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            begin = clock()
            candidates[name]()
            seconds[name].append(clock() - begin)
    return seconds


def median_ratio(slower: list[float], faster: list[float]) -> float:
    """How many times longer `slower` takes: the median over rounds of the ratio inside a round."""
    return statistics.median(s / f for s, f in zip(slower, faster))


def paired_milliseconds(
    candidates: Mapping[str, Callable[[int], object]],
    device: str,
    runs: int | Mapping[str, int] = 15,
    warmup: int = 2,
) -> dict[str, list[float]]:
    """Milliseconds of each candidate in each of `runs` rounds, on the device's own clock.

    Candidates take the number of the round, by which they rotate their inputs. On CUDA two events
    stand around each call and the host waits once a round; elsewhere it is wall time.

    Args:
        runs: rounds of all candidates, or of each by name: one with fewer leaves the later rounds.
    """
    rounds = dict.fromkeys(candidates, runs) if isinstance(runs, int) else runs
    milliseconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(-warmup, max(rounds.values(), default=0)):
        names = [name for name in candidates if round_ < rounds[name]]
        turn = round_ % max(1, len(names))
        clocks = {}
        for name in names[turn:] + names[:turn]:
            clocks[name] = clock = _Clock(device)
            candidates[name](round_)
            clock.stop()
        for name in names if round_ >= 0 else ():
            milliseconds[name].append(clocks[name].milliseconds())
    return milliseconds


def host_microseconds(call: Callable[[], object], device: str, calls: int = 20) -> float:
    """Median microseconds until a call returns to Python; each starts with an idle device."""
    microseconds = []
    for _ in range(calls):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        microseconds.append(1e6 * (time.perf_counter() - begin))
    return statistics.median(microseconds)


class _Clock:
    """Runs from its creation to `stop`."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.begin = self._now()

    def stop(self) -> None:
        self.end = self._now()

    def milliseconds(self) -> float:
        if self.on_gpu:
            self.end.synchronize()
            return self.begin.elapsed_time(self.end)
        return 1e3 * (self.end - self.begin)

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
