"""The backward kernel for Hopper (sm_90), in Gluon: dk, dv and sums of dq, five products a block.

Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision"
(2024). One warp copies blocks of q, dout, lse and delta into a ring of shared memory (TMA); two
warpgroups of 64 keys each multiply, scores transposed. Both put their ds in shared memory, meet,
and each makes half of the block's dq from all 128 keys: a quarter of the registers, and half of
the additions, of a share from its own 64 keys. Hardware adds the shares to float32 sums.

The mask is the interval rule with the key's half alone. Producer and consumers walk the same blocks
in the same order, edges first: for each head of the group, for each block. Block n stands in slot
n % STAGES, and a barrier's phase there is n // STAGES: consumers wait for `*_full` of that phase,
the producer for `*_empty` of the phase before, which a fresh barrier counts as complete.

What a NaN in one document does to another in its tile is not repaired here: a flag says whether a
result is not finite, and `backward_repair.py` does the whole backward again.
"""

# Gluon's language is not Python's: its stubs know neither constexpr arguments nor tensors.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportReturnType=false, reportAssignmentType=false

from typing import Any

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import _unwrap_if_constexpr, builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from packed_attn_kernels.rules import FAR, LOG2E

# triton 3.9 renamed both.
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

# Keys of a warpgroup; a tile has two. Also the rows and columns of a share of dq.
ROWS: gl.constexpr = gl.constexpr(64)


@builtin
def _add(desc, corner, tile, _semantic: Any = None):
    """Adds a tile in shared memory to global memory, as a store of `tma` would write it.

    triton 3.9 has it as `tma.async_atomic_add`.
    """
    corner = _semantic._convert_to_ir_values(corner, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, desc.handle, corner, tile.handle)


@builtin
def _view(memory, shape, layout, _semantic: Any = None):
    """Shared memory in another shape; triton 3.9 renamed the method."""
    shape = [_unwrap_if_constexpr(size) for size in shape]
    layout = _unwrap_if_constexpr(layout)
    return _semantic.memdesc_reinterpret(memory, memory.dtype, shape, layout)


@gluon.jit(
    do_not_specialize=[
        "group",
        "padded_queries",
        "q_row_step",
        "q_column_step",
        "k_row_step",
        "k_column_step",
        "v_row_step",
        "v_column_step",
        "dout_row_step",
        "dout_column_step",
    ]
)
def hopper_backward_kernel(
    q_desc,
    k_desc,
    v_desc,
    dout_desc,
    row_lse_desc,
    delta_desc,
    sums_desc,
    dk_ptr,
    dv_ptr,
    tiles_ptr,
    flag_ptr,
    query_start_ptr,
    query_stop_ptr,
    softmax_scale,
    group,
    padded_queries,
    q_row_step,
    q_column_step,
    k_row_step,
    k_column_step,
    v_row_step,
    v_column_step,
    dout_row_step,
    dout_column_step,
    stride_t,
    stride_h,
    HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):
    """One tile of 128 keys of one kv head.

    A descriptor shows a tensor as a matrix; head h begins at row h * row_step, column
    h * column_step. Those of row_lse and delta show `[heads * padded_queries]`; that of the sums
    shows shares, see `_share`.
    """
    kv_head = gl.program_id(1)
    entry = tiles_ptr + 2 * gl.program_id(0)
    first = gl.load(entry)
    stop = gl.load(entry + 1)
    if first == stop:
        return
    j = first + gl.arange(0, 2 * ROWS, gl.BlockedLayout([1], [32], [4], [0]))
    start, end, live = _intervals(query_start_ptr, query_stop_ptr, j, stop)
    hull_stop = gl.max(gl.where(live, end, 0), 0)
    hull_start = gl.minimum(gl.min(gl.where(live, start, FAR), 0), hull_stop)
    full_start = gl.max(gl.where(live, start, 0), 0)
    # Rows of no key here must not meet a query without a mask: all of them add to dq.
    full_stop = gl.minimum(gl.min(gl.where(live, end, 0), 0), hull_stop)
    # Aligned blocks stay inside the padding of lse and delta.
    hull_start = hull_start // BLOCK_M * BLOCK_M
    blocks = (hull_stop - hull_start + BLOCK_M - 1) // BLOCK_M
    left = (gl.maximum(full_start - hull_start, 0) + BLOCK_M - 1) // BLOCK_M
    left = gl.minimum(left, blocks)
    full = gl.maximum(gl.maximum(full_stop - hull_start, 0) // BLOCK_M - left, 0)

    PARTS: gl.constexpr = HEAD_DIM // ROWS
    gl.static_assert(PARTS + BLOCK_M // ROWS == 3, "a block's dq must have two shares")
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    # Tiles of 64 x 64 lie in memory as the columns of a wider one do.
    k = gl.allocate_shared_memory(k_desc.dtype, [2 * PARTS, ROWS, ROWS], TILE)
    v = gl.allocate_shared_memory(v_desc.dtype, [2, ROWS, HEAD_DIM], v_desc.layout)
    q = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK_M, HEAD_DIM], q_desc.layout)
    dout = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK_M, HEAD_DIM], dout_desc.layout)
    lse = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], row_lse_desc.layout)
    delta = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], delta_desc.layout)
    ds = gl.allocate_shared_memory(q_desc.dtype, [4 * BLOCK_M // ROWS, ROWS, ROWS], TILE)
    shares = gl.allocate_shared_memory(gl.float32, [2, 2 * ROWS, 32], sums_desc.layout)
    kv_full = _barriers(1, 1)
    q_full = _barriers(STAGES, 1)
    dout_full = _barriers(STAGES, 1)
    q_empty = _barriers(STAGES, 2)
    dout_empty = _barriers(STAGES, 2)
    ds_full = _barriers(2, 2)
    fence_async_shared()

    tiles = (k, v, q, dout, lse, delta, ds, shares)
    barriers = (kv_full, q_full, dout_full, q_empty, dout_empty, ds_full)
    walk = (hull_start, blocks, left, full, group)
    keys = (query_start_ptr, query_stop_ptr, first, stop)
    results = (
        dk_ptr, dv_ptr, kv_head.to(gl.int64) * stride_h + first.to(gl.int64) * stride_t, stride_t,
        sums_desc, kv_head * group * padded_queries, padded_queries, flag_ptr, softmax_scale,
    )  # fmt: skip
    head = kv_head * group
    descriptors = (q_desc, k_desc, v_desc, dout_desc, row_lse_desc, delta_desc)
    corners = (
        kv_head * k_row_step + first, kv_head * k_column_step,
        kv_head * v_row_step + first, kv_head * v_column_step,
        head * q_row_step, head * q_column_step, q_row_step, q_column_step,
        head * dout_row_step, head * dout_column_step, dout_row_step, dout_column_step,
        head * padded_queries, padded_queries,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_consume_upper, (tiles, barriers, walk, keys, results, HEAD_DIM, BLOCK_M, STAGES)),
            (_consume_lower, (tiles, barriers, walk, keys, results, HEAD_DIM, BLOCK_M, STAGES)),
            (_produce, (tiles, barriers, walk, descriptors, corners, HEAD_DIM, BLOCK_M, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, each of which completes a phase by ARRIVALS arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(COUNT):
        mbarrier.init(barriers.index(slot), count=ARRIVALS)
    return barriers


@gluon.jit
def _intervals(query_start_ptr, query_stop_ptr, j, stop):
    """The intervals of the keys j, and which are of this tile and seen by a query."""
    start = gl.load(query_start_ptr + j, mask=j < stop, other=0)
    end = gl.load(query_stop_ptr + j, mask=j < stop, other=0)
    return start, end, end > start


@gluon.jit
def _place(y, hull_start, left, full, MASKED: gl.constexpr, BLOCK_M: gl.constexpr):
    """The first query of the y-th edge or of the y-th full block."""
    if MASKED:
        skipped = full * (y >= left).to(gl.int32)
    else:
        skipped = left
    return hull_start + (y + skipped) * BLOCK_M


@gluon.jit
def _next(y, g, count):
    """The block after y of `count`, and its head."""
    over = (y + 1 == count).to(gl.int32)
    return (y + 1) * (1 - over), g + over


@gluon.jit
def _produce(
    tiles, barriers, walk, descriptors, corners, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Copies k and v once, and each block into its slot as soon as both warpgroups left it."""
    k, v, _, _, _, _, _, _ = tiles
    kv_full, _, _, _, _, _ = barriers
    hull_start, blocks, left, full, group = walk
    _, k_desc, v_desc, _, _, _ = descriptors
    k_row, k_column, v_row, v_column, _, _, _, _, _, _, _, _, _, _ = corners
    if blocks > 0:
        mbarrier.expect(kv_full.index(0), 2 * ROWS * HEAD_DIM * 4)
        halves = _view(k, [2, ROWS, HEAD_DIM], k_desc.layout)
        for half in gl.static_range(2):
            row = half * ROWS
            _load(k_desc, [k_row + row, k_column], kv_full.index(0), halves.index(half))
            _load(v_desc, [v_row + row, v_column], kv_full.index(0), v.index(half))
    edges = blocks - full
    y = 0
    g = 0
    for n in range(0, edges * group):
        at = _place(y, hull_start, left, full, True, BLOCK_M)
        _fetch(n, at, g, tiles, barriers, descriptors, corners, HEAD_DIM, BLOCK_M, STAGES)
        y, g = _next(y, g, edges)
    y = 0
    g = 0
    for n in range(edges * group, blocks * group):
        at = _place(y, hull_start, left, full, False, BLOCK_M)
        _fetch(n, at, g, tiles, barriers, descriptors, corners, HEAD_DIM, BLOCK_M, STAGES)
        y, g = _next(y, g, full)


@gluon.jit
def _fetch(
    n, at, g, tiles, barriers, descriptors, corners, HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copies the n-th block, queries from `at` of head g of the group."""
    _, _, q, dout, lse, delta, _, _ = tiles
    _, q_full, dout_full, q_empty, dout_empty, _ = barriers
    q_desc, _, _, dout_desc, row_lse_desc, delta_desc = descriptors
    (
        _, _, _, _, q_row, q_column, q_row_step, q_column_step, dout_row, dout_column,
        dout_row_step, dout_column_step, number, padded_queries,
    ) = corners  # fmt: skip
    slot = n % STAGES
    before = (n // STAGES + 1) & 1
    line = number + g * padded_queries + at
    BYTES: gl.constexpr = BLOCK_M * HEAD_DIM * 2 + BLOCK_M * 4
    mbarrier.wait(q_empty.index(slot), before)
    mbarrier.expect(q_full.index(slot), BYTES)
    corner = [q_row + g * q_row_step + at, q_column + g * q_column_step]
    _load(q_desc, corner, q_full.index(slot), q.index(slot))
    _load(row_lse_desc, [line], q_full.index(slot), lse.index(slot))
    mbarrier.wait(dout_empty.index(slot), before)
    mbarrier.expect(dout_full.index(slot), BYTES)
    corner = [dout_row + g * dout_row_step + at, dout_column + g * dout_column_step]
    _load(dout_desc, corner, dout_full.index(slot), dout.index(slot))
    _load(delta_desc, [line], dout_full.index(slot), delta.index(slot))


@gluon.jit
def _consume_upper(
    tiles, barriers, walk, keys, results, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The first 64 keys."""
    _consume(0, tiles, barriers, walk, keys, results, HEAD_DIM, BLOCK_M, STAGES)


@gluon.jit
def _consume_lower(
    tiles, barriers, walk, keys, results, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The last 64 keys."""
    _consume(1, tiles, barriers, walk, keys, results, HEAD_DIM, BLOCK_M, STAGES)


@gluon.jit
def _consume(
    HALF: gl.constexpr,
    tiles,
    barriers,
    walk,
    keys,
    results,
    HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """dk and dv of 64 keys over all blocks, and half of each block's share of dq."""
    _, v, _, _, _, _, _, _ = tiles
    kv_full, _, _, _, _, _ = barriers
    hull_start, blocks, left, full, group = walk
    query_start_ptr, query_stop_ptr, first, stop = keys
    dk_ptr, dv_ptr, offset, stride_t, _, _, _, flag_ptr, softmax_scale = results
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    j = first + HALF * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    start, end, live = _intervals(query_start_ptr, query_stop_ptr, j, stop)
    dk = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, SUMS)
    dv = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, SUMS)
    edges = blocks - full
    if blocks > 0:
        mbarrier.wait(kv_full.index(0), 0)
    y = 0
    g = 0
    for n in range(0, edges * group):
        at = _place(y, hull_start, left, full, True, BLOCK_M)
        dk, dv = _step(
            n, at, g, True, HALF, dk, dv, start, end, tiles, barriers, results, HEAD_DIM, BLOCK_M,
            STAGES,
        )  # fmt: skip
        y, g = _next(y, g, edges)
    y = 0
    g = 0
    for n in range(edges * group, blocks * group):
        at = _place(y, hull_start, left, full, False, BLOCK_M)
        dk, dv = _step(
            n, at, g, False, HALF, dk, dv, start, end, tiles, barriers, results, HEAD_DIM, BLOCK_M,
            STAGES,
        )  # fmt: skip
        y, g = _next(y, g, full)
    ROW: gl.constexpr = gl.SliceLayout(1, SUMS)
    live = gl.convert_layout(live, ROW)
    broken = gl.sum(dk * 0.0, 1) + gl.sum(dv * 0.0, 1)
    broken = live & (broken != broken)
    gl.store(flag_ptr + gl.full([ROWS], 0, gl.int32, ROW), 1, mask=broken)
    # v's own half is free: no other warpgroup reads it.
    rows = stop - first - HALF * ROWS
    offset = offset + HALF * ROWS * stride_t
    dk = gl.where(live[:, None], dk * softmax_scale, 0.0)
    _write(dk, v.index(HALF), dk_ptr + offset, stride_t, rows, HEAD_DIM)
    dv = gl.where(live[:, None], dv, 0.0)
    _write(dv, v.index(HALF), dv_ptr + offset, stride_t, rows, HEAD_DIM)
    tma.store_wait(0)


@gluon.jit
def _step(
    n,
    at,
    g,
    MASKED: gl.constexpr,
    HALF: gl.constexpr,
    dk,
    dv,
    start,
    end,
    tiles,
    barriers,
    results,
    HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The n-th block, queries from `at` of head g of the group."""
    k, v, q, dout, lse, delta, ds, shares = tiles
    _, q_full, dout_full, q_empty, dout_empty, ds_full = barriers
    _, _, _, _, sums_desc, number, padded_queries, _, softmax_scale = results
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    SHARE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    PARTS: gl.constexpr = HEAD_DIM // ROWS
    MORE: gl.constexpr = BLOCK_M // ROWS
    slot = n % STAGES
    phase = (n // STAGES) & 1
    q = q.index(slot)
    dout = dout.index(slot)
    # An offset that no compiler knows: what it made before the loop, for each product, it spilled.
    zero = gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [n], gl.int32, is_pure=False, pack=1)
    own_k = _view(k, [2, ROWS, HEAD_DIM], v.layout).index(HALF + zero)
    none = gl.full([ROWS, BLOCK_M], 0.0, gl.float32, SCORES)
    mbarrier.wait(q_full.index(slot), phase)
    # Products that begin at -lse and -delta need no registers for them later. The first has to
    # wait for them, which only blocks of 128 queries are short enough of registers for.
    BEGIN_AT_LSE: gl.constexpr = MORE == 2
    if BEGIN_AT_LSE:
        less = none - lse.index(slot).load(COLUMN)[None, :] * (1.0 / (softmax_scale * LOG2E))
        products = warpgroup_mma(own_k, q.permute((1, 0)), less, is_async=True)
    else:
        products = warpgroup_mma(own_k, q.permute((1, 0)), none, use_acc=False, is_async=True)
    mbarrier.wait(dout_full.index(slot), phase)
    own_v = v.index(HALF + zero)
    less = none - delta.index(slot).load(COLUMN)[None, :]
    dp = warpgroup_mma(own_v, dout.permute((1, 0)), less, is_async=True)
    s = warpgroup_mma_wait(1, deps=[products])
    if BEGIN_AT_LSE:
        p = gl.exp2(s * (softmax_scale * LOG2E))
    else:
        p = gl.exp2(s * (softmax_scale * LOG2E) - lse.index(slot).load(COLUMN)[None, :])
    if MASKED:
        i = at + gl.arange(0, BLOCK_M, COLUMN)
        sees = (start[:, None] <= i[None, :]) & (i[None, :] < end[:, None])
        p = gl.where(sees, p, 0.0)
    dp = warpgroup_mma_wait(0, deps=[dp])
    slope = (p * dp).to(q.dtype)
    pair = n % 2
    wide_ds = _view(ds, [4, ROWS, BLOCK_M], _tile_layout(BLOCK_M))
    wide_ds.index(2 * pair + HALF).store(slope)
    weights = gl.convert_layout(p.to(q.dtype), OPERAND)
    dv = warpgroup_mma(weights, dout, dv, is_async=True)
    fence_async_shared()
    mbarrier.arrive(ds_full.index(pair))
    mbarrier.wait(ds_full.index(pair), (n // 2) & 1)
    none = gl.full([ROWS, ROWS], 0.0, gl.float32, SHARE)
    MINE: gl.constexpr = HALF if MORE == 2 else 0
    PART: gl.constexpr = HALF if PARTS == 2 else 0
    upper = ds.index(2 * pair * MORE + MINE).permute((1, 0))
    lower = ds.index((2 * pair + 1) * MORE + MINE).permute((1, 0))
    share = warpgroup_mma(upper, k.index(PART + zero), none, use_acc=False, is_async=True)
    share = warpgroup_mma(lower, k.index(PARTS + PART + zero), share, is_async=True)
    # Last, so that the tensor cores work while the share is written.
    dk = warpgroup_mma(gl.convert_layout(slope, OPERAND), q, dk, is_async=True)
    dv = warpgroup_mma_wait(3, deps=[dv])
    mbarrier.arrive(dout_empty.index(slot))
    share = warpgroup_mma_wait(1, deps=[share])
    tma.store_wait(0)
    _barrier()
    shares.index(HALF).store(_share(share))
    fence_async_shared()
    _barrier()
    row = ((number + g * padded_queries + at) // ROWS * PARTS + HALF) * (2 * ROWS)
    _add(sums_desc, [row, 0], shares.index(HALF))
    dk = warpgroup_mma_wait(0, deps=[dk])
    mbarrier.arrive(q_empty.index(slot))
    return dk, dv


@gluon.constexpr_function
def _tile_layout(columns):
    """The layout of 64 rows in half precision."""
    return gl.NVMMASharedLayout.get_default_for([64, columns], gl.bfloat16)


@gluon.jit
def _share(x):
    """A share `[64, 64]` as `[128, 32]`, four neighbours in a row what a thread holds.

    Element (16w + 8b + r, 8e + 2c + a) goes to row 16e + 4w + r // 2, column 16(r % 2) + 4c + 2b +
    a: no thread needs another's value, and 128 bits a store meet no bank conflict.
    """
    x = x.reshape([4, 2, 8, 8, 4, 2]).permute((3, 0, 2, 4, 1, 5))
    return x.reshape([2 * ROWS, 32])


@gluon.jit
def _write(x, tile, ptr, stride_t, rows, HEAD_DIM: gl.constexpr):
    """The first rows of a gradient, through shared memory for whole ones."""
    # Warps may still read the tile.
    _barrier()
    tile.store(x.to(tile.dtype))
    _barrier()
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    whole = tile.load(COPY)
    r = gl.arange(0, ROWS, gl.SliceLayout(1, COPY))
    c = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, COPY))
    gl.store(ptr + r[:, None] * stride_t + c[None, :], whole, mask=(r < rows)[:, None])
