"""What other packed kernels got wrong, each class by name, on every backend that takes it.

The triton backend needs a GPU or a process with TRITON_INTERPRET=1 (`make test` starts one). All
runs poison fresh memory with NaN, so a row of lse or delta that nobody wrote is seen.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from packed_attn import DocumentLayout, attention
from packed_attn.backends import BACKENDS
from tests.cases import Case
from tests.oracle import assert_exact, reasons_against, run

SMALL = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
BUG_CLASSES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("zero-length documents first, last and together", (0, 0, 9, 0, 30, 0), **SMALL),
        Case("zero-length documents alone", (0, 0, 0), **SMALL),
        Case("a one-token maximum among empty documents", (0, 1, 0, 0, 1, 0), sinks=True, **SMALL),
        Case(
            "rows with no visible key, with a sink and a gradient of lse",
            (7, 5, 0, 6),
            key_lengths=(0, 3, 4, 9),
            sinks=True,
            lse_gradient=True,
            **SMALL,
        ),
        Case(
            "padding between documents, with a gradient of lse",
            (20, 14, 31),
            padding=(False, True, False),
            lse_gradient=True,
            **SMALL,
        ),
        Case("lse and delta past the last row of a tile", (100, 29), lse_gradient=True, **SMALL),
        Case("lse and delta of a tile that is full", (64, 64), **SMALL),
        Case("a gradient of out that is not contiguous", (21, 1, 18), strided=True, **SMALL),
        Case(
            "head_dim 256 backward on heavy tails",
            (33, 12),
            num_heads=2,
            num_kv_heads=1,
            head_dim=256,
            heavy_tailed=True,
        ),
    )
}
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)


@EVERY_BACKEND
@pytest.mark.parametrize("name", BUG_CLASSES)
def test_bug_class(backend: str, name: str, device: str) -> None:
    case = BUG_CLASSES[name]
    _skip_without(backend, case, device)
    assert_exact(backend, case, device)


@EVERY_BACKEND
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (4, 1)], ids=str)
def test_query_heads_reach_their_own_key_head(
    backend: str, heads: tuple[int, int], device: str
) -> None:
    """A loss on one query head has its gradient in the k and v of that head's group alone."""
    case = Case("groups", (5, 3), num_heads=heads[0], num_kv_heads=heads[1], head_dim=16)
    _skip_without(backend, case, device)
    inputs, group = case.inputs(device=device), heads[0] // heads[1]
    for head in (group - 1, heads[0] - 1):
        only = torch.zeros_like(inputs.grad_out)
        only[:, head] = inputs.grad_out[:, head]
        grads = run(backend, case, replace(inputs, grad_out=only), device).grads
        for name in ("k", "v"):
            reached = [bool(grads[name][:, kv].any()) for kv in range(heads[1])]
            assert reached == [kv == head // group for kv in range(heads[1])], (name, head)


@EVERY_BACKEND
def test_expanded_gradient_of_out(backend: str, device: str) -> None:
    """`out.sum()` gives a gradient of stride 0 in every dimension."""
    case = Case("sum", (17, 6), **SMALL)
    _skip_without(backend, case, device)
    inputs = case.inputs(device=device)
    one = torch.ones((), device=device).expand(inputs.grad_out.shape)
    assert one.stride() == (0, 0, 0)
    got = run(backend, case, replace(inputs, grad_out=one), device)
    want = run(backend, case, replace(inputs, grad_out=one.contiguous()), device)
    for name, gradient in want.grads.items():
        assert torch.equal(got.grads[name], gradient), name


@EVERY_BACKEND
def test_sink_of_minus_infinity_is_no_sink(backend: str, device: str) -> None:
    """On rows that see nothing too, where its share is exp(-inf - -inf)."""
    case = Case(
        "off",
        (7, 5, 0, 6),
        key_lengths=(0, 3, 4, 9),
        padding=(False, False, False, True),
        lse_gradient=True,
        **SMALL,
    )
    if reasons_against(backend, replace(case, sinks=True), device):
        pytest.skip(f"{backend} does not run sinks here")
    inputs = case.inputs(device=device)
    got = run(
        backend, case, replace(inputs, sinks=torch.tensor([-torch.inf] * 2).to(device)), device
    )
    want = run(backend, case, inputs, device)
    assert not got.grads.pop("sinks").any()
    for a, b in (
        (got.out, want.out),
        (got.lse, want.lse),
        *zip(got.grads.values(), want.grads.values()),
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "name", ["v", *(pytest.param(n, marks=pytest.mark.slow) for n in ("q", "k", "grad_out"))]
)
def test_index_arithmetic_past_32_bits(name: str) -> None:
    """Tokens 2^24 - 8 elements apart: the last of 131 stands past 2^31 elements.

    Corrupt results pass checks for NaN and for repeatability, so values are compared. numpy maps
    the memory and the test touches 131 places of it.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a process started with TRITON_INTERPRET=1 (make test)")
    tokens, stride = 131, 2**24 - 8
    case = Case("far", (tokens,), window_size=(2, 0), num_heads=1, num_kv_heads=1, head_dim=16)
    inputs = case.inputs()
    try:
        memory = np.empty((tokens - 1) * stride + 16, dtype=np.float32)
    except MemoryError as error:
        pytest.skip(f"this machine does not overcommit 9 GB: {error}")
    far = torch.from_numpy(memory).as_strided((tokens, 1, 16), (stride, 16, 1))
    far.copy_(getattr(inputs, name))
    want = run("triton", case, inputs, "cpu")
    got = _run_in_place(case, replace(inputs, **{name: far}))
    assert torch.equal(got[0], want.out)
    for gradient, n in zip(got[1:], "qkv"):
        assert torch.equal(gradient, want.grads[n]), n


@pytest.mark.gpu
@EVERY_BACKEND
def test_total_size_past_32_bits(backend: str) -> None:
    """tokens x heads x head_dim = 2^31 + 2^20: the last documents equal the same alone."""
    lengths = (64,) * (2**11 + 1)
    case = Case("huge", lengths, num_heads=64, num_kv_heads=1, head_dim=256, dtype=torch.bfloat16)
    assert sum(lengths) * 64 * 256 > 2**31
    short = replace(case, lengths=(64,) * 2)
    inputs = short.inputs(device="cuda")
    repeats = sum(lengths) // 128
    rest = sum(lengths) - 128 * repeats
    tiled = {
        name: torch.cat([x] * repeats + [x[:rest]])
        for name in ("q", "k", "v", "grad_out")
        for x in [getattr(inputs, name)]
    }
    if reasons_against(backend, short, "cuda"):
        pytest.skip("; ".join(reasons_against(backend, short, "cuda")))
    layout = DocumentLayout.from_lengths(lengths, device="cuda")
    try:
        got = _gradients(tiled, layout, backend)
    except NotImplementedError as error:
        pytest.skip(str(error))
    want = _gradients(
        {name: getattr(inputs, name) for name in tiled}, short.layout("cuda"), backend
    )
    for a, b in zip(got, want):
        torch.testing.assert_close(a[-64:], b[:64], atol=0.02, rtol=0.02)


def _run_in_place(case: Case, inputs) -> tuple[Tensor, ...]:
    tensors = {name: getattr(inputs, name) for name in ("q", "k", "v", "grad_out")}
    return _gradients(tensors, case.layout(), "triton", window_size=case.window_size)


def _gradients(
    tensors: dict[str, Tensor], layout: DocumentLayout, backend: str, **mask: tuple[int, int]
) -> tuple[Tensor, ...]:
    leaves = [tensors[name].detach().requires_grad_() for name in "qkv"]
    out = attention(*leaves, layout, backend=backend, **mask)
    return out.detach(), *torch.autograd.grad(out, leaves, tensors["grad_out"])


def _skip_without(backend: str, case: Case, device: str) -> None:
    reasons = reasons_against(backend, case, device)
    if reasons:
        pytest.skip(f"{backend}: {'; '.join(reasons)}")
