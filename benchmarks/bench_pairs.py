"""What packs of source and target documents save on CPU: forward and backward, against padding.

    python -m benchmarks.bench_pairs [--json PATH]

The same pairs of log-normal lengths go through the stock model as rows that are padded to the
longest source and target, and through the patched model as one pack of each side. A ratio is the
median over rounds in one process, so that load on the machine slows both sides. The report holds
both losses, which are equal but for ProphetNet's, where padding changes what the stock model says.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from packed_attn_patches.tiny import tiny_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSeq2SeqLM

from benchmarks.bench_cpu import log_normal_lengths
from benchmarks.by_type import compared, run, training_step
from packed_attn import PackedCollator, patch_model

# The first two run padded and masked, the others in batches of equal lengths.
TYPES = ("t5", "bart", "umt5", "prophetnet")
PAIRS = 24
SOURCES = log_normal_lengths(PAIRS, 2048, 400)
TARGETS = log_normal_lengths(PAIRS, 768, 160, seed=1)
WIDTHS: dict[str, Any] = {"d_model": 256, "max_position_embeddings": 1024}
RESULTS = Path(__file__).parent / "results" / "pairs.json"


def main(arguments: Sequence[str] | None = None) -> None:
    run(
        arguments,
        __doc__.splitlines()[0],
        RESULTS,
        TYPES,
        measured,
        {"sources": SOURCES, "targets": TARGETS},
    )


def measured(model_type: str) -> dict[str, Any]:
    """Seconds of both, and the median of their ratio in each round."""
    generator = torch.Generator().manual_seed(0)
    sources, targets = (
        [torch.randint(4, 190, (n,), generator=generator) for n in lengths]
        for lengths in (SOURCES, TARGETS)
    )
    features = [{"input_ids": s, "labels": t} for s, t in zip(sources, targets)]
    packs = PackedCollator("documents", encoder_decoder=True)(features)
    padded = {
        "input_ids": pad_sequence(sources, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(s) for s in sources], batch_first=True),
        "labels": pad_sequence(targets, batch_first=True, padding_value=-100),
    }
    build = {"auto_class": AutoModelForSeq2SeqLM, **WIDTHS}
    stock = tiny_model(model_type, **build).train()
    patched = patch_model(tiny_model(model_type, **build)).train()
    steps = {"padded": training_step(stock, padded), "packed": training_step(patched, packs)}
    losses = {f"{name}_loss": float(step().detach()) for name, step in steps.items()}
    return {**losses, **compared(*steps.items())}


if __name__ == "__main__":
    main()
