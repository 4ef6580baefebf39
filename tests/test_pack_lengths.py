"""pack_lengths: every token in one place, plans as good as a per-document best-fit-decreasing."""

import os
import re
from bisect import bisect_left, insort
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from packed_attn.packing import Packs, pack_lengths

STRATEGIES = ["bfd", "wrapped"]
OVERFLOWS = ["split", "truncate", "drop"]

length_lists = st.lists(st.integers(0, 60), max_size=60)


def best_fit_decreasing_packs(lengths: list[int], capacity: int) -> int:
    """The oracle: number of packs when documents are placed one by one."""
    rooms: list[int] = []  # of open packs, ascending
    packs = 0
    for length in sorted(lengths, reverse=True):
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms.pop(at)
        else:
            room, packs = capacity, packs + 1
        insort(rooms, room - length)
    return packs


def packed_tokens(packs: Packs) -> list[list[tuple[int, int]]]:
    """Every pack written out as (document, token) pairs."""
    rows = []
    for p in range(packs.num_packs):
        pieces = range(packs.offsets[p], packs.offsets[p + 1])
        rows.append(
            [
                (int(packs.order[i]), int(packs.starts[i]) + t)
                for i in pieces
                for t in range(packs.lengths[i])
            ]
        )
    return rows


def expected_tokens(lengths: list[int], capacity: int, overflow: str) -> set[tuple[int, int]]:
    kept = {
        "split": lengths,
        "truncate": [min(n, capacity) for n in lengths],
        "drop": [n if n <= capacity else 0 for n in lengths],
    }[overflow]
    return {(d, t) for d, n in enumerate(kept) for t in range(n)}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("overflow", OVERFLOWS)
@given(lengths=length_lists, capacity=st.integers(1, 40))
@settings(max_examples=150, deadline=None)
@example(lengths=[0, 0], capacity=1)
@example(lengths=[7], capacity=3)
def test_every_token_is_in_exactly_one_place(strategy, overflow, lengths, capacity):
    packs = pack_lengths(lengths, capacity, strategy=strategy, overflow=overflow)
    rows = packed_tokens(packs)
    tokens = [token for row in rows for token in row]
    assert len(tokens) == len(set(tokens))
    assert set(tokens) == expected_tokens(lengths, capacity, overflow)
    assert all(1 <= len(row) <= capacity for row in rows)
    assert packs.pack_tokens.tolist() == [len(row) for row in rows]
    if strategy == "wrapped":
        assert tokens == sorted(tokens)
        assert all(len(row) == capacity for row in rows[:-1])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("overflow", OVERFLOWS)
@given(lengths=length_lists, capacity=st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_report_counts_what_the_arrays_say(strategy, overflow, lengths, capacity):
    packs = pack_lengths(lengths, capacity, strategy=strategy, overflow=overflow)
    report = packs.report
    pieces_of = np.bincount(packs.order, minlength=len(lengths))
    tokens_of = np.bincount(packs.order, weights=packs.lengths, minlength=len(lengths))
    given_tokens = np.array(lengths, int)
    whole = (tokens_of == given_tokens) & (given_tokens > 0)
    cut_short = (tokens_of < given_tokens) & (tokens_of > 0)
    left_out = (tokens_of == 0) & (given_tokens > 0)
    assert report.documents == len(lengths)
    assert report.empty_documents == lengths.count(0)
    assert report.whole_documents == np.sum(whole & (pieces_of == 1))
    assert report.split_documents == np.sum(whole & (pieces_of > 1))
    assert report.truncated_documents == np.sum(cut_short)
    assert report.dropped_documents == np.sum(left_out)
    assert report.tokens == sum(lengths)
    assert report.packed_tokens == packs.lengths.sum()
    assert report.truncated_tokens == np.sum((given_tokens - tokens_of)[cut_short])
    assert report.dropped_tokens == np.sum(given_tokens[left_out])
    assert report.lost_labels == np.sum(packs.starts > 0)
    assert report.pieces == packs.num_pieces
    assert report.packs == packs.num_packs == len(packs) >= report.lower_bound
    if packs.num_packs:
        assert packs.fill == pytest.approx(packs.pack_tokens.mean() / capacity)


@given(lengths=st.lists(st.integers(1, 50), max_size=200), capacity=st.integers(50, 120))
@settings(max_examples=300, deadline=None)
def test_bfd_makes_as_many_packs_as_placing_documents_one_by_one(lengths, capacity):
    packs = pack_lengths(lengths, capacity)
    assert packs.num_packs == best_fit_decreasing_packs(lengths, capacity)


@pytest.mark.parametrize("capacity", [64, 2048, 4096, 100_000])
@pytest.mark.parametrize("kind", ["lognormal", "uniform", "near half", "few distinct"])
def test_bfd_matches_the_oracle_on_thousands(capacity, kind):
    rng = np.random.default_rng(capacity)
    lengths = {
        "lognormal": np.clip(rng.lognormal(np.log(capacity / 8), 1.0, 4000), 1, capacity),
        "uniform": rng.integers(1, capacity, 4000, endpoint=True),
        "near half": rng.integers(int(0.45 * capacity), int(0.55 * capacity), 4000),
        "few distinct": rng.choice([capacity // 2, capacity // 3, capacity // 7 + 1], 4000),
    }[kind].astype(np.int64)
    packs = pack_lengths(lengths, capacity)
    assert packs.num_packs == best_fit_decreasing_packs(lengths.tolist(), capacity)
    assert np.array_equal(np.sort(packs.order), np.arange(4000))
    assert np.array_equal(packs.lengths, lengths[packs.order])
    assert packs.pack_tokens.max() <= capacity


def test_order_inside_a_pack_is_longest_first_then_input_order():
    packs = pack_lengths([2, 5, 2, 1, 5], 15)
    assert packs.order.tolist() == [1, 4, 0, 2, 3]
    lengths = np.random.default_rng(0).integers(1, 300, 5000)
    packs = pack_lengths(lengths, 1000)
    pack = np.repeat(np.arange(packs.num_packs), np.diff(packs.offsets))
    keys = list(zip(pack.tolist(), (-packs.lengths).tolist(), packs.order.tolist()))
    assert keys == sorted(keys)


def test_plan_is_deterministic():
    lengths = np.random.default_rng(1).integers(0, 900, 3000)
    first, second = pack_lengths(lengths, 512), pack_lengths(lengths.tolist(), 512)
    for name in ("order", "starts", "lengths", "offsets"):
        a, b = getattr(first, name), getattr(second, name)
        assert a.dtype == b.dtype == np.int64
        assert np.array_equal(a, b)
    assert first.report == second.report


def test_overflow_on_a_worked_example():
    lengths = [3, 10, 4, 0]
    split = pack_lengths(lengths, 4)
    assert split.order.tolist() == [1, 1, 2, 0, 1]
    assert split.starts.tolist() == [0, 4, 0, 0, 8]
    assert split.lengths.tolist() == [4, 4, 4, 3, 2]
    assert split.offsets.tolist() == [0, 1, 2, 3, 4, 5]
    assert (split.report.split_documents, split.report.lost_labels) == (1, 2)
    truncated = pack_lengths(lengths, 4, overflow="truncate").report
    assert (truncated.truncated_documents, truncated.truncated_tokens) == (1, 6)
    dropped = pack_lengths(lengths, 4, overflow="drop").report
    assert (dropped.dropped_documents, dropped.dropped_tokens) == (1, 10)
    wrapped = pack_lengths(lengths, 4, strategy="wrapped")
    assert wrapped.order.tolist() == [0, 1, 1, 1, 1, 2, 2]
    assert wrapped.starts.tolist() == [0, 0, 1, 5, 9, 0, 3]
    assert wrapped.lengths.tolist() == [3, 1, 4, 4, 1, 3, 1]
    assert wrapped.offsets.tolist() == [0, 2, 3, 4, 6, 7]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_overflow_error_names_the_document(strategy):
    with pytest.raises(ValueError, match=r"document 2 has 9 tokens and capacity is 8"):
        pack_lengths([8, 1, 9, 20], 8, strategy=strategy, overflow="error")
    assert pack_lengths([8, 1], 8, strategy=strategy, overflow="error").report.packed_tokens == 9


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], np.empty(0, np.int32)])
def test_a_set_without_tokens_gives_no_packs(strategy, lengths):
    packs = pack_lengths(lengths, 8, strategy=strategy)
    assert packs.num_packs == packs.num_pieces == 0
    assert packs.offsets.tolist() == [0]
    assert packs.pack_tokens.size == 0
    assert packs.fill == 0.0
    assert packs.report.documents == packs.report.empty_documents == len(lengths)
    assert "0 packs" in str(packs.report)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_past_2_to_the_31_tokens(strategy):
    lengths = np.array([3_000_000_000, 1_500_000_000, 1, 2_500_000_000])
    packs = pack_lengths(lengths, 2_000_000_000, strategy=strategy)
    assert packs.report.packed_tokens == 7_000_000_001
    assert packs.lengths.sum() == 7_000_000_001
    assert packs.pack_tokens.max() <= 2_000_000_000
    assert packs.num_packs == 4
    many = pack_lengths(np.full(3_000, 1_000_000), 4_000_000, strategy=strategy)
    assert many.num_packs == 750
    assert many.fill == 1.0


@pytest.mark.parametrize(
    "lengths", [np.array([3, 4], np.uint8), np.array([3, 4], ">i8"), torch.tensor([3, 4]), (3, 4)]
)
def test_lengths_of_any_integer_kind(lengths):
    packs = pack_lengths(lengths, 8)
    assert packs.order.tolist() == [1, 0]
    assert packs.lengths.dtype == np.int64


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([1, -2], "lengths must not be negative, but lengths[1] is -2"),
        ([1, 2.5], "lengths must be integers, but lengths[1] is 2.5"),
        (np.array([1.0]), "lengths must be integers, but lengths[0] is"),
        ([1, None], "lengths must be integers, but lengths[1] is None"),
        ([1, "2"], "lengths must be integers, but lengths[1] is '2'"),
        ([True], "lengths must be integers, but lengths[0] is True"),
        ([2**70], "lengths must be integers that fit in 64 bits"),
        ([2**62, 2**62], "lengths must add to less than 2^62 tokens"),
        ([[1, 2]], "lengths must be one-dimensional, got shape (1, 2)"),
        ([[1], [1, 2]], "lengths must be one-dimensional"),
        (5, "lengths must be one-dimensional, got shape ()"),
    ],
)
def test_bad_lengths_are_named(lengths, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pack_lengths(lengths, 8)


@pytest.mark.parametrize("capacity", [0, -1, 2.0, "8", True, None, 2**63])
def test_bad_capacity_is_named(capacity):
    with pytest.raises(ValueError, match="capacity must be"):
        pack_lengths([1], capacity)


def test_bad_choices_are_named():
    with pytest.raises(
        ValueError, match=r"strategy must be one of 'bfd', 'wrapped', .*, got 'ffd'"
    ):
        pack_lengths([1], 8, strategy="ffd")
    with pytest.raises(ValueError, match=r"overflow must be one of .* got 'cut'"):
        pack_lengths([1], 8, overflow="cut")


def test_report_reads_as_sums_and_refuses_sums_that_do_not_balance():
    report = pack_lengths([3, 10, 4, 0], 4, overflow="drop").report
    text = str(report)
    assert "4 = 2 whole + 1 dropped + 1 empty" in text
    assert "17 = 7 packed + 10 dropped" in text
    assert not report.lossless
    assert pack_lengths([3, 4], 4).report.lossless
    with pytest.raises(ValueError, match="accounts for 4 of 5 documents"):
        replace(report, documents=5)
    with pytest.raises(ValueError, match="17 of 18 tokens"):
        replace(report, tokens=18)


@pytest.mark.skipif(
    "PACKED_ATTN_DATA" not in os.environ, reason="PACKED_ATTN_DATA names no folder of real data"
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_real_text_packs_to_the_bound(strategy):
    path = Path(os.environ["PACKED_ATTN_DATA"], "gsm8k_train.jsonl")
    lengths = [len(line) for line in path.read_bytes().splitlines()]
    packs = pack_lengths(lengths, 8192, strategy=strategy)
    assert packs.report.packed_tokens == sum(lengths)
    if strategy == "wrapped":
        assert packs.num_packs == packs.report.lower_bound
    else:
        assert packs.num_packs == best_fit_decreasing_packs(lengths, 8192)
        assert packs.num_packs <= 1.01 * packs.report.lower_bound
