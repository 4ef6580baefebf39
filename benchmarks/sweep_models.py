"""Every model type of the installed transformers, patched and held to what "exact" promises.

    python -m benchmarks.sweep_models [--head causal ...] [--types llama ...] [--json PATH]
    python -m benchmarks.sweep_models --dtype bfloat16 [--autocast [--weights DTYPE]] [--lora]

Each type is a tiny random model in a child process with a memory and a time limit. Its documents
are run alone on the stock model and then packed on the patched one, under every convention, in
training and with checkpointing (see `tests/sweep.py`). Prints a line for each type that is not
exact and a table of counts, and writes all outcomes as JSON, beside those of other heads and types
that the file has from the same versions. Exit status 1 when a type is wrong.

In half precision, whose outcomes are printed and not written by default, a pack is held to the
error of its documents alone (`tests/sweep_precision.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from packed_attn_patches.children import ChildFailed, in_children

from packed_attn.facts import machine_facts
from tests.sweep import HEADS, Outcome, model_types, sweep_type
from tests.sweep_precision import FLOAT32, Precision

RESULTS = Path(__file__).parent / "results" / "models.json"
STATUSES = ("exact", "refused", "not built", "wrong")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head", nargs="*", choices=HEADS, default=list(HEADS))
    parser.add_argument("--types", nargs="*", help="model types; all by default")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=600, help="limit for one type")
    parser.add_argument("--dtype", default="float32", help="of weights; of autocast beside it")
    parser.add_argument("--autocast", action="store_true", help="weights of another under autocast")
    parser.add_argument("--weights", default="float32", help="dtype of weights under autocast")
    parser.add_argument("--lora", action="store_true", help="adapters in float32, trained alone")
    parser.add_argument("--attention", help="attn_implementation; the model's own by default")
    parser.add_argument("--json", type=Path, help="where the outcomes go")
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    weights = getattr(torch, options.weights)
    weights, autocast = (weights, dtype) if options.autocast else (dtype, None)
    precision = Precision(weights, autocast, options.lora)
    usual = precision == FLOAT32 and options.attention is None
    path = options.json or (RESULTS if usual else None)
    outcomes: list[Outcome] = []
    kept = [] if path is None else _kept(path)
    for head in options.head:
        types = [t for t in model_types(head) if not options.types or t in options.types]
        found = in_children(
            quiet_sweep,
            [(head, t, precision, options.attention) for t in types],
            processes=options.processes,
            seconds=options.seconds,
        )
        for number, (model_type, outcome) in enumerate(zip(types, found), 1):
            if isinstance(outcome, ChildFailed):
                outcome = Outcome(head, model_type, status="not built", reason=str(outcome))
            outcomes.append(outcome)
            print(f"[{head} {number}/{len(types)}] {model_type}", file=sys.stderr, flush=True)
            if outcome.status != "exact":
                print(f"{head} {model_type}: {outcome.status}. {_why(outcome)}", flush=True)
            if path is not None:
                _write(path, kept, outcomes)
    print(table(outcomes))
    return int(any(o.status == "wrong" for o in outcomes))


def quiet_sweep(
    head: str,
    model_type: str,
    precision: Precision = FLOAT32,
    attn_implementation: str | None = None,
) -> Outcome:
    """`sweep_type` without the warnings that transformers has for tiny configs."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    options: dict[str, Any] = {"precision": precision, "attn_implementation": attn_implementation}
    return sweep_type(head, model_type, **options)


def table(outcomes: Sequence[Outcome]) -> str:
    """Counts per head as a Markdown table; the share is of the types that stock runs."""
    lines = [f"| head | types | {' | '.join(STATUSES)} | exact of built |", "|---" * 7 + "|"]
    for head in HEADS:
        counts = Counter(o.status for o in outcomes if o.head == head)
        if counts:
            built = counts.total() - counts["not built"]
            share = f"{100 * counts['exact'] / max(built, 1):.1f} %"
            cells = [str(counts[s]) for s in STATUSES]
            lines.append(f"| {head} | {counts.total()} | {' | '.join(cells)} | {share} |")
    return "\n".join(lines)


def _why(outcome: Outcome) -> str:
    bad = {n: v for n, v in outcome.checks.items() if v not in ("exact", "rounding")}
    return outcome.reason or str(bad)


def _kept(path: Path) -> list[dict[str, Any]]:
    """The outcomes of an earlier run of the same versions."""
    if not path.exists():
        return []
    report = json.loads(path.read_text())
    versions = machine_facts("torch", "transformers")
    same = all(report["machine"][n] == versions[n] for n in ("torch", "transformers"))
    return report["outcomes"] if same else []


def _write(path: Path, kept: Sequence[dict[str, Any]], outcomes: Sequence[Outcome]) -> None:
    """All outcomes by head and type; those of this run in place of earlier ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {(head, model_type) for head in HEADS for model_type in model_types(head)}
    every = {(o["head"], o["model_type"]): o for o in kept}
    every = {key: outcome for key, outcome in every.items() if key in known}
    every |= {(o.head, o.model_type): o.to_dict() for o in outcomes}
    heads = list(HEADS)
    report: dict[str, Any] = {
        "machine": machine_facts("torch", "transformers"),
        "outcomes": [every[key] for key in sorted(every, key=lambda k: (heads.index(k[0]), k[1]))],
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
