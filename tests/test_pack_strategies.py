"""Strategies and constraints of pack_lengths, the bound, seeds, losses and the report's JSON."""

from __future__ import annotations

import json
import pickle
from collections import Counter, defaultdict
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packed_attn.packing import PackingLossError, PackingReport, Packs, pack_lengths
from packed_attn.packing.best_fit import Histogram, place_groups
from packed_attn.packing.bound import lower_bound

some_lengths = st.lists(st.integers(0, 50), max_size=50)


def check_every_token_once(packs: Packs, lengths: list[int], capacity: int) -> None:
    """Every token of every document in one place, no pack over capacity."""
    seen = [np.zeros(n, int) for n in lengths]
    for document, start, length in zip(packs.order, packs.starts, packs.lengths):
        seen[document][start : start + length] += 1
    assert all((counts == 1).all() for counts in seen)
    assert packs.pack_tokens.max(initial=0) <= capacity
    assert (np.diff(packs.offsets) > 0).all()


def packs_of(packs: Packs) -> list[list[int]]:
    """The documents in each pack."""
    return [packs.order[a:b].tolist() for a, b in zip(packs.offsets, packs.offsets[1:])]


@given(
    counts=st.dictionaries(st.integers(1, 300), st.integers(1, 50), max_size=40),
    capacity=st.integers(300, 1000),
    most=st.one_of(st.just(2**62), st.integers(1, 6)),
)
@settings(max_examples=200)
def test_compiled_placements_are_those_of_the_readable_one(counts, capacity, most):
    from packed_attn.packing import compiled

    sizes = np.array(sorted(counts, reverse=True), np.int64)
    numbers = np.array([counts[size] for size in sizes.tolist()], np.int64)
    expected = place_groups(sizes, numbers, capacity, most)
    assert np.array_equal(compiled.place_groups(sizes, numbers, capacity, most), expected)


def test_packs_too_large_for_a_table_are_planned_alike():
    lengths = np.random.default_rng(0).integers(1, 50_000, 2000)
    small = pack_lengths(lengths, 2**16)
    scaled = pack_lengths(lengths * 2**16, 2**32)
    assert np.array_equal(small.order, scaled.order)
    assert np.array_equal(small.offsets, scaled.offsets)
    assert scaled.report.attention_cost == small.report.attention_cost * 2**32
    assert scaled.report.lower_bound == small.report.lower_bound


@given(lengths=some_lengths, capacity=st.integers(1, 40), seed=st.one_of(st.none(), st.just(3)))
def test_next_fit_keeps_the_order(lengths, capacity, seed):
    packs = pack_lengths(lengths, capacity, strategy="next_fit", seed=seed)
    check_every_token_once(packs, lengths, capacity)
    if seed is None:
        places = list(zip(packs.order.tolist(), packs.starts.tolist()))
        assert places == sorted(places)
        fills = packs.pack_tokens
        firsts = packs.lengths[packs.offsets[:-1]]
        assert (fills[:-1] + firsts[1:] > capacity).all()


@given(
    lengths=some_lengths,
    capacity=st.integers(1, 40),
    most=st.integers(1, 4),
    strategy=st.sampled_from(["bfd", "next_fit"]),
)
def test_max_documents(lengths, capacity, most, strategy):
    packs = pack_lengths(lengths, capacity, strategy=strategy, max_documents=most)
    check_every_token_once(packs, lengths, capacity)
    assert np.diff(packs.offsets).max(initial=0) <= most
    assert packs.report.lower_bound >= -(-packs.num_pieces // most)
    assert packs.num_packs >= packs.report.lower_bound


@given(
    lengths=some_lengths,
    units=st.integers(1, 10),
    align=st.integers(1, 6),
    strategy=st.sampled_from(["bfd", "wrapped", "next_fit", "optimal"]),
)
def test_align_leaves_room_behind_documents(lengths, units, align, strategy):
    capacity = units * align
    packs = pack_lengths(lengths, capacity, strategy=strategy, align=align)
    check_every_token_once(packs, lengths, capacity)
    room = -(-packs.lengths // align) * align
    if packs.num_packs:
        assert np.add.reduceat(room, packs.offsets[:-1]).max() <= capacity
    assert packs.report.alignment_tokens == room.sum() - packs.lengths.sum()
    assert (packs.starts % align == 0).all()


@given(
    groups=st.lists(st.tuples(st.integers(1, 9), st.integers(-1, 6)), max_size=40),
    strategy=st.sampled_from(["bfd", "next_fit", "optimal"]),
)
def test_together_shares_a_pack(groups, strategy):
    lengths, together = [n for n, _ in groups], [g for _, g in groups]
    need = Counter()
    for n, g in groups:
        need[g] += n if g >= 0 else 0
    capacity = max([10, *need.values()])
    packs = pack_lengths(lengths, capacity, strategy=strategy, together=together)
    check_every_token_once(packs, lengths, capacity)
    homes = defaultdict(set)
    for p, documents in enumerate(packs_of(packs)):
        for d in documents:
            homes[together[d]].add(p)
    assert all(len(where) == 1 for g, where in homes.items() if g >= 0)
    assert packs.num_packs >= packs.report.lower_bound


@given(
    groups=st.lists(
        st.tuples(st.integers(1, 20), st.integers(-1, 3), st.integers(-1, 8)), max_size=30
    ),
    most=st.one_of(st.none(), st.integers(30, 40)),
)
def test_apart_never_shares_a_pack(groups, most):
    lengths, apart = [n for n, _, _ in groups], [a for _, a, _ in groups]
    together = [-1] * len(groups)
    seen = defaultdict(set)
    for d, (_, a, g) in enumerate(groups):  # groups whose members need not stay apart
        if g >= 0 and a not in seen[g]:
            together[d] = g
            seen[g] |= {a} - {-1}
    need = Counter()
    for n, g in zip(lengths, together):
        need[g] += n if g >= 0 else 0
    capacity = max([20, *need.values()])
    packs = pack_lengths(lengths, capacity, apart=apart, together=together, max_documents=most)
    check_every_token_once(packs, lengths, capacity)
    for documents in packs_of(packs):
        labels = [apart[d] for d in documents if apart[d] >= 0]
        assert len(labels) == len(set(labels))
        assert most is None or len(documents) <= most
    assert packs.num_packs >= packs.report.lower_bound


def test_without_labels_the_slow_planner_packs_as_well():
    lengths = np.random.default_rng(0).integers(1, 400, 3000)
    free = np.full(lengths.size, -1)
    assert (
        pack_lengths(lengths, 1000, apart=free).num_packs == pack_lengths(lengths, 1000).num_packs
    )


def fewest_by_trying(lengths: list[int], capacity: int) -> int:
    """The fewest packs, by trying every subset that fits as the first document's pack."""
    if not lengths:
        return 0
    first, rest = lengths[0], lengths[1:]
    best = len(lengths)
    for size in range(len(rest) + 1):
        for others in combinations(range(len(rest)), size):
            if first + sum(rest[i] for i in others) <= capacity:
                left = [n for i, n in enumerate(rest) if i not in others]
                best = min(best, 1 + fewest_by_trying(left, capacity))
    return best


@given(lengths=st.lists(st.integers(1, 20), max_size=7), capacity=st.integers(20, 30))
@settings(max_examples=80)
def test_bounds_and_optimal_against_the_true_optimum(lengths, capacity):
    fewest = fewest_by_trying(lengths, capacity)
    bfd = pack_lengths(lengths, capacity)
    optimal = pack_lengths(lengths, capacity, strategy="optimal")
    check_every_token_once(optimal, lengths, capacity)
    assert bfd.report.lower_bound <= optimal.report.lower_bound <= fewest
    assert fewest <= optimal.num_packs <= bfd.num_packs
    assert lower_bound(Histogram.of(np.array(lengths, np.int64)), capacity) >= -(
        -sum(lengths) // capacity
    )


def test_the_bound_sees_documents_longer_than_half():
    assert pack_lengths([6] * 10, 10).report.lower_bound == 10
    assert pack_lengths([7, 6, 4, 4, 4], 10).report.lower_bound == 3


@pytest.mark.parametrize(
    "capacity", [pytest.param(512), pytest.param(4096, marks=pytest.mark.slow)]
)
def test_optimal_where_bfd_wastes_a_tenth(capacity):
    low, high = int(0.28 * capacity), int(0.40 * capacity)
    lengths = np.random.default_rng(0).integers(low, high, 20_000, endpoint=True)
    optimal = pack_lengths(lengths, capacity, strategy="optimal")
    check_every_token_once(optimal, lengths.tolist(), capacity)
    assert optimal.num_packs <= 1.01 * optimal.report.lower_bound
    assert pack_lengths(lengths, capacity).num_packs > 1.08 * optimal.num_packs


@pytest.mark.parametrize("capacity", [2048, pytest.param(32768, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["lognormal", "uniform", "bimodal", "near half"])
def test_bfd_is_near_the_bound(capacity, kind):
    rng = np.random.default_rng(0)
    lengths = {
        "lognormal": rng.lognormal(np.log(500) - 0.5, 1.0, 100_000),
        "uniform": rng.integers(1, capacity + 1, 100_000),
        "bimodal": np.where(
            rng.random(100_000) < 0.7,
            rng.lognormal(np.log(200) - 0.18, 0.6, 100_000),
            rng.normal(0.7 * capacity, 0.1 * capacity, 100_000),
        ),
        "near half": rng.integers(int(0.45 * capacity), int(0.55 * capacity) + 1, 100_000),
    }[kind]
    report = pack_lengths(np.clip(np.rint(lengths), 1, capacity).astype(int), capacity).report
    assert report.packs <= 1.0006 * report.lower_bound


@pytest.mark.parametrize("strategy", ["bfd", "wrapped", "next_fit", "optimal"])
def test_seeds_shuffle_packs_epoch_by_epoch(strategy):
    lengths = np.random.default_rng(2).integers(1, 12, 400).tolist()
    still = pack_lengths(lengths, 30, strategy=strategy)
    plans = [pack_lengths(lengths, 30, strategy=strategy, seed=5, epoch=e) for e in (0, 1, 0)]
    for packs in plans:
        check_every_token_once(packs, lengths, 30)
        assert packs.num_packs == still.num_packs
    assert plans[0].digest() == plans[2].digest() != plans[1].digest() != still.digest()
    if strategy == "bfd":  # other documents meet, not the same packs in another order
        assert {frozenset(p) for p in packs_of(plans[0])} != {frozenset(p) for p in packs_of(still)}
    if strategy == "next_fit":
        assert {tuple(p) for p in packs_of(plans[0])} == {tuple(p) for p in packs_of(still)}


@given(
    documents=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=40),
    overflow=st.sampled_from(["split", "truncate", "drop"]),
)
def test_documents_with_nothing_to_learn_are_left_out_and_counted(documents, overflow):
    kept = [min(n, 20) if overflow == "truncate" else n for n, _ in documents]
    learned = [min(k, n) for n, (_, k) in zip(kept, documents)]
    lengths = [n for n, _ in documents]
    report = pack_lengths(lengths, 20, overflow=overflow, learned=learned).report
    useless = [n for n, k in zip(lengths, learned) if n and not k]
    assert report.unlearnable_documents == len(useless)
    assert report.unlearnable_tokens == sum(useless)
    packed = [k for n, k in zip(lengths, learned) if k and not (overflow == "drop" and n > 20)]
    assert report.learned_tokens == sum(packed)
    assert report.masked_tokens == report.packed_tokens - sum(packed)


def test_max_loss_fails_above_its_threshold():
    lengths = [10, 30, 60]
    assert pack_lengths(lengths, 50, overflow="truncate", max_loss=0.1).report.loss == 0.1
    with pytest.raises(
        PackingLossError, match=r"max_loss allows 9.0000% .* loses 10.0000%"
    ) as error:
        pack_lengths(lengths, 50, overflow="truncate", max_loss=0.09)
    assert error.value.report.truncated_tokens == 10
    assert pickle.loads(pickle.dumps(error.value)).report == error.value.report
    assert pack_lengths(lengths, 50, max_loss=0.01).report.lost_labels == 1
    with pytest.raises(PackingLossError):
        pack_lengths(lengths, 50, max_loss=0)


@given(lengths=some_lengths, capacity=st.integers(1, 40))
def test_reports_survive_json(lengths, capacity):
    report = pack_lengths(lengths, capacity).report
    assert PackingReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert sum(report.length_histogram) == report.documents - report.empty_documents
    assert sum(report.fill_histogram) == report.packs
    assert report.attention_cost <= report.padded_attention_cost


@given(shards=st.lists(some_lengths, min_size=1, max_size=4))
def test_merged_reports_count_all_shards(shards):
    reports = [pack_lengths(lengths, 16).report for lengths in shards]
    merged = PackingReport.merged(reports)
    for name in ("documents", "tokens", "packs", "pieces", "split_documents", "attention_cost"):
        assert getattr(merged, name) == sum(getattr(report, name) for report in reports)
    assert merged.longest == max(report.longest for report in reports)
    whole = pack_lengths([n for lengths in shards for n in lengths], 16).report
    assert merged.lower_bound <= whole.packs
    assert merged.length_histogram == whole.length_histogram


def test_report_dicts_that_do_not_add_up_are_refused():
    figures = pack_lengths([3, 4], 5).report.to_dict()
    with pytest.raises(ValueError, match="report must balance"):
        PackingReport.from_dict({**figures, "tokens": 8})
    with pytest.raises(ValueError, match="differ in: surprise"):
        PackingReport.from_dict({**figures, "surprise": 1})
    with pytest.raises(ValueError, match="reports must have one capacity"):
        PackingReport.merged([pack_lengths([1], 5).report, pack_lengths([1], 6).report])
    with pytest.raises(ValueError, match="at least one report"):
        PackingReport.merged([])


def test_report_as_rich_text():
    rich = pytest.importorskip("rich.console", reason="rich text needs rich")
    console = rich.Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    report = pack_lengths([3, 10, 4, 0], 4, overflow="drop").report
    console.print(report)
    text = console.export_text()
    assert all(part in text for row in report.rows() for part in row)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_documents": 0}, "max_documents must be at least 1"),
        ({"align": 3}, "align must divide capacity, got 3 and 8"),
        ({"align": 0}, "align must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"epoch": -1}, "epoch must be at least 0"),
        ({"max_loss": 2}, "max_loss must be a share from 0 to 1 or None, got 2"),
        ({"together": [1]}, "together must have one entry a document, but has 1 for 2"),
        ({"apart": [1, 2.5]}, "apart must be integers, but apart"),
        ({"together": [1, 1]}, "those with number 1 need 9 of 8 room"),
        (
            {"together": [3, 3], "max_documents": 1, "lengths": [1, 1]},
            "those with number 3 need 2 of 1 documents",
        ),
        (
            {"together": [3, 3], "apart": [0, 0], "lengths": [1, 1]},
            "those with together=3 have apart=",
        ),
        ({"learned": [9, 0]}, r"learned must be from 0 .* learned\[0\] is 9 and lengths\[0\] is 4"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        pack_lengths(arguments.pop("lengths", [4, 5]), 8, **arguments)


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        ("wrapped", "together"),
        ("wrapped", "apart"),
        ("wrapped", "max_documents"),
        ("optimal", "max_documents"),
        ("next_fit", "apart"),
    ],
)
def test_constraints_that_a_strategy_does_not_keep_are_refused(strategy, name):
    value = 1 if name == "max_documents" else [0, 1]
    with pytest.raises(NotImplementedError, match=f"{strategy!r} does not keep {name}"):
        pack_lengths([1, 2], 8, strategy=strategy, **{name: value})
