"""Where pieces that fit go: one strategy, with constraints, on items that stay whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from packed_attn.packing.best_fit import INT64_MAX, Histogram, best_fit_decreasing
from packed_attn.packing.bound import lower_bound
from packed_attn.packing.constrained import ApartPacker
from packed_attn.packing.in_order import next_fit

Strategy = Literal["bfd", "wrapped", "next_fit", "optimal"]
NO_LABELS: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False)
class Constraints:
    """What a pack may hold.

    Attributes:
        max_documents: most pieces in a pack, or None.
        together: int64 `[num_pieces]` or None: pieces with one number of at least 0 share a pack.
        apart: int64 `[num_pieces]` or None: pieces with one number of at least 0 never share one.
    """

    max_documents: int | None = None
    together: NDArray[np.int64] | None = None
    apart: NDArray[np.int64] | None = None

    def of(self, pieces: NDArray[np.int64]) -> Constraints:
        """The constraints of some pieces, by index."""
        return Constraints(
            self.max_documents,
            None if self.together is None else self.together[pieces],
            None if self.apart is None else self.apart[pieces],
        )


@dataclass(frozen=True, eq=False)
class Placement:
    """Pieces in their packs.

    Attributes:
        order: int64 `[num_pieces]`.
        offsets: int64 `[num_packs + 1]`: pack p holds pieces `order[offsets[p] : offsets[p + 1]]`.
        bound: packs that no placement under the same constraints does without.
        sizes: int64 `[num_pieces]`, sizes in that order, where the strategy wrote them down.
    """

    order: NDArray[np.int64]
    offsets: NDArray[np.int64]
    bound: int
    sizes: NDArray[np.int64] | None = None


@dataclass(frozen=True, eq=False)
class Items:
    """What a strategy places: single pieces, or groups of pieces that share a pack.

    Attributes:
        sizes: int64 `[num_items]`.
        histogram: of the sizes.
        documents: int64 `[num_items]`, pieces in each; None is one.
        labels: for each item, labels of which no pack may hold one twice; None is none.
    """

    sizes: NDArray[np.int64]
    histogram: Histogram
    documents: NDArray[np.int64] | None = None
    labels: Sequence[frozenset[int]] | None = None


def place(
    sizes: NDArray[np.int64],
    histogram: Histogram,
    capacity: int,
    strategy: Strategy,
    constraints: Constraints,
) -> Placement:
    """Places pieces of `sizes`, int64 `[num_pieces]`, each in 1..capacity, counted in `histogram`.

    Raises:
        ValueError: pieces that must share a pack and do not fit, or must also stay apart.
    """
    if constraints.together is None or not sizes.size:
        labels = None if constraints.apart is None else _label_sets(constraints.apart)
        items = Items(sizes, histogram, None, labels)
        return _place_items(items, capacity, strategy, constraints.max_documents)
    groups = Groups.of(constraints.together)
    items = groups.items(sizes, capacity, constraints)
    placement = _place_items(items, capacity, strategy, constraints.max_documents)
    return groups.unfold(placement)


def in_random_order(
    offsets: NDArray[np.int64], random: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Packs shuffled: where the members of each now come from, and the offsets of the packs."""
    packs = random.permutation(offsets.size - 1)
    sizes = np.diff(offsets)[packs]
    ends = np.append(0, np.cumsum(sizes))
    return np.repeat(offsets[:-1][packs] - ends[:-1], sizes) + np.arange(ends[-1]), ends


def _place_items(
    items: Items, capacity: int, strategy: Strategy, max_documents: int | None
) -> Placement:
    most = max_documents or INT64_MAX
    bound = _fewest(items, capacity, most)
    if strategy == "next_fit":
        documents = _documents(items)
        offsets = next_fit(items.sizes, documents, capacity, most)
        return Placement(np.arange(items.sizes.size), offsets, bound)
    if items.labels is not None or (items.documents is not None and max_documents is not None):
        labels = items.labels or [NO_LABELS] * items.sizes.size
        packer = ApartPacker(capacity, most)
        order, offsets = packer.pack(items.sizes, _documents(items), labels)
        return Placement(order, offsets, bound)
    order, placed, offsets = best_fit_decreasing(
        items.sizes, capacity, max_documents=max_documents, histogram=items.histogram
    )
    placement = Placement(order, offsets, bound, None if items.documents is not None else placed)
    if strategy == "optimal" and items.sizes.size:
        from packed_attn.packing.optimal import fewest_packs

        return fewest_packs(items.sizes, items.histogram, capacity, placement)
    return placement


def _documents(items: Items) -> NDArray[np.int64]:
    return np.ones_like(items.sizes) if items.documents is None else items.documents


def _fewest(items: Items, capacity: int, most: int) -> int:
    """Packs that no placement of the items does without."""
    documents = items.sizes.size if items.documents is None else int(items.documents.sum())
    # Each member of a group that stays apart takes a pack of its own.
    apart = Counter(label for labels in items.labels or () for label in labels)
    largest = max(apart.values(), default=0)
    return max(lower_bound(items.histogram, capacity), -(-documents // most), largest)


def _label_sets(apart: NDArray[np.int64]) -> list[frozenset[int]]:
    return [frozenset((label,)) if label >= 0 else NO_LABELS for label in apart.tolist()]


@dataclass(frozen=True, eq=False)
class Groups:
    """Pieces by group, groups in the order of their first piece; free pieces are groups of one.

    Attributes:
        members: int64 `[num_pieces]`, the pieces, group by group.
        firsts: int64 `[num_groups + 1]`: group g is `members[firsts[g] : firsts[g + 1]]`.
        numbers: int64 `[num_groups]`, the number that the user gave to each.
    """

    members: NDArray[np.int64]
    firsts: NDArray[np.int64]
    numbers: NDArray[np.int64]

    @staticmethod
    def of(together: NDArray[np.int64]) -> Groups:
        own = -1 - np.arange(together.size)  # a free piece's group is its own
        numbers, first, group = np.unique(
            np.where(together >= 0, together, own), return_index=True, return_inverse=True
        )
        members = np.lexsort((np.arange(together.size), first[group]))
        counts = np.bincount(group)[np.argsort(first)]
        return Groups(members, np.append(0, np.cumsum(counts)), numbers[np.argsort(first)])

    def items(self, sizes: NDArray[np.int64], capacity: int, constraints: Constraints) -> Items:
        totals = np.add.reduceat(sizes[self.members], self.firsts[:-1])
        documents = np.diff(self.firsts)
        most = constraints.max_documents or INT64_MAX
        for what, values, limit in (("room", totals, capacity), ("documents", documents, most)):
            over = np.flatnonzero(values > limit)
            if over.size:
                raise ValueError(
                    f"together puts documents in one pack, but those with number "
                    f"{self.numbers[over[0]]} need {values[over[0]]} of {limit} {what}"
                )
        labels = None if constraints.apart is None else self._labels(constraints.apart)
        return Items(totals, Histogram.of(totals), documents, labels)

    def _labels(self, apart: NDArray[np.int64]) -> list[frozenset[int]]:
        labels = []
        for group, number in enumerate(self.numbers):
            members = self.members[self.firsts[group] : self.firsts[group + 1]]
            given = [label for label in apart[members].tolist() if label >= 0]
            if len(set(given)) < len(given):
                raise ValueError(
                    f"apart must not split documents that together joins, but those with "
                    f"together={number} have apart={sorted(given)}"
                )
            labels.append(frozenset(given))
        return labels

    def unfold(self, groups: Placement) -> Placement:
        """A placement of groups as one of their members."""
        counts = np.diff(self.firsts)[groups.order]
        ends = np.append(0, np.cumsum(counts))
        within = np.arange(self.members.size) - np.repeat(ends[:-1], counts)
        order = self.members[np.repeat(self.firsts[:-1][groups.order], counts) + within]
        return Placement(order, ends[groups.offsets], groups.bound)
