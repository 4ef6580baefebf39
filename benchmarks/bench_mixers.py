"""What unpacking costs token mixers on CPU: forward and backward, against one unbroken row.

    python -m benchmarks.bench_mixers [--json PATH]

The patched model takes a row of documents of log-normal lengths apart and computes them in padded
batches; LFM2, whose mixers take the boundaries, computes it as it is. Its time is compared with
what the stock model takes for a row of as many tokens without any boundary: its mixers' own time on
the unpadded token count. A ratio is the median over rounds in one process, so that load on the
machine slows both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from packed_attn_patches.tiny import tiny_model

from benchmarks.bench_cpu import log_normal_lengths
from benchmarks.by_type import compared, run, training_step
from packed_attn import PackedCollator, patch_model

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
    run(
        arguments,
        __doc__.splitlines()[0],
        RESULTS,
        TYPES,
        measured,
        {"lengths": LENGTHS, "target": TARGET},
    )


def measured(model_type: str) -> dict[str, Any]:
    """Seconds of both, and the median of their ratio in each round."""
    generator = torch.Generator().manual_seed(0)
    docs = [torch.randint(4, 190, (n,), generator=generator) for n in LENGTHS]
    batch = PackedCollator("documents")([{"input_ids": d} for d in docs])
    settings = {**WIDTHS, **SPECIAL.get(model_type, {})}
    stock = tiny_model(model_type, **settings).train()
    patched = patch_model(tiny_model(model_type, **settings)).train()
    row = {name: batch[name] for name in ("input_ids", "labels")}
    return compared(("row", training_step(stock, row)), ("unpacked", training_step(patched, batch)))


if __name__ == "__main__":
    main()
