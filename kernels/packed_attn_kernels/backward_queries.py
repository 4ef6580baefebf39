"""The backward kernels by queries: dq, and the cast of the sums that the fused kernel leaves."""

# Triton's language is not Python's: its stubs know neither constexpr arguments nor tensors.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportReturnType=false, reportAssignmentType=false

import triton
import triton.language as tl

from packed_attn_kernels.rules import (
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


@triton.jit
def dq_cast_kernel(
    dq_sums_ptr,
    row_lse_ptr,
    dq_ptr,
    softmax_scale,
    total_queries,
    padded_queries,
    dq_stride_t,
    dq_stride_h,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    """dq in its dtype from the sums of the fused kernel.

    They stand `[heads, padded_queries / SUM_BLOCK, BLOCK_D, SUM_BLOCK]`: the places of a block's
    share are then constants, which take no registers of the kernel that adds.
    """
    h = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_D)
    c_ok = c < HEAD_DIM
    row = (i % SUM_BLOCK)[None, :]
    block = (h * padded_queries + i - i % SUM_BLOCK) * BLOCK_D
    sums = tl.load(dq_sums_ptr + block[None, :] + c[:, None] * SUM_BLOCK + row)
    blind = tl.load(row_lse_ptr + h * padded_queries + i) == float("inf")
    dq = tl.trans(tl.where(blind[None, :], 0.0, sums * softmax_scale))
    dq_ptrs = dq_ptr + h * dq_stride_h + tile_offsets(i, c, dq_stride_t)
    dq_ok = (i < total_queries)[:, None] & c_ok[None, :]
    tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=dq_ok)


@triton.jit(do_not_specialize=["dropout_threshold"])
def dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    row_lse_ptr,
    delta_ptr,
    dq_ptr,
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
    padded_queries,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    dout_stride_t,
    dout_stride_h,
    dq_stride_t,
    dq_stride_h,
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
    ACCURATE: tl.constexpr,
):
    """One tile of queries of one head; walks the keys as the forward does."""
    first, stop = listed_tile(tiles_ptr)
    if first == stop:
        return
    h = tl.program_id(1).to(tl.int64)
    dq_tile(
        first, stop, h, q_ptr, k_ptr, v_ptr, dout_ptr, row_lse_ptr, delta_ptr, dq_ptr, alibi_ptr,
        seed_ptr, key_start_ptr, key_stop_ptr, query_start_ptr, query_stop_ptr, query_position_ptr,
        key_position_ptr, softmax_scale, softcap, dropout_threshold, dropout_scale, total_queries,
        total_keys, padded_queries, q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t,
        v_stride_h, dout_stride_t, dout_stride_h, dq_stride_t, dq_stride_h, GROUP, HEAD_DIM,
        VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, SPAN, LOOP_STAGES, KEY_HALF, QUERY_HALF,
        HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT, ACCURATE,
    )  # fmt: skip


@triton.jit
def dq_tile(
    first,
    stop,
    h,
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    row_lse_ptr,
    delta_ptr,
    dq_ptr,
    alibi_ptr,
    seed_ptr,
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
    padded_queries,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    dout_stride_t,
    dout_stride_h,
    dq_stride_t,
    dq_stride_h,
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
    ACCURATE: tl.constexpr,
):
    """The queries [first, stop) of head h."""
    i = first + tl.arange(0, BLOCK_M)
    row_ok = i < stop
    c, cv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
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
    q_ptrs = q_ptr + h * q_stride_h + tile_offsets(i, c, q_stride_t)
    dout_ptrs = dout_ptr + h * dout_stride_h + tile_offsets(i, cv, dout_stride_t)
    q = load_tile(q_ptrs, row_ok, c < HEAD_DIM, True, HEAD_DIM < BLOCK_D)
    dout = load_tile(dout_ptrs, row_ok, cv < VALUE_DIM, True, VALUE_DIM < BLOCK_DV)
    lse = tl.load(row_lse_ptr + h * padded_queries + i, mask=row_ok, other=float("inf"))
    delta = tl.load(delta_ptr + h * padded_queries + i, mask=row_ok, other=0.0)
    n_offset = tl.arange(0, BLOCK_N)
    k_ptrs = k_ptr + (h // GROUP) * k_stride_h + block_offsets(n_offset, c, k_stride_t)
    v_ptrs = v_ptr + (h // GROUP) * v_stride_h + block_offsets(n_offset, cv, v_stride_t)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if QUERY_HALF:
        full_start, full_stop = hull_stop, hull_start
    left, full, edges = block_runs(hull_start, hull_stop, full_start, full_stop, BLOCK_N)
    if QUERY_HALF:
        first_row = tl.min(tl.where(live, i, total_queries), 0)
        last_row = tl.max(tl.where(live, i, -1), 0)
        for span in tl.range(hull_start, hull_stop, SPAN, num_stages=1):
            run_start, run_stop = seen_run(
                query_start_ptr, query_stop_ptr, span, hull_stop, first_row, last_row, SPAN
            )
            run_start = span + (run_start - span) // BLOCK_N * BLOCK_N
            for n in tl.range(run_start, run_stop, BLOCK_N, num_stages=LOOP_STAGES):
                dq = _dq_step(
                    dq, q, dout, lse, delta, k_ptrs, v_ptrs, n, i, h, key_start, key_stop,
                    query_start_ptr, query_stop_ptr, query_position, key_position_ptr,
                    softmax_scale, softcap, alibi, seed, dropout_threshold, dropout_scale,
                    total_keys, k_stride_t, v_stride_t, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV,
                    BLOCK_N, KEY_HALF, QUERY_HALF, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT, ACCURATE,
                    True, False,
                )  # fmt: skip
    else:
        for y in tl.range(0, edges, num_stages=LOOP_STAGES):
            n = hull_start + tl.where(y < left, y, y + full) * BLOCK_N
            dq = _dq_step(
                dq, q, dout, lse, delta, k_ptrs, v_ptrs, n, i, h, key_start, key_stop,
                query_start_ptr, query_stop_ptr, query_position, key_position_ptr, softmax_scale,
                softcap, alibi, seed, dropout_threshold, dropout_scale, total_keys, k_stride_t,
                v_stride_t, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, KEY_HALF, QUERY_HALF,
                HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT, ACCURATE, True, False,
            )  # fmt: skip
    if any_nonfinite(dq, live):
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for y in tl.range(0, edges, num_stages=1):
            n = hull_start + tl.where(y < left, y, y + full) * BLOCK_N
            dq = _dq_step(
                dq, q, dout, lse, delta, k_ptrs, v_ptrs, n, i, h, key_start, key_stop,
                query_start_ptr, query_stop_ptr, query_position, key_position_ptr, softmax_scale,
                softcap, alibi, seed, dropout_threshold, dropout_scale, total_keys, k_stride_t,
                v_stride_t, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, KEY_HALF, QUERY_HALF,
                HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT, ACCURATE, True, True,
            )  # fmt: skip
    if not QUERY_HALF:
        for y in tl.range(left, left + full, num_stages=LOOP_STAGES):
            dq = _dq_step(
                dq, q, dout, lse, delta, k_ptrs, v_ptrs, hull_start + y * BLOCK_N, i, h, key_start,
                key_stop, query_start_ptr, query_stop_ptr, query_position, key_position_ptr,
                softmax_scale, softcap, alibi, seed, dropout_threshold, dropout_scale, total_keys,
                k_stride_t, v_stride_t, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, KEY_HALF,
                QUERY_HALF, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT, ACCURATE, False, False,
            )  # fmt: skip

    blind = (lse == float("inf")) | ~live
    dq = tl.where(blind[:, None], 0.0, dq * softmax_scale)
    dq_ptrs = dq_ptr + h * dq_stride_h + tile_offsets(i, c, dq_stride_t)
    dq_ok = row_ok[:, None] & (c < HEAD_DIM)[None, :]
    tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=dq_ok)


@triton.jit
def _dq_step(
    dq,
    q,
    dout,
    lse,
    delta,
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
    dropout_scale,
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
    c_ok, cv_ok = tl.arange(0, BLOCK_D) < HEAD_DIM, tl.arange(0, BLOCK_DV) < VALUE_DIM
    at = tl.cast(n, tl.int64)
    k = load_tile(k_ptrs + at * k_stride_t, key_ok, c_ok, MASKED, HEAD_DIM < BLOCK_D)
    v = load_tile(v_ptrs + at * v_stride_t, key_ok, cv_ok, MASKED, VALUE_DIM < BLOCK_DV)
    if CONFINED:
        broken = nonfinite_rows(k)
        k = tl.where(broken[:, None], 0.0, k)
    s, slope = logits(dot(q, tl.trans(k), None), softmax_scale, softcap, HAS_SOFTCAP, ACCURATE)
    if HAS_ALIBI:
        key_position = tl.load(key_position_ptr + j, mask=key_ok, other=0)
        s = biased(s, alibi, query_position[:, None], key_position[None, :])
    p = weights(s - lse[:, None], ACCURATE)
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
        p = tl.where(visible, p, 0.0)
    dp = dot(dout, tl.trans(v), None)
    if HAS_DROPOUT:
        keep = kept(seed, i[:, None], j[None, :], h.to(tl.int32), dropout_threshold)
        dp = tl.where(keep, dp * dropout_scale, 0.0)
    ds = p * (dp - delta[:, None]) * slope
    if CONFINED:
        ds = tl.where(visible, tl.where(broken[None, :], float("nan"), ds), 0.0)
    return dot(ds.to(k.dtype), k, dq)
