"""Token lists to a forest: shared prefixes found, laid out once, depth-first.

    [S, a, b]   [S, a, c, d]   [S, e]   [f]        lists
    S -> a -> b, c d                                a document is what its list shares no further
      -> e
    f

Sorted lists share their prefixes with their neighbours, so the tree is read off the lengths of the
prefixes that neighbours share, as a suffix array's intervals are (Abouelhoda, Kurtz and Ohlebusch,
"Replacing suffix trees with enhanced suffix arrays", 2004).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class ForestPlan:
    """Documents of a forest, depth-first, and which of them each token list ends in.

    Document d is tokens `starts[d] : starts[d] + lengths[d]` of list `lists[d]` and continues
    document `parents[d]`; list i is the path that ends in document `ends[i]`.

    Attributes:
        lengths, parents, lists, starts: int64 `[num_documents]`; -1 is the parent of a root.
        ends: int64 `[num_lists]`; -1 where the list is empty.
    """

    lengths: NDArray[np.int64]
    parents: NDArray[np.int64]
    lists: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    @property
    def num_documents(self) -> int:
        return self.lengths.size

    @property
    def tokens(self) -> int:
        """Tokens of all documents: what a pack has to hold."""
        return int(self.lengths.sum())

    def path(self, index: int) -> list[int]:
        """The documents of list `index`, from the root."""
        path, document = [], int(self.ends[index])
        while document >= 0:
            path.append(document)
            document = int(self.parents[document])
        return path[::-1]


def plan_forest(token_lists: Sequence[Any], *, min_shared: int = 1) -> ForestPlan:
    """Finds the prefixes that token lists share, nested ones too.

    Trees, and the branches of each, stand in the order in which their first list was given. Equal
    lists end in one document; a list that is a prefix of another ends where the other goes on.

    Args:
        token_lists: lists of token ids, each `[num_tokens]` integers from 0 to 2^32 - 1.
        min_shared: tokens that sharing a prefix must save to be worth a document of its own.

    Raises:
        ValueError: min_shared below 1, a list that is not one-dimensional integers, or an id out of
            range.
    """
    if isinstance(min_shared, bool) or not isinstance(min_shared, int) or min_shared < 1:
        raise ValueError(f"min_shared must be an integer of at least 1, got {min_shared!r}")
    keys = [_sortable(index, ids) for index, ids in enumerate(token_lists)]
    order = sorted((i for i in range(len(keys)) if keys[i]), key=keys.__getitem__)
    tree = _Tree()
    leaf_of = [-1] * len(keys)
    before = b""
    for index in order:
        leaf_of[index] = tree.add(index, len(keys[index]) // 4, _shared(before, keys[index]))
        before = keys[index]
    return _emitted(tree, leaf_of, min_shared)


@dataclass
class _Node:
    """A prefix of `depth` tokens of list `index`; `weight` lists go through it."""

    index: int
    depth: int
    is_end: bool
    weight: int = 0
    children: list[int] = field(default_factory=list)


@dataclass
class _Tree:
    """Prefixes of sorted lists. Node 0 is the empty prefix; `_path` leads to the latest list."""

    nodes: list[_Node] = field(default_factory=lambda: [_Node(-1, 0, False)])
    _path: list[int] = field(default_factory=lambda: [0])

    def add(self, index: int, length: int, shared: int) -> int:
        """Adds list `index`, which shares `shared` tokens with the one before; returns its end."""
        last = -1
        while self.nodes[self._path[-1]].depth > shared:
            last = self._path.pop()
        top = self._path[-1]
        if self.nodes[top].depth < shared:
            # The prefix ends inside the branch that was just left: the branch hangs below it now.
            between = self._new(_Node(self.nodes[last].index, shared, False))
            self.nodes[top].children[-1] = between
            self.nodes[between].children.append(last)
            self._path.append(between)
            top = between
        if length == shared:
            self.nodes[top].is_end = True
            return top
        end = self._new(_Node(index, length, True))
        self.nodes[top].children.append(end)
        self._path.append(end)
        return end

    def _new(self, node: _Node) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1


def _emitted(tree: _Tree, leaf_of: list[int], min_shared: int) -> ForestPlan:
    """The tree's documents, depth-first, without prefixes that save too little."""
    nodes = tree.nodes
    first = [len(leaf_of)] * len(nodes)
    for index in range(len(leaf_of) - 1, -1, -1):
        if leaf_of[index] >= 0:
            first[leaf_of[index]] = index
            nodes[leaf_of[index]].weight += 1
    for node in _postorder(nodes):
        for child in nodes[node].children:
            nodes[node].weight += nodes[child].weight
            first[node] = min(first[node], first[child])
    documents: list[tuple[int, int, int, int]] = []  # length, parent, list, start
    document_of = [-1] * len(nodes)
    # (node, the document above it, tokens up to that document's end)
    todo = [(child, -1, 0) for child in sorted(nodes[0].children, key=first.__getitem__)][::-1]
    while todo:
        number, parent, start = todo.pop()
        node = nodes[number]
        length = node.depth - start
        shares = length * (node.weight - 1) >= min_shared
        below = (parent, start)
        if node.is_end or (node.children and shares):
            document_of[number] = len(documents)
            documents.append((length, parent, node.index, start))
            if shares:
                below = (document_of[number], node.depth)
        children = sorted(node.children, key=first.__getitem__)
        todo += [(child, *below) for child in reversed(children)]
    table = np.array(documents, dtype=np.int64).reshape(-1, 4)
    ends = np.array([-1 if leaf < 0 else document_of[leaf] for leaf in leaf_of], dtype=np.int64)
    lengths, parents, lists, starts = (np.ascontiguousarray(column) for column in table.T)
    return ForestPlan(lengths, parents, lists, starts, ends)


def _postorder(nodes: list[_Node]) -> list[int]:
    order, todo = [], [0]
    while todo:
        number = todo.pop()
        order.append(number)
        todo += nodes[number].children
    return order[::-1]


def _sortable(index: int, ids: Any) -> bytes:
    """Big-endian bytes, which compare as the ids do."""
    array = np.asarray(ids)
    if array.size == 0:
        return b""
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"token lists must be one-dimensional integers, but list {index} is "
            f"{array.dtype} of shape {array.shape}"
        )
    if array.min() < 0 or array.max() >= 2**32:
        raise ValueError(
            f"token ids must be from 0 to 2^32 - 1, but list {index} has {array.min()} to "
            f"{array.max()}"
        )
    return array.astype(">u4").tobytes()


def _shared(a: bytes, b: bytes) -> int:
    """Tokens at the start of both."""
    n = min(len(a), len(b)) // 4
    different = np.frombuffer(a, np.uint32, n) != np.frombuffer(b, np.uint32, n)
    return int(different.argmax()) if different.any() else n
