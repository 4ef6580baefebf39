"""What IsolationCallback costs a training run: one probe beside one training step.

    python -m benchmarks.bench_isolation [--capacities 2048 8192] [--toy] [--json FILE]

The demo's model and log-normal documents. A step and a probe take turns; the overhead at N is the
median over rounds of (probe / step) / N, and what the callback's hook does in every other step.
"""

from __future__ import annotations

import argparse
import json
import timeit
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.bench_training_step import VOCABULARY, Step, packed_pack
from benchmarks.timing import median_ratio, paired_milliseconds
from packed_attn import patch_model
from packed_attn.audit import leaks_between_documents
from packed_attn.callbacks import Watch
from packed_attn.demo.batches import to_device
from packed_attn.demo.model import build_model
from packed_attn.demo.settings import use_all_cores
from packed_attn.facts import gpu_facts, machine_facts

EVERY = 500
HOOK_CALLS = 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """Times every capacity and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capacities", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--toy", action="store_true", help="one tiny step, to see that it runs")
    parser.add_argument("--json", type=Path, default=None)
    parsed = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = use_all_cores()
    capacities = [128] if parsed.toy else parsed.capacities
    rows = [
        measure(capacity, 1 if parsed.toy else parsed.rounds, device) for capacity in capacities
    ]
    for row in rows:
        print(
            f"capacity {row['capacity']:>6}: a probe takes {row['probe_over_step']:.2f} training "
            f"steps, the hook {row['hook_microseconds']:.1f} us a step: "
            f"{row['overhead']:.2%} at every={EVERY}"
        )
    if parsed.json is not None:
        facts = machine_facts("torch", "transformers") | gpu_facts() | {"threads": str(threads)}
        result = {"machine": facts, "every": EVERY, "probes": rows}
        parsed.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def measure(capacity: int, rounds: int, device: str) -> dict[str, float]:
    """A probe and a training step on one pack of `capacity` tokens, `rounds` times in turns."""
    batch = packed_pack(capacity)
    models = [build_model(vocab_size=VOCABULARY, capacity=capacity, seed=0) for _ in range(2)]
    model = patch_model(models[0]).to(device)
    live = to_device(batch, torch.device(device))
    candidates = {
        "step": Step(models[1], device, [batch], patched=True),
        "probe": lambda _: leaks_between_documents(model.train(), live),
    }
    if candidates["probe"](0) is not None:
        raise RuntimeError("the patched model leaks, so nothing is timed")
    times = paired_milliseconds(candidates, device, runs=rounds, warmup=1)
    watch = Watch()
    hook = timeit.timeit(lambda: watch(model, (), live), number=HOOK_CALLS) / HOOK_CALLS
    probe = median_ratio(times["probe"], times["step"])
    step = sorted(times["step"])[rounds // 2]
    return {
        "capacity": capacity,
        "documents": batch["layout"].num_documents,
        "step_milliseconds": step,
        "probe_over_step": probe,
        "hook_microseconds": 1e6 * hook,
        "overhead": probe / EVERY + 1e3 * hook / step,
    }


if __name__ == "__main__":
    raise SystemExit(main())
