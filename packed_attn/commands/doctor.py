"""packed-attn doctor: which attention backends run here, and the reasons against the others."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packed_attn.doctor import Diagnosis, Verdict

EXIT_FINDINGS = 1
WIDTH = 100


def add(commands: Any) -> None:
    """Describes the command to the parser."""
    parser = commands.add_parser(
        "doctor", help="which attention backends run on this machine, and why not the others"
    )
    parser.add_argument("--no-run", action="store_true", help="ask the backends, run none")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the tables; 1 where something is to be mended."""
    from packed_attn.doctor import examine

    diagnosis = examine(run=not args.no_run)
    print(json.dumps(diagnosis.to_dict(), indent=2) if args.json else _text(diagnosis))
    return EXIT_FINDINGS if diagnosis.findings else 0


def _text(diagnosis: Diagnosis) -> str:
    from packed_attn.doctor import FEATURES, HEAD_DIM, HEADS, KV_HEADS

    width = max(map(len, diagnosis.machine)) + 2
    sections = [
        "\n".join(f"{name:<{width}}{value}" for name, value in diagnosis.machine.items()),
        f"A training step's attention on {diagnosis.device}: bfloat16, causal, "
        f"{HEADS}:{KV_HEADS} heads, head_dim {HEAD_DIM}, forward and backward\n"
        + "\n".join(_verdict_line(v) for v in diagnosis.verdicts)
        + f'\nbackend="auto" takes: {diagnosis.auto}',
        "What each has, where it can run (confine: NaN and Inf stay in their document)\n"
        + "\n".join(_feature_lines(diagnosis, list(FEATURES))),
        *(_wrapped("note: ", note) for note in diagnosis.notes),
        *(_wrapped("to mend: ", finding) for finding in diagnosis.findings),
    ]
    return "\n\n".join(sections)


def _verdict_line(verdict: Verdict) -> str:
    if verdict.reasons:
        said = "no: " + "; ".join(verdict.reasons)
    elif verdict.failure is not None:
        said = verdict.failure
    elif verdict.error is None:
        said = "can"
    elif verdict.name == "reference":
        said = "runs"
    else:
        said = f"runs, {verdict.error:.0e} off the reference"
    return _wrapped(f"  {verdict.name:<13}", said)


def _feature_lines(diagnosis: Diagnosis, features: list[str]) -> list[str]:
    header = f"  {'':<13}" + " ".join(features)
    return [header.rstrip()] + [
        f"  {v.name:<13}"
        + " ".join(("yes" if f in v.features else "-").ljust(len(f)) for f in features).rstrip()
        for v in diagnosis.verdicts
    ]


def _wrapped(first: str, text: str) -> str:
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
    )
