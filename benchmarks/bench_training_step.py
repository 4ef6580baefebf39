"""A whole training step, packed-attn beside stock transformers packing and padding.

    python -m benchmarks.bench_training_step [--capacities 2048 8192] [--toy] [--json FILE]

The demo's model and log-normal documents; forward, backward and an AdamW step on the same ones.
Stock packing is shown at its best: position_ids and no cache, which keeps documents apart.
Candidates take turns; figures are medians over rounds of the ratio inside a round. Losses are
compared before anything is timed. On a GPU the same script times the GPU: not yet run on one.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import median_ratio, paired_milliseconds
from packed_attn import PackedCollator, patch_model
from packed_attn.demo.batches import pad_documents, to_device
from packed_attn.demo.model import build_model
from packed_attn.demo.settings import use_all_cores
from packed_attn.facts import gpu_facts, machine_facts
from tests.cases import log_normal_lengths

VOCABULARY = 2048
PADDED_ROWS = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Times every capacity and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capacities", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--toy", action="store_true", help="one tiny step, to see that it runs")
    parser.add_argument("--json", type=Path, default=None)
    parsed = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = use_all_cores()
    capacities = [128] if parsed.toy else parsed.capacities
    rounds = 1 if parsed.toy else parsed.rounds
    rows = [measure(capacity, rounds, device) for capacity in capacities]
    for row in rows:
        print(
            f"capacity {row['capacity']:>6}, {row['documents']:>3} documents: "
            f"{row['tokens_per_second']:>9,.0f} real tokens/s, {row['over_stock']:.2f}x stock "
            f"packing, {row['over_padded']:.2f}x padded; losses differ by {row['loss_error']:.1e}"
        )
    if parsed.json is not None:
        facts = machine_facts("torch", "transformers") | gpu_facts() | {"threads": str(threads)}
        parsed.json.write_text(json.dumps({"machine": facts, "steps": rows}, indent=2) + "\n")
    return 0


def measure(capacity: int, rounds: int, device: str) -> dict[str, float]:
    """One step of each candidate on one pack of `capacity` tokens, `rounds` times in turns."""
    documents = _documents(capacity)
    candidates = {
        "packed-attn": training_step(capacity, device, True, [_packed(documents)]),
        "stock packing": training_step(capacity, device, False, [_stock(documents)]),
        "padded": training_step(capacity, device, False, _padded(documents)),
    }
    losses = {name: step(-1) for name, step in candidates.items()}
    error = max(abs(loss - losses["packed-attn"]) for loss in losses.values())
    if error > 1e-4 * losses["packed-attn"]:
        raise RuntimeError(f"losses differ, so nothing is timed: {losses}")
    times = paired_milliseconds(candidates, device, runs=rounds, warmup=1)
    ours = times["packed-attn"]
    return {
        "capacity": capacity,
        "documents": len(documents),
        "tokens_per_second": 1e3 * capacity / statistics.median(ours),
        "over_stock": median_ratio(times["stock packing"], ours),
        "over_padded": median_ratio(times["padded"], ours),
        "loss_error": error,
    }


def packed_pack(capacity: int) -> dict[str, Any]:
    """The batch of one pack of `capacity` tokens."""
    return _packed(_documents(capacity))


def training_step(
    capacity: int, device: str, patched: bool, batches: list[dict[str, Any]]
) -> Callable[[int], float]:
    """One optimizer step over the batches; returns the token mean of the loss."""
    model = build_model(vocab_size=VOCABULARY, capacity=capacity, seed=0).to(device).train()
    if patched:
        patch_model(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    batches = [to_device(batch, torch.device(device)) for batch in batches]
    targets = sum(_targets(batch["labels"]) for batch in batches)

    def step(_: int) -> float:
        optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            loss = model(**batch, num_items_in_batch=targets).loss
            loss.backward()
            total += loss.item()
        optimizer.step()
        return total

    return step


def _documents(capacity: int) -> list[Tensor]:
    lengths = log_normal_lengths(capacity, median=capacity / 16, sigma=1.0)
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, VOCABULARY, (n,), generator=generator) for n in lengths]


def _packed(documents: list[Tensor]) -> dict[str, Any]:
    return PackedCollator("documents")([{"input_ids": d} for d in documents])


def _stock(documents: list[Tensor]) -> dict[str, Any]:
    batch = _packed(documents)
    return {name: batch[name] for name in ("input_ids", "labels", "position_ids")}


def _padded(documents: list[Tensor]) -> list[dict[str, Any]]:
    features = [{"input_ids": d, "labels": d.clone()} for d in documents]
    return [
        pad_documents(features[at : at + PADDED_ROWS])
        for at in range(0, len(features), PADDED_ROWS)
    ]


def _targets(labels: Tensor) -> int:
    return int((labels[:, 1:] != -100).sum())


if __name__ == "__main__":
    raise SystemExit(main())
