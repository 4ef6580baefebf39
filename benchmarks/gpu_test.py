"""Conformance on a GPU and compute-sanitizer on a short list, with what they ran on: one JSON.

    python -m benchmarks.gpu_test [--json PATH]

Runs the tests of every backend on every case, forward and gradients, then memcheck and racecheck
on `SANITIZED`, where NVIDIA's compute-sanitizer is on the PATH or in CUDA_HOME; where it is not,
the report says so. Exits with 1 where anything failed. Needs pytest, and no network.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from packed_attn.facts import gpu_facts, machine_facts

RESULTS = Path(__file__).parent / "results" / "gpu_test.json"
FILES = (
    "tests/test_conformance.py",
    "tests/test_bug_classes.py",
    "tests/test_triton_backend.py",
    "tests/test_varlen.py",
)
# Tiles on every side of an edge, half precision, forests, sinks, and kernels of dk and dv alone.
SANITIZED = ("mixed", "bf16_long", "forest_nested", "sinks_window", "cross", "head_dim_256")
TOOLS = ("memcheck", "racecheck")
PACKAGES = ("torch", "triton", "transformers", "flash-attn", "numpy", "pytest")


@dataclass(frozen=True)
class Step:
    """One command: its name, exit status, seconds, and the last lines that it printed."""

    name: str
    status: int | None  # None: not run
    seconds: float
    tail: list[str]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where all that ran has passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the report goes")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("gpu_test needs a CUDA device")
    steps = [run_step("conformance", pytest_command(*FILES)), *sanitizer_steps()]
    report = {
        "machine": machine_facts(*PACKAGES) | gpu_facts(),
        "sanitized_cases": SANITIZED,
        "steps": [asdict(step) for step in steps],
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=2) + "\n")
    for step in steps:
        print(f"{step.name}: {'not run' if step.status is None else step.status}; {step.tail[-1]}")
    return int(any(step.status for step in steps))


def pytest_command(*arguments: str) -> list[str]:
    """pytest in this interpreter, summary lines alone."""
    return [sys.executable, "-m", "pytest", "--durations=0", "--tb=short", *arguments]


def sanitizer_steps() -> list[Step]:
    """One step a tool; not run where compute-sanitizer is not installed."""
    tool = sanitizer()
    if tool is None:
        reason = "compute-sanitizer is neither on the PATH nor in CUDA_HOME/bin"
        return [Step(name, None, 0.0, [reason]) for name in TOOLS]
    chosen = " or ".join(SANITIZED)
    tests = pytest_command(FILES[0], "-k", f"test_exact_or_refused and triton and ({chosen})")
    return [
        run_step(name, [tool, f"--tool={name}", "--error-exitcode=9", *tests]) for name in TOOLS
    ]


def sanitizer() -> str | None:
    """The path of compute-sanitizer."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=str(home / "bin")
    )


def run_step(name: str, command: Sequence[str], kept_lines: int = 40) -> Step:
    """Runs a command to its end; what it prints is shown and its last lines are kept."""
    begin = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    status = process.wait()
    told = [line for line in lines if line and not re.fullmatch(r"[.sxF]+ *\[ *\d+%\]", line)]
    tail = told[-kept_lines:] or ["printed nothing"]
    return Step(name, status, round(time.monotonic() - begin, 1), tail)


if __name__ == "__main__":
    raise SystemExit(main())
