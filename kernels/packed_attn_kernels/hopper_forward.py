"""The forward kernel for Hopper (sm_90), in Gluon: warps with roles, asynchronous matrix products.

Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision"
(2024). One warp copies blocks of k and v into a ring of shared memory (TMA); two warpgroups of 64
query rows each multiply. A warpgroup starts q.k of the next block before it exponentiates this
one, so its tensor cores work meanwhile, and the two warpgroups fill each other's gaps.

The mask is the interval rule with the query's half alone. Producer and consumers walk the same
blocks in the same order: all of the tile's hull, ascending. Block y stands in slot y % STAGES, and
a barrier's phase there is y // STAGES: consumers wait for `*_full` of that phase, the producer for
`*_empty` of the phase before, which a fresh barrier counts as complete.

A NaN that leaked between documents of a tile (see `forward.py`) is not repaired here: a flag says
whether an accumulator of the tile is not finite, and `repair_kernel` does flagged tiles again.
"""

# Gluon's language is not Python's: its stubs know neither constexpr arguments nor tensors.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportReturnType=false, reportAssignmentType=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from packed_attn_kernels.rules import FAR, LN2, LOG2E, LOWEST

# triton 3.9 renamed both.
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

# Query rows of a warpgroup; a tile has two.
ROWS: gl.constexpr = gl.constexpr(64)


@gluon.jit(
    do_not_specialize=[
        "group",
        "total_queries",
        "q_row_step",
        "q_column_step",
        "k_row_step",
        "k_column_step",
        "v_row_step",
        "v_column_step",
    ]
)
def hopper_forward_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_ptr,
    lse_ptr,
    sinks_ptr,
    tiles_ptr,
    flags_ptr,
    key_start_ptr,
    key_stop_ptr,
    softmax_scale,
    softcap,
    group,
    total_queries,
    q_row_step,
    q_column_step,
    k_row_step,
    k_column_step,
    v_row_step,
    v_column_step,
    out_stride_t,
    out_stride_h,
    HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    TAKE_TURNS: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    HAS_SINKS: gl.constexpr,
):
    """One tile of 128 queries of one head: out, lse (natural, float32) and the tile's flag.

    A descriptor shows a tensor as a matrix; head h begins at row h * row_step, column
    h * column_step.
    """
    h = gl.program_id(1)
    entry = tiles_ptr + 2 * gl.program_id(0)
    first = gl.load(entry)
    stop = gl.load(entry + 1)
    flag_ptr = flags_ptr + h * gl.num_programs(0) + gl.program_id(0)
    gl.store(flag_ptr, 0)
    if first == stop:
        return
    i = first + gl.arange(0, 2 * ROWS, gl.BlockedLayout([1], [32], [4], [0]))
    start, end, live = _intervals(key_start_ptr, key_stop_ptr, i, stop)
    hull_stop = gl.max(gl.where(live, end, 0), 0)
    hull_start = gl.minimum(gl.min(gl.where(live, start, FAR), 0), hull_stop)
    blocks = (hull_stop - hull_start + BLOCK_N - 1) // BLOCK_N

    q = gl.allocate_shared_memory(q_desc.dtype, [2, ROWS, HEAD_DIM], q_desc.layout)
    k = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_N, HEAD_DIM], k_desc.layout)
    v = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BLOCK_N, HEAD_DIM], v_desc.layout)
    q_full = _barriers(2, 1)
    k_full = _barriers(STAGES, 1)
    v_full = _barriers(STAGES, 1)
    k_empty = _barriers(STAGES, 2)
    v_empty = _barriers(STAGES, 2)
    turns = _barriers(2, 1)
    fence_async_shared()

    h_k = h // group
    head_out_ptr = out_ptr + h.to(gl.int64) * out_stride_h
    head_lse_ptr = lse_ptr + h.to(gl.int64) * total_queries
    sink = 0.0
    if HAS_SINKS:
        sink = gl.load(sinks_ptr + h).to(gl.float32)
    rings = (q, k, v, q_full, k_full, v_full, k_empty, v_empty)
    results = (head_out_ptr, head_lse_ptr, flag_ptr, out_stride_t)
    rows = (key_start_ptr, key_stop_ptr, first, stop, hull_start, blocks)
    is_upper = i < first + ROWS
    upper = _full_blocks(start, end, live & is_upper, hull_start, hull_stop, BLOCK_N)
    lower = _full_blocks(start, end, live & ~is_upper, hull_start, hull_stop, BLOCK_N)
    numbers = (softmax_scale, softcap, sink)
    descriptors = (q_desc, k_desc, v_desc)
    corners = (
        h * q_row_step + first, h * q_column_step,
        h_k * k_row_step + hull_start, h_k * k_column_step,
        h_k * v_row_step + hull_start, h_k * v_column_step,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (
                _consume_upper,
                (rings, turns, results, rows, upper, numbers, HEAD_DIM, BLOCK_N, STAGES, TAKE_TURNS,
                 HAS_SOFTCAP, HAS_SINKS),
            ),
            (
                _consume_lower,
                (rings, turns, results, rows, lower, numbers, HEAD_DIM, BLOCK_N, STAGES, TAKE_TURNS,
                 HAS_SOFTCAP, HAS_SINKS),
            ),
            (_produce, (rings, descriptors, corners, blocks, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, each of which completes a phase by ARRIVALS arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(COUNT):
        mbarrier.init(barriers.index(slot), count=ARRIVALS)
    return barriers


@gluon.jit
def _intervals(key_start_ptr, key_stop_ptr, i, stop):
    """The intervals of the rows i, and which rows are of this tile and see a key."""
    start = gl.load(key_start_ptr + i, mask=i < stop, other=0)
    end = gl.load(key_stop_ptr + i, mask=i < stop, other=0)
    return start, end, end > start


@gluon.jit
def _full_blocks(start, end, live, hull_start, hull_stop, BLOCK_N: gl.constexpr):
    """The first block that all live rows see, and the first after it that not all do."""
    full_start = gl.max(gl.where(live, start, 0), 0)
    full_stop = gl.minimum(gl.min(gl.where(live, end, FAR), 0), hull_stop)
    left = (gl.maximum(full_start - hull_start, 0) + BLOCK_N - 1) // BLOCK_N
    return left, gl.maximum(full_stop - hull_start, 0) // BLOCK_N


@gluon.jit
def _produce(
    rings, descriptors, corners, blocks, BLOCK_N: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Copies q once and each block of k and v into its slot as soon as both warpgroups left it."""
    q, k, v, q_full, k_full, v_full, k_empty, v_empty = rings
    q_desc, k_desc, v_desc = descriptors
    q_row, q_column, k_row, k_column, v_row, v_column = corners
    if blocks > 0:
        for half in gl.static_range(2):
            mbarrier.expect(q_full.index(half), q_desc.block_type.nbytes)
            _load(q_desc, [q_row + half * ROWS, q_column], q_full.index(half), q.index(half))
    for y in range(0, blocks):
        slot = y % STAGES
        before = (y // STAGES + 1) & 1
        mbarrier.wait(k_empty.index(slot), before)
        mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
        _load(k_desc, [k_row + y * BLOCK_N, k_column], k_full.index(slot), k.index(slot))
        mbarrier.wait(v_empty.index(slot), before)
        mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
        _load(v_desc, [v_row + y * BLOCK_N, v_column], v_full.index(slot), v.index(slot))


@gluon.jit
def _consume_upper(
    rings, turns, results, rows, full, numbers, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, TAKE_TURNS: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    HAS_SINKS: gl.constexpr,
):  # fmt: skip
    """The first 64 rows."""
    _consume(
        0, rings, turns, results, rows, full, numbers, HEAD_DIM, BLOCK_N, STAGES, TAKE_TURNS,
        HAS_SOFTCAP, HAS_SINKS,
    )  # fmt: skip


@gluon.jit
def _consume_lower(
    rings, turns, results, rows, full, numbers, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, TAKE_TURNS: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    HAS_SINKS: gl.constexpr,
):  # fmt: skip
    """The last 64 rows."""
    _consume(
        1, rings, turns, results, rows, full, numbers, HEAD_DIM, BLOCK_N, STAGES, TAKE_TURNS,
        HAS_SOFTCAP, HAS_SINKS,
    )  # fmt: skip


@gluon.jit
def _consume(
    HALF: gl.constexpr,
    rings,
    turns,
    results,
    rows,
    full,
    numbers,
    HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    TAKE_TURNS: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    HAS_SINKS: gl.constexpr,
):
    """Softmax over all blocks for 64 rows, and their results."""
    q, k, v, q_full, k_full, v_full, k_empty, _v_empty = rings
    out_ptr, lse_ptr, flag_ptr, out_stride_t = results
    key_start_ptr, key_stop_ptr, first, stop, hull_start, blocks = rows
    full_from, full_to = full
    softmax_scale, softcap, sink = numbers
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    q = q.index(HALF)
    i = first + HALF * ROWS + gl.arange(0, ROWS, ROW)
    start, end, live = _intervals(key_start_ptr, key_stop_ptr, i, stop)
    m = gl.full([ROWS], LOWEST, gl.float32, ROW)
    l = gl.full([ROWS], 0.0, gl.float32, ROW)
    if HAS_SINKS:
        # A sink is a key without a value that every row has seen before the loop.
        m = gl.full([ROWS], 0.0, gl.float32, ROW) + sink * LOG2E
        l += 1.0
    acc = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, SUMS)
    if blocks > 0:
        mbarrier.wait(q_full.index(HALF), 0)
        mbarrier.wait(k_full.index(0), 0)
        none = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, SCORES)
        products = warpgroup_mma(q, k.index(0).permute((1, 0)), none, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[products])
        mbarrier.arrive(k_empty.index(0))
        s, factor = _logits(s, softmax_scale, softcap, HAS_SOFTCAP)
        s = _visible(s, hull_start, start, end, BLOCK_N, SCORES)
        weights, m, l, _ = _softmax_step(s, factor, m, l)
        p = gl.convert_layout(weights.to(q.dtype), gl.DotOperandLayout(0, SUMS, 2))
        mbarrier.wait(k_full.index(1 % STAGES), 1 // STAGES, pred=blocks > 1)
        # Three loops: a branch between a product and its wait would make the wait come first.
        edge = gl.maximum(gl.minimum(full_from, blocks), 1)
        through = gl.maximum(gl.minimum(full_to, blocks), edge)
        for y in range(1, edge):
            p, acc, m, l = _step(
                y, True, HALF, p, acc, m, l, q, rings, turns, hull_start, start, end, blocks,
                softmax_scale, softcap, BLOCK_N, STAGES, TAKE_TURNS, HAS_SOFTCAP, SCORES, SUMS,
            )  # fmt: skip
        for y in range(edge, through):
            p, acc, m, l = _step(
                y, False, HALF, p, acc, m, l, q, rings, turns, hull_start, start, end, blocks,
                softmax_scale, softcap, BLOCK_N, STAGES, TAKE_TURNS, HAS_SOFTCAP, SCORES, SUMS,
            )  # fmt: skip
        for y in range(through, blocks):
            p, acc, m, l = _step(
                y, True, HALF, p, acc, m, l, q, rings, turns, hull_start, start, end, blocks,
                softmax_scale, softcap, BLOCK_N, STAGES, TAKE_TURNS, HAS_SOFTCAP, SCORES, SUMS,
            )  # fmt: skip
        last = (blocks - 1) % STAGES
        mbarrier.wait(v_full.index(last), ((blocks - 1) // STAGES) & 1)
        sums = warpgroup_mma(p, v.index(last), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[sums])
    _finish(
        acc, m, l, live, i, q, out_ptr, lse_ptr, flag_ptr, first + HALF * ROWS, stop,
        out_stride_t, HEAD_DIM, SUMS,
    )  # fmt: skip


@gluon.jit
def _step(
    y,
    MASKED: gl.constexpr,
    HALF: gl.constexpr,
    p,
    acc,
    m,
    l,
    q,
    rings,
    turns,
    hull_start,
    start,
    end,
    blocks,
    softmax_scale,
    softcap,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    TAKE_TURNS: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    SCORES: gl.constexpr,
    SUMS: gl.constexpr,
):
    """The weights of block y, whose k has come; meanwhile p, those of the block before, times v."""
    _, k, v, _, k_full, v_full, k_empty, v_empty = rings
    slot = y % STAGES
    last = (y - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((y - 1) // STAGES) & 1)
    if TAKE_TURNS:
        # The upper half goes first: its turn y waits for the lower half's turn y - 1.
        mbarrier.wait(turns.index(HALF), (y + HALF) & 1)
    none = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, SCORES)
    products = warpgroup_mma(q, k.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
    sums = warpgroup_mma(p, v.index(last), acc, is_async=True)
    if TAKE_TURNS:
        mbarrier.arrive(turns.index(1 - HALF))
    s = warpgroup_mma_wait(1, deps=[products])
    mbarrier.arrive(k_empty.index(slot))
    s, factor = _logits(s, softmax_scale, softcap, HAS_SOFTCAP)
    if MASKED:
        s = _visible(s, hull_start + y * BLOCK_N, start, end, BLOCK_N, SCORES)
    weights, m, l, alpha = _softmax_step(s, factor, m, l)
    # Waiting for the next k here keeps ptxas from moving the next wait before the exponentials.
    after = y + 1
    mbarrier.wait(k_full.index(after % STAGES), (after // STAGES) & 1, pred=after < blocks)
    acc = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(v_empty.index(last))
    p = gl.convert_layout(weights.to(q.dtype), gl.DotOperandLayout(0, SUMS, 2))
    return p, acc * gl.convert_layout(alpha, gl.SliceLayout(1, SUMS))[:, None], m, l


@gluon.jit
def _logits(products, softmax_scale, softcap, HAS_SOFTCAP: gl.constexpr):
    """Scores, and the factor that makes them logits in base 2, which the exponent applies.

    It is positive, so the largest score has the largest logit. For the cap see `rules.logits`.
    """
    factor = softmax_scale * LOG2E
    if HAS_SOFTCAP:
        r = 1.0 / (gl.exp2(products * (softmax_scale / softcap * (2.0 * LOG2E))) + 1.0)
        products = (1.0 - 2.0 * r) * softcap
        factor = LOG2E
    return products, factor


@gluon.jit
def _visible(s, n, start, end, BLOCK_N: gl.constexpr, SCORES: gl.constexpr):
    """Scores of the keys from n on with -inf where a row does not see one."""
    j = n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
    sees = (start[:, None] <= j[None, :]) & (j[None, :] < end[:, None])
    return gl.where(sees, s, -float("inf"))


@gluon.jit
def _softmax_step(s, factor, m, l):
    """Weights of one block, the new maximum and sum, and the factor of what came before."""
    m_new = gl.maximum(m, gl.max(s, 1) * factor)
    p = gl.exp2(s * factor - m_new[:, None])
    alpha = gl.exp2(m - m_new)
    return p, m_new, l * alpha + gl.sum(p, 1), alpha


@gluon.jit
def _finish(
    acc,
    m,
    l,
    live,
    i,
    q,
    out_ptr,
    lse_ptr,
    flag_ptr,
    first,
    stop,
    out_stride_t,
    HEAD_DIM: gl.constexpr,
    SUMS: gl.constexpr,
):
    """Writes out, lse and the flag; out passes through the shared memory of q for whole rows."""
    blind = (l == 0.0) | ~live
    lse = (m + gl.log2(gl.where(blind, 1.0, l))) * LN2
    gl.store(lse_ptr + i, gl.where(blind, -float("inf"), lse), mask=i < stop)
    SUM_ROW: gl.constexpr = gl.SliceLayout(1, SUMS)
    row = gl.sum(acc * 0.0, 1)
    broken = gl.convert_layout(live, SUM_ROW) & (row != row)
    gl.store(flag_ptr + gl.full([ROWS], 0, gl.int32, SUM_ROW), 1, mask=broken)
    factor = gl.where(blind, 0.0, 1.0 / gl.where(blind, 1.0, l))
    out = gl.where(
        gl.convert_layout(blind, SUM_ROW)[:, None],
        0.0,
        acc * gl.convert_layout(factor, SUM_ROW)[:, None],
    )
    # No warp may still read q: the last product with it is over in all of them.
    _barrier()
    q.store(out.to(q.dtype))
    _barrier()
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    whole = q.load(COPY)
    x = first + gl.arange(0, ROWS, gl.SliceLayout(1, COPY))
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, COPY))
    to = out_ptr + x.to(gl.int64)[:, None] * out_stride_t + d[None, :]
    gl.store(to, whole, mask=(x < stop)[:, None])
