"""`python -m packed_attn.demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from packed_attn.demo.runner import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; returns its exit status, 2 when it cannot run here."""
    parser = argparse.ArgumentParser(prog="python -m packed_attn.demo", description=run.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--seconds", type=float, default=15.0, help="for each row")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parsed = parser.parse_args(arguments)
    try:
        return run(parsed.output, parsed.seconds, markdown=parsed.markdown)
    except (ImportError, RuntimeError) as error:
        print(f"packed-attn demo: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
