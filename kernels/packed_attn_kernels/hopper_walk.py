"""What the consumers of `hopper_forward.py` do with the blocks of an item: online softmax.

A warpgroup starts q.k of the next block before it exponentiates this one: the tensor cores work
meanwhile, and the next block's scores are there when it comes to them. Block y of an item is the
at-th of its program: it stands in slot at % STAGES, and the phase of the barriers there is
at // STAGES.
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
    mine,
    acc,
    m,
    l,
    rings,
    hull_start,
    start,
    end,
    blocks,
    edge,
    through,
    before,
    numbers,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    OUT_IN_Q: gl.constexpr,
    UNROLLED: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    SCORES: gl.constexpr,
    SUMS: gl.constexpr,
):
    """All blocks of an item, whose q of this warpgroup is the ring's `mine`.

    Those from `edge` to `through` are seen by all of its rows.
    """
    q, k, v, _, k_full, v_full, q_empty, k_empty, v_empty = rings
    if blocks > 0:
        slot = before % STAGES
        mbarrier.wait(k_full.index(slot), (before // STAGES) & 1)
        none = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, SCORES)
        products = warpgroup_mma(
            q.index(mine), k.index(slot).permute((1, 0)), none, use_acc=False, is_async=True
        )
        s = warpgroup_mma_wait(0, deps=[products])
        mbarrier.arrive(k_empty.index(slot))
        for y in range(0, edge):
            s, acc, m, l = _step(
                y, True, mine, s, acc, m, l, rings, hull_start, start, end, before, numbers,
                BLOCK_N, STAGES, HAS_SOFTCAP, SCORES, SUMS,
            )  # fmt: skip
        # Two at a time, the scores of one block stand where those of the next but one will.
        rounds = (through - edge) // UNROLLED
        for turn in range(0, rounds):
            for which in gl.static_range(UNROLLED):
                s, acc, m, l = _step(
                    edge + UNROLLED * turn + which, False, mine, s, acc, m, l, rings, hull_start,
                    start, end, before, numbers, BLOCK_N, STAGES, HAS_SOFTCAP, SCORES, SUMS,
                )  # fmt: skip
        for y in range(edge + UNROLLED * rounds, blocks - 1):
            s, acc, m, l = _step(
                y, True, mine, s, acc, m, l, rings, hull_start, start, end, before, numbers,
                BLOCK_N, STAGES, HAS_SOFTCAP, SCORES, SUMS,
            )  # fmt: skip
        if not OUT_IN_Q:
            mbarrier.arrive(q_empty.index(mine))
        last = before + blocks - 1
        mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
        s, factor = _seen(
            blocks - 1, True, s, hull_start, start, end, numbers, BLOCK_N, HAS_SOFTCAP, SCORES
        )
        sums, m, l = _weighted(s, factor, acc, m, l, v.index(last % STAGES), SUMS)
        acc = warpgroup_mma_wait(0, deps=[sums])
        mbarrier.arrive(v_empty.index(last % STAGES))
    elif not OUT_IN_Q:
        mbarrier.arrive(q_empty.index(mine))
    return acc, m, l


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
    hull_start,
    start,
    end,
    before,
    numbers,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    SCORES: gl.constexpr,
    SUMS: gl.constexpr,
):
    """Adds block y, whose products with q are s, and returns those of the block after it."""
    q, k, v, _, k_full, v_full, _, k_empty, v_empty = rings
    at = before + y
    after = at + 1
    # Before the waits, or its comparisons would be kept in registers across them.
    s, factor = _seen(y, MASKED, s, hull_start, start, end, numbers, BLOCK_N, HAS_SOFTCAP, SCORES)
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
def _seen(
    y, MASKED: gl.constexpr, s, hull_start, start, end, numbers, BLOCK_N: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """The scores of block y, and what makes them logits; see `_logits`."""
    s, factor = _logits(s, numbers[0], numbers[1], HAS_SOFTCAP)
    if MASKED:
        s = _visible(s, hull_start + y * BLOCK_N, start, end, BLOCK_N, SCORES)
    return s, factor


@gluon.jit
def _weighted(s, factor, acc, m, l, v, SUMS: gl.constexpr):
    """Starts the weights times v, on top of the sums so far by the new maximum."""
    weights, m, l, alpha = _softmax_step(s, factor, m, l)
    acc *= gl.convert_layout(alpha, gl.SliceLayout(1, SUMS))[:, None]
    p = gl.convert_layout(weights.to(v.dtype), gl.DotOperandLayout(0, SUMS, 2))
    return warpgroup_mma(p, v, acc, is_async=True), m, l


@gluon.jit
def confined_step(
    at,
    HALF: gl.constexpr,
    mine,
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
    clean = own[1].index(HALF)
    slot = at % STAGES
    phase = (at // STAGES) & 1
    mbarrier.wait(v_full.index(slot), phase)
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    block = v.index(slot).load(COPY)
    mbarrier.arrive(v_empty.index(slot))
    broken = gl.max(gl.where(gl.abs(block.to(gl.float32)) < float("inf"), 0, 1), 1)
    column = gl.convert_layout(broken, gl.SliceLayout(0, SCORES)) != 0
    sees = _sees(n, start, end, BLOCK_N, SCORES)
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
    s, factor = _seen(0, True, s, n, start, end, numbers, BLOCK_N, HAS_SOFTCAP, SCORES)
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
def _visible(s, n, start, end, BLOCK_N: gl.constexpr, SCORES: gl.constexpr):
    """Scores of the keys from n on with -inf where a row does not see one."""
    return gl.where(_sees(n, start, end, BLOCK_N, SCORES), s, -float("inf"))


@gluon.jit
def _sees(n, start, end, BLOCK_N: gl.constexpr, SCORES: gl.constexpr):
    """Whether each row sees each of the keys from n on."""
    j = n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
    return (start[:, None] <= j[None, :]) & (j[None, :] < end[:, None])


@gluon.jit
def _softmax_step(s, factor, m, l):
    """Weights of one block, the new maximum and sum, and the factor of what came before."""
    m_new = gl.maximum(m, gl.max(s, 1) * factor)
    p = gl.exp2(s * factor - m_new[:, None])
    alpha = gl.exp2(m - m_new)
    return p, m_new, l * alpha + gl.sum(p, 1), alpha
