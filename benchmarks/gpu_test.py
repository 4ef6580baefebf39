"""Conformance on a GPU and compute-sanitizer on a short list, with what they ran on: one JSON.

    python -m benchmarks.gpu_test [--step NAME ...] [--seconds 600] [--json PATH]

Runs the tests of every backend on every case, forward and gradients, those of patched models and
of training, beside them memcheck and racecheck on `SANITIZED`, where NVIDIA's compute-sanitizer is
on the PATH or in CUDA_HOME; where it is not, the report says so. Steps run side by side, and with
pytest-xdist each in several processes: what takes time is compiling. Exits with 1 where anything
failed. Needs pytest, and no network.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
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
MODELS = ("tests/test_gpu_models.py", "tests/test_gpu_training.py")
# The steps: arguments of pytest, and the processes that they get. FlexAttention compiles for each
# case; the largest need tens of GB.
ON_GPU = "not on_cpu and not past_32_bits and not beyond_32_bits"
SUITES: dict[str, tuple[tuple[str, ...], int]] = {
    "conformance": ((*FILES, "-k", f"{ON_GPU} and not flex"), 10),
    "flex": ((*FILES[:2], "-k", f"{ON_GPU} and flex"), 6),
    "models": (MODELS, 5),
    "mixers": (("tests/test_packaged_mixers.py",), 2),
    "beyond 32 bits": ((*FILES[:2], "-k", "past_32_bits or beyond_32_bits"), 1),
}
# Tiles on every side of an edge, half precision, forests, sinks, and kernels of dk and dv alone.
SANITIZED = ("mixed", "bf16_long", "forest_nested", "sinks_window", "cross", "head_dim_256")
TOOLS = ("memcheck", "racecheck")
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "flash-attn",
    "fla-core",
    "mamba-ssm",
    "causal-conv1d",
    "numpy",
    "pytest",
)


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
    parser.add_argument("--step", nargs="+", choices=[*SUITES, *TOOLS], default=[*SUITES, *TOOLS])
    parser.add_argument("--seconds", type=float, default=600.0, help="steps end after these")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the report goes")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("gpu_test needs a CUDA device")
    with ThreadPoolExecutor() as pool:
        limit = options.seconds
        running = [pool.submit(run_suite, name, limit) for name in SUITES if name in options.step]
        running += [
            pool.submit(run_sanitizer, tool, limit) for tool in TOOLS if tool in options.step
        ]
        steps = [step.result() for step in running]
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


def run_suite(name: str, limit: float = math.inf) -> Step:
    """One of `SUITES`."""
    arguments, processes = SUITES[name]
    if processes > 1 and find_spec("xdist") is not None:
        arguments += ("-n", str(processes))
    return run_step(name, pytest_command(*arguments), limit)


def pytest_command(*arguments: str) -> list[str]:
    """pytest in this interpreter, summary lines alone."""
    return [sys.executable, "-m", "pytest", "--durations=10", "--tb=short", *arguments]


def run_sanitizer(tool: str, limit: float = math.inf) -> Step:
    """`SANITIZED` under one of `TOOLS`; not run where compute-sanitizer is not installed."""
    program = sanitizer()
    if program is None:
        reason = "compute-sanitizer is neither on the PATH nor in CUDA_HOME/bin"
        return Step(tool, None, 0.0, [reason])
    chosen = " or ".join(SANITIZED)
    tests = pytest_command(FILES[0], "-k", f"test_exact_or_refused and triton and ({chosen})")
    return run_step(tool, [program, f"--tool={tool}", "--error-exitcode=9", *tests], limit)


def sanitizer() -> str | None:
    """The path of compute-sanitizer."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=str(home / "bin")
    )


def run_step(
    name: str, command: Sequence[str], limit: float = math.inf, kept_lines: int = 40
) -> Step:
    """Runs a command, and all that it starts, to its end or for `limit` seconds; what it prints is
    shown and its last lines are kept."""
    begin = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    if limit < math.inf:
        clock = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
        clock.daemon = True
        clock.start()
    lines = []
    for line in process.stdout:
        print(f"{name}: {line}", end="", flush=True)
        lines.append(line.rstrip())
    status = process.wait()
    if limit < math.inf:
        clock.cancel()
    told = [line for line in lines if line and not re.fullmatch(r"[.sxFE]+ *\[ *\d+%\]", line)]
    tail = told[-kept_lines:] or ["printed nothing"]
    return Step(name, status, round(time.monotonic() - begin, 1), tail)


if __name__ == "__main__":
    raise SystemExit(main())
