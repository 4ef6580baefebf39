"""Trees over capacity: the compiled split against one written from its description."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from packed_attn.packing import trees
from packed_attn.packing.shared import measured

Part = tuple[int, int, list]  # tokens, document, what hangs on it


def draw_tree(random: np.random.Generator, depth: int, answers: int, longest: int) -> list[list]:
    """Rows of a tree, depth-first: parent, list, length, start."""
    rows: list[list] = []

    def grow(parent: int, start: int, level: int) -> None:
        document, length = len(rows), int(random.integers(1, longest + 1))
        rows.append([parent, document, length, start])
        if level:
            for _ in range(random.integers(1, answers + 1)):
                grow(document, start + length, level - 1)

    grow(-1, 0, depth)
    return rows


def in_parts(rows: list[list], document: int, capacity: int, rank: NDArray) -> list[Part]:
    """First-fit-decreasing of what hangs below a document, from the leaves up."""
    _, _, length, start = rows[document]
    children = [d for d, row in enumerate(rows) if row[0] == document]
    below = [part for d in children for part in in_parts(rows, d, capacity, rank)]
    room = capacity - start - length
    if sum(size for size, *_ in below) <= room:
        bins = [list(range(len(below)))]
    else:
        bins = []
        for k in sorted(range(len(below)), key=lambda k: (-below[k][0], rank[below[k][1]])):
            fits = [b for b in bins if sum(below[i][0] for i in b) + below[k][0] <= room]
            (fits or bins[len(bins) :] or [bins.append([]) or bins[-1]])[0].append(k)
    parts = [[below[k] for k in sorted(members)] for members in bins]
    return [(length + sum(size for size, *_ in part), document, part) for part in parts]


def laid_out(parts: list[Part], rows: list[list], above: int, found: list[list]) -> None:
    for _, document, below in parts:
        at = len(found)
        found.append([above, *rows[document][1:]])
        laid_out(below, rows, at, found)


@pytest.mark.parametrize(
    ("depth", "answers", "longest", "capacity"),
    [
        (1, 40, 9, 30),  # many equal answers
        (1, 60, 900, 4000),
        (2, 4, 3, 11),
        (3, 3, 4, 17),  # questions that are copied too
        (4, 3, 900, 5000),
        (9, 2, 900, 9000),  # more than twice as many copies as documents
    ],
)
def test_trees_are_split_as_described(
    depth: int, answers: int, longest: int, capacity: int
) -> None:
    """Among trees that stay whole, and with so little room for the result that it grows."""
    random = np.random.default_rng(depth)
    rows: list[list] = []
    wanted: list[list] = []
    split = 0
    for _ in range(12):
        tree = draw_tree(random, depth, answers, longest)
        ranks = np.arange(len(rows), len(rows) + len(tree))
        parts = in_parts(tree, 0, capacity, ranks)
        split += len(parts) > 1
        laid_out(parts, [[p, n + len(rows), *x] for p, n, *x in tree], -1, wanted_tree := [])
        wanted += [[p + len(wanted) if p >= 0 else -1, *x] for p, *x in wanted_tree]
        rows += [[p + len(rows) if p >= 0 else -1, n + len(rows), *x] for p, n, *x in tree]
    assert split
    documents = np.array(rows, np.int64)
    every = np.arange(len(documents))
    firsts, tokens = measured(documents)
    found, heads, rank = trees.split_trees(
        documents, firsts, tokens, every, every, capacity,
        np.empty((1, 4), np.int64), np.empty(1, np.int64), np.empty(1, np.int64),
    )  # fmt: skip
    assert found.tolist() == wanted
    assert measured(found)[1].max() <= capacity
    # Lists are named as documents here: each ends once, in the first copy.
    assert rank.tolist() == found[:, 1].tolist()
    first = np.unique(found[:, 1], return_index=True)[1]
    assert heads[first].tolist() == every.tolist()
    assert np.count_nonzero(heads >= 0) == every.size
