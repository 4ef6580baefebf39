"""What the consumers of `hopper_forward.py` do with the blocks of an item: online softmax.

A warpgroup starts q.k of the next block before it exponentiates this one, so its tensor cores work
meanwhile. Block y of an item is the at-th of its program: it stands in slot at % STAGES, and the
phase of the barriers there is at // STAGES.
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
def walk(
    HALF: gl.constexpr,
    acc,
    m,
    l,
    rings,
    own,
    hull_start,
    start,
    end,
    blocks,
    edge,
    through,
    before,
    turn,
    numbers,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    TAKE_TURNS: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    SCORES: gl.constexpr,
    SUMS: gl.constexpr,
):
    """All blocks of an item: the products of one while the one before is exponentiated."""
    q, k, v, _, k_full, v_full, q_empty, k_empty, v_empty = rings
    softmax_scale, softcap = numbers
    if blocks > 0:
        slot = before % STAGES
        mbarrier.wait(k_full.index(slot), (before // STAGES) & 1)
        none = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, SCORES)
        products = warpgroup_mma(
            q.index(HALF), k.index(slot).permute((1, 0)), none, use_acc=False, is_async=True
        )
        s = warpgroup_mma_wait(0, deps=[products])
        mbarrier.arrive(k_empty.index(slot))
        s, factor = _logits(s, softmax_scale, softcap, HAS_SOFTCAP)
        s = _visible(s, hull_start, start, end, BLOCK_N, SCORES)
        weights, m, l, _alpha = _softmax_step(s, factor, m, l)
        p = gl.convert_layout(weights.to(q.dtype), gl.DotOperandLayout(0, SUMS, 2))
        after = before + 1
        mbarrier.wait(k_full.index(after % STAGES), (after // STAGES) & 1, pred=blocks > 1)
        # Three loops: a branch between a product and its wait would make the wait come first.
        for y in range(1, edge):
            p, acc, m, l = _step(
                y, True, HALF, p, acc, m, l, rings, own, hull_start, start, end, blocks, before,
                turn, numbers, BLOCK_N, STAGES, TAKE_TURNS, HAS_SOFTCAP, SCORES, SUMS,
            )  # fmt: skip
        for y in range(edge, through):
            p, acc, m, l = _step(
                y, False, HALF, p, acc, m, l, rings, own, hull_start, start, end, blocks, before,
                turn, numbers, BLOCK_N, STAGES, TAKE_TURNS, HAS_SOFTCAP, SCORES, SUMS,
            )  # fmt: skip
        for y in range(through, blocks):
            p, acc, m, l = _step(
                y, True, HALF, p, acc, m, l, rings, own, hull_start, start, end, blocks, before,
                turn, numbers, BLOCK_N, STAGES, TAKE_TURNS, HAS_SOFTCAP, SCORES, SUMS,
            )  # fmt: skip
        mbarrier.arrive(q_empty.index(HALF))
        last = before + blocks - 1
        mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
        sums = warpgroup_mma(p, v.index(last % STAGES), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[sums])
        mbarrier.arrive(v_empty.index(last % STAGES))
    else:
        mbarrier.arrive(q_empty.index(HALF))
    return acc, m, l


@gluon.jit
def _step(
    y,
    MASKED: gl.constexpr,
    HALF: gl.constexpr,
    p,
    acc,
    m,
    l,
    rings,
    own,
    hull_start,
    start,
    end,
    blocks,
    before,
    turn,
    numbers,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    TAKE_TURNS: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    SCORES: gl.constexpr,
    SUMS: gl.constexpr,
):
    """The weights of block y, whose k has come; meanwhile p, those of the block before, times v."""
    q, k, v, _, k_full, v_full, _, k_empty, v_empty = rings
    softmax_scale, softcap = numbers
    turns = own[2]
    at = before + y
    slot = at % STAGES
    last = (at - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((at - 1) // STAGES) & 1)
    if TAKE_TURNS:
        # The upper half goes first: its turn n waits for the lower half's turn n - 1.
        mbarrier.wait(turns.index(HALF), (turn + y + HALF) & 1)
    none = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, SCORES)
    products = warpgroup_mma(
        q.index(HALF), k.index(slot).permute((1, 0)), none, use_acc=False, is_async=True
    )
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
    after = at + 1
    mbarrier.wait(k_full.index(after % STAGES), (after // STAGES) & 1, pred=y + 1 < blocks)
    acc = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(v_empty.index(last))
    p = gl.convert_layout(weights.to(q.dtype), gl.DotOperandLayout(0, SUMS, 2))
    return p, acc * gl.convert_layout(alpha, gl.SliceLayout(1, SUMS))[:, None], m, l


@gluon.jit
def confined_step(
    at,
    HALF: gl.constexpr,
    acc,
    m,
    l,
    rings,
    own,
    n,
    start,
    end,
    numbers,
    HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    SCORES: gl.constexpr,
    SUMS: gl.constexpr,
):
    """The block of the keys from n on, with non-finite rows of v taken out of the product.

    A row that sees one becomes NaN; the others have the products of `_step`, bit by bit.
    """
    q, k, v, _, k_full, v_full, _, k_empty, v_empty = rings
    softmax_scale, softcap = numbers
    clean = own[1].index(HALF)
    slot = at % STAGES
    phase = (at // STAGES) & 1
    mbarrier.wait(v_full.index(slot), phase)
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    block = v.index(slot).load(COPY)
    mbarrier.arrive(v_empty.index(slot))
    broken = gl.max(gl.where(gl.abs(block.to(gl.float32)) < float("inf"), 0, 1), 1)
    hurt = gl.where(gl.convert_layout(broken, gl.SliceLayout(0, SCORES)) != 0, float("nan"), 0.0)
    clean.store(gl.where(broken[:, None] != 0, 0.0, block.to(gl.float32)).to(block.dtype))
    fence_async_shared()
    barrier()
    mbarrier.wait(k_full.index(slot), phase)
    none = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, SCORES)
    products = warpgroup_mma(
        q.index(HALF), k.index(slot).permute((1, 0)), none, use_acc=False, is_async=True
    )
    s = warpgroup_mma_wait(0, deps=[products])
    mbarrier.arrive(k_empty.index(slot))
    s, factor = _logits(s, softmax_scale, softcap, HAS_SOFTCAP)
    s = _visible(s, n, start, end, BLOCK_N, SCORES)
    weights, m, l, alpha = _softmax_step(s, factor, m, l)
    j = n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
    sees = (start[:, None] <= j[None, :]) & (j[None, :] < end[:, None])
    weights = gl.where(sees, weights + hurt[None, :], 0.0)
    p = gl.convert_layout(weights.to(q.dtype), gl.DotOperandLayout(0, SUMS, 2))
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
