"""The bookkeeping of a mask in two launches: its intervals and positions, then its lists of tiles.

`packed_attn/visibility.py` and `tile_list` in `tiles.py` say the same in torch operators. They are
the specification and what runs where no kernel does; these kernels give the same numbers, in the
same order. Shapes and grids depend on the numbers of tokens and documents alone, nothing is read by
the host, and no operator but these two runs, so a CUDA graph may hold them while boundaries change.
"""

# Triton's language is not Python's: its stubs know neither constexpr arguments nor tensors.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportOptionalOperand=false, reportOptionalMemberAccess=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from packed_attn_kernels.configurations import KEY_BLOCK, capacity
from packed_attn_kernels.launch import on_device
from packed_attn_kernels.rules import FAR, INTERPRETED, IS_INTERPRETED

# Tokens of a program of the first kernel.
TOKENS = 256
# Rows that one step of a list's scan covers. The interpreter compares a square of them.
SCAN = 512 if INTERPRETED else 4096
# Tiles whose work, or whose place among OTHERS tiles at a time, one step finds.
TILES, OTHERS = 32, 256
WARPS = 16
UNLIMITED = 2**31 - 1

Vectors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def runs_on(device: torch.device) -> bool:
    """Whether the kernels take tensors of this device."""
    return device.type == "cuda" or (INTERPRETED and device.type == "cpu")


def mask_intervals(
    query_cu: Tensor,
    key_cu: Tensor,
    total_queries: int,
    total_keys: int,
    *,
    left: int,
    right: int,
    chunk_size: int | None = None,
    prefix: Tensor | None = None,
    query_padding: Tensor | None = None,
    key_padding: Tensor | None = None,
    forest: tuple[Tensor, Tensor, Tensor] | None = None,
    depth: int = 0,
) -> Vectors:
    """The vectors of a `Visibility`, in one launch.

    Args:
        query_cu, key_cu: integers `[documents + 1]`; the same tensor in self attention.
        left, right: positions that a query sees to either side, -1 is unlimited.
        prefix: integers `[documents]`; what is below 0 is as 0.
        query_padding, key_padding: bool `[documents]`.
        forest: parents, path_offset and subtree_stop, integers `[documents]`; self attention only.
        depth: most ancestors that a document of the forest has.

    Returns:
        key_start, key_stop, query_position `[total_queries]`, query_start, query_stop,
        key_position `[total_keys]`, all int32.
    """
    left, right = (UNLIMITED if side < 0 else side for side in (left, right))
    return torch.ops.packed_attn.mask_intervals(
        query_cu, key_cu, query_padding, key_padding, prefix, list(forest or ()),
        total_queries, total_keys, depth, left, right, chunk_size,
    )  # fmt: skip


def tile_lists(
    key_start: Tensor,
    key_stop: Tensor,
    query_start: Tensor,
    query_stop: Tensor,
    rows: tuple[int, int, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The lists of the forward, of keys and of dq, each as `tile_list` gives it, and the blocks of
    `key_blocks`, in one launch.

    Args:
        rows: of a tile in each of them, powers of two up to 128.
    """
    vectors = (key_start, key_stop, query_start, query_stop)
    *lists, blocks = torch.ops.packed_attn.tile_lists(*vectors, *rows)
    return lists[0], lists[1], lists[2 if rows[2] != rows[0] else 0], blocks


@torch.library.custom_op("packed_attn::mask_intervals", mutates_args=())
def _mask_intervals(
    query_cu: Tensor,
    key_cu: Tensor,
    query_padding: Tensor | None,
    key_padding: Tensor | None,
    prefix: Tensor | None,
    forest: list[Tensor],
    total_queries: int,
    total_keys: int,
    depth: int,
    left: int,
    right: int,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    vectors = _empty_vectors(query_cu, total_queries, total_keys)
    documents = query_cu.numel() - 1
    arguments: dict[str, Any] = {
        "query_cu_ptr": query_cu.contiguous(),
        "key_cu_ptr": key_cu.contiguous(),
        "query_padding_ptr": _bytes(query_padding),
        "key_padding_ptr": _bytes(key_padding),
        "prefix_ptr": None if prefix is None else prefix.contiguous(),
        **dict(zip(FOREST, [x.contiguous() for x in forest] or [None] * 3)),
        **dict(zip(VECTORS, vectors)),
        "total_queries": total_queries,
        "total_keys": total_keys,
        "documents": documents,
        "steps": (documents - 1).bit_length(),
        "depth": depth,
        "left": left,
        "right": right,
        "chunk_size": chunk_size,
        "BLOCK": TOKENS,
    }
    programs = triton.cdiv(max(total_queries, total_keys), TOKENS)
    if programs:
        with on_device(query_cu.device):
            intervals_kernel[(programs,)](**arguments)
    return vectors


@_mask_intervals.register_fake
def _(
    query_cu: Tensor,
    key_cu: Tensor,
    query_padding: Tensor | None,
    key_padding: Tensor | None,
    prefix: Tensor | None,
    forest: list[Tensor],
    total_queries: int,
    total_keys: int,
    *_: Any,
) -> Vectors:
    return _empty_vectors(query_cu, total_queries, total_keys)


@torch.library.custom_op("packed_attn::tile_lists", mutates_args=())
def _tile_lists(
    key_start: Tensor,
    key_stop: Tensor,
    query_start: Tensor,
    query_stop: Tensor,
    forward_rows: int,
    keys_rows: int,
    dq_rows: int,
) -> list[Tensor]:
    rows = (forward_rows, keys_rows, dq_rows)
    *lists, blocks = _empty_lists(key_start, query_start, *rows)
    slots = max(x.shape[0] for x in lists)
    if slots == 0:
        return [*lists, blocks]
    arguments = {
        "key_start_ptr": key_start.contiguous(),
        "key_stop_ptr": key_stop.contiguous(),
        "query_start_ptr": query_start.contiguous(),
        "query_stop_ptr": query_stop.contiguous(),
        "forward_ptr": lists[0],
        "keys_ptr": lists[1],
        "dq_ptr": lists[-1],
        "blocks_ptr": blocks,
        "scratch_ptr": key_start.new_empty(len(lists), 2, slots),
        "total_queries": key_start.numel(),
        "total_keys": query_start.numel(),
        "forward_rows": forward_rows,
        "keys_rows": keys_rows,
        "dq_rows": dq_rows,
        "forward_capacity": lists[0].shape[0],
        "keys_capacity": lists[1].shape[0],
        "dq_capacity": lists[-1].shape[0],
        "slots": slots,
        "lists": len(lists),
        "blocks": blocks.shape[1],
        "ROWS": max(rows),
        "BLOCK": KEY_BLOCK,
        "SCAN": SCAN,
        "TILES": TILES,
        "OTHERS": OTHERS,
    }
    with on_device(key_start.device):
        tile_lists_kernel[(len(lists) + 1,)](**arguments, num_warps=WARPS)
    return [*lists, blocks]


@_tile_lists.register_fake
def _(key_start: Tensor, key_stop: Tensor, query_start: Tensor, *rest: Any) -> list[Tensor]:
    return _empty_lists(key_start, query_start, *rest[-3:])


VECTORS = (
    "key_start_ptr",
    "key_stop_ptr",
    "query_position_ptr",
    "query_start_ptr",
    "query_stop_ptr",
    "key_position_ptr",
)
FOREST = ("parents_ptr", "path_offset_ptr", "subtree_stop_ptr")


def _empty_vectors(like: Tensor, total_queries: int, total_keys: int) -> Vectors:
    # One tensor each: rows of one buffer would be aligned as the number of tokens happens to be.
    a, b, c = (like.new_empty(total_queries, dtype=torch.int32) for _ in range(3))
    d, e, f = (like.new_empty(total_keys, dtype=torch.int32) for _ in range(3))
    return a, b, c, d, e, f


def _empty_lists(
    key_start: Tensor, query_start: Tensor, forward_rows: int, keys_rows: int, dq_rows: int
) -> list[Tensor]:
    """The forward's, that of keys, that of dq where it is another, and the blocks of keys."""
    kinds = [(key_start, forward_rows), (query_start, keys_rows), (key_start, dq_rows)]
    wanted = kinds if dq_rows != forward_rows else kinds[:2]
    lists = [x.new_empty(capacity(x.shape[0], rows), 2) for x, rows in wanted]
    return [*lists, query_start.new_empty(4, triton.cdiv(query_start.shape[0], KEY_BLOCK))]


def _bytes(flags: Tensor | None) -> Tensor | None:
    return None if flags is None else flags.contiguous().view(torch.uint8)


# Numbers that change from batch to batch compile nothing new.
@triton.jit(
    do_not_specialize=[
        "total_queries", "total_keys", "documents", "steps", "depth", "left", "right", "chunk_size",
    ]
)  # fmt: skip
def intervals_kernel(
    query_cu_ptr,
    key_cu_ptr,
    query_padding_ptr,
    key_padding_ptr,
    prefix_ptr,
    parents_ptr,
    path_offset_ptr,
    subtree_stop_ptr,
    key_start_ptr,
    key_stop_ptr,
    query_position_ptr,
    query_start_ptr,
    query_stop_ptr,
    key_position_ptr,
    total_queries,
    total_keys,
    documents,
    steps,
    depth,
    left,
    right,
    chunk_size,
    BLOCK: tl.constexpr,
):
    """Each program takes BLOCK queries and as many keys; in 64 bits, as torch counts."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)

    live = token < total_queries
    document = document_of(query_cu_ptr, token, live, documents, steps)
    q_begin, q_end = document_bounds(query_cu_ptr, document, live)
    k_begin, k_end = document_bounds(key_cu_ptr, document, live)
    # Bottom-right alignment: the last query of a document stands over its last key.
    excess = (k_end - k_begin) - (q_end - q_begin)
    place = token - q_begin
    position = place + path_offset(path_offset_ptr, document, live)
    over = k_begin + excess + place
    start = tl.maximum(k_begin, over - left)
    stop = tl.minimum(k_end, over + right + 1)
    if prefix_ptr is not None:
        prefix = tl.load(prefix_ptr + document, mask=live, other=0).to(tl.int64)
        stop = tl.maximum(stop, tl.minimum(k_begin + prefix, k_end))
    if chunk_size is not None:
        first = over - floor_modulo(position + excess, chunk_size)
        start = tl.maximum(start, first)
        stop = tl.minimum(stop, first + chunk_size)
    if parents_ptr is not None:
        first = tl.maximum(position - left, 0)
        if chunk_size is not None:
            first = tl.maximum(first, position - position % chunk_size)
        holder = document
        for _ in range(depth):
            above = path_offset(path_offset_ptr, holder, live) > first
            parent = tl.load(parents_ptr + holder, mask=above, other=0)
            holder = tl.where(above, parent, holder).to(tl.int32)
        begin = tl.load(query_cu_ptr + holder, mask=live, other=0)
        start = begin + first - path_offset(path_offset_ptr, holder, live)
    stop = tl.maximum(start, stop)
    hidden = is_padding(query_padding_ptr, key_padding_ptr, document, live)
    tl.store(key_start_ptr + token, start.to(tl.int32), mask=live)
    tl.store(key_stop_ptr + token, tl.where(hidden, start, stop).to(tl.int32), mask=live)
    tl.store(query_position_ptr + token, (position + excess).to(tl.int32), mask=live)

    live = token < total_keys
    document = document_of(key_cu_ptr, token, live, documents, steps)
    q_begin, q_end = document_bounds(query_cu_ptr, document, live)
    k_begin, k_end = document_bounds(key_cu_ptr, document, live)
    excess = (k_end - k_begin) - (q_end - q_begin)
    place = token - k_begin
    position = place + path_offset(path_offset_ptr, document, live)
    under = q_begin - excess + place
    start = tl.maximum(q_begin, under - right)
    stop = tl.minimum(q_end, under + left + 1)
    if prefix_ptr is not None:
        prefix = tl.load(prefix_ptr + document, mask=live, other=0)
        start = tl.where(place < prefix, q_begin, start)
    if chunk_size is not None:
        first = under - floor_modulo(position, chunk_size)
        start = tl.maximum(start, first)
        stop = tl.minimum(stop, first + chunk_size)
    if parents_ptr is not None:
        stop = tl.load(subtree_stop_ptr + document, mask=live, other=0).to(tl.int64)
    stop = tl.maximum(start, stop)
    hidden = is_padding(query_padding_ptr, key_padding_ptr, document, live)
    tl.store(query_start_ptr + token, start.to(tl.int32), mask=live)
    tl.store(query_stop_ptr + token, tl.where(hidden, start, stop).to(tl.int32), mask=live)
    tl.store(key_position_ptr + token, position.to(tl.int32), mask=live)


@triton.jit
def document_of(cu_ptr, token, live, documents, steps):
    """The document of each token by binary search, cu[document] <= token < cu[document + 1]; empty
    ones drop out. `steps` halve a range of `documents` to one."""
    low = tl.zeros_like(token)
    high = low + documents
    for _ in range(steps):
        middle = low + (high - low) // 2
        begun = tl.load(cu_ptr + middle, mask=live, other=0) <= token
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
    return low


@triton.jit
def document_bounds(cu_ptr, document, live):
    begin = tl.load(cu_ptr + document, mask=live, other=0)
    end = tl.load(cu_ptr + document + 1, mask=live, other=0)
    return begin.to(tl.int64), end.to(tl.int64)


@triton.jit
def path_offset(path_offset_ptr, document, live):
    """Tokens before the document on its path from the root; 0 without a forest."""
    if path_offset_ptr is not None:
        offset = tl.load(path_offset_ptr + document, mask=live, other=0).to(tl.int64)
    else:
        offset = tl.zeros_like(document).to(tl.int64)
    return offset


@triton.jit
def is_padding(query_padding_ptr, key_padding_ptr, document, live):
    """Padding on either side takes both halves of the rule."""
    hidden = tl.zeros_like(document)
    if query_padding_ptr is not None:
        hidden += tl.load(query_padding_ptr + document, mask=live, other=0).to(tl.int32)
    if key_padding_ptr is not None:
        hidden += tl.load(key_padding_ptr + document, mask=live, other=0).to(tl.int32)
    return hidden > 0


@triton.jit
def floor_modulo(x, n):
    """x modulo n > 0, never negative: queries without keys have positions below 0."""
    remainder = x % n
    return tl.where(remainder < 0, remainder + n, remainder)


@triton.jit(
    do_not_specialize=[
        "total_queries", "total_keys", "forward_rows", "keys_rows", "dq_rows",
        "forward_capacity", "keys_capacity", "dq_capacity", "slots", "lists", "blocks",
    ]
)  # fmt: skip
def tile_lists_kernel(
    key_start_ptr,
    key_stop_ptr,
    query_start_ptr,
    query_stop_ptr,
    forward_ptr,
    keys_ptr,
    dq_ptr,
    blocks_ptr,
    scratch_ptr,
    total_queries,
    total_keys,
    forward_rows,
    keys_rows,
    dq_rows,
    forward_capacity,
    keys_capacity,
    dq_capacity,
    slots,
    lists,
    blocks,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCAN: tl.constexpr,
    TILES: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """A program makes a list: cuts rows into tiles, weighs the tiles, and ranks them by work. The
    last one makes the blocks.

    Its steps hand on first rows and work of the tiles through `scratch_ptr`, `[lists, 2, slots]`.
    Ranks count the tiles that come before: quadratic in a number that is small.
    """
    which = tl.program_id(0)
    if which == lists:
        block_queries(query_start_ptr, query_stop_ptr, blocks_ptr, total_keys, blocks, BLOCK, TILES)
        return
    start_ptr, stop_ptr, tiles_ptr = key_start_ptr, key_stop_ptr, forward_ptr
    total, rows, entries = total_queries, forward_rows, forward_capacity
    if which == 1:
        start_ptr, stop_ptr, tiles_ptr = query_start_ptr, query_stop_ptr, keys_ptr
        total, rows, entries = total_keys, keys_rows, keys_capacity
    if which == 2:
        tiles_ptr = dq_ptr
        rows, entries = dq_rows, dq_capacity
    first_ptr = scratch_ptr + which * 2 * slots
    work_ptr = first_ptr + slots

    count = cut_rows(start_ptr, stop_ptr, first_ptr, total, rows, SCAN)
    tl.debug_barrier()
    for begin in range(0, count, TILES):
        tile = begin + tl.arange(0, TILES)
        first, last = tile_bounds(first_ptr, tile, count, total)
        work = hull_lengths(start_ptr, stop_ptr, first, last, ROWS)
        tl.store(work_ptr + tile, work, mask=tile < count)
    tl.debug_barrier()
    for begin in range(0, entries, TILES):
        tile = begin + tl.arange(0, TILES)
        first, last = tile_bounds(first_ptr, tile, count, total)
        rank = tile_ranks(work_ptr, tile, count, TILES, OTHERS)
        tl.store(tiles_ptr + 2 * rank, first, mask=tile < entries)
        tl.store(tiles_ptr + 2 * rank + 1, last, mask=tile < entries)


@triton.jit
def block_queries(
    start_ptr, stop_ptr, blocks_ptr, total, blocks, BLOCK: tl.constexpr, TILES: tl.constexpr
):
    """Writes which queries see a key of each block, and which see all of them; see `key_blocks`."""
    for begin in range(0, blocks, TILES):
        block = begin + tl.arange(0, TILES)
        key = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        start = tl.load(start_ptr + key, mask=key < total, other=FAR)
        stop = tl.load(stop_ptr + key, mask=key < total, other=0)
        seen = start < stop
        bounds_ptr = blocks_ptr + block
        ok = block < blocks
        tl.store(bounds_ptr, tl.min(tl.where(seen, start, FAR), 1), mask=ok)
        tl.store(bounds_ptr + blocks, tl.max(tl.where(seen, stop, 0), 1), mask=ok)
        tl.store(bounds_ptr + 2 * blocks, tl.max(start, 1), mask=ok)
        tl.store(bounds_ptr + 3 * blocks, tl.min(stop, 1), mask=ok)


@triton.jit
def cut_rows(start_ptr, stop_ptr, first_ptr, total, rows, SCAN: tl.constexpr):
    """Writes the first row of each tile and returns how many tiles there are.

    Whether a document that begins at row x is long is known at row `ahead`, its 2 * rows-th: the
    last document that has begun there is still this one. The first step begins so far before row 0
    that each row ahead is met once.
    """
    reached, latest, section, count = 0, -1, 0, 0
    for begin in range(1 - 2 * rows, total, SCAN):
        x = begin + tl.arange(0, SCAN)
        ahead = x + (2 * rows - 1)
        there = (ahead >= 0) & (ahead < total)
        start = tl.load(start_ptr + ahead, mask=there, other=-1)
        stop_before = tl.load(stop_ptr + ahead - 1, mask=there & (ahead > 0), other=0)
        reached_before = tl.maximum(running_max(stop_before, SCAN), reached)
        begun = tl.where(there & (start >= reached_before), ahead, -1)
        latest_begun = tl.maximum(running_max(begun, SCAN), latest)
        is_row = (x >= 0) & (x < total)
        long = is_row & there & (latest_begun == x)
        sections = tl.maximum(running_max(tl.where(long, x, 0), SCAN), section)
        begins_tile = is_row & ((x - sections) % rows == 0)
        tile = count + tl.cumsum(begins_tile.to(tl.int32), 0) - 1
        tl.store(first_ptr + tile, x, mask=begins_tile)
        reached = tl.max(reached_before, 0)
        latest = tl.max(latest_begun, 0)
        section = tl.max(sections, 0)
        count += tl.sum(begins_tile.to(tl.int32), 0)
    return count


@triton.jit
def tile_bounds(first_ptr, tile, count, total):
    """Rows [first, last) of the tiles; both are `total` from `count` on."""
    first = tl.load(first_ptr + tile, mask=tile < count, other=0)
    last = tl.load(first_ptr + tile + 1, mask=tile + 1 < count, other=0)
    return tl.where(tile < count, first, total), tl.where(tile + 1 < count, last, total)


@triton.jit
def hull_lengths(start_ptr, stop_ptr, first, last, ROWS: tl.constexpr):
    """The work of tiles: the length of the hull of their rows, 0 where nothing is seen."""
    row = first[:, None] + tl.arange(0, ROWS)[None, :]
    inside = row < last[:, None]
    start = tl.load(start_ptr + row, mask=inside, other=0)
    stop = tl.load(stop_ptr + row, mask=inside, other=0)
    live = stop > start
    hull_stop = tl.max(tl.where(live, stop, 0), 1)
    hull_start = tl.min(tl.where(live, start, FAR), 1)
    return hull_stop - tl.minimum(hull_start, hull_stop)


@triton.jit
def tile_ranks(work_ptr, tile, count, TILES: tl.constexpr, OTHERS: tl.constexpr):
    """The place of each tile by falling work, equal ones as they stand; unused ones stay last."""
    work = tl.load(work_ptr + tile, mask=tile < count, other=0)
    rank = tl.zeros([TILES], tl.int32)
    for begin in range(0, count, OTHERS):
        other = begin + tl.arange(0, OTHERS)
        others = tl.load(work_ptr + other, mask=other < count, other=-1)
        equal_before = (others[None, :] == work[:, None]) & (other[None, :] < tile[:, None])
        before = (others[None, :] > work[:, None]) | equal_before
        rank += tl.sum(before.to(tl.int32), 1)
    return tl.where(tile < count, rank, tile)


@triton.jit
def running_max(x, SIZE: tl.constexpr):
    """The largest of x up to each place."""
    if IS_INTERPRETED:
        # The interpreter calls the combination of a scan in Python, once an element.
        at = tl.arange(0, SIZE)
        seen = at[None, :] <= at[:, None]
        largest = tl.max(tl.where(seen, x[None, :], -1), 1)
    else:
        largest = tl.associative_scan(x, 0, larger)
    return largest


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)
