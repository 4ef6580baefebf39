"""Token lists to a forest: shared prefixes found, laid out once, depth-first.

    [S, a, b]   [S, a, c, d]   [S, e]   [f]        lists
    S -> a -> b, c d                                a document is what its list shares no further
      -> e
    f

Lists go one by one into a trie with compressed edges (Morrison, "PATRICIA", 1968): each is compared
with one path, so a token is read once, and what a list shares with no other is not read at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from packed_attn.packing.arguments import checked_column, checked_lengths

NOTHING = np.empty(0, np.int32)
# Columns of documents. Compiled passes have them too: see `compiled.compiled`.
PARENT, LIST, LENGTH, START = range(4)


@dataclass(frozen=True, eq=False)
class ForestPlan:
    """Documents of a forest, depth-first, and which of them each token list ends in.

    Document d is tokens `starts[d] : starts[d] + lengths[d]` of list `lists[d]` and continues
    document `parents[d]`; list i is the path that ends in document `ends[i]`.

    Attributes:
        documents: int64 `[num_documents, 4]`: parent (-1 for a root), list, length and start of
            each; `parents`, `lists`, `lengths` and `starts` are its columns.
        ends: int64 `[num_lists]`; -1 where the list is empty.
    """

    documents: NDArray[np.int64]
    ends: NDArray[np.int64]

    @property
    def parents(self) -> NDArray[np.int64]:
        return self.documents[:, PARENT]

    @property
    def lists(self) -> NDArray[np.int64]:
        return self.documents[:, LIST]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self.documents[:, LENGTH]

    @property
    def starts(self) -> NDArray[np.int64]:
        return self.documents[:, START]

    @property
    def num_documents(self) -> int:
        return len(self.documents)

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
        token_lists: lists of token ids, each `[num_tokens]` integers from 0 to 2^32 - 1; or an
            Arrow array of lists of integers, which is read where it lies.
        min_shared: tokens that sharing a prefix must save to be worth a document of its own.

    Raises:
        ValueError: min_shared below 1, a list that is not one-dimensional integers, or an id out of
            range.
    """
    check_min_shared(min_shared)
    return plan_flat(*_flat(token_lists), min_shared)


def plan_prompts(
    lengths: ArrayLike, prompt_ids: ArrayLike, prompt_lengths: ArrayLike, *, min_shared: int = 1
) -> ForestPlan:
    """The forest of documents that are known to begin with the same prompts; reads no token.

    Args:
        lengths: tokens of each document, `[num_documents]`; 0 leaves it out.
        prompt_ids: integers `[num_documents]`: documents with one number of at least 0 begin with
            one prompt; negative ones share nothing.
        prompt_lengths: tokens of the prompt that each document begins with, `[num_documents]`. Of
            documents with one number the shortest prompt counts, and no document more than its
            length, so documents may have been cut.
        min_shared: tokens that sharing a prompt must save.

    Raises:
        ValueError: min_shared below 1, or columns that are not one integer a document.
    """
    from packed_attn.packing import tries

    check_min_shared(min_shared)
    given = checked_lengths(lengths)
    ids = checked_column("prompt_ids", prompt_ids, given.size)
    prompts = checked_column("prompt_lengths", prompt_lengths, given.size)
    if prompts.min(initial=0) < 0:
        at = int(np.argmax(prompts < 0))
        raise ValueError(f"prompt_lengths must not be negative, but [{at}] is {prompts[at]}")
    numbers, ends = np.empty_like(given), np.empty_like(given)
    table = np.full(2 << given.size.bit_length(), -1, np.int32)
    groups = tries.number_groups(ids, given > 0, numbers, table)
    del table
    counts, shared = tries.shortest_prompts(numbers, np.minimum(prompts, given), groups)
    members = np.empty((counts.sum(), 2), np.int64)
    documents = np.empty((len(members) + np.count_nonzero(counts > 1), 4), np.int64)
    used = tries.emit_groups(numbers, given, shared, counts, min_shared, members, documents, ends)
    return ForestPlan(documents[:used], ends)


def plan_flat(
    tokens: NDArray[np.int32],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    min_shared: int,
    second: NDArray[np.int32] = NOTHING,
) -> ForestPlan:
    """`plan_forest` of lists in one flat array: list i is `tokens[starts[i]:][:lengths[i]]`.

    Args:
        tokens: as `bits` makes them.
        second: values beside the tokens, such as labels, that must agree too where they are shared
            (those of first tokens aside); empty for none.
    """
    from packed_attn.packing import tries

    number = lengths.size
    leaf_of, nodes = np.empty(number, np.int32), np.empty((2 * number + 1, 4), np.int32)
    used = tries.insert_lists(
        # The table is freed before documents are made: a quarter of the memory that this takes.
        tokens, second, starts, lengths, leaf_of, nodes,
        np.full(4 << number.bit_length(), -1, np.int32),
    )  # fmt: skip
    nodes = nodes[:used]
    order, facts = np.zeros(used, np.int32), np.empty((used, 4), np.int32)
    found = tries.weigh(nodes, leaf_of, min_shared, order, facts)
    documents, ends = np.empty((found, 4), np.int64), np.empty(number, np.int64)
    tries.emit_documents(nodes, leaf_of, order, facts, documents, ends)
    return ForestPlan(documents, ends)


def bits(values: NDArray[Any]) -> NDArray[np.int32]:
    """Integers as int32, those from 2^31 to 2^32 - 1 as negative ones: equal where they are equal.

    One type for the compiled passes, which are compiled anew for each; int32 is not copied.

    Raises:
        ValueError: integers that would be equal there to others.
    """
    if values.dtype.itemsize > 4 and values.size:
        least, most = int(values.min()), int(values.max())
        if least < -(2**31) or most >= (2**31 if least < 0 else 2**32):
            raise ValueError(
                "documents that share prefixes must have tokens and labels of 32 bits, got "
                f"{least} to {most}"
            )
    return values.astype(np.int32, copy=False)


def check_min_shared(min_shared: Any) -> None:
    """Refuses what is no number of tokens that sharing could save."""
    if isinstance(min_shared, bool) or not isinstance(min_shared, int) or min_shared < 1:
        raise ValueError(f"min_shared must be an integer of at least 1, got {min_shared!r}")


def _flat(token_lists: Any) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """All lists end to end, where each begins, and how long it is."""
    if hasattr(token_lists, "type") and hasattr(token_lists, "null_count"):
        return _flat_arrow(token_lists)
    arrays = [_checked(f"list {index}", ids) for index, ids in enumerate(token_lists)]
    lengths = np.array([array.size for array in arrays], np.int64)
    return np.concatenate([NOTHING, *arrays]), np.cumsum(lengths) - lengths, lengths


def _flat_arrow(lists: Any) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    import pyarrow as pa

    from packed_attn.packing.columns import table_columns

    column = table_columns(pa.table({"lists": lists})).get("lists")
    if column is None:
        raise ValueError(f"token_lists must be lists of integers, got {lists.type}")
    if column.row_with_null() is not None or (column.lengths < 0).any():
        raise ValueError("token_lists must not hold nulls, but a list is null or holds one")
    tokens, starts = column.flat()
    return _checked("the Arrow array", tokens), starts, column.lengths


def _checked(name: str, ids: Any) -> NDArray[np.int32]:
    array = np.asarray(ids)
    if array.size == 0:
        return NOTHING
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"token lists must be one-dimensional integers, but {name} is "
            f"{array.dtype} of shape {array.shape}"
        )
    if array.min() < 0 or array.max() >= 2**32:
        raise ValueError(
            f"token ids must be from 0 to 2^32 - 1, but {name} has {array.min()} to {array.max()}"
        )
    return bits(array)
