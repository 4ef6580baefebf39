"""Paired timing: candidates take turns in one process, so that a busy machine slows all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def paired_seconds(
    candidates: Mapping[str, Callable[[], object]], runs: int = 9, warmup: int = 1
) -> dict[str, list[float]]:
    """Wall seconds of each candidate in each of `runs` rounds; a round runs every candidate once.

    The order turns from round to round, so that none always follows the same neighbour.
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names * warmup:
        candidates[name]()
    for round_ in range(runs):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            begin = time.perf_counter()
            candidates[name]()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def median_ratio(slower: list[float], faster: list[float]) -> float:
    """How many times longer `slower` takes: the median over rounds of the ratio inside a round."""
    return statistics.median(s / f for s, f in zip(slower, faster))
