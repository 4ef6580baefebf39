"""Attention as rectangles of queries and keys: what is one call on the CPU, and the mask of each.

A document is one rectangle, its queries against its keys; a long one under a window is several, a
band of them along the diagonal; a shared prompt is one more, all of its answers' queries against
its keys, so that the cost grows with the answers and not with their square. Rectangles of like
size are one batch. No mask spans two documents and none is larger than a stated number of elements.

A plan is a pure function of lengths and mask, and the last few are kept: one serves all layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from packed_attn.buckets import PADDED_LENGTH, Bucket, gathered_bucket
from packed_attn.trees import Forest

# Rows of a rectangle under a narrower window. Fewer rows compute less of what the window hides,
# more rows make larger matrix products.
BAND_ROWS = 128
# Rows of a rectangle whose scores are held: keys after a block's last query are not computed.
HELD_ROWS = 256
# However many keys a rectangle has, it has this many rows: below, products become slow.
FEWEST_ROWS = 16
# The position of a column of padding: behind everything.
NOWHERE = 2**40
# Layers of one depth of a forest: more than blocks of one document.
DEPTH_STEP = 2**32

Span = tuple[int, int]


@dataclass(frozen=True)
class MaskKind:
    """The mask rule in positions. -1 is unlimited; causal is `right == 0`."""

    left: int
    right: int
    chunk_size: int | None = None
    by_distance: bool = False  # scores depend on positions, as with ALiBi


@dataclass(frozen=True)
class Limits:
    """What bounds a call.

    Attributes:
        view_tokens: from how many tokens on queries and keys are read where they lie; below, a
            call's fixed cost outweighs gathering them.
        call_tokens: tokens of one call, if it has more than one rectangle.
        pair_elements: numbers held for each pair of query and key, a batch's shared mask aside.
        elements: numbers held in one call.
        holds_scores: whether scores are held, or only the mask.
    """

    view_tokens: int
    call_tokens: int
    pair_elements: int
    elements: int
    holds_scores: bool


@dataclass(frozen=True, eq=False)
class Call:
    """Rectangles of one batch: `queries.batch` times queries by keys.

    Attributes:
        query_positions, key_positions: int64 `[batch or 1, length]`, positions in the document;
            1 where all rectangles look alike. Columns of padding are at NOWHERE.
        prefix: int64 `[batch, 1, 1]` or None: keys before it are seen by the whole document.
        chunk_size: not None where a rectangle spans chunks.
        hides: whether the rule hides anything in it, and a mask is needed.
        is_causal: the mask is the lower triangle of a square.
        shared: what rectangles with the same mask share, or None.
    """

    queries: Bucket
    keys: Bucket
    query_positions: Tensor
    key_positions: Tensor
    prefix: Tensor | None
    chunk_size: int | None
    hides: bool
    is_causal: bool
    shared: tuple[int, int, int] | None

    def visible(self, kind: MaskKind) -> Tensor:
        """The rule written out, bool `[batch or 1, queries, keys]`."""
        i, j = self.query_positions[:, :, None], self.key_positions[:, None, :]
        visible = (j < NOWHERE).expand(-1, i.shape[1], -1)
        if kind.right >= 0:
            below = j - i <= kind.right
            visible = visible & (below if self.prefix is None else below | (j < self.prefix))
        if kind.left >= 0:
            visible = visible & (i - j <= kind.left)
        if self.chunk_size is not None:
            visible = visible & (i // self.chunk_size == j // self.chunk_size)
        return visible


@dataclass(frozen=True, eq=False)
class Plan:
    """All rectangles in calls, in the order in which their results add up.

    Attributes:
        unseen_queries, unseen_keys: (start, stop) of tokens in no rectangle.
        queries_overlap, keys_overlap: whether a token is in several calls, and results are merged.
    """

    calls: tuple[Call, ...]
    unseen_queries: tuple[Span, ...]
    unseen_keys: tuple[Span, ...]
    queries_overlap: bool
    keys_overlap: bool


def plan_rectangles(
    cu_seqlens: Tensor,
    key_cu_seqlens: Tensor | None,
    parents: Tensor | None,
    padding: Tensor | None,
    key_padding: Tensor | None,
    prefix: Tensor | None,
    kind: MaskKind,
    limits: Limits,
) -> Plan:
    """How to compute these documents.

    Args:
        cu_seqlens, key_cu_seqlens: int32 `[num_documents + 1]`, CPU; None is self attention.
        parents: int32 `[num_documents]`, or None.
        padding, key_padding: bool `[num_documents]`, or None.
        prefix: int64 `[num_documents]`, or None.
    """
    vectors = (cu_seqlens, key_cu_seqlens, parents, padding, key_padding, prefix)
    return _cached_plan(*(None if x is None else _bytes(x) for x in vectors), kind, limits)


def _bytes(x: Tensor) -> bytes:
    return (x if x.dtype == torch.bool else x.long()).numpy().tobytes()


@lru_cache(maxsize=16)
def _cached_plan(
    cu_seqlens: bytes,
    key_cu_seqlens: bytes | None,
    parents: bytes | None,
    padding: bytes | None,
    key_padding: bytes | None,
    prefix: bytes | None,
    kind: MaskKind,
    limits: Limits,
) -> Plan:
    cu = np.frombuffer(cu_seqlens, dtype=np.int64)
    key_cu = cu if key_cu_seqlens is None else np.frombuffer(key_cu_seqlens, dtype=np.int64)
    forest = None
    if parents is not None:
        links = np.frombuffer(parents, dtype=np.int64)
        forest = Forest.build(np.diff(cu).tolist(), links.tolist())
    skipped = np.zeros(len(cu) - 1, dtype=bool)
    for flags in (padding, key_padding):
        if flags is not None:
            skipped |= np.frombuffer(flags, dtype=bool)
    own = _documents(cu, key_cu, forest, prefix).take(~skipped)
    if kind.chunk_size is not None:
        own = _chunked(own, kind.chunk_size)
    parts = _blocked(_trimmed(own, kind), kind, limits)
    by_position: list[Call] = []
    if forest is not None:
        if kind.left < 0 and kind.chunk_size is None and not kind.by_distance:
            shared = _blocked(_shared_prompts(cu, forest, skipped), kind, limits)
            parts = parts.joined(shared)
        else:
            by_position = list(_prompts_by_position(cu, forest, skipped, kind, limits))
    totals = int(cu[-1]), int(key_cu[-1])
    calls = (*_grouped(parts, kind, limits, totals), *by_position)
    return _plan(calls, totals)


@dataclass(frozen=True, eq=False)
class _Parts:
    """Rectangles by columns, int64 `[parts]`: queries from q_start, keys from k_start on, the
    position of the first of each, and a layer: one call takes rectangles of one layer, which
    have no token in common."""

    q_start: np.ndarray
    n: np.ndarray
    k_start: np.ndarray
    m: np.ndarray
    q_position: np.ndarray
    k_position: np.ndarray
    layer: np.ndarray
    prefix: np.ndarray | None = None

    @property
    def offset(self) -> np.ndarray:
        return self.q_position - self.k_position

    def take(self, which: np.ndarray) -> _Parts:
        columns = [getattr(self, f.name)[which] for f in fields(self) if f.name != "prefix"]
        return _Parts(*columns, prefix=None if self.prefix is None else self.prefix[which])

    def joined(self, other: _Parts) -> _Parts:
        """Both, without prefixes: forests have none."""
        columns = [f.name for f in fields(self) if f.name != "prefix"]
        return _Parts(*(np.concatenate([getattr(x, c) for x in (self, other)]) for c in columns))


def _documents(
    cu: np.ndarray, key_cu: np.ndarray, forest: Forest | None, prefix: bytes | None
) -> _Parts:
    """Every document's own queries and keys; the last query stands over the last key."""
    n, m = np.diff(cu), np.diff(key_cu)
    first = np.zeros_like(m)
    if forest is not None:
        first = np.array(forest.path_offset, dtype=np.int64)
    lengths = None if prefix is None else np.frombuffer(prefix, dtype=np.int64)
    return _Parts(cu[:-1], n, key_cu[:-1], m, first + m - n, first, np.zeros_like(n), lengths)


def _chunked(parts: _Parts, chunk_size: int) -> _Parts:
    """Every chunk as a rectangle of its own: chunks see nothing of each other."""
    stop = parts.k_position + parts.m
    first = np.maximum(parts.q_position, parts.k_position) // chunk_size
    chunks = np.maximum(0, -(-stop // chunk_size) - first)
    which, place = _repeated(chunks)
    whole = parts.take(which)
    low = (first[which] + place) * chunk_size
    high = np.minimum(low + chunk_size, stop[which])
    return _cut(whole, np.maximum(low, whole.q_position), high, low, high)


def _trimmed(parts: _Parts, kind: MaskKind) -> _Parts:
    """Without first queries that see nothing and first keys that nobody sees."""
    q_low, k_low = parts.q_position, parts.k_position
    if kind.right >= 0 and parts.prefix is None:
        q_low = np.maximum(q_low, parts.k_position - kind.right)
    if kind.left >= 0:
        k_low = np.maximum(k_low, q_low - kind.left)
    return _cut(parts, q_low, parts.q_position + parts.n, k_low, parts.k_position + parts.m)


def _blocked(parts: _Parts, kind: MaskKind, limits: Limits) -> _Parts:
    """Rectangles cut into blocks of rows, each with the keys that its rows may see."""
    rows = _block_rows(parts, kind, limits)
    which, block = _repeated(-(-parts.n // rows))
    whole, rows = parts.take(which), rows[which]
    q_low = whole.q_position + block * rows
    q_high = np.minimum(q_low + rows, whole.q_position + whole.n)
    k_low, k_high = whole.k_position, whole.k_position + whole.m
    if kind.left >= 0:
        k_low = np.maximum(k_low, q_low - kind.left)
    if kind.right >= 0:
        seen = q_high + kind.right
        if whole.prefix is not None:
            seen = np.maximum(seen, whole.prefix)
        k_high = np.minimum(k_high, seen)
    layer = block
    if kind.left >= 0 and kind.right >= 0 and parts.prefix is None:
        # So many blocks on, a band has left the keys of this one.
        layer = block % (1 - (-(kind.left + kind.right) // rows))
    return _cut(replace(whole, layer=whole.layer + layer), q_low, q_high, k_low, k_high)


def _block_rows(parts: _Parts, kind: MaskKind, limits: Limits) -> np.ndarray:
    """Rows of a block of each rectangle, int64: all where nothing is held for its pairs."""
    rows, width = parts.n, parts.m
    if limits.holds_scores and kind.right >= 0:
        rows = np.minimum(rows, HELD_ROWS)
    if kind.left >= 0 and kind.right >= 0 and parts.prefix is None:
        span = kind.left + kind.right
        band = max(BAND_ROWS, span)
        rows = np.where(2 * rows > 3 * band, band, rows)
        width = np.minimum(width, rows + span)
    fitting = limits.elements // (limits.pair_elements * np.maximum(width, 1))
    rows = np.minimum(rows, np.maximum(FEWEST_ROWS, fitting))
    holds = np.full_like(rows, limits.holds_scores or kind.by_distance, dtype=bool)
    if parts.prefix is not None:
        holds[:] = True
    holds |= _hides(kind, parts.n, parts.m, parts.offset) & ~_is_triangle(kind, parts)
    return np.maximum(1, np.where(holds, rows, parts.n))


def _hides(kind: MaskKind, n: Any, m: Any, offset: Any) -> Any:
    """Whether the rule hides a pair of n queries and m keys, by their outermost corners."""
    right = m - 1 - offset > kind.right if kind.right >= 0 else False
    left = offset + n - 1 > kind.left if kind.left >= 0 else False
    return right | left


def _is_triangle(kind: MaskKind, parts: _Parts) -> np.ndarray:
    """Whether what is seen is the lower triangle of a square, which needs no mask."""
    square = (parts.offset == 0) & (parts.n == parts.m) & (kind.right == 0)
    return square & ((kind.left < 0) | (kind.left >= parts.n - 1))


def _shared_prompts(cu: np.ndarray, forest: Forest, skipped: np.ndarray) -> _Parts:
    """Of each document with others below it: all of their queries against its keys."""
    stop, depth = np.array(forest.subtree_stop, dtype=np.int64), _depths(forest)
    lengths = np.diff(cu)
    which = np.flatnonzero((stop > cu[1:]) & (lengths > 0) & ~skipped)
    # Every query comes after every key: where exactly changes nothing without a window.
    after, zeros = lengths[which], np.zeros_like(which)
    n, layer = stop[which] - cu[1:][which], (depth[which] + 1) * DEPTH_STEP
    return _Parts(cu[1:][which], n, cu[:-1][which], after, after, zeros, layer)


def _prompts_by_position(
    cu: np.ndarray, forest: Forest, skipped: np.ndarray, kind: MaskKind, limits: Limits
) -> Iterator[Call]:
    """The same where positions count: one rectangle a call, its rows those that see some key."""
    first, stop, lengths = np.array(forest.path_offset), forest.subtree_stop, np.diff(cu)
    positions = np.arange(cu[-1]) + np.repeat(first - cu[:-1], lengths)
    order = np.argsort(_depths(forest), kind="stable").tolist()
    for d in order:
        k_stop = int(first[d] + lengths[d])  # the position after its last key
        k_first = int(first[d])
        rows = np.arange(int(cu[d + 1]), stop[d])
        if kind.left >= 0:
            k_first = max(k_first, k_stop - kind.left)
            rows = rows[positions[rows] - kind.left < k_stop]
        if kind.chunk_size is not None:
            k_first = max(k_first, k_stop - k_stop % kind.chunk_size)
            rows = rows[positions[rows] // kind.chunk_size == (k_stop - 1) // kind.chunk_size]
        if skipped[d] or len(rows) == 0 or k_first >= k_stop:
            continue
        keys = Bucket(1, k_stop - k_first, start=int(cu[d]) + k_first - int(first[d]))
        fitting = limits.elements // (limits.pair_elements * keys.length)
        for block in np.split(rows, np.arange(0, len(rows), max(FEWEST_ROWS, fitting))[1:]):
            tokens = torch.from_numpy(block)
            queries = Bucket(1, len(block), tokens=tokens, targets=tokens)
            q_positions = torch.from_numpy(positions[block])[None]
            k_positions = torch.arange(k_first, k_stop)[None]
            yield Call(
                queries, keys, q_positions, k_positions, None, kind.chunk_size, True, False, None
            )


def _depths(forest: Forest) -> np.ndarray:
    """How many ancestors each document has."""
    depths: list[int] = []
    for parent in forest.parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return np.array(depths, dtype=np.int64)


def _repeated(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each index as often as it counts, and the place of each repetition from 0."""
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)


def _cut(
    parts: _Parts, q_low: np.ndarray, q_high: np.ndarray, k_low: np.ndarray, k_high: np.ndarray
) -> _Parts:
    """Rectangles reduced to positions [low, high) of each side; empty ones are left out."""
    q_low, k_low = np.maximum(q_low, parts.q_position), np.maximum(k_low, parts.k_position)
    cut = replace(
        parts,
        q_start=parts.q_start + q_low - parts.q_position,
        n=q_high - q_low,
        q_position=q_low,
        k_start=parts.k_start + k_low - parts.k_position,
        m=k_high - k_low,
        k_position=k_low,
    )
    return cut.take((cut.n > 0) & (cut.m > 0))


def _grouped(
    parts: _Parts, kind: MaskKind, limits: Limits, totals: tuple[int, int]
) -> Iterator[Call]:
    """Calls by layer: runs and long rectangles where they lie, then the others gathered by size."""
    in_place, runs = _runs(parts, limits)
    groups = [(layer, 0, group) for layer, group in runs]
    groups += [(layer, 1, group) for layer, group in _alike(parts, ~in_place, limits)]
    for _, gathered, group in sorted(groups, key=lambda entry: entry[:2]):
        yield _call(parts.take(group), kind, totals, in_place=not gathered)


def _runs(parts: _Parts, limits: Limits) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Rectangles that are read where they lie: which, and in which groups."""
    number = len(parts.n)
    same = np.ones(max(number - 1, 0), dtype=bool)
    for column in (parts.n, parts.m, parts.offset, parts.layer):
        same &= column[1:] == column[:-1]
    same &= parts.q_start[1:] == parts.q_start[:-1] + parts.n[:-1]
    same &= parts.k_start[1:] == parts.k_start[:-1] + parts.m[:-1]
    if parts.prefix is not None:
        same &= parts.prefix[1:] == parts.prefix[:-1]
    firsts = np.flatnonzero(np.concatenate([np.ones(min(number, 1), dtype=bool), ~same]))
    counts = np.diff(np.append(firsts, number))
    longer = np.maximum(parts.n, parts.m)[firsts]
    chosen = counts * longer >= limits.view_tokens
    groups = []
    for first, count, length in zip(firsts[chosen], counts[chosen], longer[chosen]):
        step = max(1, limits.call_tokens // int(length))
        step = min(step, _most(limits, int(parts.n[first]), int(parts.m[first])))
        for at in range(0, int(count), step):
            group = np.arange(first + at, first + min(at + step, count))
            groups.append((int(parts.layer[first]), group))
    return np.repeat(chosen, counts), groups


def _most(limits: Limits, n: int, m: int) -> int:
    """Rectangles of one size in one call, by what the call holds."""
    return max(1, limits.elements // (limits.pair_elements * n * m))


def _alike(parts: _Parts, wanted: np.ndarray, limits: Limits) -> Iterator[tuple[int, np.ndarray]]:
    """Groups of one layer and like sizes, largest first."""
    which = np.flatnonzero(wanted)
    m_class = _classes(parts.m[which])
    order = which[np.lexsort((-parts.n[which], m_class, parts.layer[which]))]
    classes = np.empty(len(wanted), dtype=np.int64)
    classes[which] = m_class
    keys = list(zip(parts.layer[order].tolist(), classes[order].tolist()))
    n, m = parts.n[order].tolist(), parts.m[order].tolist()
    first, widest = 0, 0
    for i in range(1, len(order) + 1):
        widest = max(widest, m[i - 1])
        size = i - first + 1
        if (
            i == len(order)
            or keys[i] != keys[first]
            or n[i] * PADDED_LENGTH < n[first]
            or size * max(n[first], widest, m[i]) > limits.call_tokens
            or size > _most(limits, n[first], max(widest, m[i]))
        ):
            yield keys[first][0], order[first:i]
            first, widest = i, 0


def _classes(sizes: np.ndarray) -> np.ndarray:
    """A number for each size, 0 for the largest; a class spans a factor of PADDED_LENGTH."""
    distinct = np.unique(sizes)[::-1]
    numbers, number, largest = [], -1, np.inf
    for size in distinct.tolist():
        if size * PADDED_LENGTH < largest:
            number, largest = number + 1, size
        numbers.append(number)
    return np.array(numbers, dtype=np.int64)[np.searchsorted(-distinct, -sizes)]


def _call(parts: _Parts, kind: MaskKind, totals: tuple[int, int], *, in_place: bool) -> Call:
    """One batch of rectangles, padded to the largest."""
    n, m = int(parts.n.max()), int(parts.m.max())
    queries = _bucket(parts.q_start, parts.n, totals[0], in_place)
    same_side = np.array_equal(parts.q_start, parts.k_start) and np.array_equal(parts.n, parts.m)
    keys = queries
    if not (same_side and totals[0] == totals[1]):
        keys = _bucket(parts.k_start, parts.m, totals[1], in_place)
    offset = int(parts.offset[0])
    # Under a causal mask, real rows see no column of padding if real keys end with real queries.
    no_pads = (parts.m == m).all() or (
        kind.right == 0 and (parts.m == parts.n + parts.offset).all()
    )
    if parts.prefix is None and no_pads and (parts.offset == offset).all():
        shared = (n, m, offset)
        rows, columns = torch.arange(offset, offset + n)[None], torch.arange(m)[None]
        hides = bool(_hides(kind, n, m, offset))
        is_causal = bool(_is_triangle(kind, parts).all())
        return Call(queries, keys, rows, columns, None, None, hides, is_causal, shared)
    rows = parts.q_position[:, None] + np.arange(n)
    columns = parts.k_position[:, None] + np.arange(m)
    columns[np.arange(m) >= parts.m[:, None]] = NOWHERE
    prefix = None if parts.prefix is None else torch.from_numpy(parts.prefix)[:, None, None]
    positions = torch.from_numpy(rows), torch.from_numpy(columns)
    return Call(queries, keys, *positions, prefix, None, True, False, None)


def _bucket(starts: np.ndarray, lengths: np.ndarray, total: int, in_place: bool) -> Bucket:
    if in_place:
        return Bucket(len(starts), int(lengths[0]), start=int(starts[0]))
    return gathered_bucket(starts, lengths, total)


def _plan(calls: tuple[Call, ...], totals: tuple[int, int]) -> Plan:
    queries = _coverage([call.queries for call in calls], totals[0])
    keys = _coverage([call.keys for call in calls], totals[1])
    return Plan(
        calls,
        _spans(queries == 0),
        _spans(keys == 0),
        queries_overlap=bool((queries > 1).any()),
        keys_overlap=bool((keys > 1).any()),
    )


def _coverage(buckets: list[Bucket], total: int) -> np.ndarray:
    """In how many calls each token is."""
    counts = np.zeros(total + 1, dtype=np.int64)
    for bucket in buckets:
        if bucket.targets is None:
            counts[bucket.start : bucket.start + bucket.batch * bucket.length] += 1
        else:
            counts[bucket.targets.numpy()] += 1
    return counts[:total]


def _spans(flags: np.ndarray) -> tuple[Span, ...]:
    """(start, stop) of the runs of true flags."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]])))
    return tuple(zip(edges[::2].tolist(), edges[1::2].tolist()))
