"""packed-attn demo: the four-row table and the planted secret."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Describes the command to the parser."""
    parser = commands.add_parser("demo", help="train on your own standard library, four ways")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder to write")
    parser.add_argument("--seconds", type=float, default=15.0, help="seconds for each row")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the demo."""
    from packed_attn import demo

    return demo.run(args.output, seconds_per_row=args.seconds)
