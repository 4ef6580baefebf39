"""Tuning end to end in triton's interpreter, with a clock that a test sets."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="tuning compiles with triton")

from packed_attn_kernels import configurations, gpu, hopper_launch
from packed_attn_kernels.configurations import (
    AMPERE,
    AMPERE_CANDIDATES,
    CANDIDATES,
    HOPPER,
    HOPPER_CANDIDATES,
    LEAN,
    TABLE,
    Configuration,
)

from benchmarks import profiled, regimes, tune
from packed_attn import attention
from tests.cases import Case

CASE = Case("toy", (9, 3), num_heads=1, num_kv_heads=1, head_dim=16, dtype=torch.bfloat16)
FORWARD = ("forward", 64, 2)


def _clock(calls, device, rounds):
    """Runs every candidate; the later a candidate stands, the faster it is."""
    for call in calls.values():
        call(0)
    return {name: [1.0 / (n + 1)] * 3 for n, name in enumerate(calls)}


@pytest.fixture
def short_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """One candidate a kernel: the interpreter is slow."""
    for key, rows in list(CANDIDATES.items()):
        monkeypatch.setitem(CANDIDATES, key, rows[-1:])


def test_a_tuned_table_is_printed(short_list: None) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a process started with TRITON_INTERPRET=1 (make test)")
    before = dict(TABLE), dict(LEAN)
    results = tune.tune_case(CASE, "cpu", 3, _clock)
    assert (dict(TABLE), dict(LEAN)) == before
    assert [r.key[0] for r in results] == ["forward", "forward", "dkdv", "dkdv", "dq", "dq"]
    assert [r.ratio for r in results] == [1.0, 0.5] * 3
    lines = tune.best_rows(results)
    assert lines[0] == '    ("forward", 64, 2): Configuration(64, 64, 4, 3),  # 0.500 of the row'
    assert len(lines) == 3


def test_other_backends_are_timed_beside(
    short_list: None, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a process started with TRITON_INTERPRET=1 (make test)")
    results = tune.tune_case(CASE, "cpu", 3, _clock, ["forward"], ("reference", "flash3"))
    assert [r.ratio for r in results] == [1.0, 0.5], "they are no rows"
    said = capsys.readouterr().out
    assert "reference: 0.3333 ms, 0.333 of the row" in said
    assert "flash3: backend 'flash3' cannot run this: needs a CUDA device" in said


def test_kernels_are_timed_as_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each input has its graph, and a short call is replayed until it makes a span."""
    replayed: list[tuple[str, int]] = []

    class Capturing:
        def graph(self, call):
            return call

    monkeypatch.setattr(tune, "Capture", Capturing)
    monkeypatch.setattr(tune, "spanning", lambda once: {"short": 3, "long": 1})
    calls = {n: (lambda x, n=n: replayed.append((n, x))) for n in ("short", "long")}
    times = tune.kernel_milliseconds(calls, "cpu", 5)
    assert {name: len(found) for name, found in times.items()} == {"short": 5, "long": 5}
    shorts = [x for name, x in replayed if name == "short"]
    assert len(shorts) - 3 == 3 * (5 + 2), "3 for its length, then 3 a round, 2 of them to warm up"
    assert set(shorts) == {0, 1}


def test_best_is_that_of_the_geometric_mean() -> None:
    rows = Configuration(128, 64, 8, 2), Configuration(64, 64, 4, 2)
    ratios = {"a": (1.0, 0.5), "b": (1.0, 4.0)}
    results = [
        tune.Result(FORWARD, case, row, ratio)
        for case, both in ratios.items()
        for row, ratio in zip(rows, both)
    ]
    assert "Configuration(128, 64, 8, 2),  # 1.000" in tune.best_rows(results)[0]
    assert "Configuration(64, 64, 4, 2),  # 0.500" in tune.best_rows(results[:2])[0]


def test_a_table_is_changed_for_the_time_of_a_call() -> None:
    row = Configuration(16, 64, 4, 1)
    before = dict(TABLE)
    with tune._table_with(("dk", 256, 2), row):
        assert TABLE["dk", 256, 2] == row
        assert TABLE["dv", 256, 2].BLOCK_N == 64, "dk and dv share a list of tiles"
        problem = configurations.Problem(256, 256, 1, 2, "either", False, False)
        assert configurations.tile_rows(problem)[1] == 64
    assert before == TABLE


def test_results_must_agree() -> None:
    x = torch.ones(4)
    assert tune._agree((x,), (x,))
    assert not tune._agree((x + 1e-3,), (x,))
    assert not tune._agree((x * torch.nan,), (x,))


def test_lean_cases_use_the_lean_table() -> None:
    key = ("forward", 128, 2)
    case = replace(CASE, head_dim=128)
    assert tune.rows_of(key, tune.problem_of(case))[0] == TABLE[key]
    assert tune.rows_of(key, tune.problem_of(replace(case, alibi=True)))[0] == LEAN[key]
    tree = replace(case, parents=(-1, 0), window_size=(3, 0))
    assert tune.rows_of(key, tune.problem_of(tree))[0] == LEAN[key]


def test_an_ampere_gpu_tunes_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "capability", lambda _: (8, 0))
    problem = tune.problem_of(replace(CASE, head_dim=256), "cuda")
    for kernel in ("forward", "dk", "dv", "dq"):
        key = (kernel, 256, 2)
        assert tune.rows_of(key, problem) == (AMPERE[key], *AMPERE_CANDIDATES[key])


def test_a_hopper_gpu_tunes_what_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_launch, "INTERPRETED", False)
    case = replace(CASE, head_dim=128)
    keys = tune.keys_of(tune.problem_of(case), (9, 0))
    assert keys == [("hopper_forward", 128, 2)]
    keys = tune.keys_of(tune.problem_of(replace(case, softcap=5.0)), (9, 0))
    assert keys == [("hopper_forward", 128, 2), ("dkdv", 128, 2), ("dq", 128, 2)]
    assert tune.keys_of(tune.problem_of(case), (8, 0))[0] == ("forward", 128, 2)
    assert tune.keys_of(tune.problem_of(replace(case, alibi=True)), (9, 0))[0] == (
        "forward",
        128,
        2,
    )


def test_a_kernel_that_is_off_is_timed_beside_the_portable_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = ("hopper_forward", 256, 2)
    problem = tune.problem_of(replace(CASE, head_dim=256))
    monkeypatch.setattr(configurations, "HOPPER_FORWARD", frozenset({(128, 2, "either")}))
    rows = tune.rows_of(key, problem)
    assert rows == (None, HOPPER[256], *HOPPER_CANDIDATES[256])
    before = dict(HOPPER)
    with tune._table_with(key, rows[-1]):
        assert HOPPER[256] == rows[-1]
        assert (256, 2, "query") in configurations.HOPPER_FORWARD
        assert tune.rows_of(key, problem)[0] == rows[-1], "on, it is the row itself"
        with tune._table_with(key, None):
            assert {(128, 2, "either")} == configurations.HOPPER_FORWARD
    assert before == HOPPER
    assert {(128, 2, "either")} == configurations.HOPPER_FORWARD
    results = [tune.Result(key, "a", row, 1.0 / n) for n, row in enumerate(rows[:2], 1)]
    named = "256: HopperConfiguration(BLOCK_N=64, stages=2, out_in_q=True, unrolled=1)"
    assert tune.best_rows(results) == [f"    {named},  # 0.500 of the row"]
    assert "not (256, 2) in HOPPER_FORWARD" in tune.best_rows(results[:1])[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_needs_a_gpu() -> None:
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        tune.main([])


def test_a_profiler_has_something_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def attend(*tensors, backend, **options):
        calls.append(backend)
        return attention(*tensors, backend=backend, **options)

    monkeypatch.setattr(profiled, "benchmark_cases", lambda: (CASE,))
    monkeypatch.setattr(regimes, "attention", attend)
    given = ["toy", "--backend", "cpu", "--device", "cpu", "--calls", "2", "--backward"]
    profiled.main(given)
    assert calls == ["cpu", "cpu"]
