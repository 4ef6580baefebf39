"""Exact best-fit-decreasing on the histogram of lengths.

Documents of equal length are interchangeable and so are packs with equal room, so the plan moves
groups of packs: it costs (distinct lengths) x (splits of groups), whatever the number of
documents. Only the sort before it and the scatter after it touch every document, and those are
numpy's.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

RADIX_BITS = 16  # numpy's stable sort is a radix sort, linear in time, up to 16-bit keys


def best_fit_decreasing(
    lengths: NDArray[np.int64], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Packs by best-fit-decreasing: the longest first, each into the fullest pack that has room.

    Args:
        lengths: int64 `[num_pieces]`, each in 1..capacity.
        capacity: tokens a pack holds.

    Returns:
        order, int64 `[num_pieces]`, and offsets, int64 `[num_packs + 1]`: pack p holds the pieces
        `order[offsets[p] : offsets[p + 1]]`, longest first, equal lengths by rising index. Packs
        stand in the order in which they were opened. The same input gives the same plan.

    Source: Johnson, "Near-optimal bin packing algorithms" (1973); for documents, Ding et al.,
    "Fewer Truncations Improve Language Modeling" (2024).
    """
    if not lengths.size:
        return np.empty(0, np.int64), np.zeros(1, np.int64)
    distinct, counts = _histogram(lengths)
    placements = _place(distinct[::-1].tolist(), counts[::-1].tolist(), capacity)
    return _scatter(_argsort_descending(lengths), placements)


def _histogram(lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct lengths, ascending, and how many documents have each."""
    longest = int(lengths.max())
    if longest > lengths.size + 2**RADIX_BITS:  # a table of that size would cost more than a sort
        return np.unique(lengths, return_counts=True)
    counts = np.bincount(lengths)
    distinct = np.flatnonzero(counts)
    return distinct, counts[distinct]


def _argsort_descending(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Stable order from longest to shortest: one radix pass for each 16 bits of the range."""
    longest = lengths.max()
    keys = longest - lengths
    key_range = int(longest - lengths.min())
    order = np.argsort(keys.astype(np.uint16), kind="stable")  # the low 16 bits
    for shift in range(RADIX_BITS, key_range.bit_length(), RADIX_BITS):
        digits = (keys >> shift).astype(np.uint16)
        order = order[np.argsort(digits[order], kind="stable")]
    return order


def _place(lengths: list[int], counts: list[int], capacity: int) -> NDArray[np.int64]:
    """Places `counts[i]` documents of `lengths[i]`, longest first, into groups of equal packs.

    A group is a run of packs that hold the same lengths and so have the same room. When the fullest
    pack that takes a document has room for k of them, the next k - 1 go there too, because its
    room stays the smallest that fits: a whole group is filled in one step.

    Returns:
        int64 `[num_placements, 4]`: first pack, number of packs, documents put in each pack, and
        documents that each of them held before. Placements take documents longest first.
    """
    rooms = [capacity]  # ascending; a pack not yet opened has room for `capacity`
    groups: dict[int, list[tuple[int, int, int]]] = {}  # room -> (first pack, packs, held)
    placements: list[int] = []
    opened = 0
    for length, left in zip(lengths, counts):
        while left:
            at = bisect_left(rooms, length)
            room = rooms[at]
            each = room // length
            packs = left // each
            if not packs:
                packs, each = 1, left
            if room == capacity:
                first, held = opened, 0
                opened += packs
            else:
                first, available, held = groups[room].pop()
                if packs < available:
                    groups[room].append((first + packs, available - packs, held))
                elif not groups[room]:
                    del rooms[at], groups[room]
                packs = min(packs, available)
            left -= packs * each
            placements += (first, packs, each, held)
            room -= each * length
            if room and room not in groups:
                groups[room] = []
                rooms.insert(bisect_left(rooms, room), room)
            if room:
                groups[room].append((first, packs, held + each))
    return np.array(placements, np.int64).reshape(-1, 4)


def _scatter(
    longest_first: NDArray[np.int64], placements: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Carries the documents, longest first, to where their placements put them.

    A visit is one pack of one placement: it takes the next `each` documents and puts them side by
    side, after the documents that the pack already holds.
    """
    first, packs, each, held = placements.T
    visits_before = np.cumsum(packs) - packs
    pack = np.arange(packs.sum()) + np.repeat(first - visits_before, packs)
    taken = np.repeat(each, packs)
    # Counts far below 2^53 stay exact in the float64 that bincount's weights make.
    sizes = np.bincount(pack, weights=taken).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    target = offsets[pack] + np.repeat(held, packs)
    documents_before = np.cumsum(taken) - taken
    target = np.repeat(target - documents_before, taken) + np.arange(longest_first.size)
    order = np.empty_like(longest_first)
    order[target] = longest_first
    return order, offsets
