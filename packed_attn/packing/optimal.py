"""Nearly the fewest packs: a linear program over whole packs, rounded, for sets that bfd wastes.

Where a pack holds two or three documents (lengths of a third of the capacity, say), taking the
longest first pairs them badly. The linear program of Gilmore and Gomory chooses how many packs of
each pattern to make; patterns are generated as it asks for them. Documents are taken in at most
`CLASSES` classes of similar length, rounded up to the longest of the class, so the plan holds; the
same program with lengths rounded down bounds every plan from below.

Source: Gilmore and Gomory, "A linear programming approach to the cutting-stock problem" (1961);
the bound before convergence: Farley (1990).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from packed_attn.packing.best_fit import Histogram, best_fit_decreasing
from packed_attn.packing.placement import Placement

CLASSES = 160
STEPS = 2**14  # lengths are measured in at most so many steps of a pack, rounded the safe way
ROUNDS = 60
TOLERANCE = 1e-4


def fewest_packs(
    sizes: NDArray[np.int64], histogram: Histogram, capacity: int, bfd: Placement
) -> Placement:
    """A placement of at most as many packs as `bfd`, and a bound that the program proves.

    Args:
        sizes: int64 `[num_items]`, each in 1..capacity, counted in `histogram`.
        bfd: the best-fit-decreasing placement of the same items.
    """
    if bfd.offsets.size - 1 <= bfd.bound:
        return bfd
    bound = max(bfd.bound, linear_bound(histogram, capacity))
    classes = _Classes.of(histogram, capacity, up=True)
    patterns, amounts, _ = classes.solve()
    order, offsets = _fill(sizes, classes, patterns, np.floor(amounts + 1e-9), capacity)
    if offsets.size >= bfd.offsets.size:
        return Placement(bfd.order, bfd.offsets, bound, bfd.sizes)
    return Placement(order, offsets, bound)


def linear_bound(histogram: Histogram, capacity: int) -> int:
    """Packs that no plan does without, by the linear program with lengths rounded down."""
    return _Classes.of(histogram, capacity, up=False).solve()[2]


class _Classes:
    """Documents in classes of similar length, and the linear program over patterns of classes.

    Attributes:
        longest: int64 `[num_classes]`, the longest document of each, ascending.
        units: int64 `[num_classes]`, their lengths in steps.
        counts: int64 `[num_classes]`, documents in each.
        steps: steps in a pack.
    """

    def __init__(
        self, longest: NDArray[Any], units: NDArray[Any], counts: NDArray[Any], steps: int
    ) -> None:
        self.longest, self.units, self.counts, self.steps = longest, units, counts, steps

    @staticmethod
    def of(histogram: Histogram, capacity: int, *, up: bool) -> _Classes:
        """Classes with like numbers of documents; lengths rounded up, or down for a bound."""
        before = np.cumsum(histogram.counts) - histogram.counts
        total = int(histogram.counts.sum())
        wanted = np.minimum(before * CLASSES // total, CLASSES - 1)
        if histogram.lengths.size <= CLASSES:
            wanted = np.arange(histogram.lengths.size)
        first = np.flatnonzero(np.diff(wanted, prepend=-1))
        last = np.append(first[1:], wanted.size) - 1
        counts = np.add.reduceat(histogram.counts, first)
        step = -(-capacity // STEPS)
        chosen = histogram.lengths[last if up else first]
        units = -(-chosen // step) if up else np.maximum(chosen // step, 1)
        steps = capacity // step if up else -(-capacity // step)
        return _Classes(histogram.lengths[last], units, counts, steps)

    def solve(self) -> tuple[NDArray[np.int64], NDArray[np.float64], int]:
        """Patterns, int64 `[num_patterns, num_classes]`; packs of each; and a lower bound."""
        from packed_attn.packing import compiled

        patterns = self._first_patterns()
        bound = 0.0
        amounts = np.zeros(len(patterns))
        for _ in range(ROUNDS):
            packs, amounts, prices = self._program(patterns)
            best, chosen = compiled.knapsack(self.units, prices, self.steps)
            bound = max(bound, packs / max(best[-1], 1.0))
            if bound >= packs * (1 - TOLERANCE):
                break
            more = self._priced(prices, best, chosen)
            patterns, before = np.unique(np.concatenate([patterns, more]), axis=0), len(patterns)
            if len(patterns) == before:
                break
        else:
            packs, amounts, _ = self._program(patterns)
        return patterns, amounts, int(np.ceil(bound - 1e-6))

    def _first_patterns(self) -> NDArray[np.int64]:
        """For each pair of classes that fits, the two and the longest that still fit after."""
        number = self.units.size
        i, j = np.triu_indices(number)
        fits = self.units[i] + self.units[j] <= self.steps
        i, j = i[fits], j[fits]
        patterns = np.zeros((i.size + number, number), np.int64)
        pairs = np.arange(i.size)
        np.add.at(patterns, (pairs, i), 1)
        np.add.at(patterns, (pairs, j), 1)
        patterns[i.size + np.arange(number), np.arange(number)] = 1
        room = self.steps - patterns @ self.units
        for item in range(number - 1, -1, -1):
            more = room // self.units[item]
            patterns[:, item] += more
            room -= more * self.units[item]
        return np.unique(patterns, axis=0)

    def _program(
        self, patterns: NDArray[np.int64]
    ) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
        """The fewest packs of the patterns, in fractions: their number, amounts and prices.

        A place for a long document takes a shorter one as well, so what is asked for is places for
        documents of a class and longer ones: prices then never fall with length, which steadies
        them from round to round.
        """
        try:
            from scipy.optimize import linprog
            from scipy.sparse import csc_matrix
        except ImportError as error:
            raise ImportError(
                "strategy='optimal' needs scipy: pip install 'packed-attn[optimal]'"
            ) from error
        places = np.cumsum(patterns[:, ::-1], axis=1)[:, ::-1]
        needed = np.cumsum(self.counts[::-1])[::-1]
        ones = np.ones(len(patterns))
        result = linprog(ones, A_ub=-csc_matrix(places.T), b_ub=-needed, method="highs")
        if not result.success:
            raise RuntimeError(f"the linear program over packs failed: {result.message}")
        prices = np.cumsum(-result.ineqlin.marginals)
        return float(result.fun), result.x, prices

    def _priced(
        self, prices: NDArray[np.float64], best: NDArray[np.float64], chosen: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """For each class, the most valuable pattern with it, where that is worth a pack."""
        worth = prices + best[self.steps - self.units]
        patterns = []
        for item in np.flatnonzero(worth > 1 + 1e-9):
            pattern = np.zeros(self.units.size, np.int64)
            pattern[item], room = 1, self.steps - self.units[item]
            while room > 0:
                if chosen[room] < 0:
                    room -= 1
                else:
                    pattern[chosen[room]] += 1
                    room -= self.units[chosen[room]]
            patterns.append(pattern)
        return np.array(patterns, np.int64).reshape(-1, self.units.size)


def _fill(
    sizes: NDArray[np.int64],
    classes: _Classes,
    patterns: NDArray[np.int64],
    amounts: NDArray[np.float64],
    capacity: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Puts documents, longest first, in the places of whole patterns, and bfd places the rest."""
    used = amounts > 0
    packs = np.repeat(np.flatnonzero(used), amounts[used].astype(np.int64))
    pack, item = np.nonzero(patterns[packs])
    times = patterns[packs][pack, item]
    place_pack, place_class = np.repeat(pack, times), np.repeat(item, times)
    by_length = np.argsort(-place_class, kind="stable")
    longest_first = np.argsort(-sizes, kind="stable")
    class_of = np.searchsorted(classes.longest, sizes[longest_first])
    placed, at = _matched(class_of, place_class[by_length])
    pack_of = np.full(sizes.size, -1, np.int64)
    pack_of[longest_first[placed]] = place_pack[by_length][at]
    rest = np.flatnonzero(pack_of < 0)
    order, _, offsets = best_fit_decreasing(sizes[rest], capacity)
    pack_of[rest[order]] = len(packs) + np.repeat(np.arange(offsets.size - 1), np.diff(offsets))
    pack_of = np.unique(pack_of, return_inverse=True)[1]  # patterns that got no document drop out
    order = np.lexsort((np.arange(sizes.size), -sizes, pack_of))
    return order, np.append(0, np.cumsum(np.bincount(pack_of)))


def _matched(
    documents: NDArray[np.int64], places: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs documents with places of their class or a longer one, both by falling class.

    Document i takes the first free place; a place too short for it is kept for later ones.
    """
    taken, at = [], 0
    for document, class_ in enumerate(documents.tolist()):
        if at < places.size and places[at] >= class_:
            taken.append(document)
            at += 1
    return np.array(taken, np.int64), np.arange(at)
