"""The demo: four ways of batching real documents, one table, and a secret that only leaks.

    packed-attn demo          or          python -m packed_attn.demo

Every table row and the secret run in a child process of their own, one after another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

# Imports and the checks after training take about this long on two cores; the rest is training.
SECONDS_BESIDE_TRAINING = 7.0
NEEDED = ("transformers", "accelerate", "datasets", "tokenizers", "tqdm", "matplotlib")


def run(
    output: Path = Path("demo-output"),
    seconds_per_row: float = 15.0,
    *,
    seconds_for_secret: float = 30.0,
    markdown: bool = False,
) -> int:
    """Runs the whole demo, prints its table and fills `output`.

    Writes `results.json`, `table.md`, `secret.png`, and the tokenized documents.

    Args:
        output: folder to write, made where it is missing.
        seconds_per_row: seconds for each row, its imports and checks (about 7) counted.
        seconds_for_secret: seconds for the planted secret, its imports (about 7) counted.
        markdown: print the table as Markdown.

    Returns:
        0; or 1 when packed-attn let a token see another document.

    Raises:
        ImportError: a package of the extras `hf` and `plot` is missing.
        RuntimeError: a child process failed.
    """
    _check_installed()
    from packed_attn.demo.corpus import prepare_corpus
    from packed_attn.demo.facts import machine_facts
    from packed_attn.demo.plot import plot_secret
    from packed_attn.demo.rows import ROWS, RowResult
    from packed_attn.demo.secret import SecretResult
    from packed_attn.demo.settings import Settings
    from packed_attn.demo.table import render_ratios, render_table

    begun = time.perf_counter()
    settings = Settings(
        output.resolve(),
        train_seconds=max(1.0, seconds_per_row - SECONDS_BESIDE_TRAINING),
        secret_seconds=max(1.0, (seconds_for_secret - SECONDS_BESIDE_TRAINING) / 2),
    )
    settings.output.mkdir(parents=True, exist_ok=True)
    settings.save()
    facts = machine_facts()
    print("\n".join(f"{name:>12}: {fact}" for name, fact in facts.items()))
    corpus = prepare_corpus(settings)
    print(f"\n{corpus}\n")
    results = [RowResult(**_child(settings, "rows", name, f"row-{name}.json")) for name in ROWS]
    secret = SecretResult(**_child(settings, "secret", None, "secret.json"))
    plot_secret(secret, settings.output / "secret.png")
    table = render_table(results, markdown=markdown)
    seconds = time.perf_counter() - begun
    _write(settings, results, secret, facts, asdict(corpus), seconds)
    print(f"\n{table}\n\n{render_ratios(results)}\n{_footnotes(settings)}\n\n{secret}")
    print(f"\nThe curves are in {output / 'secret.png'}; the demo took {seconds:.0f} s.")
    return 1 if results[-1].leaked_tokens else 0
