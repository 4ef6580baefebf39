"""Exact best-fit-decreasing on the histogram of lengths.

Documents of equal length are interchangeable and so are packs with equal room, so the plan moves
groups of packs: it costs (distinct lengths) x (splits of groups), whatever the number of
documents. Only the sort before it and the scatter after it touch every document.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

INT64_MAX = 2**63 - 1
# A table of counts, or a bitset of rooms, up to here: 32 MB and 8 MB. Beyond, sets that sort.
LONGEST_TABLE = 2**22
LARGEST_BITSET = 2**26


@dataclass(frozen=True, eq=False)
class Histogram:
    """How many documents have each length.

    Attributes:
        lengths: int64 `[num_lengths]`, the lengths that occur, ascending.
        counts: int64 `[num_lengths]`, documents of each.
        table: int64 `[longest + 1]`, documents by length; None where it would be too long.
    """

    lengths: NDArray[np.int64]
    counts: NDArray[np.int64]
    table: NDArray[np.int64] | None = None

    @property
    def longest(self) -> int:
        return int(self.lengths[-1]) if self.lengths.size else 0

    @property
    def has_zeros(self) -> bool:
        return bool(self.lengths.size) and not self.lengths[0]

    @property
    def total(self) -> int:
        """The sum of all lengths."""
        return int(self.lengths @ self.counts)

    @classmethod
    def of(cls, lengths: NDArray[np.int64]) -> Histogram:
        """Counts lengths of at least 0."""
        longest = int(lengths.max(initial=0))
        if longest > LONGEST_TABLE:
            return cls(*np.unique(lengths, return_counts=True))
        from packed_attn.packing import compiled

        table = compiled.count_lengths(lengths, longest)
        distinct = np.flatnonzero(table)
        return cls(distinct, table[distinct], table)


def best_fit_decreasing(
    lengths: NDArray[np.int64],
    capacity: int,
    *,
    max_documents: int | None = None,
    histogram: Histogram | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Packs by best-fit-decreasing: the longest first, each into the fullest pack that has room.

    Args:
        lengths: int64 `[num_pieces]`, each in 1..capacity.
        capacity: tokens a pack holds.
        max_documents: most pieces a pack takes; None is no limit.
        histogram: `Histogram.of(lengths)`, where the caller has counted already.

    Returns:
        order, int64 `[num_pieces]`; the lengths in that order; and offsets, int64
        `[num_packs + 1]`: pack p holds the pieces `order[offsets[p] : offsets[p + 1]]`, longest
        first, equal lengths by rising index. Packs stand in the order in which they were opened.
        The same input gives the same plan.

    Source: Johnson, "Near-optimal bin packing algorithms" (1973); for documents, Ding et al.,
    "Fewer Truncations Improve Language Modeling" (2024).
    """
    from packed_attn.packing import compiled

    histogram = histogram or Histogram.of(lengths)
    longest_first = _argsort_descending(lengths, histogram)
    place = compiled.place_groups if capacity <= LARGEST_BITSET else place_groups
    sizes, counts = histogram.lengths[::-1].copy(), histogram.counts[::-1].copy()
    placements = place(sizes, counts, capacity, max_documents or INT64_MAX)
    num_packs = int((placements[:, 0] + placements[:, 1]).max(initial=0))
    offsets = np.zeros(num_packs + 1, np.int64)
    order, placed = np.empty_like(lengths), np.empty_like(lengths)
    compiled.scatter(lengths, longest_first, placements, offsets, order, placed)
    return order, placed, offsets


def place_groups(
    sizes: NDArray[np.int64], counts: NDArray[np.int64], capacity: int, most: int
) -> NDArray[np.int64]:
    """Places `counts[i]` documents of `sizes[i]`, longest first, into groups of equal packs.

    A group is a run of packs that hold the same lengths and so have the same room. When the fullest
    pack that takes a document has room for k of them, the next k - 1 go there too, because its
    room stays the smallest that fits: a whole group is filled in one step. A pack with `most`
    documents takes no more.

    Written for packs too large for `compiled.place_groups`, which makes the same placements: rooms
    are a sorted list here and a bitset there.

    Returns:
        int64 `[num_placements, 4]`: first pack, number of packs, documents put in each pack, and
        documents that each of them held before. Placements take documents longest first.
    """
    rooms: list[int] = []  # of packs that are open, ascending
    groups: dict[int, list[tuple[int, int, int]]] = {}  # room -> (first pack, packs, held)
    placements: list[tuple[int, int, int, int]] = []
    opened = 0
    for size, left in zip(sizes.tolist(), counts.tolist()):
        while left:
            at = bisect_left(rooms, size)
            new = at == len(rooms)
            room = capacity if new else rooms[at]
            first, available, held = (opened, left, 0) if new else groups[room].pop()
            each = min(room // size, most - held)
            packs = left // each
            if not packs:
                packs, each = 1, left
            packs = min(packs, available)
            if new:
                opened += packs
            elif packs < available:
                groups[room].append((first + packs, available - packs, held))
            elif not groups[room]:
                del rooms[at], groups[room]
            left -= packs * each
            placements.append((first, packs, each, held))
            room -= each * size
            if room and held + each < most:
                if room not in groups:
                    groups[room] = []
                    rooms.insert(bisect_left(rooms, room), room)
                groups[room].append((first, packs, held + each))
    return np.array(placements, np.int64).reshape(-1, 4)


def _argsort_descending(
    lengths: NDArray[np.int64], histogram: Histogram
) -> NDArray[np.signedinteger]:
    """Stable order from longest to shortest."""
    if histogram.table is None:
        return np.argsort(-lengths, kind="stable")
    from packed_attn.packing import compiled

    order = np.empty(lengths.size, np.int32 if lengths.size < 2**31 else np.int64)
    compiled.sort_descending(lengths, histogram.table, order)
    return order
