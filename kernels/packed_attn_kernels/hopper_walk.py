"""What the consumers of `hopper_forward.py` do with the blocks of an item: online softmax.

A warpgroup starts q.k of the next block before it exponentiates this one: the tensor cores work
meanwhile, and the next block's scores are there when it comes to them. With AHEAD that holds across
items too: the first scores of an item are made while the one before ends. With CARRIED a block's
weights wait for the next block, whose q.k is started together with their product: two products are
under way while the next weights are made. With TURNS besides, the warpgroups start theirs in turns.
Block y of an item is the at-th of its program: it stands in slot at % STAGES, and the phase of the
barriers there is at // STAGES.

Where QUERY_HALF decides, with KEY_HALF or alone, the intervals of a block's keys stand in its slot
of `lines`, and its first key in that of `places`; both come with v.
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
    warpgroup_mma,
    warpgroup_mma_wait,
)

from packed_attn_kernels.rules import LOG2E

# triton 3.9 renamed it.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

# Query rows of a warpgroup; a tile has two.
ROWS: gl.constexpr = gl.constexpr(64)


@gluon.jit
def first_scores(
    mine, at, rings, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr
):
    """The products of an item's q, the ring's `mine`, with its first block, the at-th."""
    q, k, _, _, k_full, _, _, k_empty, _ = rings
    slot = at % STAGES
    mbarrier.wait(k_full.index(slot), (at // STAGES) & 1)
    none = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, SCORES)
    products = warpgroup_mma(
        q.index(mine), k.index(slot).permute((1, 0)), none, use_acc=False, is_async=True
    )
    s = warpgroup_mma_wait(0, deps=[products])
    mbarrier.arrive(k_empty.index(slot))
    return s


@gluon.jit
def first_weights(
    s, m, l, rings, mask, before, numbers, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    KEY_HALF: gl.constexpr, QUERY_HALF: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    SCORES: gl.constexpr,
):  # fmt: skip
    """Weights of an item's first block, whose scores are s and whose v is there then."""
    mbarrier.wait(rings[5].index(before % STAGES), (before // STAGES) & 1)
    s, factor = _seen(
        0, before, True, s, mask, numbers, BLOCK_N, STAGES, KEY_HALF, QUERY_HALF, HAS_SOFTCAP,
        SCORES,
    )  # fmt: skip
    weights, m, l, _ = _softmax_step(s, factor, m, l)
    return weights, m, l


@gluon.jit
def walk(
    mine,
    s,
    acc,
    m,
    l,
    rings,
    turns,
    mask,
    blocks,
    edge,
    through,
    before,
    numbers,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CARRIED: gl.constexpr,
    TURNS: gl.constexpr,
    UNROLLED: gl.constexpr,
    KEY_HALF: gl.constexpr,
    QUERY_HALF: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    SCORES: gl.constexpr,
    SUMS: gl.constexpr,
):
    """All blocks of an item but the last, from the first one's scores to the last one's.

    Those from `edge` to `through` are seen by all of its rows. For `mask` see `_sees`. With
    CARRIED, from the first one's weights to the last one's.
    """
    # The block that a step masks: the next one's scores are no weights yet.
    FIRST: gl.constexpr = 1 if CARRIED else 0
    full = gl.maximum(edge, FIRST)
    for y in range(FIRST, edge):
        s, acc, m, l = _step(
            y, True, mine, s, acc, m, l, rings, turns, mask, before, numbers, BLOCK_N, STAGES,
            CARRIED, TURNS, KEY_HALF, QUERY_HALF, HAS_SOFTCAP, SCORES, SUMS,
        )  # fmt: skip
    # Two at a time, the scores of one block stand where those of the next but one will.
    rounds = gl.maximum(through - full, 0) // UNROLLED
    for turn in range(0, rounds):
        for which in gl.static_range(UNROLLED):
            s, acc, m, l = _step(
                full + UNROLLED * turn + which, False, mine, s, acc, m, l, rings, turns, mask,
                before, numbers, BLOCK_N, STAGES, CARRIED, TURNS, KEY_HALF, QUERY_HALF, HAS_SOFTCAP,
                SCORES, SUMS,
            )  # fmt: skip
    for y in range(full + UNROLLED * rounds, blocks - 1 + FIRST):
        s, acc, m, l = _step(
            y, True, mine, s, acc, m, l, rings, turns, mask, before, numbers, BLOCK_N, STAGES,
            CARRIED, TURNS, KEY_HALF, QUERY_HALF, HAS_SOFTCAP, SCORES, SUMS,
        )  # fmt: skip
    return s, acc, m, l


@gluon.jit
def last_step(
    y,
    mine,
    s,
    acc,
    m,
    l,
    rings,
    turns,
    mask,
    before,
    numbers,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CARRIED: gl.constexpr,
    TURNS: gl.constexpr,
    KEY_HALF: gl.constexpr,
    QUERY_HALF: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    SCORES: gl.constexpr,
    SUMS: gl.constexpr,
):
    """Adds the last block of an item, whose scores (CARRIED: weights) are s."""
    _, _, v, _, _, v_full, _, _, v_empty = rings
    last = before + y
    mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
    if CARRIED:
        if TURNS:
            _await_turn(turns, mine & 1, last)
        sums = _product(s, v.index(last % STAGES), acc, SUMS)
        if TURNS:
            _end_turn(turns, mine & 1)
    else:
        s, factor = _seen(
            y, last, True, s, mask, numbers, BLOCK_N, STAGES, KEY_HALF, QUERY_HALF, HAS_SOFTCAP,
            SCORES,
        )  # fmt: skip
        sums, m, l = _weighted(s, factor, acc, m, l, v.index(last % STAGES), SUMS)
    acc = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(v_empty.index(last % STAGES))
    return acc, m, l


@gluon.jit
def last_step_ahead(
    y,
    mine,
    s,
    acc,
    m,
    l,
    rings,
    turns,
    mask,
    before,
    numbers,
    message,
    following,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CARRIED: gl.constexpr,
    TURNS: gl.constexpr,
    KEY_HALF: gl.constexpr,
    QUERY_HALF: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    SCORES: gl.constexpr,
    SUMS: gl.constexpr,
):
    """`last_step`, and the first scores of the item that follows, begun before it.

    `following`: its place in `message`, in the ring of q and the phase there. What comes first is
    the item, or -1 where none follows: then the last products are made again, for nobody.
    """
    q, k, v, q_full, k_full, v_full, _, k_empty, v_empty = rings
    word, theirs, phase = following
    last = before + y
    after = last + 1
    if not CARRIED:
        if QUERY_HALF:
            mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
        s, factor = _seen(
            y, last, True, s, mask, numbers, BLOCK_N, STAGES, KEY_HALF, QUERY_HALF, HAS_SOFTCAP,
            SCORES,
        )  # fmt: skip
    mbarrier.wait(q_full.index(theirs), phase)
    item = hear(message, word)
    if item >= 0:
        mbarrier.wait(k_full.index(after % STAGES), (after // STAGES) & 1)
    slot = gl.where(item >= 0, after, last) % STAGES
    if TURNS:
        _await_turn(turns, mine & 1, last)
    none = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, SCORES)
    products = warpgroup_mma(
        q.index(gl.where(item >= 0, theirs, mine)),
        k.index(slot).permute((1, 0)),
        none,
        use_acc=False,
        is_async=True,
    )
    # As in `_step`.
    mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
    if CARRIED:
        sums = _product(s, v.index(last % STAGES), acc, SUMS)
    else:
        sums, m, l = _weighted(s, factor, acc, m, l, v.index(last % STAGES), SUMS)
    if TURNS:
        _end_turn(turns, mine & 1)
    s = warpgroup_mma_wait(1, deps=[products])
    if item >= 0:
        mbarrier.arrive(k_empty.index(slot))
    acc = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(v_empty.index(last % STAGES))
    return item, s, acc, m, l


@gluon.jit
def _step(
    y,
    MASKED: gl.constexpr,
    mine,
    s,
    acc,
    m,
    l,
    rings,
    turns,
    mask,
    before,
    numbers,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CARRIED: gl.constexpr,
    TURNS: gl.constexpr,
    KEY_HALF: gl.constexpr,
    QUERY_HALF: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    SCORES: gl.constexpr,
    SUMS: gl.constexpr,
):
    """Adds block y, whose products with q are s, and returns those of the block after it.

    CARRIED: adds the block before y, whose weights are s, and returns those of y.
    """
    if CARRIED:
        return _carried_step(
            y, MASKED, mine, s, acc, m, l, rings, turns, mask, before, numbers, BLOCK_N, STAGES,
            TURNS, KEY_HALF, QUERY_HALF, HAS_SOFTCAP, SCORES, SUMS,
        )  # fmt: skip
    q, k, v, _, k_full, v_full, _, k_empty, v_empty = rings
    at = before + y
    after = at + 1
    if MASKED and QUERY_HALF:
        mbarrier.wait(v_full.index(at % STAGES), (at // STAGES) & 1)
    # Before the waits, or its comparisons would be kept in registers across them.
    s, factor = _seen(
        y, at, MASKED, s, mask, numbers, BLOCK_N, STAGES, KEY_HALF, QUERY_HALF, HAS_SOFTCAP, SCORES
    )
    mbarrier.wait(k_full.index(after % STAGES), (after // STAGES) & 1)
    none = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, SCORES)
    products = warpgroup_mma(
        q.index(mine), k.index(after % STAGES).permute((1, 0)), none, use_acc=False, is_async=True
    )
    # No instruction passes this wait: the products are on their way before the exponentials.
    mbarrier.wait(v_full.index(at % STAGES), (at // STAGES) & 1)
    sums, m, l = _weighted(s, factor, acc, m, l, v.index(at % STAGES), SUMS)
    s = warpgroup_mma_wait(1, deps=[products])
    mbarrier.arrive(k_empty.index(after % STAGES))
    acc = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(v_empty.index(at % STAGES))
    return s, acc, m, l


@gluon.jit
def _carried_step(
    y,
    MASKED: gl.constexpr,
    mine,
    weights,
    acc,
    m,
    l,
    rings,
    turns,
    mask,
    before,
    numbers,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    TURNS: gl.constexpr,
    KEY_HALF: gl.constexpr,
    QUERY_HALF: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    SCORES: gl.constexpr,
    SUMS: gl.constexpr,
):
    """Adds the block before y by its weights, and makes those of y meanwhile."""
    q, k, v, _, k_full, v_full, _, k_empty, v_empty = rings
    at = before + y
    ended = at - 1
    mbarrier.wait(k_full.index(at % STAGES), (at // STAGES) & 1)
    if TURNS:
        _await_turn(turns, mine & 1, ended)
    none = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, SCORES)
    products = warpgroup_mma(
        q.index(mine), k.index(at % STAGES).permute((1, 0)), none, use_acc=False, is_async=True
    )
    sums = _product(weights, v.index(ended % STAGES), acc, SUMS)
    if TURNS:
        _end_turn(turns, mine & 1)
    s = warpgroup_mma_wait(1, deps=[products])
    mbarrier.arrive(k_empty.index(at % STAGES))
    if MASKED and QUERY_HALF:
        mbarrier.wait(v_full.index(at % STAGES), (at // STAGES) & 1)
    s, factor = _seen(
        y, at, MASKED, s, mask, numbers, BLOCK_N, STAGES, KEY_HALF, QUERY_HALF, HAS_SOFTCAP, SCORES
    )
    weights, m, l, alpha = _softmax_step(s, factor, m, l)
    # For the next step. No instruction passes this wait: exponentials are made before the sums
    # are waited for.
    mbarrier.wait(v_full.index(at % STAGES), (at // STAGES) & 1)
    acc = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(v_empty.index(ended % STAGES))
    acc *= gl.convert_layout(alpha, gl.SliceLayout(1, SUMS))[:, None]
    return weights, acc, m, l


@gluon.jit
def _await_turn(turns, half, number):
    """Until the other warpgroup has ended its turn: the upper one's `number`-th comes first."""
    mbarrier.wait(turns.index(half), (number + 1 - half) & 1)


@gluon.jit
def _end_turn(turns, half):
    mbarrier.arrive(turns.index(1 - half))


@gluon.jit
def _seen(
    y, at, MASKED: gl.constexpr, s, mask, numbers, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    KEY_HALF: gl.constexpr, QUERY_HALF: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    SCORES: gl.constexpr,
):  # fmt: skip
    """The scores of block y, -inf where a row does not see a key, and what makes them logits."""
    s, factor = _logits(s, numbers[0], numbers[1], HAS_SOFTCAP)
    if MASKED:
        sees = _sees(y, at, mask, BLOCK_N, STAGES, KEY_HALF, QUERY_HALF, SCORES)
        s = gl.where(sees, s, -float("inf"))
    return s, factor


@gluon.jit
def _weighted(s, factor, acc, m, l, v, SUMS: gl.constexpr):
    """Starts the weights times v, on top of the sums so far by the new maximum."""
    weights, m, l, alpha = _softmax_step(s, factor, m, l)
    acc *= gl.convert_layout(alpha, gl.SliceLayout(1, SUMS))[:, None]
    return _product(weights, v, acc, SUMS), m, l


@gluon.jit
def _product(weights, v, acc, SUMS: gl.constexpr):
    """Starts the weights times v, on top of the sums so far."""
    p = gl.convert_layout(weights.to(v.dtype), gl.DotOperandLayout(0, SUMS, 2))
    return warpgroup_mma(p, v, acc, is_async=True)


@gluon.jit
def confined_step(
    y,
    at,
    HALF: gl.constexpr,
    mine,
    acc,
    m,
    l,
    rings,
    own,
    mask,
    numbers,
    HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    KEY_HALF: gl.constexpr,
    QUERY_HALF: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    SCORES: gl.constexpr,
    SUMS: gl.constexpr,
):
    """Block y, with non-finite rows of v taken out of the product.

    A row that sees one becomes NaN; the others have the products of `_step`, bit by bit.
    """
    q, k, v, _, k_full, v_full, _, k_empty, v_empty = rings
    clean = own[1].index(HALF)
    slot = at % STAGES
    phase = (at // STAGES) & 1
    mbarrier.wait(v_full.index(slot), phase)
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    block = v.index(slot).load(COPY)
    if QUERY_HALF:  # its intervals stand beside v
        sees = _sees(y, at, mask, BLOCK_N, STAGES, KEY_HALF, QUERY_HALF, SCORES)
    mbarrier.arrive(v_empty.index(slot))
    broken = gl.max(gl.where(gl.abs(block.to(gl.float32)) < float("inf"), 0, 1), 1)
    column = gl.convert_layout(broken, gl.SliceLayout(0, SCORES)) != 0
    if not QUERY_HALF:
        sees = _sees(y, at, mask, BLOCK_N, STAGES, KEY_HALF, QUERY_HALF, SCORES)
    hurt = gl.max((sees & column[None, :]).to(gl.int32), 1)
    clean.store(gl.where(broken[:, None] != 0, 0.0, block.to(gl.float32)).to(block.dtype))
    fence_async_shared()
    barrier()
    mbarrier.wait(k_full.index(slot), phase)
    none = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, SCORES)
    products = warpgroup_mma(
        q.index(mine), k.index(slot).permute((1, 0)), none, use_acc=False, is_async=True
    )
    s = warpgroup_mma_wait(0, deps=[products])
    mbarrier.arrive(k_empty.index(slot))
    s, factor = _logits(s, numbers[0], numbers[1], HAS_SOFTCAP)
    s = gl.where(sees, s, -float("inf"))
    weights, m, l, alpha = _softmax_step(s, factor, m, l)
    p = gl.convert_layout(weights.to(q.dtype), gl.DotOperandLayout(0, SUMS, 2))
    alpha = gl.where(hurt != 0, float("nan"), alpha)
    acc *= gl.convert_layout(alpha, gl.SliceLayout(1, SUMS))[:, None]
    sums = warpgroup_mma(p, clean, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[sums])
    # No warp may overwrite the clean block before all have read it.
    barrier()
    return acc, m, l


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
def _sees(
    y, at, mask, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, KEY_HALF: gl.constexpr,
    QUERY_HALF: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """Whether each row sees each key of block y, by the halves of the mask rule (`rules.sees`)."""
    hull_start, i, start, end, lines, places = mask
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    if QUERY_HALF:
        slot = at % STAGES
        query_start = lines.index(2 * slot).load(COLUMN)
        query_stop = lines.index(2 * slot + 1).load(COLUMN)
        sees = (query_start[None, :] <= i[:, None]) & (i[:, None] < query_stop[None, :])
        if KEY_HALF:
            sees = sees & _within(start, end, hear(places, slot), BLOCK_N, COLUMN)
    else:
        sees = _within(start, end, hull_start + y * BLOCK_N, BLOCK_N, COLUMN)
    return sees


@gluon.jit
def _within(start, end, n, BLOCK_N: gl.constexpr, COLUMN: gl.constexpr):
    """Whether the keys from n on are in the rows' intervals.

    A thread has two columns of every eight of a row, the same two of each: a word of bits says
    which of them are in, and takes a few instructions a row. Two comparisons would be two a score.
    """
    c = gl.arange(0, BLOCK_N, COLUMN)[None, :]
    word = _from(start - n, c, BLOCK_N) & ~_from(end - n, c, BLOCK_N)
    return (word >> (2 * (c >> 3) + (c & 1))) & 1 != 0


@gluon.jit
def _from(bound, c, BLOCK_N: gl.constexpr):
    """The bits of those columns of a thread that are not before the bound; c is one of them."""
    past = gl.minimum(gl.maximum(bound[:, None] - (c & 6), 0), BLOCK_N)
    eights = past >> 3
    # Twice, as they may be 32 in all: no shift of a word.
    return -1 << eights << (eights + gl.minimum(past & 7, 2))


@gluon.jit
def hear(words, at):
    """Reads a word that the producer wrote."""
    WORD: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(words.index(at).load(WORD), 0)


@gluon.jit
def _softmax_step(s, factor, m, l):
    """Weights of one block, the new maximum and sum, and the factor of what came before."""
    m_new = gl.maximum(m, gl.max(s, 1) * factor)
    p = gl.exp2(s * factor - m_new[:, None])
    alpha = gl.exp2(m - m_new)
    return p, m_new, l * alpha + gl.sum(p, 1), alpha
