"""Runs the benchmarks of speed that this machine can run, and names the others with their reasons.

    python -m benchmarks.suite [NAME ...] [--results DIR]

Each is a module of its own in a process of its own and writes NAME.json; `benchmarks.report` makes
one report of them. `packed-attn bench` is this command.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
# Models of the training step at real sizes.
MODELS = ("llama3-8b-layers", "qwen3-0.6b")
STEPS = ("--model", *MODELS, "--capacities", "8192")


@dataclass(frozen=True)
class Bench:
    """One result file, the module that writes it, and what it takes to run."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    cuda: bool = False
    packages: tuple[str, ...] = ()

    def reasons_against(self) -> list[str]:
        """Why it cannot run here; empty where it can."""
        reasons = ["no CUDA device"] if self.cuda and not torch.cuda.is_available() else []
        missing = [name for name in self.packages if find_spec(name) is None]
        return reasons + [f"{name} is not installed" for name in missing]

    @property
    def command(self) -> str:
        """What a user types for it alone."""
        return " ".join(["python -m", f"benchmarks.{self.module}", *self.arguments])


BENCHES = (
    Bench("attention", "bench_attention", cuda=True),
    Bench("training_step_gpu", "bench_training_step", STEPS, True, ("transformers",)),
    Bench("mixers_gpu", "bench_mixers_gpu", cuda=True, packages=("transformers",)),
    Bench("forest_gpu", "bench_forest", ("--device", "cuda"), True, ("pyarrow",)),
    Bench("cpu", "bench_cpu"),
    Bench("forest_cpu", "bench_forest", packages=("pyarrow",)),
    Bench("training_step", "bench_training_step", packages=("transformers",)),
    Bench("isolation", "bench_isolation", packages=("transformers",)),
    Bench("mixers", "bench_mixers", packages=("transformers",)),
    Bench("pairs", "bench_pairs", packages=("transformers",)),
    Bench("packing", "bench_packing", packages=("trl", "scipy")),
    Bench("streaming", "bench_streaming", ("--rows", "fill"), packages=("torchdata",)),
)
BY_NAME = {bench.name: bench for bench in BENCHES}


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where all that ran has ended well."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BY_NAME)}")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in BY_NAME]
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}: there are {', '.join(BY_NAME)}")
    options.results.mkdir(parents=True, exist_ok=True)
    failed, without = [], []
    for bench in [BY_NAME[name] for name in options.names] or BENCHES:
        if reasons := bench.reasons_against():
            without.append(f"{bench.name} cannot run here: {'; '.join(reasons)}")
        elif status := run(bench, options.results):
            failed.append(f"{bench.name} ended with status {status}")
    print("\n".join(["", *failed, *without]), file=sys.stderr)
    return int(bool(failed))


def run(bench: Bench, results: Path) -> int:
    """Runs one in a process of its own; its exit status."""
    path = results / f"{bench.name}.json"
    print(f"\n## {bench.name}: {bench.command}, figures in {path}\n", flush=True)
    command = [sys.executable, "-m", f"benchmarks.{bench.module}", *bench.arguments]
    return subprocess.run([*command, "--json", str(path.resolve())], check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
