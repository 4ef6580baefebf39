"""The offline gate: the kernels' machine code, compiled on a machine without a GPU.

Default configurations must not spill, must fit shared memory and must use the tensor cores, those
for Hopper also TMA, and nothing may be worse than the committed tables, one for each kind of GPU.
float32 keeps its bits on ordinary multiply-adds, so it must only compile and fit. `make test-all`
compiles all jobs, those for sm_90 on two versions of triton.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import Any, get_args

import pytest

pytest.importorskip("triton", reason="the gate compiles with triton")

from packed_attn_kernels import bookkeeping
from packed_attn_kernels.compile_gate import (
    GPUS,
    Resources,
    compile_function,
    compile_hopper_forward,
    compile_kernel,
    unordered_products,
)
from packed_attn_kernels.configurations import (
    AMPERE,
    AMPERE_CANDIDATES,
    AMPERE_LEAN,
    BY_KEYS,
    CANDIDATES,
    FUSED,
    HOPPER_CANDIDATES,
    KEY_BLOCK,
    LEAN,
    PADDED,
    SPAN,
    TABLE,
    Configuration,
    KernelName,
    Problem,
    tile_rows,
)

from benchmarks.resources import (
    KNOWN_RACES,
    KNOWN_SPILLS,
    REGISTER_MARGIN,
    HopperName,
    Job,
    Measured,
    all_jobs,
    default_jobs,
    faults,
    few_jobs,
    installed_version,
    jobs_of,
    measure,
    read_table,
    regressions,
    results,
    write_table,
)

# GPUs whose table is committed, and the versions of triton in it.
MEASURED = dict.fromkeys(GPUS, ("3.9",)) | {90: ("3.6", "3.9"), 86: ("3.6", "3.9")}
WORKERS = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 2
# RTX 30 stands for all that multiply a warp at a time, by the least shared memory.
DEFAULTS = [*default_jobs(), *(replace(job, sm=86) for job in few_jobs())]
# A version that no table has compiles for all.
COMPILED = [
    sm
    for sm, versions in MEASURED.items()
    if installed_version() in versions or installed_version() not in MEASURED[90]
]
OTHERS = [job for sm in COMPILED for job in jobs_of(sm) if job not in DEFAULTS]
CLEAN = Resources(
    registers=128,
    stack=0,
    shared_memory=1024,
    spills=0,
    products=8,
    tensor_copies=4,
    register_changes=12,
)


def _name(job: Job) -> str:
    return f"sm_{job.sm} {job}"


@pytest.fixture(scope="module")
def defaults() -> dict[Job, Measured]:
    return _compiled(DEFAULTS)


@pytest.fixture(scope="module")
def others() -> dict[Job, Measured]:
    return _compiled(OTHERS)


@pytest.mark.parametrize("job", DEFAULTS, ids=_name)
def test_machine_code(job: Job, defaults: dict[Job, Measured]) -> None:
    _assert_clean(job, defaults[job])


@pytest.mark.slow
@pytest.mark.parametrize("job", OTHERS, ids=_name)
def test_machine_code_of_all(job: Job, others: dict[Job, Measured]) -> None:
    _assert_clean(job, others[job])


@pytest.mark.slow
def test_candidates_compile_and_fit() -> None:
    """What tuning would time can be launched; spilling is for the clock to judge."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled")
    for sm, candidates in ((90, CANDIDATES), (86, AMPERE_CANDIDATES)):
        for (kernel, width, _), rows in candidates.items():
            problem = Job(kernel, (width, width), "causal", sm=sm).problem
            for row in rows:
                found = compile_kernel(kernel, problem, "bf16", row, sm)
                assert found.shared_memory <= GPUS[sm].shared_memory, (kernel, row)
                assert found.products, (kernel, row)
    for size, hopper_rows in HOPPER_CANDIDATES.items():
        problem = Job("hopper_forward", (size, size), "causal").problem
        for row in hopper_rows:
            for confined in (False, True):
                found = compile_hopper_forward(problem, "bf16", row, confined)
                assert found.shared_memory <= GPUS[90].shared_memory, (size, row)
                assert found.products, (size, row)


@pytest.mark.parametrize("kernel", ["forward", "dkdv"])
def test_padded_head_dims_do_not_spill(kernel: KernelName) -> None:
    """Phi-3's 96 stands in tiles of 128 columns, masked."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled")
    problem = Problem(96, 96, 1, 2, "either", has_softcap=False, has_sinks=False)
    assert not compile_kernel(kernel, problem, "bf16").faults("products")


def test_gate_shuts() -> None:
    """Each fault is found: a gate that cannot fail guards nothing."""
    assert not CLEAN.faults("products")
    assert "stack" in replace(CLEAN, stack=8).faults()[0]
    assert "local" in replace(CLEAN, spills=2).faults()[0]
    assert "shared memory" in replace(CLEAN, shared_memory=240_000).faults()[0]
    assert "over 101376" in replace(CLEAN, shared_memory=131_072).faults(sm=86)[0]
    assert replace(CLEAN, products=0).faults("products", sm=86) == ["no HMMA"]
    assert "tensor memory" in replace(CLEAN, tensor_memory=513).faults(sm=100)[0]
    assert "no HGMMA" in replace(CLEAN, products=0).faults("products")
    assert "before they are stored" in replace(CLEAN, races=1).faults()[0]


@pytest.mark.parametrize(
    ("kernel", "change", "named"),
    [
        ("hopper_forward", {"products": 0}, "no HGMMA"),
        ("hopper_forward", {"tensor_copies": 0}, "no UTMALDG"),
        ("hopper_backward", {"register_changes": 0}, "no USETMAXREG"),
        ("repair_forward", {"tensor_copies": 0}, "no UTMALDG"),
        ("repair_dq", {"products": 0}, "no HGMMA"),
        ("repair_dq", {"tensor_copies": 0}, None),
        ("shares_cast", {"products": 0}, None),
        ("hopper_forward", {"races": 1}, "1 products may read"),
        ("hopper_backward", {"races": KNOWN_RACES["hopper_backward"]}, None),
        ("hopper_backward", {"races": KNOWN_RACES["hopper_backward"] + 1}, "5 products may read"),
        ("hopper_backward", {"stack": 8}, "spills: 8 bytes"),
        ("hopper_forward", {"stack": KNOWN_SPILLS[90, "3.9", "hopper_forward", 128]}, None),
        ("hopper_forward", {"stack": KNOWN_SPILLS[90, "3.9", "hopper_forward", 128] + 8}, "spills"),
    ],
)
def test_gate_knows_what_each_kernel_needs(
    kernel: HopperName, change: dict[str, int], named: str | None
) -> None:
    found = "; ".join(faults(Job(kernel, (128, 128), "causal"), replace(CLEAN, **change), "3.9"))
    assert found.startswith(named) if named else not found


STORE, FENCE, BARRIER = "st.shared.v4.b32 [%r1], {}", "fence.proxy.async.shared::cta", "bar.sync 0"
PRODUCT = "wgmma.mma_async.sync.aligned.m64n64k16\nwgmma.commit_group"


@pytest.mark.parametrize(
    ("races", "lines"),
    [
        (0, (STORE, FENCE, BARRIER, PRODUCT)),
        (0, (STORE, BARRIER, FENCE, BARRIER, PRODUCT)),
        (1, (STORE, BARRIER, FENCE, PRODUCT)),
        (1, (STORE, BARRIER, PRODUCT)),
        (0, (BARRIER, FENCE, PRODUCT)),
        (0, ("st.shared.b8 [%r1], %rs1", BARRIER, FENCE, PRODUCT)),
        (1, (STORE, FENCE, BARRIER, PRODUCT, STORE, FENCE, PRODUCT)),
        (0, (STORE, "$L__BB0_1:", BARRIER, FENCE, PRODUCT)),
        # Whatever the first product reads: see KNOWN_RACES.
        (1, (STORE, PRODUCT, FENCE, BARRIER, PRODUCT)),
    ],
)
def test_stores_are_ordered_before_products(races: int, lines: tuple[str, ...]) -> None:
    assert unordered_products("\n".join(lines)) == races


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"stack": 8}, "spills: 8 B and 0, were 0 B and 0"),
        ({"spills": 2}, "spills"),
        ({"products": 7}, "7 HGMMA, were 8"),
        ({"tensor_copies": 3}, "3 UTMALDG, were 4"),
        ({"shared_memory": 2048}, "2048 B of shared memory, were 1024"),
        ({"registers": 128 + REGISTER_MARGIN + 1}, "145 registers, were 128"),
    ],
)
def test_a_regression_is_found(change: dict[str, int], named: str) -> None:
    row = Measured(Configuration(128, 64, 8, 2), CLEAN)
    assert not regressions(row, row)
    assert not regressions(replace(row, resources=replace(CLEAN, registers=140)), row)
    assert regressions(replace(row, resources=replace(CLEAN, **change)), row)[0].startswith(named)
    other = replace(row, configuration=Configuration(64, 64, 4, 2))
    assert "make resources" in regressions(other, row)[0]


def test_tables_are_committed_and_read_back() -> None:
    for sm, versions in MEASURED.items():
        text = results(sm).read_text()
        rows = read_table(text)
        assert write_table(rows, sm) == text
        for version in versions:
            assert {(version, str(job)) for job in jobs_of(sm)} <= rows.keys()
        named = {str(job): job for job in jobs_of(sm)}
        for (version, name), row in rows.items():
            assert not faults(named[name], row.resources, version), (sm, version, name)
            assert row.configuration == named[name].configuration, name
    portable = {
        width
        for sm, _, kernel, width in KNOWN_SPILLS
        if sm == 90 and kernel in get_args(KernelName)
    }
    assert portable == {128, 256}, "at 64 nothing spills"


def test_table_covers_every_width() -> None:
    """Each kernel has a row for each width and element size that its problems need."""
    for special in (AMPERE, AMPERE_LEAN, LEAN, PADDED):
        assert special.keys() <= TABLE.keys()
    for kernel in ("forward", "dkdv", "dq"):
        for width in (64, 128, 256):
            for size in (2, 4):
                split = kernel == "dkdv" and (width, size) == (256, 2)
                assert ((kernel, width, size) in TABLE) != split
    for job in all_jobs():
        assert job.configuration
        assert tile_rows(job.problem)


@pytest.mark.parametrize(
    ("kernel", "size", "row"),
    [
        *((key[0], key[2], row) for table in (TABLE, LEAN, PADDED) for key, row in table.items()),
        *(("fused", key[1], row) for key, row in FUSED.items()),
        *((key[0], key[2], row) for key, rows in CANDIDATES.items() for row in rows),
    ],
    ids=str,
)
def test_tiles_divide_their_padding_and_fill_their_warps(
    kernel: str, size: int, row: Configuration
) -> None:
    """Fewer rows than 16 a warp, and all warpgroups compute the same scores: twice the work."""
    assert 128 % row.BLOCK_M == 0
    assert SPAN % row.BLOCK_N == 0
    assert SPAN % row.BLOCK_M == 0
    rows = row.BLOCK_N if kernel in BY_KEYS else row.BLOCK_M
    if size == 2:
        assert rows == 16 * row.num_warps


PARTS = ("query_padding", "key_padding", "prefix", "parents", "path_offset", "subtree_stop")
PLAIN = {**{f"{part}_ptr": None for part in PARTS}, "chunk_size": None}


@pytest.mark.parametrize("absent", [PLAIN, {}], ids=["plain", "every mask"])
def test_machine_code_of_intervals(absent: dict[str, None]) -> None:
    _assert_fits(bookkeeping.intervals_kernel, absent | {"BLOCK": bookkeeping.TOKENS}, 4)


@pytest.mark.parametrize("rows", [64, 128])
def test_machine_code_of_lists(rows: int) -> None:
    values = {"TILES": bookkeeping.TILES, "OTHERS": bookkeeping.OTHERS, "SCAN": bookkeeping.SCAN}
    values |= {"BLOCK": KEY_BLOCK}
    _assert_fits(bookkeeping.tile_lists_kernel, values | {"ROWS": rows}, bookkeeping.WARPS)


def _assert_fits(kernel: Any, values: dict[str, Any], warps: int) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled")
    wide = {"prefix_ptr": "*i64", "path_offset_ptr": "*i64", "subtree_stop_ptr": "*i64"}
    wide |= {"query_padding_ptr": "*u8", "key_padding_ptr": "*u8"}
    signature = {
        name: wide.get(name, "*i32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    found = compile_function(kernel, signature, values, {"num_warps": warps})
    assert not found.faults(), found


def _compiled(jobs: list[Job]) -> dict[Job, Measured]:
    """As many processes as there are cores."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled")
    return measure(jobs, WORKERS)


def _assert_clean(job: Job, found: Measured) -> None:
    wrong = faults(job, found.resources, installed_version())
    assert not wrong, f"{found}: {'; '.join(wrong)}"
    rows = read_table(results(job.sm).read_text())
    committed = rows.get((installed_version(), str(job)))
    if committed is not None:
        worse = regressions(found, committed, job.sm)
        assert not worse, f"{'; '.join(worse)}; now {found}"
