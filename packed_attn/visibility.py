"""The mask rule: who sees whom in a packed stream, as one interval per token and side.

query i sees key j   iff   key_start[i] <= j < key_stop[i]
                     and   query_start[j] <= i < query_stop[j]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from packed_attn.lasting import lasting

if TYPE_CHECKING:
    from packed_attn.layout import DocumentLayout

# Looked for here, without importing it: a compiler cannot trace a search for a package.
HAS_TRITON = find_spec("triton") is not None


@dataclass(frozen=True, eq=False)
class Visibility:
    """Who sees whom, as four int32 vectors, and where tokens stand.

    Shapes: key_start, key_stop, query_position `[total_queries]`; query_start, query_stop,
    key_position `[total_keys]`, all int32.
    An empty interval (start == stop) belongs to a token that sees nothing or that nobody sees.
    Where query i sees key j, `query_position[i] - key_position[j]` is the distance between them:
    bottom-right aligned in cross attention, along the path to the root in a forest.

    `halves` says which half of the rule decides alone: `"either"` (plain documents: the halves are
    transposes of each other), `"query"` (forests: only query_start/query_stop tell siblings
    apart) or `"both"` (forests with a window or chunks).
    """

    key_start: Tensor
    key_stop: Tensor
    query_start: Tensor
    query_stop: Tensor
    halves: Literal["either", "query", "both"]
    query_position: Tensor
    key_position: Tensor
    # What backends derive from the mask, each thing made once and shared by all layers.
    _derived: dict[Any, Any] = field(default_factory=dict, repr=False)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, made at the first call with this key."""
        if key not in self._derived:
            if torch.compiler.is_compiling():
                # A compiler that sees the mask change compiles anew for other boundaries. It makes
                # this once in a graph all the same: equal computations are one.
                return make()
            self._derived[key] = lasting(make)
        return self._derived[key]

    def dense(self) -> Tensor:
        """The rule written out, bool `[total_queries, total_keys]`: for tests and pictures only."""
        i = torch.arange(self.key_start.numel(), device=self.key_start.device)[:, None]
        j = torch.arange(self.query_start.numel(), device=self.key_start.device)[None, :]
        by_query = (self.key_start[:, None] <= j) & (j < self.key_stop[:, None])
        by_key = (self.query_start[None, :] <= i) & (i < self.query_stop[None, :])
        return by_query & by_key


def build_visibility(
    queries: DocumentLayout,
    key_layout: DocumentLayout | None,
    left: int,
    right: int,
    chunk_size: int | None,
    prefix_lengths: Sequence[int] | Tensor | None,
) -> Visibility:
    """The intervals of one kind of mask; `right == 0` is causal, -1 is unlimited.

    Arguments and errors are those of `DocumentLayout.visibility`, which is the way in.
    """
    keys = queries if key_layout is None else key_layout
    _check_sides(queries, key_layout, prefix_lengths)
    if _runs_kernels(queries.device):
        return _launched(queries, keys, left, right, chunk_size, prefix_lengths)
    q, k = _Side.of(queries), _Side.of(keys)
    # Bottom-right alignment: the last query of a document stands over its last key.
    excess = k.length - q.length
    over = q.per_token(k.begin + excess) + q.place  # the key that stands under each query
    under = k.per_token(q.begin - excess) + k.place
    key_start, key_stop = q.per_token(k.begin), q.per_token(k.end)
    query_start, query_stop = k.per_token(q.begin), k.per_token(q.end)
    query_begin = query_start

    if left >= 0:
        key_start = torch.maximum(key_start, over - left)
        query_stop = torch.minimum(query_stop, under + left + 1)
    if right >= 0:
        key_stop = torch.minimum(key_stop, over + right + 1)
        query_start = torch.maximum(query_start, under - right)
    if prefix_lengths is not None:
        prefix = prefix_tensor(prefix_lengths, queries)
        prefix_stop = torch.minimum(q.per_token(k.begin) + q.per_token(prefix), q.per_token(k.end))
        key_stop = torch.maximum(key_stop, prefix_stop)
        query_start = torch.where(k.place < k.per_token(prefix), query_begin, query_start)
    if chunk_size is not None:
        first = over - (queries.position_ids + q.per_token(excess)) % chunk_size
        key_start = torch.maximum(key_start, first)
        key_stop = torch.minimum(key_stop, first + chunk_size)
        first = under - keys.position_ids % chunk_size
        query_start = torch.maximum(query_start, first)
        query_stop = torch.minimum(query_stop, first + chunk_size)
    if queries.is_forest:
        key_start, query_stop = _forest_hull(queries, left, chunk_size)

    hidden = _hidden_documents(queries, keys)
    key_start, key_stop = _settled(key_start, key_stop, q, hidden)
    query_start, query_stop = _settled(query_start, query_stop, k, hidden)
    query_position = (queries.position_ids + q.per_token(excess)).to(torch.int32)
    key_position = keys.position_ids.to(torch.int32)
    halves = _deciding_halves(queries, left, chunk_size)
    return Visibility(
        key_start, key_stop, query_start, query_stop, halves, query_position, key_position
    )


def check_window(window_size: tuple[int, int]) -> tuple[int, int]:
    """(left, right) as a tuple.

    Raises:
        ValueError: not two integers of at least -1.
    """
    sides = tuple(window_size) if isinstance(window_size, Sequence) else ()
    if len(sides) != 2 or any(not is_whole(side) or side < -1 for side in sides):
        raise ValueError(
            f"window_size must hold two integers of at least -1 (unlimited), got {window_size!r}"
        )
    return sides[0], sides[1]


def is_whole(value: object) -> bool:
    """Whether `value` is an integer and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def prefix_tensor(prefix_lengths: Sequence[int] | Tensor, layout: DocumentLayout) -> Tensor:
    """`prefix_lengths` as int64 `[num_documents]` on the layout's device.

    Raises:
        ValueError: not integers, or not one for each document. Negative ones are found where
            looking costs no device sync; on a device and in a compiled region they are taken as 0.
    """
    prefix = _checked_prefix(prefix_lengths, layout)
    return prefix.to(layout.device, torch.int64).clamp(min=0)


def _checked_prefix(prefix_lengths: Sequence[int] | Tensor, layout: DocumentLayout) -> Tensor:
    prefix = torch.as_tensor(prefix_lengths)
    if prefix.numel() and (prefix.dtype.is_floating_point or prefix.dtype == torch.bool):
        raise ValueError(f"prefix_lengths must be integers, got {prefix.dtype}")
    if list(prefix.shape) != [layout.num_documents]:
        raise ValueError(
            f"prefix_lengths must have shape [{layout.num_documents}], got {list(prefix.shape)}"
        )
    is_readable = prefix.device.type == "cpu" and not torch.compiler.is_compiling()
    if is_readable and (prefix < 0).any():
        raise ValueError(f"prefix_lengths must not be negative, got {int(prefix.min())}")
    return prefix


def _runs_kernels(device: torch.device) -> bool:
    """Whether the kernels of `packed_attn_kernels.bookkeeping` make the vectors: on CUDA where
    triton is installed, and on the CPU once the kernels are loaded interpreted. Elsewhere the torch
    operators of this file do, which are their specification, and under a compiler, which makes one
    kernel of them by itself. Imports neither."""
    if torch.compiler.is_compiling():
        return False
    if device.type == "cuda":
        return HAS_TRITON
    rules = sys.modules.get("packed_attn_kernels.rules")
    return device.type == "cpu" and rules is not None and rules.INTERPRETED


def _launched(
    queries: DocumentLayout,
    keys: DocumentLayout,
    left: int,
    right: int,
    chunk_size: int | None,
    prefix_lengths: Sequence[int] | Tensor | None,
) -> Visibility:
    """What `build_visibility` makes, in one launch."""
    from packed_attn_kernels.bookkeeping import mask_intervals

    prefix = None
    if prefix_lengths is not None:
        prefix = _checked_prefix(prefix_lengths, queries).to(queries.device)
    forest, depth = None, 0
    if queries.parents is not None:
        tensors = queries.forest_tensors()
        forest = queries.parents, tensors.path_offset, tensors.subtree_stop
        depth = tensors.depth
    vectors = mask_intervals(
        queries.cu_seqlens,
        keys.cu_seqlens,
        queries.total_tokens,
        keys.total_tokens,
        left=left,
        right=right,
        chunk_size=chunk_size,
        prefix=prefix,
        query_padding=queries.padding,
        key_padding=None if keys is queries else keys.padding,
        forest=forest,
        depth=depth,
    )
    key_start, key_stop, query_position, query_start, query_stop, key_position = vectors
    halves = _deciding_halves(queries, left, chunk_size)
    return Visibility(
        key_start, key_stop, query_start, query_stop, halves, query_position, key_position
    )


def _deciding_halves(
    queries: DocumentLayout, left: int, chunk_size: int | None
) -> Literal["either", "query", "both"]:
    if not queries.is_forest:
        return "either"
    return "both" if left >= 0 or chunk_size is not None else "query"


@dataclass(frozen=True, eq=False)
class _Side:
    """Begins, ends and lengths per document of one side and an entry past them, and how to spread
    them over tokens."""

    layout: DocumentLayout
    begin: Tensor
    end: Tensor
    length: Tensor
    place: Tensor  # of each token in its own document, forests not counted on

    @staticmethod
    def of(layout: DocumentLayout) -> _Side:
        # One entry past the documents, which no token reads: a compiler takes a vector of a single
        # entry for a shape of its own, and compiles anew for a pack of one document.
        begin = layout.cu_seqlens.long()
        end = begin.roll(-1)
        token = torch.arange(layout.total_tokens, device=layout.device)
        return _Side(layout, begin, end, end - begin, token - layout.per_token(begin))

    def per_token(self, per_document: Tensor) -> Tensor:
        return self.layout.per_token(per_document)


def _check_sides(
    queries: DocumentLayout,
    key_layout: DocumentLayout | None,
    prefix_lengths: Sequence[int] | Tensor | None,
) -> None:
    if key_layout is not None and key_layout.num_documents != queries.num_documents:
        raise ValueError(
            f"layout has {queries.num_documents} documents, "
            f"but key_layout has {key_layout.num_documents}"
        )
    forest = queries.is_forest or (key_layout is not None and key_layout.is_forest)
    if forest and (prefix_lengths is not None or key_layout is not None):
        raise NotImplementedError(
            "a forest has neither prefix_lengths nor a key_layout: "
            "give the shared prefix as a document of its own"
        )


def _forest_hull(
    layout: DocumentLayout, left: int, chunk_size: int | None
) -> tuple[Tensor, Tensor]:
    """key_start: the first token on each query's path that the window and the chunk let it see.
    query_stop: the end of each key's subtree."""
    assert layout.parents is not None
    forest = layout.forest_tensors()
    position = layout.position_ids
    first = torch.zeros_like(position)
    if left >= 0:
        first = torch.maximum(first, position - left)
    if chunk_size is not None:
        first = torch.maximum(first, position - position % chunk_size)
    document = layout.document_ids.long()
    for _ in range(forest.depth):
        above = forest.path_offset[document] > first
        document = torch.where(above, layout.parents[document].long(), document)
    begin = layout.cu_seqlens[:-1].long()
    key_start = begin[document] + first - forest.path_offset[document]
    return key_start, layout.per_token(forest.subtree_stop)


def _hidden_documents(queries: DocumentLayout, keys: DocumentLayout) -> Tensor | None:
    """bool `[num_documents]`: padding on either side, which takes both halves of the rule."""
    if keys is queries or keys.padding is None:
        return queries.padding
    return keys.padding if queries.padding is None else queries.padding | keys.padding


def _settled(
    start: Tensor, stop: Tensor, side: _Side, hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """int32 intervals; crossed ones and those of hidden documents are empty."""
    stop = torch.maximum(start, stop)
    if hidden is not None:
        stop = torch.where(side.per_token(hidden), start, stop)
    return start.to(torch.int32), stop.to(torch.int32)
