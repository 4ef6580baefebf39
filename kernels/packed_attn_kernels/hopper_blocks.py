"""Which blocks of keys a tile sees, for the producer of `hopper_forward.py`.

In a forest the hull of a late answer covers all its siblings. `Tiles.blocks` says of each block
which queries see some key of it and which see all: blocks that no row of the tile sees are skipped.
`look` is the first and the end of the hull's blocks, the tile's bounds, and those numbers.
"""

# Gluon's language is not Python's: its stubs know neither constexpr arguments nor tensors.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportReturnType=false, reportAssignmentType=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from packed_attn_kernels import configurations
from packed_attn_kernels.hopper_walk import ROWS
from packed_attn_kernels.rules import FAR

# Blocks that the producer looks through at a time.
LOOK: gl.constexpr = gl.constexpr(32)
KEY_BLOCK: gl.constexpr = gl.constexpr(configurations.KEY_BLOCK)


@gluon.jit
def intervals_of(key_start_ptr, key_stop_ptr, i, stop):
    """The intervals of the rows i, and which rows are of this tile and see a key."""
    start = gl.load(key_start_ptr + i, mask=i < stop, other=0)
    end = gl.load(key_stop_ptr + i, mask=i < stop, other=0)
    return start, end, end > start


@gluon.jit
def full_blocks(start, end, live, hull_start, hull_stop, blocks, BLOCK_N: gl.constexpr):
    """The first block that all live rows see, and the first after it that not all do.

    Both are less than `blocks`, in order: the last block counts as an edge.
    """
    full_start = gl.max(gl.where(live, start, 0), 0)
    full_stop = gl.minimum(gl.min(gl.where(live, end, FAR), 0), hull_stop)
    left = (gl.maximum(full_start - hull_start, 0) + BLOCK_N - 1) // BLOCK_N
    through = gl.maximum(full_stop - hull_start, 0) // BLOCK_N
    last = blocks - 1
    edge = gl.minimum(left, last)
    return edge, gl.maximum(gl.minimum(through, last), edge)


@gluon.jit
def tile_bounds(i, start_0, end_0, live_0, start_1, end_1, live_1):
    """The first and the last live row of a tile, and the keys that the intervals of all have."""
    first = gl.minimum(gl.where(live_0, i, FAR), gl.where(live_1, i + ROWS, FAR))
    last = gl.maximum(gl.where(live_0, i, -1), gl.where(live_1, i + ROWS, -1))
    start = gl.maximum(gl.where(live_0, start_0, 0), gl.where(live_1, start_1, 0))
    stop = gl.minimum(gl.where(live_0, end_0, FAR), gl.where(live_1, end_1, FAR))
    return gl.min(first, 0), gl.max(last, 0), gl.max(start, 0), gl.min(stop, 0)


@gluon.jit
def look_through(begin, look, BLOCK_N: gl.constexpr, KEY_HALF: gl.constexpr):
    """LOOK blocks from `begin` on: their numbers, which are seen and which are full."""
    _, stop, tile, blocks_ptr, key_blocks = look
    first, last, full_start, full_stop = tile
    block = begin + gl.arange(0, LOOK, gl.BlockedLayout([1], [32], [1], [0]))
    there = block < stop
    bounds_ptr = blocks_ptr + block * BLOCK_N // KEY_BLOCK
    seen = gl.load(bounds_ptr, mask=there, other=FAR) <= last
    seen = seen & (first < gl.load(bounds_ptr + key_blocks, mask=there, other=0))
    full = gl.load(bounds_ptr + 2 * key_blocks, mask=there, other=FAR) <= first
    full = full & (last < gl.load(bounds_ptr + 3 * key_blocks, mask=there, other=0))
    if KEY_HALF:
        key = block * BLOCK_N
        full = full & (full_start <= key) & (key + BLOCK_N <= full_stop)
    return block, seen, full


@gluon.jit
def count_blocks(look, BLOCK_N: gl.constexpr, KEY_HALF: gl.constexpr):
    """How many edges and full blocks come before the last block that is seen, and its number or
    -1."""
    start, stop, _, _, _ = look
    edges = 0
    full = 0
    last = -1
    for begin in range(start, stop, LOOK):
        block, seen, whole = look_through(begin, look, BLOCK_N, KEY_HALF)
        edges += gl.sum((seen & ~whole).to(gl.int32), 0)
        full += gl.sum((seen & whole).to(gl.int32), 0)
        # Twice the number, and one more if it is full.
        last = gl.maximum(last, gl.max(gl.where(seen, 2 * block + whole.to(gl.int32), -1), 0))
    if last >= 0:
        edges -= (last % 2 == 0).to(gl.int32)
        full -= (last % 2 != 0).to(gl.int32)
        last = last // 2
    return edges, full, last
