"""packed-attn equivalence: the same training steps packed and unpacked, side by side."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from typing import Any

PART_BYTES = 1 << 24


def add(commands: Any) -> None:
    """Describes the command to the parser."""
    parser = commands.add_parser(
        "equivalence",
        help="train a model packed and one document at a time, and print how far apart they end",
    )
    parser.add_argument("--model", required=True, help="model id, folder, or a config.json")
    parser.add_argument(
        "--data", required=True, nargs="+", help="JSON lines, Parquet or a saved data set"
    )
    parser.add_argument("--tokenizer", help="for text, messages, prompt and completion")
    parser.add_argument("--documents", type=int, default=200, help="how many documents are read")
    parser.add_argument("--capacity", type=int, default=512, help="tokens a pack holds")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of one pack each")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--backend", default="auto", help="attention backend of the packed run")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, float16 or float64")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs both ways and prints the report."""
    from packed_attn.commands.audit import load_model
    from packed_attn.equivalence import equivalence

    report = equivalence(
        load_model(args.model, args.dtype),
        list(itertools.islice(_documents(args), args.documents)),
        capacity=args.capacity,
        steps=args.steps,
        learning_rate=args.learning_rate,
        backend=args.backend,
    )
    print(json.dumps(report.to_dict(), indent=2) if args.json else report)
    return 0


def _documents(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Token columns of the data's documents, as `packed-attn pack` reads them."""
    from packed_attn.offline.formats import Tokenize, detect_format
    from packed_attn.offline.inputs import Bad, find_parts, read_part
    from packed_attn.offline.scratch import load_tokenizer

    tokenize = None
    for part in find_parts(args.data, PART_BYTES):
        for place, record in read_part(part):
            if isinstance(record, Bad):
                raise ValueError(f"{place}: {record.reason}")
            if tokenize is None:
                tokenizer = None if args.tokenizer is None else load_tokenizer(args.tokenizer)
                tokenize = Tokenize(detect_format(record), tokenizer)
            yield tokenize(record)[0]
