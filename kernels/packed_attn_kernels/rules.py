"""What every kernel shares: the mask rule, the logits, the tile's interval and the guarded dot.

A tile of queries walks the keys that some row of it sees, its *hull*. Where every row sees every
key of a block the block is *full* and needs no mask; the blocks before and after are *edges*:

        hull  |  edge  |  full  |  full  |  edge  |
    row 0     |    x x x x x x x x x x x x x      |
    row 1     |  x x x x x x x x x x x x x x x    |
    row 2     |      x x x x x x x x x x x x x x  |

The backward of keys walks queries in the same way, so the helpers say `start`, `stop` and `x`.
"""

# Triton's language is not Python's: its stubs know neither constexpr arguments nor tensors.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportReturnType=false, reportAssignmentType=false

import os

import triton
import triton.language as tl

# Kernels are interpreted when this was set as triton was imported; decoration time decides.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IS_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
FAR: tl.constexpr = tl.constexpr(2**31 - 1)
# Below every real logit, yet finite: differences of it with itself are 0, not NaN.
LOWEST: tl.constexpr = tl.constexpr(-1.0e38)


@triton.jit
def sees(
    i,
    j,
    key_start,
    key_stop,
    query_start,
    query_stop,
    KEY_HALF: tl.constexpr,
    QUERY_HALF: tl.constexpr,
):
    """The mask rule, once. Arguments broadcast, so both orientations of a tile use it."""
    if KEY_HALF and QUERY_HALF:
        by_query = (key_start <= j) & (j < key_stop)
        visible = by_query & (query_start <= i) & (i < query_stop)
    elif KEY_HALF:
        visible = (key_start <= j) & (j < key_stop)
    else:
        visible = (query_start <= i) & (i < query_stop)
    return visible


@triton.jit
def logits(products, softmax_scale, softcap, HAS_SOFTCAP: tl.constexpr, ACCURATE: tl.constexpr):
    """Logits of the products q.k, in the unit of `weights`, and the derivative of the cap.

    With r = 1 / (exp(2x) + 1): tanh(x) = 1 - 2r and 1 - tanh(x)^2 = 4r(1 - r). Near 0 the
    difference 1 - 2r loses float32 digits that half precision never had; ACCURATE takes the
    polynomial of Cephes' tanhf there.
    """
    if HAS_SOFTCAP:
        x = products * (softmax_scale / softcap)
        r = 1.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
        tanh = 1.0 - 2.0 * r
        if ACCURATE:
            z = x * x
            series = -5.70498872745e-3 * z + 2.06390887954e-2
            series = (series * z - 5.37397155531e-2) * z + 1.33314422036e-1
            series = (series * z - 3.33332819422e-1) * z * x + x
            tanh = tl.where(tl.abs(x) < 0.625, series, tanh)
        scores = tanh * in_logit_unit(softcap, ACCURATE)
        slope = 4.0 * r * (1.0 - r)
    else:
        scores = products * in_logit_unit(softmax_scale, ACCURATE)
        slope = 1.0
    return scores, slope


@triton.jit
def in_logit_unit(x, ACCURATE: tl.constexpr):
    """A natural logit in the unit of the kernels: natural where ACCURATE, else base 2."""
    if ACCURATE:
        converted = x
    else:
        converted = x * LOG2E
    return converted


@triton.jit
def weights(difference, ACCURATE: tl.constexpr):
    """exp of a difference of logits.

    Base 2 saves a product, but its conversion rounds each large logit once more, and the weights
    by as much relatively. ACCURATE subtracts first and converts the small difference.
    """
    if ACCURATE:
        powers = tl.exp2(difference * LOG2E)
    else:
        powers = tl.exp2(difference)
    return powers


@triton.jit
def biased(scores, slope, query_position, key_position):
    """ALiBi: logits less `slope`, in their unit, for each position between query and key."""
    return scores - slope * tl.abs(query_position - key_position).to(tl.float32)


@triton.jit
def kept(seed, i, j, h, threshold):
    """Whether dropout keeps the weight of key j in query i of head h.

    The first word of Philox4x32-10 with the seed as key and (i, j, h, 0) as counter: nothing but
    the place of a weight decides, so forward and backward agree whatever their tiles are. The
    threshold is that of the unsigned word less 2^31, which is compared as a signed one.
    """
    word, _, _, _ = tl.philox(seed, i, j, h, 0)
    return (word.to(tl.int32, bitcast=True) ^ -2147483648) >= threshold


@triton.jit
def dot(a, b, acc):
    """a @ b + acc in float32; float32 operands keep all their bits (no tf32)."""
    if IS_INTERPRETED:
        # The interpreter multiplies the raw bits of bfloat16.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def listed_tile(tiles_ptr):
    """The rows [first, last) of this program's entry in the list of tiles; both equal if unused."""
    entry = tiles_ptr + 2 * tl.program_id(0)
    return tl.load(entry), tl.load(entry + 1)


@triton.jit
def tile_interval(start_ptr, stop_ptr, x, x_stop):
    """The intervals of the tokens x, their hull and the range that all of them see.

    Tokens from `x_stop` on, which are another tile's, and those with an empty interval are not
    `live`: they widen nothing, and the caller writes nothing or zeros for them.
    """
    start = tl.load(start_ptr + x, mask=x < x_stop, other=0)
    stop = tl.load(stop_ptr + x, mask=x < x_stop, other=0)
    live = stop > start
    hull_stop = tl.max(tl.where(live, stop, 0), 0)
    hull_start = tl.minimum(tl.min(tl.where(live, start, FAR), 0), hull_stop)
    full_start = tl.max(tl.where(live, start, 0), 0)
    full_stop = tl.min(tl.where(live, stop, FAR), 0)
    return start, stop, live, hull_start, hull_stop, full_start, full_stop


@triton.jit
def block_runs(hull_start, hull_stop, full_start, full_stop, BLOCK: tl.constexpr):
    """How many blocks, counted from hull_start: the left edge's, the full ones, both edges'."""
    blocks = tl.cdiv(hull_stop - hull_start, BLOCK)
    left = tl.minimum(tl.cdiv(tl.maximum(full_start - hull_start, 0), BLOCK), blocks)
    through = tl.maximum(tl.minimum(full_stop, hull_stop) - hull_start, 0) // BLOCK
    full = tl.maximum(through - left, 0)
    return left, full, blocks - full


@triton.jit
def seen_run(start_ptr, stop_ptr, span, hull_stop, first, last, SPAN: tl.constexpr):
    """The run of tokens in [span, span + SPAN) whose own interval meets the rows [first, last] of
    the tile; (FAR, 0) where there is none.

    In a forest the hull of a late answer covers all its earlier siblings, and with a window the
    hull of a prompt's keys covers all answers: skipping those keeps the cost linear in the number
    of answers.
    """
    x = span + tl.arange(0, SPAN)
    start = tl.load(start_ptr + x, mask=x < hull_stop, other=FAR)
    stop = tl.load(stop_ptr + x, mask=x < hull_stop, other=0)
    seen = (start <= last) & (first < stop)
    return tl.min(tl.where(seen, x, FAR), 0), tl.max(tl.where(seen, x + 1, 0), 0)


@triton.jit
def load_tile(ptrs, row_ok, column_ok, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """A tile with zeros outside, masked only where it must be."""
    if MASK_ROWS and MASK_COLUMNS:
        tile = tl.load(ptrs, mask=row_ok[:, None] & column_ok[None, :], other=0.0)
    elif MASK_ROWS:
        tile = tl.load(ptrs, mask=row_ok[:, None], other=0.0)
    elif MASK_COLUMNS:
        tile = tl.load(ptrs, mask=column_ok[None, :], other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def tile_offsets(x, columns, stride):
    """Element offsets of rows x; 64-bit, since tokens x heads x head_dim can pass 2^31."""
    return x.to(tl.int64)[:, None] * stride + columns[None, :]


@triton.jit
def block_offsets(x, columns, stride):
    """Element offsets inside a block that a loop moves by 64-bit steps; half the registers.

    32-bit: launches copy tensors whose token stride passes 2^24 elements.
    """
    return x[:, None] * stride + columns[None, :]


@triton.jit
def nonfinite_rows(tile):
    """Which rows hold a NaN or an infinity."""
    finite = tl.abs(tile.to(tl.float32)) < float("inf")
    return tl.min(finite.to(tl.int32), 1) == 0


@triton.jit
def any_nonfinite(tile, live):
    """Whether a live row of a float32 tile holds a NaN or an infinity, as a scalar.

    A sum of products with 0 needs one register a row, where comparisons took one an element.
    """
    row = tl.sum(tile * 0.0, 1)
    return tl.max((live & (row != row)).to(tl.int32), 0) > 0
