"""The forward kernel: online softmax over the keys that each tile of queries may see.

Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Dao, "FlashAttention-2"
(2023). The mask is the interval rule of `rules.sees`, so tiles need no alignment to documents.

A zero weight does not stop a NaN: in a block that two documents share, 0 x NaN reaches the other.
A leak of that kind always ends as a NaN in the accumulator. The kernel therefore runs plain and,
where its edge blocks left a NaN, walks them again with non-finite rows of v taken out of the
product and every output row that may see one set to NaN. Finite inputs pay one reduction.
"""

# Triton's language is not Python's: its stubs know neither constexpr arguments nor tensors.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportReturnType=false, reportAssignmentType=false

import triton
import triton.language as tl

from packed_attn_kernels.rules import (
    LN2,
    LOWEST,
    any_nonfinite,
    biased,
    block_offsets,
    block_runs,
    dot,
    in_logit_unit,
    kept,
    listed_tile,
    load_tile,
    logits,
    nonfinite_rows,
    seen_run,
    sees,
    tile_interval,
    tile_offsets,
    weights,
)


@triton.jit(do_not_specialize=["dropout_threshold"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    sinks_ptr,
    alibi_ptr,
    seed_ptr,
    tiles_ptr,
    key_start_ptr,
    key_stop_ptr,
    query_start_ptr,
    query_stop_ptr,
    query_position_ptr,
    key_position_ptr,
    softmax_scale,
    softcap,
    dropout_threshold,
    dropout_scale,
    total_queries,
    total_keys,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    out_stride_t,
    out_stride_h,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPAN: tl.constexpr,
    LOOP_STAGES: tl.constexpr,
    KEY_HALF: tl.constexpr,
    QUERY_HALF: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    ACCURATE: tl.constexpr,
):
    """One tile of queries of one head: out in q's dtype and lse, natural, float32."""
    first, stop = listed_tile(tiles_ptr)
    if first == stop:
        return
    h = tl.program_id(1).to(tl.int64)
    i = first + tl.arange(0, BLOCK_M)
    row_ok = i < stop
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    key_start, key_stop, live, hull_start, hull_stop, full_start, full_stop = tile_interval(
        key_start_ptr, key_stop_ptr, i, stop
    )
    query_position = 0
    alibi = 0.0
    seed = 0
    if HAS_ALIBI:
        query_position = tl.load(query_position_ptr + i, mask=row_ok, other=0)
        alibi = in_logit_unit(tl.load(alibi_ptr + h), ACCURATE)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    q_ptrs = q_ptr + h * q_stride_h + tile_offsets(i, d, q_stride_t)
    q = load_tile(q_ptrs, row_ok, d < HEAD_DIM, True, HEAD_DIM < BLOCK_D)
    n_offset = tl.arange(0, BLOCK_N)
    k_ptrs = k_ptr + (h // GROUP) * k_stride_h + block_offsets(n_offset, d, k_stride_t)
    v_ptrs = v_ptr + (h // GROUP) * v_stride_h + block_offsets(n_offset, dv, v_stride_t)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m, l = _empty_softmax(sinks_ptr, h, BLOCK_M, HAS_SINKS, ACCURATE)
    if QUERY_HALF:
        # Siblings come and go in a forest: every block is an edge.
        full_start, full_stop = hull_stop, hull_start
    left, full, edges = block_runs(hull_start, hull_stop, full_start, full_stop, BLOCK_N)
    if QUERY_HALF:
        first_row = tl.min(tl.where(live, i, total_queries), 0)
        last_row = tl.max(tl.where(live, i, -1), 0)
        for span in tl.range(hull_start, hull_stop, SPAN, num_stages=1):
            run_start, run_stop = seen_run(
                query_start_ptr, query_stop_ptr, span, hull_stop, first_row, last_row, SPAN
            )
            # Blocks stay on the span's grid, so no key is met in two spans.
            run_start = span + (run_start - span) // BLOCK_N * BLOCK_N
            for n in tl.range(run_start, run_stop, BLOCK_N, num_stages=LOOP_STAGES):
                acc, m, l = _forward_step(
                    acc, m, l, q, k_ptrs, v_ptrs, n, i, h, key_start, key_stop, query_start_ptr,
                    query_stop_ptr, query_position, key_position_ptr, softmax_scale, softcap, alibi,
                    seed, dropout_threshold, total_keys, k_stride_t, v_stride_t, HEAD_DIM,
                    VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, KEY_HALF, QUERY_HALF, HAS_SOFTCAP,
                    HAS_ALIBI, HAS_DROPOUT, ACCURATE, True, False,
                )  # fmt: skip
    else:
        for y in tl.range(0, edges, num_stages=LOOP_STAGES):
            n = hull_start + tl.where(y < left, y, y + full) * BLOCK_N
            acc, m, l = _forward_step(
                acc, m, l, q, k_ptrs, v_ptrs, n, i, h, key_start, key_stop, query_start_ptr,
                query_stop_ptr, query_position, key_position_ptr, softmax_scale, softcap, alibi,
                seed, dropout_threshold, total_keys, k_stride_t, v_stride_t, HEAD_DIM, VALUE_DIM,
                BLOCK_D, BLOCK_DV, BLOCK_N, KEY_HALF, QUERY_HALF, HAS_SOFTCAP, HAS_ALIBI,
                HAS_DROPOUT, ACCURATE, True, False,
            )  # fmt: skip
    # Full blocks cannot leak: checking between the runs leaves their code and order as they are.
    if any_nonfinite(acc, live):
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        m, l = _empty_softmax(sinks_ptr, h, BLOCK_M, HAS_SINKS, ACCURATE)
        for y in tl.range(0, edges, num_stages=1):
            n = hull_start + tl.where(y < left, y, y + full) * BLOCK_N
            acc, m, l = _forward_step(
                acc, m, l, q, k_ptrs, v_ptrs, n, i, h, key_start, key_stop, query_start_ptr,
                query_stop_ptr, query_position, key_position_ptr, softmax_scale, softcap, alibi,
                seed, dropout_threshold, total_keys, k_stride_t, v_stride_t, HEAD_DIM, VALUE_DIM,
                BLOCK_D, BLOCK_DV, BLOCK_N, KEY_HALF, QUERY_HALF, HAS_SOFTCAP, HAS_ALIBI,
                HAS_DROPOUT, ACCURATE, True, True,
            )  # fmt: skip
    if not QUERY_HALF:
        for y in tl.range(left, left + full, num_stages=LOOP_STAGES):
            acc, m, l = _forward_step(
                acc, m, l, q, k_ptrs, v_ptrs, hull_start + y * BLOCK_N, i, h, key_start, key_stop,
                query_start_ptr, query_stop_ptr, query_position, key_position_ptr, softmax_scale,
                softcap, alibi, seed, dropout_threshold, total_keys, k_stride_t, v_stride_t,
                HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, KEY_HALF, QUERY_HALF, HAS_SOFTCAP,
                HAS_ALIBI, HAS_DROPOUT, ACCURATE, False, False,
            )  # fmt: skip

    blind = (l == 0.0) | ~live
    out = tl.where(blind[:, None], 0.0, acc / tl.where(blind, 1.0, l)[:, None])
    if HAS_DROPOUT:
        out *= dropout_scale
    if ACCURATE:
        lse = m + tl.log(tl.where(blind, 1.0, l))
    else:
        lse = (m + tl.log2(tl.where(blind, 1.0, l))) * LN2
    lse = tl.where(blind, -float("inf"), lse)
    out_ptrs = out_ptr + h * out_stride_h + tile_offsets(i, dv, out_stride_t)
    tl.store(
        out_ptrs, out.to(out_ptr.dtype.element_ty), mask=row_ok[:, None] & (dv < VALUE_DIM)[None, :]
    )
    tl.store(lse_ptr + h * total_queries + i, lse, mask=row_ok)


@triton.jit
def _empty_softmax(
    sinks_ptr, h, BLOCK_M: tl.constexpr, HAS_SINKS: tl.constexpr, ACCURATE: tl.constexpr
):
    """The running maximum and sum before the first key."""
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        # A sink is a key without a value that every row has seen before the loop.
        sink = in_logit_unit(tl.load(sinks_ptr + h).to(tl.float32), ACCURATE)
        m = tl.zeros([BLOCK_M], tl.float32) + sink
        l += 1.0
    return m, l


@triton.jit
def _forward_step(
    acc,
    m,
    l,
    q,
    k_ptrs,
    v_ptrs,
    n,
    i,
    h,
    key_start,
    key_stop,
    query_start_ptr,
    query_stop_ptr,
    query_position,
    key_position_ptr,
    softmax_scale,
    softcap,
    alibi,
    seed,
    dropout_threshold,
    total_keys,
    k_stride_t,
    v_stride_t,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEY_HALF: tl.constexpr,
    QUERY_HALF: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    ACCURATE: tl.constexpr,
    MASKED: tl.constexpr,
    CONFINED: tl.constexpr,
):
    """One block of keys; k_ptrs and v_ptrs point at block 0."""
    j = n + tl.arange(0, BLOCK_N)
    key_ok = j < total_keys
    d_ok, dv_ok = tl.arange(0, BLOCK_D) < HEAD_DIM, tl.arange(0, BLOCK_DV) < VALUE_DIM
    at = tl.cast(n, tl.int64)
    k = load_tile(k_ptrs + at * k_stride_t, key_ok, d_ok, MASKED, HEAD_DIM < BLOCK_D)
    s, _ = logits(dot(q, tl.trans(k), None), softmax_scale, softcap, HAS_SOFTCAP, ACCURATE)
    if HAS_ALIBI:
        key_position = tl.load(key_position_ptr + j, mask=key_ok, other=0)
        s = biased(s, alibi, query_position[:, None], key_position[None, :])
    if MASKED:
        query_start = 0
        query_stop = 0
        if QUERY_HALF:
            query_start = tl.load(query_start_ptr + j, mask=key_ok, other=0)[None, :]
            query_stop = tl.load(query_stop_ptr + j, mask=key_ok, other=0)[None, :]
        visible = sees(
            i[:, None], j[None, :], key_start[:, None], key_stop[:, None],
            query_start, query_stop, KEY_HALF, QUERY_HALF,
        )  # fmt: skip
        s = tl.where(visible, s, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    p = weights(s - m_new[:, None], ACCURATE)
    alpha = weights(m - m_new, ACCURATE)
    l = l * alpha + tl.sum(p, 1)
    if HAS_DROPOUT:
        p = tl.where(kept(seed, i[:, None], j[None, :], h.to(tl.int32), dropout_threshold), p, 0.0)
    v = load_tile(v_ptrs + at * v_stride_t, key_ok, dv_ok, MASKED, VALUE_DIM < BLOCK_DV)
    if CONFINED:
        broken = nonfinite_rows(v)
        p = tl.where(visible, tl.where(broken[None, :], float("nan"), p), 0.0)
        v = tl.where(broken[:, None], 0.0, v)
    acc = dot(p.to(v.dtype), v, acc * alpha[:, None])
    return acc, m_new, l
