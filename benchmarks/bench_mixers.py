"""What unpacking costs token mixers on CPU: forward and backward, against one unbroken row.

    python benchmarks/bench_mixers.py [--json PATH]

The patched model takes a row of documents of log-normal lengths apart and computes them in padded
batches. Its time is compared with what the stock model takes for a row of as many tokens without
any boundary: its mixers' own time on the unpadded token count. A ratio is the median over rounds in
one process, so that load on the machine slows both sides.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_cpu import log_normal_lengths
from packed_attn_patches.tiny import tiny_model
from timing import median_ratio, paired_seconds
from torch import Tensor

from packed_attn import PackedCollator, patch_model
from packed_attn.facts import machine_facts

ROUNDS = 5
TARGET = 1.5
TYPES = ("mamba", "mamba2", "lfm2", "qwen3_next", "recurrent_gemma", "bamba")
LENGTHS = log_normal_lengths(48, 2048, 256)
# Wide enough that arithmetic and not the number of calls decides.
WIDTHS: dict[str, Any] = {"hidden_size": 256, "max_position_embeddings": 4096}
SPECIAL: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 32},
    "recurrent_gemma": {"lru_width": 256},
    "bamba": {"mamba_n_heads": 32},
}
RESULTS = Path(__file__).parent / "results" / "mixers.json"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the figures go")
    options = parser.parse_args(arguments)
    rows = []
    print("| model type | unbroken row, s | unpacked, s | ratio | target |")
    print("|---|---|---|---|---|")
    for number, model_type in enumerate(TYPES, 1):
        print(f"[{number}/{len(TYPES)}] {model_type}", file=sys.stderr, flush=True)
        rows.append(measured(model_type))
        cells = "{model_type} | {row_s:.2f} | {unpacked_s:.2f} | {ratio:.2f}".format(**rows[-1])
        print(f"| {cells} | {TARGET} |", flush=True)
    report = {
        "machine": machine_facts("torch", "transformers"),
        "lengths": LENGTHS,
        "rounds": ROUNDS,
        "rows": rows,
    }
    options.json.write_text(json.dumps(report, indent=1) + "\n")


def measured(model_type: str) -> dict[str, Any]:
    """Seconds of both, and the median of their ratio in each round."""
    generator = torch.Generator().manual_seed(0)
    docs = [torch.randint(4, 190, (n,), generator=generator) for n in LENGTHS]
    batch = PackedCollator("documents")([{"input_ids": d} for d in docs])
    settings = {**WIDTHS, **SPECIAL.get(model_type, {})}
    stock = tiny_model(model_type, **settings).train()
    patched = patch_model(tiny_model(model_type, **settings)).train()
    row = {name: batch[name] for name in ("input_ids", "labels")}
    seconds = paired_seconds(
        {"row": _step(stock, row), "unpacked": _step(patched, batch)}, runs=ROUNDS
    )
    return {
        "model_type": model_type,
        "row_s": statistics.median(seconds["row"]),
        "unpacked_s": statistics.median(seconds["unpacked"]),
        "ratio": median_ratio(seconds["unpacked"], seconds["row"]),
    }


def _step(model: Any, batch: dict[str, Any]) -> Callable[[], Tensor]:
    def step() -> Tensor:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss

    return step


if __name__ == "__main__":
    main()
