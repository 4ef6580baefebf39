"""Runs attention on one named case a few times and nothing else: what a profiler looks at.

    python -m benchmarks.profiled CASE [--backend triton] [--backward] [--calls 3] [--device cuda]

For example, where warps wait in the third launch of the Hopper forward:

    ncu --clock-control none --set full -k regex:hopper_forward --launch-skip 2 --launch-count 1 \\
        -o forward python -m benchmarks.profiled llama3_8b/one_32k
    ncu -i forward.ncu-rep --page source --csv
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from benchmarks import flash3_library
from benchmarks.regimes import benchmark_cases, run_case
from packed_attn.backends import BACKENDS


def main(arguments: Sequence[str] | None = None) -> None:
    cases = {case.name: case for case in benchmark_cases()}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=cases, metavar="CASE", help=f"of {', '.join(cases)}")
    parser.add_argument("--backend", choices=BACKENDS, default="triton")
    parser.add_argument("--backward", action="store_true", help="and the gradients")
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "profiled needs a CUDA device, or --device cpu with a backend that runs there"
        )
    flash3_library.load()
    case, device = cases[options.case], options.device
    inputs, layout = case.inputs(device=device, drawn_on=device), case.layout(device)
    for _ in range(options.calls):
        run_case(case, inputs, layout, options.backend, backward=options.backward)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
