"""Tuning end to end in triton's interpreter, with a clock that a test sets."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="tuning compiles with triton")

from packed_attn_kernels import configurations
from packed_attn_kernels.configurations import CANDIDATES, LEAN, TABLE, Configuration

from benchmarks import tune
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
    assert not tune._is_lean(CASE)
    assert tune._is_lean(replace(CASE, alibi=True))
    assert tune._is_lean(replace(CASE, parents=(-1, 0), window_size=(3, 0)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_needs_a_gpu() -> None:
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        tune.main([])
