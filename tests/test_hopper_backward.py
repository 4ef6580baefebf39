"""What follows the Hopper backward, in triton's interpreter: dq from its sums, and the repair.

The Gluon kernel itself cannot be interpreted: plain torch stands in for it, leaking NaNs included.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs a process started with TRITON_INTERPRET=1 (make test)", allow_module_level=True
    )

from packed_attn_kernels import hopper_backward_launch, interval_attention, launch
from packed_attn_kernels.launch import Inputs

# The second document is padding: it sees nothing and is seen by nobody.
LENGTHS = (100, 4, 66)
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
SCALE = 0.2


def _stand_in(leaks: bool) -> Callable[[Inputs, dict[str, Any], Tensor], None]:
    """dk, dv and sums as the kernel leaves them; `leaks`: one NaN has reached every row."""

    def gradients(inputs: Inputs, arguments: dict[str, Any], sums: Tensor) -> None:
        q, k, v = (x.float().repeat_interleave(n, 1) for x, n in zip(
            (inputs.q, inputs.k, inputs.v), (1, *[HEADS // KV_HEADS] * 2)
        ))  # fmt: skip
        dout = arguments["dout_ptr"].float()
        rows = q.shape[0]
        lse, delta = (arguments[f"{name}_ptr"][:, :rows, None] for name in ("row_lse", "delta"))
        p = torch.exp2(
            torch.einsum("ihd,jhd->hij", q, k) * (SCALE / torch.log(torch.tensor(2.0))) - lse
        )
        i, start, stop = torch.arange(rows), *inputs.intervals[2:]
        p = torch.where((start <= i[:, None]) & (i[:, None] < stop), p, 0.0)
        ds = p * (torch.einsum("ihd,jhd->hij", dout, v) - delta)
        shape = (rows, KV_HEADS, -1, HEAD_DIM)
        dk = torch.einsum("hij,ihd->jhd", ds, q).view(shape).sum(2) * SCALE
        dv = torch.einsum("hij,ihd->jhd", p, dout).view(shape).sum(2)
        dq = torch.zeros(HEADS, arguments["padded_queries"], HEAD_DIM)
        dq[:, :rows] = torch.einsum("hij,jhd->hid", ds, k)
        if leaks:
            dq, dk, dv = (x * float("nan") for x in (dq, dk, dv))
        arguments["dk_ptr"].copy_(dk)
        arguments["dv_ptr"].copy_(dv)
        sums.copy_(_in_shares(dq))

    return gradients


def _in_shares(dq: Tensor) -> Tensor:
    """dq `[heads, padded_queries, head_dim]` in the order that `_share` of the kernel states."""
    heads, rows, columns = dq.shape
    shares = torch.empty(heads, rows // 64, columns // 64, 128, 32)
    for x in range(64):
        w, b, r = x // 16, x // 8 % 2, x % 8
        for y in range(64):
            e, c, a = y // 8, y // 2 % 4, y % 2
            place = shares[..., 16 * e + 4 * w + r // 2, 16 * (r % 2) + 4 * c + 2 * b + a]
            place.copy_(dq.unflatten(1, (-1, 64)).unflatten(3, (-1, 64))[:, :, x, :, y])
    return shares.flatten()


def _gradients(backward: Any, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    lengths = torch.tensor(LENGTHS)
    rows = int(lengths.sum())
    stop = torch.repeat_interleave(lengths.cumsum(0), lengths)
    start, i = stop - torch.repeat_interleave(lengths, lengths), torch.arange(rows)
    padding = (i >= 100) & (i < 104)
    vectors = (start, i + 1, i, stop)
    intervals = [torch.where(padding, 0, x).to(torch.int32) for x in vectors]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, _ = interval_attention(*leaves, *intervals, softmax_scale=SCALE, backward=backward)
    return list(torch.autograd.grad(out, leaves, dout))


def _inputs(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = sum(LENGTHS)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [torch.randn(rows, h, HEAD_DIM, generator=generator).to(dtype) for h in heads]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes the fused backward the Hopper one, and names what runs."""
    ran: list[str] = []
    real = hopper_backward_launch._launch_shares_cast

    def cast(*arguments: Any) -> None:
        ran.append("cast")
        real(*arguments)

    monkeypatch.setattr(launch, "reasons_against_hopper_backward", lambda *_: [])
    monkeypatch.setattr(hopper_backward_launch, "_launch_shares_cast", cast)
    return ran


def test_finite_gradients_are_those_of_the_sums(
    monkeypatch: pytest.MonkeyPatch, taken: list[str]
) -> None:
    monkeypatch.setattr(hopper_backward_launch, "_launch_gradients", _stand_in(leaks=False))
    inputs = _inputs(torch.bfloat16)
    fused = _gradients("fused", *inputs)
    assert taken == ["cast"]
    monkeypatch.undo()
    for a, b in zip(fused, _gradients("split", *inputs), strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)
        assert not torch.equal(a, b), "products rounded elsewhere: not repaired"
    assert not fused[0][100:104].any()


def test_what_is_not_finite_is_done_again(
    monkeypatch: pytest.MonkeyPatch, taken: list[str]
) -> None:
    """A NaN that reached everything leaves no trace: dq, dk and dv are the portable ones, bit for
    bit, with NaNs in its own document alone."""
    monkeypatch.setattr(hopper_backward_launch, "_launch_gradients", _stand_in(leaks=True))
    q, k, v, dout = _inputs(torch.bfloat16)
    k[120, 1, 5] = float("nan")
    fused = _gradients("fused", q, k, v, dout)
    assert taken == ["cast"]
    monkeypatch.undo()
    for a, b in zip(fused, _gradients("split", q, k, v, dout), strict=True):
        torch.testing.assert_close(a, b, atol=0.0, rtol=0.0, equal_nan=True)
        assert a[104:].isnan().any()
        assert not a[:104].isnan().any()
