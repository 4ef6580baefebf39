"""The forward kernel for Hopper (sm_90), in Gluon: warps with roles, asynchronous matrix products.

Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision"
(2024). One warp copies q and blocks of k and v into shared memory (TMA); two warpgroups of 64
query rows each multiply (`hopper_walk.py`) and fill each other's gaps.

A program goes through items, each a tile of one head: heavy ones first, the next one whenever it is
done with one, by a counter. The producer finds them, and is ahead of the consumers: it tells them
of each by a message in shared memory, and of the end. Where the half of the mask rule that queries
hold decides alone (KEY_HALF), all roles walk the tile's hull, ascending. In a forest (QUERY_HALF)
the producer skips blocks that no row sees by `Tiles.blocks`, and copies the others in an order that
keeps masked ones together: edges, full ones, the last one. Every role counts the items and
blocks that it has done, and a barrier's phase is that count (of rounds of its ring): consumers wait
for `*_full` of their phase, the producer for `*_empty` of the phase before, which a fresh barrier
counts as complete.

A NaN that leaked between documents of a tile (see `forward.py`) is not repaired at once: a flag
says whether an accumulator of the item is not finite. The same kernel, CONFINED, then does flagged
items again: its clean rows have the same products in the same order, and so the same bits.
"""

# Gluon's language is not Python's: its stubs know neither constexpr arguments nor tensors.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportReturnType=false, reportAssignmentType=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from packed_attn_kernels.hopper_blocks import (
    LOOK,
    count_blocks,
    full_blocks,
    intervals_of,
    look_through,
    tile_bounds,
)
from packed_attn_kernels.hopper_walk import (
    ROWS,
    barrier,
    confined_step,
    first_scores,
    first_weights,
    hear,
    last_step,
    last_step_ahead,
    walk,
)
from packed_attn_kernels.rules import FAR, LN2, LOG2E, LOWEST

# triton 3.9 renamed it.
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
# Of the message: item, first and last row, hull's start, blocks, two numbers for each half.
WORDS: gl.constexpr = gl.constexpr(9)
# Of the flags: whether any item is flagged, and how many items were taken; then one of each item.
ITEMS: gl.constexpr = gl.constexpr(2)


@gluon.jit(
    do_not_specialize=[
        "group",
        "heads",
        "items",
        "key_blocks",
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
    query_start_desc,
    query_stop_desc,
    out_ptr,
    lse_ptr,
    sinks_ptr,
    tiles_ptr,
    blocks_ptr,
    flags_ptr,
    key_start_ptr,
    key_stop_ptr,
    softmax_scale,
    softcap,
    group,
    heads,
    items,
    key_blocks,
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
    Q_SLOTS: gl.constexpr,
    OUT_IN_Q: gl.constexpr,
    AHEAD: gl.constexpr,
    CARRIED: gl.constexpr,
    TURNS: gl.constexpr,
    UNROLLED: gl.constexpr,
    CONFINED: gl.constexpr,
    KEY_HALF: gl.constexpr,
    QUERY_HALF: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    HAS_SINKS: gl.constexpr,
):
    """Items of 128 queries of one head: out, lse (natural, float32) and the items' flags.

    Item x is tile x // heads of head x % heads: heavy tiles come first, empty ones last. A
    descriptor shows a tensor as a matrix; head h begins at row h * row_step, column
    h * column_step. blocks: `[4, key_blocks]`, see `key_blocks` of `tiles.py`. flags: [0] whether
    any item is flagged, [1] how many items were taken beyond the first of each program, [ITEMS + x]
    whether item x is flagged.
    Q_SLOTS items have their q in shared memory. OUT_IN_Q passes out through its item's q, whose
    place is free only then. AHEAD begins an item before the one before it has ended, and needs two
    slots of q. For CARRIED and TURNS see `hopper_walk.py`. UNROLLED blocks are a round of the loop.
    CONFINED does flagged items alone, and reads flags where otherwise they are written.
    """
    if CONFINED:  # noqa: SIM102 - only what a constant alone decides is left out of the kernel
        if gl.load(flags_ptr) == 0:
            return
    q = gl.allocate_shared_memory(q_desc.dtype, [2 * Q_SLOTS, ROWS, HEAD_DIM], q_desc.layout)
    k = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_N, HEAD_DIM], k_desc.layout)
    v = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BLOCK_N, HEAD_DIM], v_desc.layout)
    staged = q
    if not OUT_IN_Q:
        staged = gl.allocate_shared_memory(q_desc.dtype, [2, ROWS, HEAD_DIM], q_desc.layout)
    clean = staged
    if CONFINED:
        clean = gl.allocate_shared_memory(v_desc.dtype, [2, BLOCK_N, HEAD_DIM], v_desc.layout)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    message = gl.allocate_shared_memory(gl.int32, [WORDS * Q_SLOTS, 1], PLAIN)
    intervals = gl.allocate_shared_memory(gl.int32, [4 * Q_SLOTS, ROWS], PLAIN)
    # Not read without QUERY_HALF.
    lines = intervals
    places = intervals
    if QUERY_HALF:
        lines = gl.allocate_shared_memory(gl.int32, [2 * STAGES, BLOCK_N], query_start_desc.layout)
        if KEY_HALF:
            places = gl.allocate_shared_memory(gl.int32, [STAGES, 1], PLAIN)
    q_full = _barriers(2 * Q_SLOTS, 1)
    k_full = _barriers(STAGES, 1)
    v_full = _barriers(STAGES, 1)
    q_empty = _barriers(2 * Q_SLOTS, 1)
    k_empty = _barriers(STAGES, 2)
    v_empty = _barriers(STAGES, 2)
    turns = _barriers(2, 1)
    fence_async_shared()

    rings = (q, k, v, q_full, k_full, v_full, q_empty, k_empty, v_empty)
    own = (staged, clean)
    results = (out_ptr, lse_ptr, flags_ptr, out_stride_t, out_stride_h, total_queries)
    rows = (intervals, lines, places, sinks_ptr, heads)
    numbers = (softmax_scale, softcap)
    descriptors = (q_desc, k_desc, v_desc, query_start_desc, query_stop_desc)
    steps = (q_row_step, q_column_step, k_row_step, k_column_step, v_row_step, v_column_step)
    lists = (
        tiles_ptr, blocks_ptr, flags_ptr, key_start_ptr, key_stop_ptr, rows, group, items,
        key_blocks,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (
                _consume_upper,
                (rings, turns, message, own, results, rows, numbers, HEAD_DIM, BLOCK_N, STAGES,
                 Q_SLOTS, OUT_IN_Q, AHEAD, CARRIED, TURNS, UNROLLED, CONFINED, KEY_HALF, QUERY_HALF,
                 HAS_SOFTCAP, HAS_SINKS),
            ),
            (
                _consume_lower,
                (rings, turns, message, own, results, rows, numbers, HEAD_DIM, BLOCK_N, STAGES,
                 Q_SLOTS, OUT_IN_Q, AHEAD, CARRIED, TURNS, UNROLLED, CONFINED, KEY_HALF, QUERY_HALF,
                 HAS_SOFTCAP, HAS_SINKS),
            ),
            (
                _produce,
                (rings, message, descriptors, steps, lists, BLOCK_N, STAGES, Q_SLOTS, CONFINED,
                 KEY_HALF, QUERY_HALF),
            ),
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
def _produce(
    rings, message, descriptors, steps, lists, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    Q_SLOTS: gl.constexpr, CONFINED: gl.constexpr, KEY_HALF: gl.constexpr,
    QUERY_HALF: gl.constexpr,
):  # fmt: skip
    """Finds the items of this program, says which they are, and copies what they read."""
    q, _, _, q_full, _, _, q_empty, _, _ = rings
    q_desc, _, _, _, _ = descriptors
    q_row_step, q_column_step, _, _, _, _ = steps
    (
        tiles_ptr, blocks_ptr, flags_ptr, key_start_ptr, key_stop_ptr, rows, group, items,
        key_blocks,
    ) = lists  # fmt: skip
    intervals, lines, places, _, heads = rows
    row = gl.arange(0, ROWS, gl.BlockedLayout([1], [32], [1], [0]))
    item = gl.program_id(0)
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    count = flags_ptr + 1 + lane * 0
    first = gl.load(tiles_ptr + item // heads * 2)
    stop = gl.load(tiles_ptr + item // heads * 2 + 1)
    taken = lane * 0
    if not CONFINED:
        taken = gl.atomic_add(count, lane * 0 + 1, lane == 0, sem="relaxed")
    done = 0
    before = 0
    while item < items:
        following = item + gl.num_programs(0)
        if not CONFINED:
            following = gl.num_programs(0) + gl.max(gl.where(lane == 0, taken, 0), 0)
        # What comes after this item is asked for before its blocks are copied, and waited for
        # when they are on their way.
        ends = gl.load(
            tiles_ptr + following // heads * 2 + lane,
            mask=(following < items) & (lane < 2),
            other=0,
        )
        wanted = first < stop
        if CONFINED:
            wanted = wanted & (gl.load(flags_ptr + ITEMS + item) != 0)
        else:
            taken = gl.atomic_add(count, lane * 0 + 1, lane == 0, sem="relaxed")
        if wanted:
            start_0, end_0, live_0 = intervals_of(key_start_ptr, key_stop_ptr, first + row, stop)
            start_1, end_1, live_1 = intervals_of(
                key_start_ptr, key_stop_ptr, first + ROWS + row, stop
            )
            hull_stop = gl.maximum(gl.where(live_0, end_0, 0), gl.where(live_1, end_1, 0))
            hull_stop = gl.max(hull_stop, 0)
            hull_start = gl.minimum(gl.where(live_0, start_0, FAR), gl.where(live_1, start_1, FAR))
            hull_start = gl.minimum(gl.min(hull_start, 0), hull_stop)
            if QUERY_HALF:
                tile = tile_bounds(first + row, start_0, end_0, live_0, start_1, end_1, live_1)
                begin = hull_start // BLOCK_N
                end = (hull_stop + BLOCK_N - 1) // BLOCK_N
                look = (begin, end, tile, blocks_ptr, key_blocks)
                edges, full, last = count_blocks(look, BLOCK_N, KEY_HALF)
                last = gl.maximum(last, 0)
                blocks = edges + full + 1
                upper = (edges, edges + full)
                lower = upper
            else:
                # One that nobody sees, rather than an item without blocks.
                blocks = gl.maximum((hull_stop - hull_start + BLOCK_N - 1) // BLOCK_N, 1)
                upper = full_blocks(start_0, end_0, live_0, hull_start, hull_stop, blocks, BLOCK_N)
                lower = full_blocks(start_1, end_1, live_1, hull_start, hull_stop, blocks, BLOCK_N)
            at = done % Q_SLOTS
            _wait_for_place(q_empty, done, Q_SLOTS)
            intervals.index(4 * at).store(start_0)
            intervals.index(4 * at + 1).store(end_0)
            intervals.index(4 * at + 2).store(start_1)
            intervals.index(4 * at + 3).store(end_1)
            _announce(message, at, item, first, stop, hull_start, blocks, upper, lower)
            h = item % heads
            for half in gl.static_range(2):
                slot = 2 * at + half
                mbarrier.expect(q_full.index(slot), q_desc.block_type.nbytes)
                _load(
                    q_desc,
                    [h * q_row_step + first + half * ROWS, h * q_column_step],
                    q_full.index(slot),
                    q.index(slot),
                )
            source = (rings, lines, places, descriptors, h // group, steps)
            if QUERY_HALF:
                _copy_seen(look, last, before, source, BLOCK_N, STAGES, KEY_HALF)
            else:
                for y in range(0, blocks):
                    _copy_block(
                        hull_start + y * BLOCK_N,
                        before + y,
                        source,
                        BLOCK_N,
                        STAGES,
                        KEY_HALF,
                        False,
                    )
            done += 1
            before += blocks
        # Empty tiles come last.
        item = gl.where(first < stop, following, items)
        first = gl.max(gl.where(lane == 0, ends, 0), 0)
        stop = gl.max(gl.where(lane == 1, ends, 0), 0)
    _wait_for_place(q_empty, done, Q_SLOTS)
    _say(message, done % Q_SLOTS * WORDS, -1)
    barrier()
    for half in gl.static_range(2):
        mbarrier.arrive(q_full.index(done % Q_SLOTS * 2 + half))


@gluon.jit
def _wait_for_place(q_empty, done, Q_SLOTS: gl.constexpr):
    """Until both warpgroups are done with the item that the next one takes the place of."""
    for half in gl.static_range(2):
        mbarrier.wait(q_empty.index(done % Q_SLOTS * 2 + half), (done // Q_SLOTS + 1) & 1)


@gluon.jit
def _announce(message, at, item, first, stop, hull_start, blocks, upper, lower):
    """Writes the message of an item, for all of the consumers' threads to read."""
    _say(message, at * WORDS, item)
    _say(message, at * WORDS + 1, first)
    _say(message, at * WORDS + 2, stop)
    _say(message, at * WORDS + 3, hull_start)
    _say(message, at * WORDS + 4, blocks)
    _say(message, at * WORDS + 5, upper[0])
    _say(message, at * WORDS + 6, upper[1])
    _say(message, at * WORDS + 7, lower[0])
    _say(message, at * WORDS + 8, lower[1])
    barrier()


@gluon.jit
def _copy_seen(
    look, last, before, source, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    KEY_HALF: gl.constexpr,
):  # fmt: skip
    """Copies the blocks that are seen: edges, then full ones, then the last one."""
    start, stop, _, _, _ = look
    at = before
    for wanted in gl.static_range(2):
        for begin in range(start, stop, LOOK):
            block, seen, full = look_through(begin, look, BLOCK_N, KEY_HALF)
            if wanted == 0:
                seen = seen & ~full
            else:
                seen = seen & full
            seen = seen & (block != last)
            following = gl.min(gl.where(seen, block, FAR), 0)
            while following < FAR:
                _copy_block(following * BLOCK_N, at, source, BLOCK_N, STAGES, KEY_HALF, True)
                at += 1
                following = gl.min(gl.where(seen & (block > following), block, FAR), 0)
    _copy_block(last * BLOCK_N, at, source, BLOCK_N, STAGES, KEY_HALF, True)


@gluon.jit
def _copy_block(
    n, at, source, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, KEY_HALF: gl.constexpr,
    QUERY_HALF: gl.constexpr,
):  # fmt: skip
    """Copies the keys from n on, the at-th block of the program, as soon as its slot is free."""
    rings, lines, places, descriptors, h, steps = source
    _, k, v, _, k_full, v_full, _, k_empty, v_empty = rings
    _, k_desc, v_desc, query_start_desc, query_stop_desc = descriptors
    _, _, k_row_step, k_column_step, v_row_step, v_column_step = steps
    slot = at % STAGES
    phase = (at // STAGES + 1) & 1
    mbarrier.wait(k_empty.index(slot), phase)
    mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
    corner = [h * k_row_step + n, h * k_column_step]
    _load(k_desc, corner, k_full.index(slot), k.index(slot))
    mbarrier.wait(v_empty.index(slot), phase)
    LINES: gl.constexpr = 2 * BLOCK_N * 4 if QUERY_HALF else 0
    if QUERY_HALF and KEY_HALF:
        _say(places, slot, n)
        barrier()
    mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes + LINES)
    corner = [h * v_row_step + n, h * v_column_step]
    _load(v_desc, corner, v_full.index(slot), v.index(slot))
    if QUERY_HALF:
        _load(query_start_desc, [n], v_full.index(slot), lines.index(2 * slot))
        _load(query_stop_desc, [n], v_full.index(slot), lines.index(2 * slot + 1))


@gluon.jit
def _say(message, at, value):
    """Writes a word of the message, which the consumers' `q_full` covers."""
    WORD: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    message.index(at).store(gl.full([1], 0, gl.int32, WORD) + value)


@gluon.jit
def _consume_upper(
    rings, turns, message, own, results, rows, numbers, HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, Q_SLOTS: gl.constexpr, OUT_IN_Q: gl.constexpr,
    AHEAD: gl.constexpr, CARRIED: gl.constexpr, TURNS: gl.constexpr, UNROLLED: gl.constexpr,
    CONFINED: gl.constexpr, KEY_HALF: gl.constexpr, QUERY_HALF: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr, HAS_SINKS: gl.constexpr,
):  # fmt: skip
    """The first 64 rows."""
    _consume(
        0, rings, turns, message, own, results, rows, numbers, HEAD_DIM, BLOCK_N, STAGES, Q_SLOTS,
        OUT_IN_Q, AHEAD, CARRIED, TURNS, UNROLLED, CONFINED, KEY_HALF, QUERY_HALF, HAS_SOFTCAP,
        HAS_SINKS,
    )  # fmt: skip


@gluon.jit
def _consume_lower(
    rings, turns, message, own, results, rows, numbers, HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, Q_SLOTS: gl.constexpr, OUT_IN_Q: gl.constexpr,
    AHEAD: gl.constexpr, CARRIED: gl.constexpr, TURNS: gl.constexpr, UNROLLED: gl.constexpr,
    CONFINED: gl.constexpr, KEY_HALF: gl.constexpr, QUERY_HALF: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr, HAS_SINKS: gl.constexpr,
):  # fmt: skip
    """The last 64 rows."""
    _consume(
        1, rings, turns, message, own, results, rows, numbers, HEAD_DIM, BLOCK_N, STAGES, Q_SLOTS,
        OUT_IN_Q, AHEAD, CARRIED, TURNS, UNROLLED, CONFINED, KEY_HALF, QUERY_HALF, HAS_SOFTCAP,
        HAS_SINKS,
    )  # fmt: skip


@gluon.jit
def _consume(
    HALF: gl.constexpr,
    rings,
    turns,
    message,
    own,
    results,
    rows,
    numbers,
    HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    Q_SLOTS: gl.constexpr,
    OUT_IN_Q: gl.constexpr,
    AHEAD: gl.constexpr,
    CARRIED: gl.constexpr,
    TURNS: gl.constexpr,
    UNROLLED: gl.constexpr,
    CONFINED: gl.constexpr,
    KEY_HALF: gl.constexpr,
    QUERY_HALF: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    HAS_SINKS: gl.constexpr,
):
    """Softmax over all blocks for 64 rows of each item, and their results."""
    q_full, q_empty = rings[3], rings[6]
    intervals, lines, places, sinks_ptr, heads = rows
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    done = 0
    before = 0
    mbarrier.wait(q_full.index(HALF), 0)
    item = hear(message, 0)
    s = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, SCORES)
    if AHEAD:  # noqa: SIM102 - a constant
        if item >= 0:
            s = first_scores(HALF, 0, rings, BLOCK_N, STAGES, SCORES)
    while item >= 0:
        at = done % Q_SLOTS
        mine = 2 * at + HALF
        word = at * WORDS
        first = hear(message, word + 1) + HALF * ROWS
        stop = hear(message, word + 2)
        hull_start = hear(message, word + 3)
        blocks = hear(message, word + 4)
        edge = hear(message, word + 5 + 2 * HALF)
        through = hear(message, word + 6 + 2 * HALF)
        i = first + gl.arange(0, ROWS, ROW)
        start = intervals.index(4 * at + 2 * HALF).load(ROW)
        end = intervals.index(4 * at + 2 * HALF + 1).load(ROW)
        live = end > start
        mask = (hull_start, i, start, end, lines, places)
        m = gl.full([ROWS], LOWEST, gl.float32, ROW)
        l = gl.full([ROWS], 0.0, gl.float32, ROW)
        if HAS_SINKS:
            # A sink is a key without a value that every row has seen before the loop.
            sink = gl.load(sinks_ptr + item % heads).to(gl.float32)
            m = gl.full([ROWS], 0.0, gl.float32, ROW) + sink * LOG2E
            l += 1.0
        acc = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, SUMS)
        if CONFINED:
            for y in range(0, blocks):
                acc, m, l = confined_step(
                    y, before + y, HALF, mine, acc, m, l, rings, own, mask, numbers, HEAD_DIM,
                    BLOCK_N, STAGES, KEY_HALF, QUERY_HALF, HAS_SOFTCAP, SCORES, SUMS,
                )  # fmt: skip
            if not OUT_IN_Q:
                mbarrier.arrive(q_empty.index(mine))
        else:
            if not AHEAD:
                s = first_scores(mine, before, rings, BLOCK_N, STAGES, SCORES)
            if CARRIED:
                s, m, l = first_weights(
                    s, m, l, rings, mask, before, numbers, BLOCK_N, STAGES, KEY_HALF, QUERY_HALF,
                    HAS_SOFTCAP, SCORES,
                )  # fmt: skip
            s, acc, m, l = walk(
                mine, s, acc, m, l, rings, turns, mask, blocks, edge, through, before, numbers,
                BLOCK_N, STAGES, CARRIED, TURNS, UNROLLED, KEY_HALF, QUERY_HALF, HAS_SOFTCAP,
                SCORES, SUMS,
            )  # fmt: skip
            if not OUT_IN_Q:
                mbarrier.arrive(q_empty.index(mine))
            if AHEAD:
                then = (done + 1) % Q_SLOTS
                place = (then * WORDS, 2 * then + HALF, ((done + 1) // Q_SLOTS) & 1)
                following, s, acc, m, l = last_step_ahead(
                    blocks - 1, mine, s, acc, m, l, rings, turns, mask, before, numbers, message,
                    place, BLOCK_N, STAGES, CARRIED, TURNS, KEY_HALF, QUERY_HALF, HAS_SOFTCAP,
                    SCORES, SUMS,
                )  # fmt: skip
            else:
                acc, m, l = last_step(
                    blocks - 1, mine, s, acc, m, l, rings, turns, mask, before, numbers, BLOCK_N,
                    STAGES, CARRIED, TURNS, KEY_HALF, QUERY_HALF, HAS_SOFTCAP, SCORES, SUMS,
                )  # fmt: skip
        staged = own[0].index(mine if OUT_IN_Q else HALF)
        _finish(
            staged, acc, m, l, live, i, results, item, item % heads, first, stop, HEAD_DIM, SUMS,
            CONFINED,
        )  # fmt: skip
        if OUT_IN_Q:
            # What was written there as out must not come after what is copied there as q.
            fence_async_shared()
            barrier()
            mbarrier.arrive(q_empty.index(mine))
        done += 1
        before += blocks
        if AHEAD:
            item = following
        else:
            mbarrier.wait(q_full.index(done % Q_SLOTS * 2 + HALF), (done // Q_SLOTS) & 1)
            item = hear(message, done % Q_SLOTS * WORDS)


@gluon.jit
def _finish(
    staged,
    acc,
    m,
    l,
    live,
    i,
    results,
    item,
    h,
    first,
    stop,
    HEAD_DIM: gl.constexpr,
    SUMS: gl.constexpr,
    CONFINED: gl.constexpr,
):
    """Writes out, lse and the flag; out passes through shared memory for whole rows."""
    out_ptr, lse_ptr, flags_ptr, out_stride_t, out_stride_h, total_queries = results
    blind = (l == 0.0) | ~live
    lse = (m + gl.log2(gl.where(blind, 1.0, l))) * LN2
    head_lse_ptr = lse_ptr + h.to(gl.int64) * total_queries
    gl.store(head_lse_ptr + i, gl.where(blind, -float("inf"), lse), mask=i < stop)
    SUM_ROW: gl.constexpr = gl.SliceLayout(1, SUMS)
    if not CONFINED:
        row = gl.sum(acc * 0.0, 1)
        broken = gl.convert_layout(live, SUM_ROW) & (row != row)
        zero = gl.full([ROWS], 0, gl.int32, SUM_ROW)
        gl.store(flags_ptr + zero, 1, mask=broken)
        gl.store(flags_ptr + (ITEMS + item) + zero, 1, mask=broken)
    factor = gl.where(blind, 0.0, 1.0 / gl.where(blind, 1.0, l))
    out = gl.where(
        gl.convert_layout(blind, SUM_ROW)[:, None],
        0.0,
        acc * gl.convert_layout(factor, SUM_ROW)[:, None],
    )
    # No warp may still read the item before.
    barrier()
    staged.store(out.to(staged.dtype))
    barrier()
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    whole = staged.load(COPY)
    x = first + gl.arange(0, ROWS, gl.SliceLayout(1, COPY))
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, COPY))
    head_out_ptr = out_ptr + h.to(gl.int64) * out_stride_h
    to = head_out_ptr + x.to(gl.int64)[:, None] * out_stride_t + d[None, :]
    gl.store(to, whole, mask=(x < stop)[:, None])
