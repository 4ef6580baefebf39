"""The packer's figures, one core, against TRL in the same process.

    python -m benchmarks.bench_packing [--rows plan,bound,...] [--json PATH]

Times are CPU seconds of the process (user and system), medians, which other work on the machine
disturbs less than wall time; rows that are asked for replace those of the same name in the JSON.
TRL plans and moves tokens in one function, so for its plan documents carry one-byte tokens, and
the time that Arrow needs to move them is measured alone and taken off.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# One core: before numpy and Arrow start their threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from trl.data_utils import pack_dataset as trl_pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from packed_attn.collator import PackedCollator
from packed_attn.facts import machine_facts
from packed_attn.packing import PackedBatchSampler, PackedDataset, pack_dataset, pack_lengths

RESULTS = Path(__file__).parent / "results" / "packing.json"
FIRST_PLAN = """
import time
wall, cpu = time.perf_counter(), time.process_time()
import numpy as np
from packed_attn.packing import pack_lengths
loaded = time.perf_counter(), time.process_time()
pack_lengths(np.arange(1, 1000), 4096)
print(time.perf_counter() - loaded[0], time.process_time() - loaded[1])
"""

Figures = list[dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(BENCHMARKS), help="which, by name")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the figures go")
    options = parser.parse_args(arguments)
    datasets.disable_progress_bars()
    datasets.disable_caching()
    pa.set_cpu_count(1)
    torch.set_num_threads(1)
    report = json.loads(options.json.read_text()) if options.json.exists() else {}
    report = {name: figures for name, figures in report.items() if name in BENCHMARKS}
    for name in options.rows.split(","):
        report[name] = BENCHMARKS[name]()
        for figures in report[name]:
            print(name, ", ".join(f"{k} {v}" for k, v in figures.items()), sep=": ", flush=True)
        facts = machine_facts("numpy", "numba", "scipy", "pyarrow", "datasets", "trl")
        shared = "shared with other work; CPU seconds of one core, medians"
        written = {"machine": {**facts, "measured": shared}, **report}
        options.json.write_text(json.dumps(written, indent=2) + "\n")


def plan() -> Figures:
    """Documents planned a second, report included, and TRL's where it packs as it comes."""
    figures = []
    for documents in (1_000_000, 10_000_000):
        lengths = some_lengths("lognormal", documents, 4096)
        seconds, packs = cpu_seconds(partial(pack_lengths, lengths, 4096), 7)
        figures.append({"planner": "packed-attn", **plan_figures(seconds, lengths, packs)})
    lengths = some_lengths("lognormal", 100_000, 4096)
    seconds, packs = cpu_seconds(lambda: pack_lengths(lengths, 4096), 7)
    figures.append({"planner": "packed-attn", **plan_figures(seconds, lengths, packs)})
    data = data_set(lengths, np.zeros(lengths.sum(), np.int8))
    tokens, order = data.data.column("input_ids"), pa.array(packs.order)
    moving, _ = cpu_seconds(lambda: pc.take(tokens, order), 3)
    theirs, rows = cpu_seconds(lambda: trl_packed(data, 4096), 1)
    rate = round(lengths.size / (theirs - moving))
    figures.append(
        {
            "planner": "TRL, 1000 documents at a time",
            "documents": lengths.size,
            "documents_per_second": rate,
            "packs": rows.num_rows,
            "lower_bound": packs.report.lower_bound,
        }
    )
    return figures


def first_plan() -> Figures:
    """Seconds that the first plan of a process takes: compiling, then with compiled code kept."""
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for state in ("nothing compiled", "compiled code kept"):
            environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
            command = [sys.executable, "-c", FIRST_PLAN]
            text = subprocess.run(
                command, env=environment, check=True, capture_output=True, text=True
            ).stdout
            wall, cpu = map(float, text.split())
            figures.append(
                {"state": state, "wall_seconds": round(wall, 2), "cpu_seconds": round(cpu, 2)}
            )
    return figures


def bound() -> Figures:
    """Packs over the Martello-Toth bound."""
    figures = []
    for kind in ("lognormal", "uniform", "bimodal", "near half"):
        for capacity in (2048, 4096, 8192, 16384, 32768):
            report = pack_lengths(some_lengths(kind, 100_000, capacity), capacity).report
            ratio = round(report.packs / report.lower_bound, 6)
            figures.append({"lengths": kind, "capacity": capacity, "packs_over_bound": ratio})
    return figures


def optimal() -> Figures:
    """Packs over the bound that the linear program proves, lengths U(0.28, 0.40) of capacity."""
    figures = []
    for capacity in (2048, 32768):
        lengths = some_lengths("third", 100_000, capacity)
        seconds, packs = cpu_seconds(
            partial(pack_lengths, lengths, capacity, strategy="optimal"), 1
        )
        fewest = packs.report.lower_bound
        figures.append(
            {
                "capacity": capacity,
                "packs_over_bound": round(packs.num_packs / fewest, 5),
                "bfd_over_bound": round(pack_lengths(lengths, capacity).num_packs / fewest, 5),
                "cpu_seconds": round(seconds, 2),
            }
        )
    return figures


def index() -> Figures:
    """A data set of 100 thousand documents (50 M tokens) planned without moving a token."""
    lengths = some_lengths("lognormal", 100_000, 4096)
    data = data_set(lengths, some_tokens(lengths))

    def make() -> PackedDataset:
        return PackedDataset(data, 4096, on_report=lambda report: None)

    seconds, rows = cpu_seconds(make, 9)
    peak = peak_bytes(make)
    return [
        {
            "documents": lengths.size,
            "packs": len(rows),
            "milliseconds": round(seconds * 1e3, 1),
            "peak_megabytes": round(peak / 1e6, 1),
        }
    ]


def materialise() -> Figures:
    """The same 50 M tokens from disk to disk; ours writes labels and position_ids besides."""
    lengths = some_lengths("lognormal", 100_000, 4096)
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        data_set(lengths, some_tokens(lengths)).save_to_disk(folder)
        packers: dict[str, Callable[[], Any]] = {
            "packed-attn": lambda: pack_dataset(datasets.load_from_disk(folder), 4096),
            "TRL": lambda: trl_packed(datasets.load_from_disk(folder), 4096, in_memory=False),
        }

        def once(packer: str) -> float:
            seconds, _ = cpu_seconds(packers[packer], 1)
            for path in [*Path(folder).glob("packed-*"), *Path(folder).glob("cache-*")]:
                path.unlink()
            return seconds

        times = {packer: [] for packer in packers}
        for _ in range(3):
            for packer in packers:
                times[packer].append(once(packer))
        for packer in packers:
            seconds = statistics.median(times[packer])
            peak = peak_bytes(packers[packer])
            for path in [*Path(folder).glob("packed-*"), *Path(folder).glob("cache-*")]:
                path.unlink()
            figures.append(
                {
                    "packer": packer,
                    "cpu_seconds": round(seconds, 3),
                    "tokens_per_second": round(lengths.sum() / seconds),
                    "peak_megabytes": round(peak / 1e6, 1),
                }
            )
    return figures


def assemble() -> Figures:
    """Tokens a second of rows of 32768, fetched and collated."""
    lengths = some_lengths("lognormal", 20_000, 32768)
    data = data_set(lengths, some_tokens(lengths))
    rows = PackedDataset(data, 32768, seed=0, on_report=lambda report: None)
    collator = PackedCollator(capacity=32768)
    theirs = trl_packed(data, 32768)
    their_collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    makers: dict[str, Callable[[int], Any]] = {
        "packed-attn": lambda i: collator([rows[i]]),
        "TRL": lambda i: their_collator([theirs[i]]),
    }
    figures = []
    for maker, make in makers.items():
        tokens = [make(i)["input_ids"].numel() for i in range(5)]  # and warms up
        times = [cpu_seconds(partial(make, i), 1)[0] for i in range(100)]
        seconds = statistics.median(times)
        figures.append(
            {
                "maker": maker,
                "microseconds": round(seconds * 1e6),
                "tokens_per_second": round(statistics.mean(tokens) / seconds),
            }
        )
    return figures


def ranks() -> Figures:
    """Modelled time of a micro-step over that of the mean rank, capacity 32768."""
    figures = []
    for mean in (500, 2000):
        lengths = some_lengths("lognormal", 200_000, 32768, mean)
        packs = pack_lengths(lengths, 32768, seed=0)
        for world_size in (8, 64):
            sampler = PackedBatchSampler(packs, world_size=world_size)
            random = PackedBatchSampler(packs, world_size=world_size, window_steps=1)
            figures.append(
                {
                    "mean_length": mean,
                    "world_size": world_size,
                    "stretch": round(sampler.stretch(), 4),
                    "stretch_in_random_order": round(random.stretch(), 4),
                }
            )
    return figures


BENCHMARKS: dict[str, Callable[[], Figures]] = {
    "plan": plan,
    "first_plan": first_plan,
    "bound": bound,
    "optimal": optimal,
    "index": index,
    "materialise": materialise,
    "assemble": assemble,
    "ranks": ranks,
}


def some_lengths(kind: str, documents: int, capacity: int, mean: int = 500) -> NDArray[np.int64]:
    """Lengths of a kind, from 1 to capacity; log-normal ones are like those of chats."""
    random = np.random.default_rng(0)
    if kind == "lognormal":
        draws = random.lognormal(np.log(mean) - 0.5, 1.0, documents)
    elif kind == "uniform":
        draws = random.integers(1, capacity + 1, documents)
    elif kind == "bimodal":
        short = random.lognormal(np.log(200) - 0.18, 0.6, documents)
        long = random.normal(0.7 * capacity, 0.1 * capacity, documents)
        draws = np.where(random.random(documents) < 0.7, short, long)
    else:
        low, high = {"near half": (0.45, 0.55), "third": (0.28, 0.40)}[kind]
        draws = random.integers(int(low * capacity), int(high * capacity) + 1, documents)
    return np.clip(np.rint(draws), 1, capacity).astype(np.int64)


def some_tokens(lengths: NDArray[np.int64]) -> NDArray[np.int32]:
    return np.random.default_rng(1).integers(0, 50_000, int(lengths.sum()), dtype=np.int32)


def data_set(lengths: NDArray[np.int64], tokens: NDArray[Any]) -> datasets.Dataset:
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens))
    return datasets.Dataset(pa.table({"input_ids": lists}))


def trl_packed(data: datasets.Dataset, capacity: int, in_memory: bool = True) -> datasets.Dataset:
    options = {"load_from_cache_file": False, "keep_in_memory": in_memory}
    return trl_pack_dataset(data, capacity, "bfd", options)


def cpu_seconds(function: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    """Median CPU seconds, after one round that warms up where there are several."""
    times, result = [], function() if rounds > 1 else None
    for _ in range(rounds):
        begin = time.process_time()
        result = function()
        times.append(time.process_time() - begin)
    return statistics.median(times), result


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes allocated at a time, Python's and numpy's plus Arrow's; not mapped files."""
    usual, arrow = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(arrow)
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    pa.set_memory_pool(usual)
    return peak + (arrow.max_memory() or 0)


def plan_figures(seconds: float, lengths: NDArray[np.int64], packs: Any) -> dict[str, Any]:
    return {
        "documents": lengths.size,
        "documents_per_second": round(lengths.size / seconds),
        "packs": packs.num_packs,
        "lower_bound": packs.report.lower_bound,
    }


if __name__ == "__main__":
    main()
