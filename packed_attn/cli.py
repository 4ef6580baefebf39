"""The packed-attn command: each subcommand is a file of `packed_attn.commands`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

# In the order in which help lists them.
COMMANDS = ("demo", "audit", "pack", "inspect", "verify", "equivalence", "doctor", "bench")
EXIT_REFUSED = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0 good, 1 a finding, 2 refused or bad input."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        print(f"packed-attn: {error}", file=sys.stderr)
        return EXIT_REFUSED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="packed-attn", description="Exact document packing for LLM fine-tuning."
    )
    commands = parser.add_subparsers(title="commands", required=True)
    for name in COMMANDS:
        import_module(f"packed_attn.commands.{name}").add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
