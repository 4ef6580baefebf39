"""Token mixers on a GPU: a training step by the documents' boundaries and on documents in batches.

    python -m benchmarks.bench_mixers_gpu [--types TYPE ...] [--json PATH]

Four layers of each type, bfloat16, one pack of log-normal documents, forward and backward. The same
patched model runs by its mixers' kernels (`boundaries`) and on documents batched by length
(`batches`); `row` is the stock model on as many tokens without any boundary, whose attention goes
over the whole row. Medians of rounds in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from packed_attn_patches import fast_mixers
from packed_attn_patches.tiny import tiny_model
from torch import Tensor

from benchmarks.bench_cpu import log_normal_lengths
from benchmarks.timing import paired_milliseconds
from packed_attn import PackedCollator, patch_model
from packed_attn.facts import machine_facts

RESULTS = Path(__file__).parent / "results" / "mixers_gpu.json"
LENGTHS = log_normal_lengths(24, 16384, 4096)
ROUNDS = 7
WIDTHS: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_hidden_layers": 4,
    "max_position_embeddings": 1 << 15,
}
_MIXED = ["linear_attention"] * 3 + ["full_attention"]
_GATED = {
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "layer_types": _MIXED,
}
_MAMBA = {"mamba_n_heads": 32, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_chunk_size": 256}
TYPES: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv"] * 3 + ["full_attention"]},
    "qwen3_5_text": _GATED,
    "qwen3_next": {**_GATED, "mlp_only_layers": [0, 1, 2, 3]},
    "olmo_hybrid": _GATED,
    "bamba": {**_MAMBA, "attn_layer_indices": [3]},
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the figures go")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    facts = machine_facts("torch", "triton", "transformers", *_PACKAGES)
    rows: list[dict[str, Any]] = []
    print("| type | row ms | batches ms | boundaries ms | why not |\n|---|---|---|---|---|")
    for model_type in options.types:
        rows.append({"model_type": model_type, **measured(model_type, options.device)})
        cells = [rows[-1].get(k, "") for k in ("row_ms", "batches_ms", "boundaries_ms", "why_not")]
        cells = [f"{x:.1f}" if isinstance(x, float) else str(x) for x in cells]
        print(f"| {model_type} | {' | '.join(cells)} |", flush=True)
        report = {"machine": facts, "lengths": LENGTHS, "rounds": ROUNDS, "rows": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


_PACKAGES = ("flash-linear-attention", "fla-core", "mamba-ssm", "causal-conv1d")


def measured(model_type: str, device: str) -> dict[str, Any]:
    """Median milliseconds of each; `why_not` where the model takes no boundaries here."""
    generator = torch.Generator().manual_seed(0)
    docs = [torch.randint(4, 190, (n,), generator=generator) for n in LENGTHS]
    batch = {
        name: value.to(device) if hasattr(value, "to") else value
        for name, value in PackedCollator("documents")([{"input_ids": d} for d in docs]).items()
    }
    row = {name: batch[name] for name in ("input_ids", "labels")}
    fast = patch_model(_model(model_type, device))
    with mock.patch.object(fast_mixers, "FAST_TYPES", frozenset()):
        batches = patch_model(_model(model_type, device))
    candidates = {
        "row": _step(_model(model_type, device), row),
        "batches": _step(batches, batch),
    }
    why_not = fast_mixers.reason_against(fast, batch["layout"])
    if why_not is None:
        candidates["boundaries"] = _step(fast, batch)
    times = paired_milliseconds(candidates, device, runs=ROUNDS)
    found: dict[str, Any] = {f"{n}_ms": statistics.median(ms) for n, ms in times.items()}
    return found if why_not is None else {**found, "why_not": why_not}


def _model(model_type: str, device: str) -> Any:
    settings = {**WIDTHS, **TYPES[model_type]}
    return tiny_model(model_type, dtype=torch.bfloat16, **settings).to(device).train()


def _step(model: Any, batch: dict[str, Any]) -> Callable[[int], Tensor]:
    def step(_: int) -> Tensor:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss

    return step


if __name__ == "__main__":
    main()
