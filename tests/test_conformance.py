"""Every backend on every named case: exact, isolated and confined, or refused with its reasons.

On a machine without a GPU the triton backend has a reason against everything, unless
TRITON_INTERPRET=1 is set before triton is imported: `make test` gives it a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from packed_attn import DocumentLayout, attention, backends
from packed_attn.backends import BACKENDS
from packed_attn.request import AttentionRequest
from tests.cases import BY_NAME, COMBINED, REAL, SMALL, Case
from tests.oracle import (
    assert_confined,
    assert_exact,
    assert_isolated,
    assert_refused,
    documents_to_isolate,
    reasons_against,
)

_Mask = Callable[[AttentionRequest], Tensor]

# Isolation needs a document to change and another one to look at.
SEVERAL = [case for case in SMALL if documents_to_isolate(case)]


def _names(cases: list[Case] | tuple[Case, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


@pytest.mark.parametrize("backend", BACKENDS)
@_names(SMALL)
def test_exact_or_refused(backend: str, case: Case, device: str) -> None:
    if reasons_against(backend, case, device):
        assert_refused(backend, case, device)
    else:
        assert_exact(backend, case, device)


@pytest.mark.parametrize("backend", BACKENDS)
@_names(SEVERAL)
def test_isolated_or_refused(backend: str, case: Case, device: str) -> None:
    if reasons_against(backend, case, device):
        assert_refused(backend, case, device)
    else:
        assert_isolated(backend, case, device)


@pytest.mark.parametrize("backend", BACKENDS)
@_names(SEVERAL)
def test_confined_or_refused(backend: str, case: Case, device: str) -> None:
    if reasons_against(backend, case, device, confine_nonfinite=True):
        assert_refused(backend, case, device, confine_nonfinite=True)
    else:
        assert_confined(backend, case, device)


# Interpreted, a case takes seconds.
QUICK = ("cpu", "reference")
COMBINING = [b if b in QUICK else pytest.param(b, marks=pytest.mark.slow) for b in BACKENDS]


@pytest.mark.parametrize("backend", COMBINING)
@_names(COMBINED)
def test_combined_exact_or_refused(backend: str, case: Case, device: str) -> None:
    test_exact_or_refused(backend, case, device)


@pytest.mark.slow
@pytest.mark.parametrize("backend", COMBINING)
@_names([case for case in COMBINED if documents_to_isolate(case)])
def test_combined_isolated_and_confined(backend: str, case: Case, device: str) -> None:
    test_isolated_or_refused(backend, case, device)
    test_confined_or_refused(backend, case, device)


@pytest.mark.slow
@_names(REAL)
def test_real_shapes_exact_on_cpu(case: Case) -> None:
    """Real heads and masks on documents 128 times shorter; hundreds say as much as thousands, for
    which the oracle takes minutes."""
    assert_exact("cpu", case.shortened(128).first(300), "cpu")


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """More than 2^31 elements of q: what wraps around is finite and repeatable, so values count."""
    lengths = (*(4096,) * 131, 1000)
    layout = DocumentLayout.from_lengths(lengths, device="cuda")
    shapes = (32, 1, 1, 32)
    q, k, v, grad_out = (
        torch.randn(layout.total_tokens, heads, 128, dtype=torch.bfloat16, device="cuda")
        for heads in shapes
    )
    assert q.numel() > 2**31
    alone = DocumentLayout.from_lengths([1000], device="cuda")
    results = []
    for part, documents in ((slice(None), layout), (slice(-1000, None), alone)):
        leaves = [x[part].detach().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, documents)  # type: ignore[misc]
        grads = torch.autograd.grad(out, leaves, grad_out[part])
        results.append([x[-1000:] for x in (out, *grads)])
    for packed, wanted in zip(*results):
        torch.testing.assert_close(packed, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@_names(REAL)
def test_real_shapes_exact(backend: str, case: Case) -> None:
    """Real heads and masks on documents 16 times shorter: the oracle is quadratic in float64."""
    short = case.shortened(16)
    if reasons_against(backend, short, "cuda"):
        assert_refused(backend, short, "cuda")
    else:
        assert_exact(backend, short, "cuda")


@pytest.mark.parametrize("case", SMALL, ids=[case.name for case in SMALL])
def test_auto_runs_every_case(case: Case, device: str) -> None:
    """The last backend has no reason against anything, so auto never fails."""
    inputs = case.inputs(device=device)
    out = attention(
        inputs.q,
        inputs.k,
        inputs.v,
        case.layout(device),
        key_layout=case.key_layout(device),
        sinks=inputs.sinks,
        dropout_seed=case.dropout_seed(device),
        **inputs.kwargs(),
        **case.kwargs(),
    )
    assert out.shape == (*inputs.q.shape[:2], inputs.v.shape[-1])
    assert not out.isnan().any()


def test_table_is_consistent() -> None:
    """Names are unique and every real case is a request that `attention` takes."""
    assert len(BY_NAME) == len(SMALL) + len(COMBINED) + len(REAL)
    for case in REAL:
        layout = case.layout()
        assert 8192 <= layout.total_tokens <= 40960
        visibility = layout.visibility(case.causal, case.window_size, chunk_size=case.chunk_size)
        seen = (visibility.key_stop - visibility.key_start).min()
        assert int(seen) >= 1, f"{case.name}: every token sees itself"


def test_small_table_covers_the_hard_layouts() -> None:
    """What a kernel most often gets wrong stays in the table."""
    masks = [(c.lengths, c.parents, c.padding, c.key_lengths) for c in SMALL]
    assert any(max(lengths, default=0) > 128 for lengths, *_ in masks)
    assert any(len(lengths) >= 150 and max(lengths) <= 2 for lengths, *_ in masks)
    assert any(0 in lengths and sum(lengths) > 1 for lengths, *_ in masks)
    assert {c.dtype for c in SMALL} == {torch.float32, torch.bfloat16, torch.float16}
    assert any(c.parents is not None and c.window_size[0] >= 0 for c in SMALL)
    assert any(c.num_kv_heads == 1 and c.num_heads > 1 for c in SMALL)


class _Dense:
    """A backend made of one softmax over the whole pack, with a mask that a test chooses."""

    def __init__(self, mask: Callable[[AttentionRequest], Tensor]) -> None:
        self.mask = mask

    def reasons_against(self, request: AttentionRequest) -> list[str]:
        return []

    def run(self, request: AttentionRequest) -> tuple[Tensor, Tensor]:
        group = request.num_heads // request.num_kv_heads
        k, v = (x.repeat_interleave(group, dim=1) for x in (request.k, request.v))
        scores = torch.einsum("ihd,jhd->hij", request.q, k) * request.softmax_scale
        scores = scores.masked_fill(~self.mask(request), -torch.inf)
        return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v), scores.logsumexp(-1)


def _right_mask(request: AttentionRequest) -> Tensor:
    return request.visibility().dense()


def _no_boundaries(request: AttentionRequest) -> Tensor:
    return torch.ones(request.q.shape[0], request.k.shape[0], dtype=torch.bool).tril()


def _first_token_seen_by_all(request: AttentionRequest) -> Tensor:
    mask = _right_mask(request)
    mask[:, 0] = True
    return mask


@pytest.fixture
def dense_backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[_Mask], str]:
    """Registers a `_Dense` backend beside the real ones and gives its name."""
    load = backends.load

    def register(mask: _Mask) -> str:
        name = mask.__name__
        monkeypatch.setattr(backends, "load", lambda n: _Dense(mask) if n == name else load(n))
        return name

    return register


@pytest.mark.parametrize("mask", [_no_boundaries, _first_token_seen_by_all])
@pytest.mark.parametrize("assertion", [assert_exact, assert_isolated, assert_confined])
def test_suite_catches_a_leak(assertion, mask: _Mask, dense_backend) -> None:
    """The assertions themselves can fail."""
    with pytest.raises(AssertionError):
        assertion(dense_backend(mask), BY_NAME["mixed"], "cpu")


def test_suite_tells_zero_times_nan_from_a_leak(dense_backend) -> None:
    """A dense mask is exact and isolated, but its zero weights do not stop a NaN."""
    name, case = dense_backend(_right_mask), BY_NAME["mixed"]
    assert_exact(name, case, "cpu")
    with pytest.raises(AssertionError, match="changed"):
        assert_confined(name, case, "cpu")
