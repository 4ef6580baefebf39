"""Forests to packs: trees that fit stay whole, larger ones are split, their prefixes repeated."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from packed_attn.packing.best_fit import Histogram
from packed_attn.packing.forest import ForestPlan
from packed_attn.packing.placement import Constraints, Groups, Strategy, place


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
    own = plan.num_documents + np.arange(order.size)
    return ForestPlan(
        np.append(plan.lengths, lengths),
        np.append(plan.parents, np.full(order.size, -1)),
        np.append(plan.lists, order),
        np.append(plan.starts, starts),
        np.append(plan.ends, own),
    )


def place_forest(
    plan: ForestPlan,
    documents: NDArray[np.int64],
    capacity: int,
    strategy: Strategy,
    random: np.random.Generator | None = None,
) -> Plan:
    """Places whole trees; those over capacity are split first.

    Args:
        plan: no list of it is longer than capacity.
        documents: int64 `[num_lists]`, the document of each entry of `plan.ends`.
        random: which of equally large trees and branches come first; None is as they stand.
    """
    rank = np.arange(plan.num_documents)
    if random is not None:
        rank = random.permutation(plan.num_documents)
    copied, parents = split_trees(plan, capacity, rank)
    roots = np.flatnonzero(parents < 0)
    firsts = np.append(roots, parents.size)
    tree_order = np.argsort(rank[copied[roots]], kind="stable")
    lengths = plan.lengths[copied]
    totals = np.add.reduceat(lengths, roots) if roots.size else lengths
    histogram = Histogram.of(totals)
    placed = place(totals[tree_order], histogram, capacity, strategy, Constraints())
    # Trees stand where they were placed, their pieces as they stood.
    groups = Groups(np.arange(copied.size), firsts, roots)
    unfolded = groups.unfold(replace(placed, order=tree_order[placed.order]))
    order, offsets = unfolded.order, unfolded.offsets
    place_of = np.empty_like(order)
    place_of[order] = np.arange(order.size)
    pack = np.repeat(np.arange(offsets.size - 1), np.diff(offsets))
    above = parents[order]
    in_pack = np.where(above < 0, -1, place_of[above] - offsets[pack])
    trees = _trees(plan, documents, copied, place_of, offsets, in_pack)
    pieces = copied[order]
    return Plan(
        plan.lists[pieces],
        plan.starts[pieces],
        plan.lengths[pieces],
        offsets,
        histogram,
        placed.bound,
        trees,
    )


def split_trees(
    plan: ForestPlan, capacity: int, rank: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Copies of documents in trees of at most `capacity` tokens, depth-first.

    Returns:
        copied and parents, int64 `[num_copies]`: the document that each copy is of, and the copy
        that it continues.
    """
    roots = np.flatnonzero(plan.parents < 0)
    totals = np.add.reduceat(plan.lengths, roots) if roots.size else plan.lengths
    if totals.max(initial=0) <= capacity:
        return np.arange(plan.num_documents), plan.parents
    from packed_attn.packing import tries

    bounds = np.append(roots, plan.num_documents)
    return tries.split_trees(plan.lengths, plan.parents, bounds, capacity, rank)


def attention_pairs(
    lengths: NDArray[np.int64], starts: NDArray[np.int64], parents: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Query-key pairs of each piece, int64 `[num_pieces]`, as length^2 counts a document's.

    A piece of n tokens after k of its path has n^2 pairs of its own and 2 n k with the path, so
    that pieces of a path add up to the square of its length.
    """
    before = np.where(parents < 0, 0, starts)
    return lengths * (lengths + 2 * before)


def _trees(
    plan: ForestPlan,
    documents: NDArray[np.int64],
    copied: NDArray[np.int64],
    place_of: NDArray[np.int64],
    offsets: NDArray[np.int64],
    in_pack: NDArray[np.int64],
) -> Trees:
    """Where each document ends: in the first copy of the piece in which its list ends."""
    first_copy = np.empty(plan.num_documents, np.int64)
    first_copy[copied[::-1]] = np.arange(copied.size)[::-1]
    lists = np.flatnonzero(plan.ends >= 0)
    piece = place_of[first_copy[plan.ends[lists]]]
    order = np.argsort(piece, kind="stable")
    lists, piece = lists[order], piece[order]
    bounds = np.searchsorted(piece, offsets)
    pack = np.repeat(np.arange(offsets.size - 1), np.diff(bounds))
    end = plan.ends[lists]
    before = np.where(plan.parents[end] < 0, 0, plan.starts[end])
    return Trees(
        in_pack, documents[lists], piece - offsets[pack], bounds, before + plan.lengths[end]
    )
