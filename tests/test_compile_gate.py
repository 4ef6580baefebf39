"""The offline gate: the kernels' machine code for sm_90, compiled on a machine without a GPU.

Default configurations must not spill, must fit shared memory and must use wgmma. float32 keeps
its bits on ordinary multiply-adds, so it must only compile and fit.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the gate compiles with triton")

from packed_attn_kernels.compile_gate import Resources, compile_kernel
from packed_attn_kernels.configurations import BOTH_HALVES, TABLE, KernelName, Problem

KERNELS_FOLDER = Path(__file__).parent.parent / "kernels"
FLAGS = {
    "causal": ("either", False, False),
    "forest": ("query", False, False),
    "forest+window": ("both", False, False),
    "softcap+sinks": ("either", True, True),
}
Job = tuple[KernelName, int, str, str]


def jobs() -> list[Job]:
    """(kernel, head_dim, flags, element type), the slowest to compile first."""
    kernels: tuple[KernelName, ...] = ("dkdv", "dq", "forward")
    half: list[Job] = [
        (kernel, head_dim, flags, "bf16")
        for head_dim in (128, 64)
        for flags in FLAGS
        for kernel in kernels
        # dk and dv ask the query half alone in both, which is one kernel.
        if (kernel, flags) != ("dkdv", "forest")
    ]
    single: list[Job] = [
        (kernel, head_dim, "softcap+sinks", "fp32") for head_dim in (128, 64) for kernel in kernels
    ]
    delta: list[Job] = [("delta", head_dim, "softcap+sinks", "bf16") for head_dim in (128, 64)]
    return half + single + delta


def compile_job(job: Job) -> Resources:
    """Runs in a process of its own, where triton compiles and does not interpret."""
    kernel, head_dim, flags, element = job
    halves, softcap, sinks = FLAGS[flags]
    itemsize = 4 if element == "fp32" else 2
    problem = Problem(head_dim, head_dim, 4, itemsize, halves, softcap, sinks)
    return compile_kernel(kernel, problem, element)


@pytest.fixture(scope="module")
def resources() -> dict[Job, Resources]:
    """Every job's machine code, two processes at a time or as many as there are cores."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled")
    workers = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 2
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return dict(zip(jobs(), pool.map(compile_job, jobs())))


@pytest.mark.parametrize("job", jobs(), ids=lambda job: "-".join(map(str, job)))
def test_machine_code(job: Job, resources: dict[Job, Resources]) -> None:
    kernel, _, _, element = job
    found = resources[job]
    if element == "fp32":
        faults = [fault for fault in found.faults(needs_wgmma=False) if "spills" not in fault]
    else:
        faults = found.faults(needs_wgmma=kernel != "delta")
    assert not faults, f"{found}: {'; '.join(faults)}"


def test_gate_shuts() -> None:
    """Each fault is found: a gate that cannot fail guards nothing."""
    assert not Resources(128, 0, 1024, 0, 8).faults(needs_wgmma=True)
    assert "stack" in Resources(255, 8, 1024, 0, 8).faults(needs_wgmma=True)[0]
    assert "local" in Resources(255, 0, 1024, 2, 8).faults(needs_wgmma=True)[0]
    assert "shared memory" in Resources(255, 0, 240_000, 0, 8).faults(needs_wgmma=True)[0]
    assert "HGMMA" in Resources(255, 0, 1024, 0, 0).faults(needs_wgmma=True)[0]


def test_table_covers_every_width() -> None:
    """Each kernel has a row for each width and element size, and tiles divide their padding."""
    widths = {(kernel, width, size) for kernel, width, size in TABLE}
    assert widths == {
        (kernel, width, size)
        for kernel in ("forward", "dkdv", "dq")
        for width in (64, 128, 256)
        for size in (2, 4)
    }
    for row in (*TABLE.values(), *BOTH_HALVES.values()):
        assert 128 % row.BLOCK_M == 0
        assert 1024 % row.BLOCK_N == 0
