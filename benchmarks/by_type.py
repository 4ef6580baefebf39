"""Benchmarks that time two ways of training tiny models, type by type, in turns in one process."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.timing import median_ratio, paired_seconds
from packed_attn.facts import machine_facts

ROUNDS = 5
Step = Callable[[], Tensor]


def run(
    arguments: Sequence[str] | None,
    purpose: str,
    results: Path,
    types: Sequence[str],
    measured: Callable[[str], dict[str, Any]],
    facts: Mapping[str, Any],
) -> None:
    """Measures every type and prints a row of it; the report is written anew after each.

    Args:
        purpose: what help says.
        results: where the report goes by default.
        facts: what the report says besides.
    """
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("--json", type=Path, default=results, help="where the figures go")
    parser.add_argument("--types", nargs="+", choices=types, default=types)
    options = parser.parse_args(arguments)
    report = {"machine": machine_facts("torch", "transformers"), **facts, "rounds": ROUNDS}
    rows: list[dict[str, Any]] = []
    for number, model_type in enumerate(options.types, 1):
        print(f"[{number}/{len(options.types)}] {model_type}", file=sys.stderr, flush=True)
        rows.append({"model_type": model_type, **measured(model_type)})
        if number == 1:
            print(f"| {' | '.join(rows[0])} |\n{'|---' * len(rows[0])}|")
        cells = (f"{x:.2f}" if isinstance(x, float) else str(x) for x in rows[-1].values())
        print(f"| {' | '.join(cells)} |", flush=True)
        options.json.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n")


def compared(base: tuple[str, Step], other: tuple[str, Step]) -> dict[str, float]:
    """Median seconds of two named steps, and the median over rounds of other / base."""
    seconds = paired_seconds(dict([base, other]), runs=ROUNDS)
    medians = {f"{name}_s": statistics.median(times) for name, times in seconds.items()}
    return {**medians, "ratio": median_ratio(seconds[other[0]], seconds[base[0]])}


def training_step(model: Any, batch: dict[str, Any]) -> Step:
    """Forward and backward of one batch; returns the loss."""

    def step() -> Tensor:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss

    return step
