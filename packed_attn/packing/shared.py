"""Forests to packs: trees that fit stay whole, larger ones are split, their prefixes repeated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from packed_attn.packing.best_fit import Histogram
from packed_attn.packing.forest import LENGTH, LIST, PARENT, START, ForestPlan
from packed_attn.packing.placement import Constraints, Strategy, in_random_order, place


@dataclass(frozen=True, eq=False)
class Trees:
    """How the pieces of packs go on from each other, and where documents end.

    A piece is tokens that one or more documents have, a document the path of pieces from a root to
    the piece in which it ends. Pieces of a pack stand depth-first.

    Attributes:
        parents: int64 `[num_pieces]`, the piece of the same pack, counted from its first, that each
            one continues; -1 is a root.
        documents: int64 `[num_documents]`, documents in the order of the packs and of the pieces in
            which they end; one that was cut is there once for each part.
        ends: int64 `[num_documents]`, the piece of its pack in which each ends.
        offsets: int64 `[num_packs + 1]`: documents `offsets[p] : offsets[p + 1]` are in pack p.
        lengths: int64 `[num_documents]`, tokens of each.
    """

    parents: NDArray[np.int64]
    documents: NDArray[np.int64]
    ends: NDArray[np.int64]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Plan:
    """`Packs` without a report; `sizes` counts what was placed by length, in steps of `align`."""

    order: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: Histogram
    bound: int
    trees: Trees | None = None


def with_rests(
    plan: ForestPlan,
    order: NDArray[np.int64],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
) -> ForestPlan:
    """The plan with the later parts of cut documents, each a root of its own, behind it.

    Args:
        order, starts, lengths: int64 `[num_parts]`: the document of each part, where it begins
            inside it, and its tokens. Further `ends` stand in this order.
    """
    if not order.size:
        return plan
    rests = np.empty((order.size, 4), np.int64)
    rests[:, PARENT], rests[:, LIST] = -1, order
    rests[:, LENGTH], rests[:, START] = lengths, starts
    own = plan.num_documents + np.arange(order.size)
    return ForestPlan(np.concatenate([plan.documents, rests]), np.append(plan.ends, own))


def place_forest(
    plan: ForestPlan,
    capacity: int,
    strategy: Strategy,
    random: Callable[[int], np.random.Generator] | None = None,
) -> Plan:
    """Places whole trees; those over capacity are split first. `trees.documents` are lists.

    Args:
        plan: no list of it is longer than capacity.
        random: random numbers for which of equally large trees and branches come first (use 0),
            and for the order of packs (use 1); None is as they stand.
    """
    from packed_attn.packing import trees as passes

    documents, heads = plan.documents, np.full(plan.num_documents, -1)
    after = np.empty_like(plan.ends)
    lists = np.empty((3, passes.chain_lists(plan.ends, heads, after)), np.int64)
    rank = np.arange(heads.size) if random is None else random(0).permutation(heads.size)
    firsts, totals = measured(documents)
    if totals.max(initial=0) > capacity:
        # Room that is not used is never touched.
        room = [np.empty((2 * heads.size, *shape), np.int64) for shape in ((4,), (), ())]
        documents, heads, rank = passes.split_trees(
            documents, firsts, totals, heads, rank, capacity, *room
        )
        firsts, totals = measured(documents)
    tree_order = np.argsort(rank[firsts[:-1]], kind="stable")
    totals = totals[tree_order]
    histogram = Histogram.of(totals)
    placed = place(totals, histogram, capacity, strategy, Constraints())
    order, packs = tree_order[placed.order], placed.offsets
    if random is not None:
        moved, packs = in_random_order(packs, random(1))
        order = order[moved]
    pieces = np.empty((4, heads.size), np.int64)
    bounds = np.empty((2, packs.size), np.int64)
    passes.lay_out(order, packs, firsts, documents, heads, after, pieces, lists, bounds)
    order, starts, lengths, parents = pieces
    ended = Trees(parents, lists[0], lists[1], bounds[1], lists[2])
    return Plan(order, starts, lengths, bounds[0], histogram, placed.bound, ended)


def measured(documents: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each tree begins, int64 `[num_trees + 1]`, and its tokens, int64 `[num_trees]`."""
    from packed_attn.packing import trees as passes

    totals = np.empty(np.count_nonzero(documents[:, PARENT] < 0), np.int64)
    firsts = np.empty(totals.size + 1, np.int64)
    passes.measure_trees(documents, firsts, totals)
    return firsts, totals


def attention_pairs(
    lengths: NDArray[np.int64], starts: NDArray[np.int64], parents: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Query-key pairs of each piece, int64 `[num_pieces]`, as length^2 counts a document's.

    A piece of n tokens after k of its path has n^2 pairs of its own and 2 n k with the path, so
    that pieces of a path add up to the square of its length.
    """
    before = np.where(parents < 0, 0, starts)
    return lengths * (lengths + 2 * before)
