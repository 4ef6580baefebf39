"""Compiles what a benchmark will run, in processes beside each other, into the caches on disk.

Triton and Inductor compile on one core, for seconds a kernel; a GPU would wait for them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing import get_context

import torch

from benchmarks.peers import COMPILED, compiling_each_shape, peers
from tests.cases import Case

MOST_PROCESSES = 12  # each holds a CUDA context and one case


def warm(cases: Sequence[Case], device: str, without: Sequence[str] = (), limit: float = 90) -> int:
    """Runs each candidate that compiles once on every kind of case; how many groups did.

    What fails here fails again where it is reported. After `limit` seconds, processes that still
    run are ended.
    """
    # One core is enough for a process here: it compiles one thing at a time.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] = "1"  # off by default
    kinds = {_kind(case): case for case in reversed(cases)}
    tasks = [
        (case, names)
        for case in reversed(kinds.values())
        for group in COMPILED
        if (names := tuple(name for name in group if name not in without))
    ]
    processes = max(1, min(len(tasks), (os.cpu_count() or 2) - 1, MOST_PROCESSES))
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
    running = [pool.submit(_run_once, case, names, device) for case, names in tasks]
    done, late = wait(running, timeout=limit)
    workers = list(pool._processes.values()) if late else []
    pool.shutdown(wait=not late, cancel_futures=True)
    for worker in workers:
        worker.kill()
    return sum(future.exception() is None and future.result() for future in done)


def _kind(case: Case) -> tuple[object, ...]:
    """What the kernels are compiled for."""
    shape = (case.num_heads, case.num_kv_heads, case.head_dim, case.value_head_dim, case.dtype)
    halves = case.layout().visibility(case.causal, case.window_size).halves
    return (*shape, halves, case.softcap, case.sinks, sum(case.lengths))


def _run_once(case: Case, names: Sequence[str], device: str) -> bool:
    """Whether every candidate of these that takes part has run, forward and backward."""
    torch.set_num_threads(1)
    inputs = case.inputs(device=device, drawn_on=device)
    found = peers(case, inputs, device)
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    ran = True
    for name in names:
        function = found[name].function
        if function is None:
            continue
        try:
            with compiling_each_shape():
                torch.autograd.grad(function(*leaves), leaves, inputs.grad_out)
        except Exception as error:
            print(f"warming {name} for {case.name}: {type(error).__name__}: {error}", flush=True)
            ran = False
    return ran
