"""Compiles our kernels for a GPU that is not there, so that one need not wait for a compiler.

    python -m benchmarks.ahead FOLDER [--what conformance attention tuning] [--sm 90]
        [--processes 2]

Runs what the tests of conformance, `bench_attention` and `tune` launch through the triton backend,
on a machine without a GPU: kernels are compiled and not started. They stand in FOLDER as triton's
cache has them, machine code alone; with TRITON_CACHE_DIR=FOLDER a GPU of that kind finds them, if
it has the same triton. What depends on a tensor's values or place in memory is no matter: pointers
are aligned here as there.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from packed_attn_kernels import INTERPRETED, bookkeeping, gpu, hopper_launch
from packed_attn_kernels.compile_gate import GPUS
from triton.backends.compiler import GPUTarget

from benchmarks import tune
from benchmarks.regimes import benchmark_cases, run_case, speed_cases
from packed_attn import visibility
from packed_attn.backends import machine
from packed_attn.backends import triton as backend
from packed_attn.errors import first_line
from tests import oracle
from tests.cases import COMBINED, REAL, SMALL, Case

# What a launch reads; the rest of a folder is for those who read it.
KEPT = (".json", ".cubin")
WHAT = ("tuning", "attention", "conformance")
# Real lengths say nothing to a compiler.
SHORTER = 64
TUNED = ("one_32k", "head_dim_64", "head_dim_256", "forest")

Job = tuple[str, Callable[[], object]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="becomes the cache")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument("--sm", type=int, default=90, choices=GPUS, help="compute capability")
    parser.add_argument("--cases", nargs="*", default=(), help="words of which a name holds one")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("under TRITON_INTERPRET=1 nothing is compiled")
    os.environ["TRITON_CACHE_DIR"] = str(options.folder.resolve())
    numbers = range(options.processes)
    given = (options.what, options.cases, options.sm, options.processes)
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        counts = list(pool.map(partial(compile_share, *given), numbers))
    if not sum(counts):
        words = " or ".join(options.cases) or "anything"
        raise SystemExit(f"nothing was compiled of the calls that have {words} in their names")
    removed = slimmed(options.folder)
    print(f"{sum(counts)} calls compiled; {removed} files that no launch reads removed")


def compile_share(
    what: Sequence[str], words: Sequence[str], sm: int, processes: int, number: int
) -> int:
    """Every `processes`-th call from the number-th on; how many were compiled."""
    torch.set_num_threads(1)
    compiled = 0
    with pretended_gpu(sm):
        named = [job for job in jobs(what) if not words or any(word in job[0] for word in words)]
        for name, call in named[number::processes]:
            begin = time.monotonic()
            try:
                call()
            except Exception as error:  # what does not fit or cannot run is told there too
                print(f"{name}: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
                continue
            compiled += 1
            print(f"{name}: {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)
    return compiled


def jobs(what: Sequence[str]) -> list[Job]:
    """Calls by name, each of which compiles what it launches."""
    found: list[Job] = []
    if "tuning" in what:
        for case in _kinds(c for c in benchmark_cases() if any(w in c.name for w in TUNED)):
            found += _tuning_jobs(case)
    if "attention" in what:
        for case in _kinds(speed_cases()):
            for deterministic in (False, True):
                run = partial(_both, case, deterministic)
                found.append((f"attention {case.name}, deterministic={deterministic}", run))
    if "conformance" in what:
        for case in (*SMALL, *COMBINED):
            for confine in (False, True):
                run = partial(_conform, case, confine)
                found.append((f"conformance {case.name}, confine_nonfinite={confine}", run))
        found += [(f"conformance {c.name}", partial(_conform, _shorter(c), False)) for c in REAL]
    return found


@contextmanager
def pretended_gpu(sm: int) -> Iterator[None]:
    """Tensors of the CPU pass for those of a GPU; triton compiles for it and starts nothing."""
    capability = divmod(sm, 10)
    driver = triton.runtime.driver.active if torch.cuda.is_available() else None
    triton.runtime.driver.set_active(_Driver(sm))  # type: ignore[arg-type]
    changes: list[tuple[Any, str, Any]] = [
        (gpu, "capability", lambda device: capability),
        (machine, "capability", lambda device: capability),
        (machine, "gpu_reasons", lambda *_, **__: []),
        (backend, "_machine_reasons", lambda request: []),
        (bookkeeping, "runs_on", lambda device: True),
        (visibility, "_runs_kernels", lambda device: True),
        (hopper_launch, "_multiprocessors", lambda device: 1),
    ]
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(patch.object(owner, name, value))
        try:
            yield
        finally:
            if driver is not None:
                triton.runtime.driver.set_active(driver)


class _Utils:
    """What triton asks of a device when it loads a kernel."""

    def __init__(self, sm: int) -> None:
        self.shared_memory = GPUS[sm].shared_memory

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared_memory}

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, the most threads of a block."""
        return 1, 1, 0, 0, 1024


class _Driver:
    """triton's view of a GPU: the target alone is real."""

    def __init__(self, sm: int) -> None:
        self.target = GPUTarget("cuda", sm, 32)
        self.utils = _Utils(sm)

    def launcher_cls(self, *_: Any) -> Callable[..., None]:
        return lambda *_, **__: None

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def slimmed(folder: Path) -> int:
    """Removes what no launch reads; how many files."""
    extra = [p for p in folder.glob("*/*") if p.suffix not in KEPT]
    for path in extra:
        path.unlink()
    return len(extra)


def _tuning_jobs(case: Case) -> list[Job]:
    found: list[Job] = []
    problem = tune.problem_of(case)
    for key in tune.keys_of(problem, gpu.capability(torch.device("cpu"))):
        for row in tune.rows_of(key, problem):
            found.append((f"tuning {case.name} {key[0]} {row}", partial(_tuned, case, key, row)))
    return found


def _tuned(case: Case, key: tune.Key, row: tune.Row) -> None:
    inputs = [case.inputs(0)]
    tune.call_of(case, key, row, inputs, case.layout())(0)


def _both(case: Case, deterministic: bool) -> None:
    """As `bench_attention` calls it."""
    run_case(case, case.inputs(0), case.layout(), deterministic=deterministic)


def _conform(case: Case, confine: bool) -> None:
    oracle.run("triton", case, case.inputs(), "cpu", confine_nonfinite=confine)


def _shorter(case: Case) -> Case:
    return replace(case.shortened(SHORTER), name=case.name)


def _kinds(cases: Iterable[Case]) -> list[Case]:
    """One case, shortened, of each kind of kernels."""
    kinds: dict[Any, Case] = {}
    for case in cases:
        problem = tune.problem_of(case)
        kinds.setdefault((problem, case.dtype), _shorter(case))
    return list(kinds.values())


if __name__ == "__main__":
    main()
