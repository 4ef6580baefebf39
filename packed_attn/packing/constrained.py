"""Best-fit-decreasing one item at a time, for items that may not share a pack."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence, Set
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(eq=False)
class ApartPacker:
    """Packs items longest first, each into the fullest pack that has room and none of its labels.

    An item passes over the packs that hold one of its labels: at most as many as there are items
    with that label, so the cost grows with sum(group size^2) over the groups kept apart.

    Attributes:
        capacity: tokens a pack holds.
        most: documents a pack takes.
    """

    capacity: int
    most: int
    _rooms: list[int] = field(default_factory=list)  # of packs that are open, ascending
    # room -> packs with it; a dict keeps their order and removes one at once.
    _with_room: dict[int, dict[int, None]] = field(default_factory=dict)
    _held: list[int] = field(default_factory=list)
    _labels: list[set[int]] = field(default_factory=list)
    _items: list[list[int]] = field(default_factory=list)

    def pack(
        self, sizes: NDArray[np.int64], documents: NDArray[np.int64], labels: Sequence[Set[int]]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Places all items.

        Args:
            sizes: int64 `[num_items]`, each in 1..capacity.
            documents: int64 `[num_items]`, how many documents each counts for.
            labels: for each item, labels of which no pack may hold one twice.

        Returns:
            order, int64 `[num_items]`, and offsets, int64 `[num_packs + 1]`; packs stand in the
            order in which they were opened, items longest first.
        """
        for item in np.argsort(-sizes, kind="stable").tolist():
            self._place(item, int(sizes[item]), int(documents[item]), labels[item])
        order = [item for pack in self._items for item in pack]
        offsets = np.cumsum([0, *map(len, self._items)])
        return np.array(order, np.int64), offsets.astype(np.int64)

    def _place(self, item: int, size: int, documents: int, labels: Set[int]) -> None:
        room, pack = self._take(size, documents, labels)
        self._items[pack].append(item)
        self._held[pack] += documents
        self._labels[pack] |= labels
        room -= size
        if room and self._held[pack] < self.most:
            if room not in self._with_room:
                self._with_room[room] = {}
                self._rooms.insert(bisect_left(self._rooms, room), room)
            self._with_room[room][pack] = None

    def _take(self, size: int, documents: int, labels: Set[int]) -> tuple[int, int]:
        """The fullest open pack that may take such an item, or a new one, and its room."""
        for at in range(bisect_left(self._rooms, size), len(self._rooms)):
            room = self._rooms[at]
            for pack in reversed(self._with_room[room]):
                few = self._held[pack] + documents <= self.most
                if few and self._labels[pack].isdisjoint(labels):
                    del self._with_room[room][pack]
                    if not self._with_room[room]:
                        del self._with_room[room], self._rooms[at]
                    return room, pack
        self._held.append(0)
        self._labels.append(set())
        self._items.append([])
        return self.capacity, len(self._items) - 1
