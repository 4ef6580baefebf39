"""The packer against TRL's: documents a second and packs made, in one process.

    python benchmarks/bench_packing.py [--documents N] [--json PATH]

Two tables. "Plan": `pack_lengths` on N log-normal lengths, against TRL's `pack_dataset` (bfd) as it
comes (1000 documents at a time) and told to take the whole set at once. TRL plans and moves tokens
in one function, so its documents carry one-byte tokens, and the time that Arrow needs to move
them is measured alone and taken off TRL's. "Data set": `pack_dataset` against `pack_dataset`,
tokens in and rows out, where ours also writes labels and position_ids.

All are single-threaded and timed in CPU seconds of the process (user and system), which other work
on the machine disturbs less than wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# One core: before numpy and Arrow start their threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from trl.data_utils import pack_dataset as trl_pack_dataset

from packed_attn.facts import machine_facts
from packed_attn.packing import pack_dataset, pack_lengths

ROUNDS = 9
DATASET_ROUNDS = 3
DATASET_DOCUMENTS = 100_000
CAPACITIES = (2048, 4096)
TARGET = 100.0  # times TRL's documents a second
RESULTS = Path(__file__).parent / "results" / "packing.json"


@dataclass(frozen=True)
class PlanRow:
    """One planner on one set of lengths."""

    capacity: int
    planner: str
    cpu_seconds: float
    documents_per_second: float
    packs: int
    lower_bound: int
    slower_than_ours: float


@dataclass(frozen=True)
class DatasetRow:
    """One packer of whole data sets."""

    capacity: int
    packer: str
    cpu_seconds: float
    documents_per_second: float
    tokens_per_second: float
    packs: int
    slower_than_ours: float


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=1_000_000, help="for the plan")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the figures go")
    options = parser.parse_args(arguments)
    datasets.disable_progress_bars()
    datasets.disable_caching()
    pa.set_cpu_count(1)
    plans, packed = [], []
    for capacity in CAPACITIES:
        print(f"plan, capacity {capacity} ...", file=sys.stderr, flush=True)
        plans += plan_rows(log_normal_lengths(options.documents, capacity), capacity)
    for capacity in CAPACITIES:
        print(f"data set, capacity {capacity} ...", file=sys.stderr, flush=True)
        packed += dataset_rows(log_normal_lengths(DATASET_DOCUMENTS, capacity), capacity)
    print(plan_table(plans, options.documents), dataset_table(packed), sep="\n\n")
    report = {
        "machine": machine_facts("numpy", "pyarrow", "datasets", "trl"),
        "documents": options.documents,
        "dataset_documents": DATASET_DOCUMENTS,
        "plan": [asdict(row) for row in plans],
        "dataset": [asdict(row) for row in packed],
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=2) + "\n")


def log_normal_lengths(documents: int, capacity: int, seed: int = 0) -> NDArray[np.int64]:
    """Lengths like those of chats: log-normal, mean 500 and sigma 1 before the cut at capacity."""
    draws = np.random.default_rng(seed).lognormal(np.log(500) - 0.5, 1.0, documents)
    return np.clip(np.rint(draws), 1, capacity).astype(np.int64)


def plan_rows(lengths: NDArray[np.int64], capacity: int) -> list[PlanRow]:
    """Ours, median of rounds before and after TRL's, which run once: they take a minute each."""
    packs = pack_lengths(lengths, capacity)
    data = documents_of_bytes(lengths)
    tokens, order = data.data.column("input_ids"), pa.array(packs.order)
    moving = min(_cpu_seconds(lambda: pc.take(tokens, order))[0] for _ in range(3))

    def rounds_of_ours() -> list[float]:
        return [_cpu_seconds(lambda: pack_lengths(lengths, capacity))[0] for _ in range(ROUNDS)]

    before = rounds_of_ours()
    theirs = {}
    for planner, batch in (("TRL, as it comes", 1000), ("TRL, whole set", lengths.size)):
        seconds, rows = _cpu_seconds(_trl_packer(data, capacity, batch))
        theirs[planner] = (seconds - moving, rows.num_rows)
    ours = statistics.median(before + rounds_of_ours())
    results = {"packed-attn": (ours, packs.num_packs), **theirs}
    return [
        PlanRow(
            capacity,
            planner,
            round(seconds, 4),
            round(lengths.size / seconds),
            num_packs,
            packs.report.lower_bound,
            round(seconds / ours, 1),
        )
        for planner, (seconds, num_packs) in results.items()
    ]


def dataset_rows(lengths: NDArray[np.int64], capacity: int) -> list[DatasetRow]:
    """Whole data sets in memory with int32 tokens, candidates taking turns."""
    total = int(lengths.sum())
    tokens = np.random.default_rng(1).integers(0, 50_000, total, dtype=np.int32)
    data = _dataset(lengths, tokens)
    candidates: dict[str, Callable[[], Any]] = {
        "packed-attn": lambda: pack_dataset(data, capacity),
        "TRL, as it comes": _trl_packer(data, capacity, 1000),
        "TRL, whole set": _trl_packer(data, capacity, lengths.size),
    }
    packs = {name: pack().num_rows for name, pack in candidates.items()}  # and warms them up
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(DATASET_ROUNDS):
        for name, pack in candidates.items():
            seconds[name].append(_cpu_seconds(pack)[0])
    ours = statistics.median(seconds["packed-attn"])
    return [
        DatasetRow(
            capacity,
            name,
            round(statistics.median(times), 3),
            round(lengths.size / statistics.median(times)),
            round(total / statistics.median(times)),
            packs[name],
            round(statistics.median(times) / ours, 1),
        )
        for name, times in seconds.items()
    ]


def documents_of_bytes(lengths: NDArray[np.int64]) -> datasets.Dataset:
    """Documents of the given lengths, every token one zero byte."""
    return _dataset(lengths, np.zeros(lengths.sum(), np.int8))


def _dataset(lengths: NDArray[np.int64], tokens: NDArray[Any]) -> datasets.Dataset:
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens))
    return datasets.Dataset(pa.table({"input_ids": lists}))


def _trl_packer(data: datasets.Dataset, capacity: int, batch: int) -> Callable[[], Any]:
    options = {"batch_size": batch, "load_from_cache_file": False, "keep_in_memory": True}
    return lambda: trl_pack_dataset(data, capacity, "bfd", options)


def _cpu_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.process_time()
    result = function()
    return time.process_time() - begin, result


def plan_table(rows: Sequence[PlanRow], documents: int) -> str:
    lines = [
        f"Plan of {documents:,} log-normal lengths (target: {TARGET:g}x TRL's documents a second "
        "at equal or fewer packs)\n",
        "| capacity | planner | CPU seconds | documents/s | packs | over ceil(tokens / capacity) | "
        "time, ours = 1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.capacity} | {row.planner} | {row.cpu_seconds:.3f} | "
            f"{row.documents_per_second:,} | {row.packs:,} | "
            f"{row.packs / row.lower_bound - 1:.4%} | {row.slower_than_ours:,.0f}x |"
        )
    return "\n".join(lines)


def dataset_table(rows: Sequence[DatasetRow]) -> str:
    lines = [
        f"Data set of {DATASET_DOCUMENTS:,} documents in memory, tokens in and rows out (ours also "
        "writes labels and position_ids)\n",
        "| capacity | packer | CPU seconds | documents/s | tokens/s | packs | time, ours = 1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.capacity} | {row.packer} | {row.cpu_seconds:.2f} | "
            f"{row.documents_per_second:,} | {row.tokens_per_second:,} | "
            f"{row.packs:,} | {row.slower_than_ours:.1f}x |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
