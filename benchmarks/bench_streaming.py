"""How full PackedIterableDataset packs a stream, how fast, and whether it continues at every step.

    python -m benchmarks.bench_streaming [--rows fill,resume] [--documents N] [--json PATH]

fill: documents of log-normal lengths, mean 500, cut at the capacity. The fill is against the bound:
the packs that hold all tokens, were all of them full, over the packs made. Time is CPU time of one
process, reading, planning and assembling included.

resume: a run of over 200 steps is stopped and continued at every one of them, under torchdata's
StatefulDataLoader by its state and under a plain DataLoader by skipping, with 0, 2 and 4 workers.
Every row must be the same to the bit, and the run raises where one is not. Takes six minutes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from packed_attn import PackedIterableDataset
from packed_attn.facts import machine_facts
from tests.test_streaming import continue_at_every_step

CAPACITIES = (2048, 4096, 8192)
WINDOWS = ((1000, 0.995), (10_000, 0.998))  # documents, and the fill to reach
RESULTS = Path(__file__).parent / "results" / "streaming.json"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(MEASURES), help="which, by name")
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the figures go")
    options = parser.parse_args(arguments)
    content = json.loads(options.json.read_text()) if options.json.exists() else {}
    for name in options.rows.split(","):
        content[name] = MEASURES[name](options.documents)
        content["machine"] = machine_facts("numpy", "torch", "torchdata")
        options.json.write_text(json.dumps(content, indent=2) + "\n")


def fill(documents: int) -> list[dict[str, float]]:
    """Every capacity and window on one stream of documents."""
    return [
        measure(documents, capacity, lookahead, target)
        for capacity in CAPACITIES
        for lookahead, target in WINDOWS
    ]


def resume(documents: int) -> list[dict[str, int]]:
    """How many stops each loader was continued from; the length of the stream is fixed."""
    rows = []
    for workers in (0, 2, 4):
        stateful, plain = continue_at_every_step(workers)
        rows.append({"workers": workers, "stateful_loader": stateful, "plain_loader": plain})
        print("resume:", ", ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    return rows


def measure(documents: int, capacity: int, lookahead: int, target: float) -> dict[str, float]:
    """Packs one stream, prints and returns its figures."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(500) - 0.5, 1.0, documents), 1, capacity).astype(int)
    tokens = np.zeros(capacity, np.int64)
    stream = [tokens[:length] for length in lengths.tolist()]
    packed = PackedIterableDataset(stream, capacity, lookahead=lookahead)
    began = time.process_time()
    packs = sum(1 for _ in packed)
    seconds = time.process_time() - began
    row = {
        "documents": documents,
        "capacity": capacity,
        "lookahead": lookahead,
        "packs": packs,
        "fill_of_bound": -(-int(lengths.sum()) // capacity) / packs,
        "target": target,
        "documents_per_second": documents / seconds,
        "tokens_per_second": int(lengths.sum()) / seconds,
    }
    print(
        f"capacity {capacity:5}, look-ahead {lookahead:6}: {row['fill_of_bound']:.5f} of the bound "
        f"(to reach: {target}), {row['documents_per_second']:,.0f} documents/s"
    )
    return row


MEASURES = {"fill": fill, "resume": resume}


if __name__ == "__main__":
    main()
