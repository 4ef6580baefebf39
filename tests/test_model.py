"""The analytic model: what it counts is exact, what it schedules is possible."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.model import (
    DESIGNS,
    DEVICES,
    Design,
    blocks_walked,
    main,
    makespan,
    predict,
    tiles,
    visible_pairs,
)
from benchmarks.regimes import REGIMES, benchmark_cases, chosen_cases, toy
from tests.cases import BY_NAME, Case

GRID, LISTED, _, FUSED, PER_DOCUMENT = DESIGNS
H200 = DEVICES["H200"]
SMALL = ("mixed", "bidirectional", "window_left", "window_both", "chunk", "padding_between")
FORESTS = ("forest", "forest_nested", "forest_many_answers")


@pytest.mark.parametrize("name", [*SMALL, *FORESTS])
def test_pairs_are_those_of_the_dense_mask(name: str) -> None:
    case = BY_NAME[name]
    seen = case.layout().visibility(case.causal, case.window_size, chunk_size=case.chunk_size)
    assert visible_pairs(case) == int(seen.dense().sum())


@pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.name)
@pytest.mark.parametrize("name", [*SMALL, *FORESTS])
def test_tiles_hold_every_row_once_and_walk_all_that_it_sees(design: Design, name: str) -> None:
    case, columns = BY_NAME[name], 8
    cut = tiles(case, design, 16)
    rows = [row for first, stop in cut for row in range(first, stop)]
    assert sorted(rows) == list(range(sum(case.lengths)))
    assert all(stop - first <= 16 for first, stop in cut)
    seen = case.layout().visibility(case.causal, case.window_size, chunk_size=case.chunk_size)
    walked = blocks_walked(case, cut, columns, "query")
    for (first, stop), blocks in zip(cut, walked):
        pairs = int(seen.dense()[first:stop].sum())
        assert pairs <= int(blocks) * columns * 16
        assert (pairs > 0) == (blocks > 0)


@pytest.mark.parametrize("backward", [False, True])
def test_one_long_document_wastes_nothing(backward: bool) -> None:
    one = BY_NAME["llama3_8b/one_32k"]
    assert predict(one, LISTED, H200).useful_share == pytest.approx(1.0, abs=0.01)
    found = predict(one, FUSED, H200, backward)
    assert found.useful_share == pytest.approx(1.0, abs=0.01)
    assert 0.9 < found.balance <= 1.0
    # The matrix units alone bound the fastest prediction from below.
    assert found.seconds[0] > found.done_flops / H200.flops
    assert found.seconds[0] < found.seconds[1]


def test_split_backward_computes_two_products_again() -> None:
    """Of head_dim columns: s, dp, dv, dk, dq once, then s and dp twice."""
    case = BY_NAME["mixed"]
    fused, split = (predict(case, design, H200, backward=True) for design in (FUSED, LISTED))
    assert fused.useful_flops == split.useful_flops
    assert fused.useful_flops == 2.5 * predict(case, LISTED, H200).useful_flops
    one = BY_NAME["llama3_8b/one_32k"]
    share = predict(one, LISTED, H200, backward=True).useful_share
    assert share == pytest.approx(5 / 7, abs=0.01)


@pytest.mark.parametrize("name", REGIMES)
def test_work_is_the_same_however_it_is_handed_out(name: str) -> None:
    case = BY_NAME[name]
    found = [predict(case, design, H200) for design in (GRID, LISTED)]
    assert found[0].useful_flops == found[1].useful_flops
    for prediction in found:
        assert prediction.useful_flops <= prediction.done_flops
        assert 0 < prediction.balance <= 1.0


def test_short_documents_share_tiles() -> None:
    """1000 documents of 32 tokens have 528 pairs each: a tile of 128 x 128 holds one or four."""
    case = BY_NAME["llama3_8b/1000x32"]
    pairs = visible_pairs(case)
    for design, share in ((LISTED, 4 * 528 / 128**2), (PER_DOCUMENT, 528 / 128**2)):
        cut = [tile for tile in tiles(case, design, 128) if tile[1] > tile[0]]
        walked = blocks_walked(case, cut, 128, "query")
        assert pairs / (int(walked.sum()) * 128**2) == pytest.approx(share, rel=0.01)


def test_a_grid_per_document_launches_for_the_longest() -> None:
    case = BY_NAME["llama3_8b/one_16k_256x64"]
    cut = tiles(case, PER_DOCUMENT, 128)
    assert len(cut) == 257 * 128
    assert sum(first == stop for first, stop in cut) / len(cut) > 0.98
    assert len(tiles(case, LISTED, 128)) == 128 + 128


def test_schedules_are_possible_and_heavy_first_helps() -> None:
    costs = np.array([1.0] * 40 + [10.0])
    bound = max(costs.max(), costs.sum() / 4)
    late, early = makespan(costs, 4, False), makespan(np.sort(costs)[::-1], 4, False)
    assert late == 20.0
    assert bound <= early <= 4 / 3 * bound
    assert makespan(costs, 4, True) == 20.0
    assert makespan(np.array([]), 4, True) == 0.0


@pytest.mark.parametrize("name", REGIMES)
def test_listed_tiles_are_those_that_the_kernels_read(name: str) -> None:
    tile_list = pytest.importorskip("packed_attn_kernels").tile_list
    case = BY_NAME[name]
    seen = case.layout().visibility(case.causal)
    wanted = [(a, b) for a, b in tile_list(seen.key_start, seen.key_stop, 128).tolist() if a < b]
    assert sorted(tiles(case, LISTED, 128)) == sorted(wanted)


def test_two_kernels_of_keys_at_256_compute_the_scores_again() -> None:
    """s, dp, dk; s, dv; s, dp, dq: eight products where five are useful."""
    case = BY_NAME["llama3_8b/one_32k"]
    wide = next(c for c in benchmark_cases() if c.name.endswith("one_32k/head_dim_256"))
    assert predict(wide, LISTED, H200, backward=True).useful_share == pytest.approx(5 / 8, abs=0.01)
    assert predict(wide, LISTED, H200, backward=True).launches == 4
    assert predict(case, LISTED, H200, backward=True).launches == 3


def test_forest_with_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="forest_window: a forest with a window"):
        visible_pairs(BY_NAME["forest_window"])


def test_command_prints_a_range_for_each_design(capsys, tmp_path) -> None:
    main(["--case", "modernbert_base_local", "--markdown", str(tmp_path / "model.md")])
    printed = capsys.readouterr().out
    assert printed.startswith("Predictions for H200 from public peak figures: no GPU has measured")
    assert printed.count("modernbert_base_local/64x512") == len(DESIGNS)
    assert (tmp_path / "model.md").read_text() == printed


def test_benchmark_cases_are_named_once_and_have_toys() -> None:
    cases = benchmark_cases()
    assert len({case.name for case in cases}) == len(cases)
    assert {case.name for case in chosen_cases(cases, ["forest"])} == {"llama3_8b/forest"}
    with pytest.raises(ValueError, match="no case has 'nothing'"):
        chosen_cases(cases, ["nothing"])
    for case in cases:
        small = toy(case)
        assert 8 <= sum(small.lengths) <= 200, small
        assert (small.causal, small.softcap, small.sinks) == (case.causal, case.softcap, case.sinks)
        assert isinstance(small, Case)
