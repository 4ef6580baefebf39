"""What follows the backward of `hopper_backward.py`: dq from its sums, and the repair.

A share of dq that holds a NaN of another document cannot be taken back, so one flag for the whole
backward says that a result is not finite, and then the portable kernels, which confine NaNs, write
dq, dk and dv again. Where the flag is not set their few programs end at once.
"""

# Triton's language is not Python's: its stubs know neither constexpr arguments nor tensors.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportReturnType=false, reportAssignmentType=false

import triton
import triton.language as tl

from packed_attn_kernels.backward import dkdv_tile
from packed_attn_kernels.backward_queries import dq_tile
from packed_attn_kernels.rules import any_nonfinite, tile_offsets

# Rows and columns of a share.
SHARE: tl.constexpr = tl.constexpr(64)


@triton.jit
def shares_cast_kernel(
    dq_sums_ptr,
    row_lse_ptr,
    dq_ptr,
    flag_ptr,
    softmax_scale,
    total_queries,
    padded_queries,
    dq_stride_t,
    dq_stride_h,
    HEAD_DIM: tl.constexpr,
):
    """dq of 64 rows and columns in its dtype from their sum, whose order `_share` gives; the flag.

    The sums stand `[heads, padded_queries / 64, HEAD_DIM / 64, 64 * 64]`.
    """
    h = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    part = tl.program_id(2)
    i = block * SHARE + tl.arange(0, SHARE)
    c = part * SHARE + tl.arange(0, SHARE)
    number = (h * (padded_queries // SHARE) + block) * (HEAD_DIM // SHARE) + part
    sums = tl.load(dq_sums_ptr + number * SHARE * SHARE + tl.arange(0, SHARE * SHARE))
    sums = tl.permute(tl.reshape(sums, [8, 4, 8, 4, 2, 2]), [1, 4, 2, 0, 3, 5])
    sums = tl.reshape(sums, [SHARE, SHARE])
    blind = tl.load(row_lse_ptr + h * padded_queries + i) == float("inf")
    if any_nonfinite(sums, ~blind):
        tl.store(flag_ptr, 1)
    dq = tl.where(blind[:, None], 0.0, sums * softmax_scale)
    dq_ptrs = dq_ptr + h * dq_stride_h + tile_offsets(i, c, dq_stride_t)
    tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=(i < total_queries)[:, None])


@triton.jit(do_not_specialize=["tiles", "kv_heads"])
def repair_dkdv_kernel(
    flag_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    row_lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    tiles_ptr,
    query_start_ptr,
    query_stop_ptr,
    softmax_scale,
    tiles,
    kv_heads,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of all tiles of keys, if the flag is set."""
    if tl.load(flag_ptr) == 0:
        return
    for slot in tl.range(tl.program_id(0), tiles * kv_heads, tl.num_programs(0), num_stages=1):
        first = tl.load(tiles_ptr + 2 * (slot // kv_heads))
        stop = tl.load(tiles_ptr + 2 * (slot // kv_heads) + 1)
        if first < stop:
            kv_head = tl.cast(slot % kv_heads, tl.int64)
            dkdv_tile(
                first, stop, kv_head, q_ptr, k_ptr, v_ptr, dout_ptr, row_lse_ptr, delta_ptr, dk_ptr,
                dv_ptr, None, None, None, None, None, query_start_ptr, query_stop_ptr, None, None,
                softmax_scale, None, None, None, total_queries, total_keys, padded_queries,
                q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
                dout_stride_t, dout_stride_h, dk_stride_t, dk_stride_h, dv_stride_t, dv_stride_h,
                GROUP, HEAD_DIM, HEAD_DIM, HEAD_DIM, HEAD_DIM, BLOCK_M, BLOCK_N, 0, 1, False, True,
                False, False, False, False, False, True, True,
            )  # fmt: skip


@triton.jit(do_not_specialize=["tiles", "heads"])
def repair_dq_kernel(
    flag_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    row_lse_ptr,
    delta_ptr,
    dq_ptr,
    tiles_ptr,
    key_start_ptr,
    key_stop_ptr,
    query_start_ptr,
    query_stop_ptr,
    softmax_scale,
    tiles,
    heads,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPAN: tl.constexpr,
    KEY_HALF: tl.constexpr,
    QUERY_HALF: tl.constexpr,
):
    """dq of all tiles of queries, if the flag is set."""
    if tl.load(flag_ptr) == 0:
        return
    for slot in tl.range(tl.program_id(0), tiles * heads, tl.num_programs(0), num_stages=1):
        first = tl.load(tiles_ptr + 2 * (slot // heads))
        stop = tl.load(tiles_ptr + 2 * (slot // heads) + 1)
        if first < stop:
            h = tl.cast(slot % heads, tl.int64)
            dq_tile(
                first, stop, h, q_ptr, k_ptr, v_ptr, dout_ptr, row_lse_ptr, delta_ptr, dq_ptr, None,
                None, key_start_ptr, key_stop_ptr, query_start_ptr, query_stop_ptr, None, None,
                softmax_scale, None, None, None, total_queries, total_keys, padded_queries,
                q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
                dout_stride_t, dout_stride_h, dq_stride_t, dq_stride_h, GROUP, HEAD_DIM, HEAD_DIM,
                HEAD_DIM, HEAD_DIM, BLOCK_M, BLOCK_N, SPAN, 1, KEY_HALF, QUERY_HALF, False, False,
                False, False,
            )  # fmt: skip
