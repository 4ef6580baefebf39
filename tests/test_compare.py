"""compare: padded, truncated and packed figures of one plan, counted one document at a time."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packed_attn.packing import compare, pack_lengths, truncate


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_figures_are_those_of_the_documents(lengths: list[int], max_length: int) -> None:
    packs = pack_lengths(lengths, 40)
    ways = compare(packs, max_length)
    reports = []
    rows = [{"input_ids": [0] * n} for n in lengths]
    kept = [
        len(row["input_ids"])
        for row in truncate(rows, max_length=max_length, on_report=reports.append)
    ]
    assert ways.truncated.tokens == sum(kept)
    assert ways.truncated.lost_tokens == reports[0].lost_tokens["input_ids"]
    assert ways.truncated.cut_documents == reports[0].truncated_examples
    assert ways.truncated.computed_tokens == len(kept) * max(kept)
    assert ways.truncated.attention_cost == len(kept) * max(kept) ** 2
    assert ways.padded.computed_tokens == packs.report.padded_tokens
    assert ways.padded.attention_cost == packs.report.padded_attention_cost
    assert ways.packed.computed_tokens == packs.num_packs * 40
    assert ways.packed.attention_cost == packs.report.attention_cost
    assert [way.tokens + way.lost_tokens for way in ways.ways] == [sum(lengths)] * 3


def test_shown_as_text_json_and_table() -> None:
    rich = pytest.importorskip("rich.console", reason="the table needs rich")
    comparison = compare(pack_lengths([3, 4, 9, 20], 20), 8)
    lines = str(comparison).splitlines()
    assert " ".join(lines[2].split()) == "truncated to 8 4 32 71.9% 13 (36.11%) 2 256"
    assert len(set(map(len, lines))) == 1
    assert json.loads(json.dumps(comparison.to_dict()))["truncated"]["lost_tokens"] == 13
    console = rich.Console(width=200)
    with console.capture() as captured:
        console.print(comparison)
    assert "13 (36.11%)" in captured.get()


def test_four_of_five_documents_stay_whole_by_default() -> None:
    comparison = compare(pack_lengths(np.arange(1, 101), 128))
    assert comparison.max_length == 80
    assert comparison.truncated.cut_documents == 20


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="packs must hold at least one pack to be compared"):
        compare(pack_lengths([], 16))
    with pytest.raises(
        ValueError, match="max_length must be an integer of at least 1 or None, got 0"
    ):
        compare(pack_lengths([3], 16), 0)
