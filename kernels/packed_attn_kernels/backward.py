"""The backward kernels by keys: delta, then dk and dv. dq is in `backward_queries.py`.

Dao, "FlashAttention-2" (2023), split so that nothing is added atomically: the gradients have the
same bits every time. Grouped queries add up inside the loop of their key tile, so k, v, dk and dv
are never expanded. As in the forward, a tile whose result holds a NaN is walked again with
non-finite operand rows taken out of the products and every row that may see one set to NaN.

FUSED makes dq in the kernel of dk and dv, which saves two of seven products: each block's share is
added to a float32 workspace atomically, in any order, and `dq_cast_kernel` writes dq. A share that
has been added cannot be taken back, so nothing may reach it that is to be walked again: a key that
is not finite enters as zeros from the start, and what may see it gets its NaN through v.
"""

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
def delta_kernel(
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    sinks_ptr,
    row_lse_ptr,
    delta_ptr,
    dsinks_ptr,
    total_queries,
    padded_queries,
    out_stride_t,
    out_stride_h,
    dout_stride_t,
    dout_stride_h,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    ACCURATE: tl.constexpr,
):
    """delta = rowsum(out * dout) - dlse, and lse in the unit of the logits.

    Both are float32 `[heads, padded_queries]` and need no bounds check: past the end, and for rows
    that see nothing, this lse is +inf, so every weight is 0, and delta is 0. A sink is a key
    without a value, so its gradient is -sum(p_sink * delta): one partial sum a tile.
    """
    h = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dv = tl.arange(0, BLOCK_DV)
    row_ok, dv_ok = i < total_queries, dv < VALUE_DIM
    lse = tl.load(lse_ptr + h * total_queries + i, mask=row_ok, other=-float("inf"))
    out_ptrs = out_ptr + h * out_stride_h + tile_offsets(i, dv, out_stride_t)
    dout_ptrs = dout_ptr + h * dout_stride_h + tile_offsets(i, dv, dout_stride_t)
    out = load_tile(out_ptrs, row_ok, dv_ok, True, VALUE_DIM < BLOCK_DV)
    dout = load_tile(dout_ptrs, row_ok, dv_ok, True, VALUE_DIM < BLOCK_DV)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + h * total_queries + i, mask=row_ok, other=0.0)
    blind = lse == -float("inf")
    delta = tl.where(blind, 0.0, delta)
    row_lse = tl.where(blind, float("inf"), in_logit_unit(lse, ACCURATE))
    tl.store(delta_ptr + h * padded_queries + i, delta)
    tl.store(row_lse_ptr + h * padded_queries + i, row_lse)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + h).to(tl.float32)
        weight = tl.where(blind, 0.0, weights(sink - lse, True))
        partial = -tl.sum(weight * delta, 0)
        tl.store(dsinks_ptr + tl.program_id(0) * tl.num_programs(1) + h, partial)


@triton.jit(do_not_specialize=["dropout_threshold"])
def dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    row_lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    dq_sums_ptr,
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
    dk_stride_t,
    dk_stride_h,
    dv_stride_t,
    dv_stride_h,
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
    FUSED: tl.constexpr,
    WITH_DK: tl.constexpr,
    WITH_DV: tl.constexpr,
):
    """One tile of keys of one kv head; flat loops over (head of the group, query block).

    Two float32 tiles as wide as head_dim 256 do not fit the registers, so one kernel then makes dk
    and another dv; what is not made is one zero.
    """
    first, stop = listed_tile(tiles_ptr)
    if first == stop:
        return
    kv_head = tl.program_id(1).to(tl.int64)
    dkdv_tile(
        first, stop, kv_head, q_ptr, k_ptr, v_ptr, dout_ptr, row_lse_ptr, delta_ptr, dk_ptr, dv_ptr,
        dq_sums_ptr, alibi_ptr, seed_ptr, key_start_ptr, key_stop_ptr, query_start_ptr,
        query_stop_ptr, query_position_ptr, key_position_ptr, softmax_scale, softcap,
        dropout_threshold, dropout_scale, total_queries, total_keys, padded_queries, q_stride_t,
        q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, dout_stride_t, dout_stride_h,
        dk_stride_t, dk_stride_h, dv_stride_t, dv_stride_h, GROUP, HEAD_DIM, VALUE_DIM, BLOCK_D,
        BLOCK_DV, BLOCK_M, BLOCK_N, SPAN, LOOP_STAGES, KEY_HALF, QUERY_HALF, HAS_SOFTCAP, HAS_ALIBI,
        HAS_DROPOUT, ACCURATE, FUSED, WITH_DK, WITH_DV,
    )  # fmt: skip


@triton.jit
def dkdv_tile(
    first,
    stop,
    kv_head,
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    row_lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    dq_sums_ptr,
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
    dk_stride_t,
    dk_stride_h,
    dv_stride_t,
    dv_stride_h,
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
    FUSED: tl.constexpr,
    WITH_DK: tl.constexpr,
    WITH_DV: tl.constexpr,
):
    """The keys [first, stop) of one kv head."""
    j = first + tl.arange(0, BLOCK_N)
    key_ok = j < stop
    c, cv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    query_start, query_stop, live, hull_start, hull_stop, full_start, full_stop = tile_interval(
        query_start_ptr, query_stop_ptr, j, stop
    )
    key_position = 0
    seed = 0
    if HAS_ALIBI:
        key_position = tl.load(key_position_ptr + j, mask=key_ok, other=0)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    k_ptrs = k_ptr + kv_head * k_stride_h + tile_offsets(j, c, k_stride_t)
    v_ptrs = v_ptr + kv_head * v_stride_h + tile_offsets(j, cv, v_stride_t)
    k = load_tile(k_ptrs, key_ok, c < HEAD_DIM, True, HEAD_DIM < BLOCK_D)
    v = load_tile(v_ptrs, key_ok, cv < VALUE_DIM, True, VALUE_DIM < BLOCK_DV)
    head = kv_head * GROUP
    m_offset = tl.arange(0, BLOCK_M)
    q_ptrs = q_ptr + head * q_stride_h + block_offsets(m_offset, c, q_stride_t)
    dout_ptrs = dout_ptr + head * dout_stride_h + block_offsets(m_offset, cv, dout_stride_t)
    row_lse_ptrs = row_lse_ptr + head * padded_queries + m_offset
    delta_ptrs = delta_ptr + head * padded_queries + m_offset
    if FUSED:
        dq_sums_ptr += head * padded_queries * BLOCK_D
        broken_key = nonfinite_rows(k)
        k = tl.where(broken_key[:, None], 0.0, k)
        # A constant in bf16 is more than triton 3.6 can interpret.
        nan = tl.where(broken_key, float("nan"), 0.0).to(v.dtype)
        v = tl.where(broken_key[:, None], nan[:, None], v)
        # Rows of no key here must not meet a query without a mask: all of them add to dq.
        full_stop = tl.where(tl.min(live.to(tl.int32), 0) == 1, full_stop, 0)

    dk = tl.zeros([BLOCK_N if WITH_DK else 1, BLOCK_D if WITH_DK else 1], tl.float32)
    dv = tl.zeros([BLOCK_N if WITH_DV else 1, BLOCK_DV if WITH_DV else 1], tl.float32)
    # Aligned blocks load lse and delta in vectors and stay inside their padding.
    hull_start = hull_start // BLOCK_M * BLOCK_M
    if KEY_HALF:
        full_start, full_stop = hull_stop, hull_start
    left, full, edges = block_runs(hull_start, hull_stop, full_start, full_stop, BLOCK_M)
    # A loop that is not entered still computes its first addresses, ahead of its loads. A division
    # by 0 there lets the compiler conclude that the loop is entered: its loads lose their guard.
    some_edges, some_full = tl.maximum(edges, 1), tl.maximum(full, 1)
    if KEY_HALF:
        first_key = tl.min(tl.where(live, j, total_keys), 0)
        last_key = tl.max(tl.where(live, j, -1), 0)
        for span in tl.range(hull_start, hull_stop, SPAN, num_stages=1):
            run_start, run_stop = seen_run(
                key_start_ptr, key_stop_ptr, span, hull_stop, first_key, last_key, SPAN
            )
            # Blocks stay on the span's grid, so no query is met in two spans.
            run_start = span + (run_start - span) // BLOCK_M * BLOCK_M
            blocks = tl.cdiv(tl.maximum(run_stop - run_start, 0), BLOCK_M)
            some_blocks = tl.maximum(blocks, 1)
            for x in tl.range(0, blocks * GROUP, num_stages=LOOP_STAGES):
                at = tl.multiple_of(run_start + x % some_blocks * BLOCK_M, BLOCK_M)
                dk, dv = _dkdv_step(
                    dk, dv, k, v, q_ptrs, dout_ptrs, row_lse_ptrs, delta_ptrs, dq_sums_ptr, at, x //
                    some_blocks, j, head, query_start, query_stop, key_start_ptr, key_stop_ptr,
                    query_position_ptr, key_position, softmax_scale, softcap, alibi_ptr, seed,
                    dropout_threshold, dropout_scale, total_queries, padded_queries, q_stride_t,
                    q_stride_h, dout_stride_t, dout_stride_h, HEAD_DIM, VALUE_DIM, BLOCK_D,
                    BLOCK_DV, BLOCK_M, KEY_HALF, QUERY_HALF, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT,
                    ACCURATE, FUSED, WITH_DK, WITH_DV, True, False,
                )  # fmt: skip
    else:
        for x in tl.range(0, edges * GROUP, num_stages=LOOP_STAGES):
            y = x % some_edges
            at = tl.multiple_of(hull_start + tl.where(y < left, y, y + full) * BLOCK_M, BLOCK_M)
            dk, dv = _dkdv_step(
                dk, dv, k, v, q_ptrs, dout_ptrs, row_lse_ptrs, delta_ptrs, dq_sums_ptr, at, x //
                some_edges, j, head, query_start, query_stop, key_start_ptr, key_stop_ptr,
                query_position_ptr, key_position, softmax_scale, softcap, alibi_ptr, seed,
                dropout_threshold, dropout_scale, total_queries, padded_queries, q_stride_t,
                q_stride_h, dout_stride_t, dout_stride_h, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV,
                BLOCK_M, KEY_HALF, QUERY_HALF, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT, ACCURATE, FUSED,
                WITH_DK, WITH_DV, True, False,
            )  # fmt: skip
    # Full blocks cannot leak: checking between the runs leaves their code and order as they are.
    if WITH_DK and WITH_DV:
        leaks = any_nonfinite(dk, live) | any_nonfinite(dv, live)
    elif WITH_DK:
        leaks = any_nonfinite(dk, live)
    else:
        leaks = any_nonfinite(dv, live)
    if leaks:
        dk = tl.zeros_like(dk)
        dv = tl.zeros_like(dv)
        for x in tl.range(0, edges * GROUP, num_stages=1):
            y = x % some_edges
            at = tl.multiple_of(hull_start + tl.where(y < left, y, y + full) * BLOCK_M, BLOCK_M)
            dk, dv = _dkdv_step(
                dk, dv, k, v, q_ptrs, dout_ptrs, row_lse_ptrs, delta_ptrs, dq_sums_ptr, at, x //
                some_edges, j, head, query_start, query_stop, key_start_ptr, key_stop_ptr,
                query_position_ptr, key_position, softmax_scale, softcap, alibi_ptr, seed,
                dropout_threshold, dropout_scale, total_queries, padded_queries, q_stride_t,
                q_stride_h, dout_stride_t, dout_stride_h, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV,
                BLOCK_M, KEY_HALF, QUERY_HALF, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT, ACCURATE, False,
                WITH_DK, WITH_DV, True, True,
            )  # fmt: skip
    if not KEY_HALF:
        for x in tl.range(0, full * GROUP, num_stages=LOOP_STAGES):
            at = tl.multiple_of(hull_start + (left + x % some_full) * BLOCK_M, BLOCK_M)
            dk, dv = _dkdv_step(
                dk, dv, k, v, q_ptrs, dout_ptrs, row_lse_ptrs, delta_ptrs, dq_sums_ptr, at, x //
                some_full, j, head, query_start, query_stop, key_start_ptr, key_stop_ptr,
                query_position_ptr, key_position, softmax_scale, softcap, alibi_ptr, seed,
                dropout_threshold, dropout_scale, total_queries, padded_queries, q_stride_t,
                q_stride_h, dout_stride_t, dout_stride_h, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV,
                BLOCK_M, KEY_HALF, QUERY_HALF, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT, ACCURATE, FUSED,
                WITH_DK, WITH_DV, False, False,
            )  # fmt: skip

    if FUSED:
        dv = tl.where(broken_key[:, None], float("nan"), dv)
    if WITH_DK:
        dk = tl.where(live[:, None], dk * softmax_scale, 0.0)
        dk_ptrs = dk_ptr + kv_head * dk_stride_h + tile_offsets(j, c, dk_stride_t)
        dk_ok = key_ok[:, None] & (c < HEAD_DIM)[None, :]
        tl.store(dk_ptrs, dk.to(dk_ptr.dtype.element_ty), mask=dk_ok)
    if WITH_DV:
        if HAS_DROPOUT:
            dv *= dropout_scale
        dv = tl.where(live[:, None], dv, 0.0)
        dv_ptrs = dv_ptr + kv_head * dv_stride_h + tile_offsets(j, cv, dv_stride_t)
        dv_ok = key_ok[:, None] & (cv < VALUE_DIM)[None, :]
        tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=dv_ok)


@triton.jit
def _dkdv_step(
    dk,
    dv,
    k,
    v,
    q_ptrs,
    dout_ptrs,
    row_lse_ptrs,
    delta_ptrs,
    dq_sums_ptr,
    at,
    g,
    j,
    head,
    query_start,
    query_stop,
    key_start_ptr,
    key_stop_ptr,
    query_position_ptr,
    key_position,
    softmax_scale,
    softcap,
    alibi_ptr,
    seed,
    dropout_threshold,
    dropout_scale,
    total_queries,
    padded_queries,
    q_stride_t,
    q_stride_h,
    dout_stride_t,
    dout_stride_h,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEY_HALF: tl.constexpr,
    QUERY_HALF: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    ACCURATE: tl.constexpr,
    FUSED: tl.constexpr,
    WITH_DK: tl.constexpr,
    WITH_DV: tl.constexpr,
    MASKED: tl.constexpr,
    CONFINED: tl.constexpr,
):
    """One block of queries, from token `at`, of head g of the group; scores are transposed."""
    i = at + tl.arange(0, BLOCK_M)
    row_ok = i < total_queries
    c_ok, cv_ok = tl.arange(0, BLOCK_D) < HEAD_DIM, tl.arange(0, BLOCK_DV) < VALUE_DIM
    at, g = tl.cast(at, tl.int64), tl.cast(g, tl.int64)
    q_ptrs += at * q_stride_t + g * q_stride_h
    q = load_tile(q_ptrs, row_ok, c_ok, MASKED, HEAD_DIM < BLOCK_D)
    dout_ptrs += at * dout_stride_t + g * dout_stride_h
    dout = load_tile(dout_ptrs, row_ok, cv_ok, MASKED, VALUE_DIM < BLOCK_DV)
    lse = tl.load(row_lse_ptrs + g * padded_queries + at)
    delta = tl.load(delta_ptrs + g * padded_queries + at)
    if CONFINED:
        broken = nonfinite_rows(q) | nonfinite_rows(dout)
        q = tl.where(broken[:, None], 0.0, q)
        dout = tl.where(broken[:, None], 0.0, dout)
    s, slope = logits(dot(k, tl.trans(q), None), softmax_scale, softcap, HAS_SOFTCAP, ACCURATE)
    if HAS_ALIBI:
        alibi = in_logit_unit(tl.load(alibi_ptr + head + g), ACCURATE)
        query_position = tl.load(query_position_ptr + i, mask=row_ok, other=0)
        s = biased(s, alibi, query_position[None, :], key_position[:, None])
    p = weights(s - lse[None, :], ACCURATE)
    if MASKED:
        key_start = 0
        key_stop = 0
        if KEY_HALF:
            key_start = tl.load(key_start_ptr + i, mask=row_ok, other=0)[None, :]
            key_stop = tl.load(key_stop_ptr + i, mask=row_ok, other=0)[None, :]
        visible = sees(
            i[None, :], j[:, None], key_start, key_stop, query_start[:, None],
            query_stop[:, None], KEY_HALF, QUERY_HALF,
        )  # fmt: skip
        if CONFINED:
            # A row that sees nothing takes no part, whatever it holds.
            visible &= (lse != float("inf"))[None, :]
            p = tl.where(broken[None, :], float("nan"), p)
        p = tl.where(visible, p, 0.0)
    kept_p = p
    if HAS_DROPOUT:
        keep = kept(seed, i[None, :], j[:, None], (head + g).to(tl.int32), dropout_threshold)
        kept_p = tl.where(keep, p, 0.0)
    # dv before dp: the other order keeps p longer and spills.
    if WITH_DV:
        dv = dot(kept_p.to(dout.dtype), dout, dv)
    if WITH_DK:
        dp = dot(v, tl.trans(dout), None)
        if HAS_DROPOUT:
            dp = tl.where(keep, dp * dropout_scale, 0.0)
        ds = p * (dp - delta[None, :]) * slope
        if CONFINED or (FUSED and MASKED):
            ds = tl.where(visible, ds, 0.0)
        ds = ds.to(q.dtype)
        dk = dot(ds, q, dk)
    if FUSED:
        # Transposed: head_dim fills the 64 rows that wgmma wants, a block of queries may not.
        share = dot(tl.trans(k), ds, None)
        sums = dq_sums_ptr + (g * padded_queries + at) * BLOCK_D
        place = tl.arange(0, BLOCK_D)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        tl.atomic_add(sums + place, share, sem="relaxed")
    return dk, dv
