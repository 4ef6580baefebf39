"""packed-attn bench: runs the benchmarks of a checkout, or makes one report of their figures."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

EPILOG = """\
The benchmarks are modules of the repository and no part of an installed package: the command runs
from a checkout. exit status: 0 good; 1 a benchmark failed; 2 bad input, or no checkout.
"""


def add(commands: Any) -> None:
    """Describes the command to the parser."""
    parser = commands.add_parser(
        "bench",
        help="time what this machine can run, or report what was timed",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks; all by default")
    parser.add_argument("--results", type=Path, help="folder of the figures (benchmarks/results)")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--report", action="store_true", help="write Markdown and plots")
    shown.add_argument("--readme", action="store_true", help="print the README's table of speed")
    parser.add_argument("--output", type=Path, help="folder of the report (bench-report)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs a module of the checkout in a process of its own; its exit status."""
    reports = args.report or args.readme
    if reports and args.names:
        raise ValueError(f"--report and --readme take no NAME, got {' '.join(args.names)}")
    if args.output is not None and not args.report:
        raise ValueError("--output is the folder of --report, which was not given")
    module = ["benchmarks.report", *["--readme"] * args.readme] if reports else ["benchmarks.suite"]
    folders = [
        word
        for name, folder in (("--results", args.results), ("--output", args.output))
        if folder is not None
        for word in (name, str(folder.resolve()))
    ]
    if args.report and args.output is None:
        folders += ["--output", str(Path("bench-report").resolve())]
    command = [sys.executable, "-m", *module, *args.names, *folders]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(command, cwd=checkout(), env=environment, check=False).returncode


def checkout() -> Path:
    """The root of the repository that this package is imported from.

    Raises:
        ModuleNotFoundError: the package is installed without it.
    """
    root = Path(__file__).parents[2]
    if not (root / "benchmarks" / "suite.py").is_file():
        raise ModuleNotFoundError(
            "bench runs the benchmarks of a checkout, and this packed-attn is installed without "
            "them: clone the repository and run it there after pip install -e '.[bench]'"
        )
    return root
