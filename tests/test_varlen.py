"""flash_attn_varlen_func: flash-attn's signature and meaning."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from packed_attn import DocumentLayout, attention, flash_attn_varlen_func
from packed_attn.varlen import _layout_on_device


def _cu(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _qkv(queries: int, keys: int | None = None) -> list[Tensor]:
    keys = queries if keys is None else keys
    return [
        torch.randn(queries, 4, 16, requires_grad=True),
        torch.randn(keys, 2, 16, requires_grad=True),
        torch.randn(keys, 2, 16, requires_grad=True),
    ]


def _call(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None = None, **kwargs):
    cu_k = cu_q if cu_k is None else cu_k
    return flash_attn_varlen_func(q, k, v, cu_q, cu_k, 100, 100, **kwargs)


def test_signature_is_flash_attns() -> None:
    """flash-attn 2.8: names, order, defaults, and all of them positional too."""
    parameters = inspect.signature(flash_attn_varlen_func).parameters
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())
    required = ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    assert list(parameters)[: len(required)] == required
    assert all(parameters[name].default is inspect.Parameter.empty for name in required)
    assert [(n, p.default) for n, p in list(parameters.items())[len(required) :]] == [
        ("dropout_p", 0.0),
        ("softmax_scale", None),
        ("causal", False),
        ("window_size", (-1, -1)),
        ("softcap", 0.0),
        ("alibi_slopes", None),
        ("deterministic", False),
        ("return_attn_probs", False),
        ("block_table", None),
    ]


def test_not_causal_by_default() -> None:
    q, k, v = _qkv(9)
    layout = DocumentLayout.from_lengths([4, 5])
    out = _call(q, k, v, _cu(0, 4, 9))
    assert torch.equal(out, attention(q, k, v, layout, causal=False))
    out = _call(q, k, v, _cu(0, 4, 9), causal=True)
    assert torch.equal(out, attention(q, k, v, layout))


def test_options_reach_attention() -> None:
    q, k, v = _qkv(9)
    options = {
        "causal": True,
        "softmax_scale": 0.4,
        "window_size": (2, 0),
        "softcap": 3.0,
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625]),
        "deterministic": True,
    }
    out = _call(q, k, v, _cu(0, 4, 9), **options)
    assert torch.equal(out, attention(q, k, v, DocumentLayout.from_lengths([4, 5]), **options))
    for left_out in options.keys() - {"deterministic"}:
        rest = {name: value for name, value in options.items() if name != left_out}
        if left_out == "causal":
            rest["window_size"] = (2, 2)
        assert not torch.equal(out, _call(q, k, v, _cu(0, 4, 9), **rest)), left_out


def test_softcap_of_zero_is_off() -> None:
    q, k, v = _qkv(9)
    assert torch.equal(_call(q, k, v, _cu(0, 9), softcap=0.0), _call(q, k, v, _cu(0, 9)))
    with pytest.raises(ValueError, match="softcap must be positive and finite"):
        _call(q, k, v, _cu(0, 9), softcap=-1.0)


def test_return_attn_probs_gives_lse() -> None:
    q, k, v = _qkv(9)
    out, lse, probabilities = _call(q, k, v, _cu(0, 4, 9), return_attn_probs=True)
    assert torch.equal(out, _call(q, k, v, _cu(0, 4, 9)))
    assert lse.shape == (4, 9)
    assert probabilities is None
    scores = (q[:4, 0] @ k[:4, 0].T) * 16**-0.5
    torch.testing.assert_close(lse[0, :4], scores.logsumexp(-1))


@pytest.mark.parametrize("causal", [True, False])
def test_cross_lengths_are_aligned_bottom_right(causal: bool) -> None:
    """As in flash-attn: the last query of a document stands over its last key."""
    q, k, v = _qkv(7, 10)
    out = _call(q, k, v, _cu(0, 3, 7), _cu(0, 8, 10), causal=causal)
    for queries, keys in ((slice(0, 3), slice(0, 8)), (slice(3, 7), slice(8, 10))):
        n, m = queries.stop - queries.start, keys.stop - keys.start
        mask = torch.ones(n, m, dtype=torch.bool)
        mask = mask.tril(m - n) if causal else mask
        heads = [x.transpose(0, 1) for x in (q[queries], k[keys], v[keys])]
        wanted = scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
        # flash-attn gives 0 where a query stands before the first key.
        wanted = wanted.transpose(0, 1).masked_fill(~mask.any(-1)[:, None, None], 0.0)
        torch.testing.assert_close(out[queries], wanted)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(12, 12), (12, 9), (9, 12), (15, 11)])
def test_tokens_beyond_the_last_entry(queries: int, keys: int, causal: bool) -> None:
    """They belong to no document: output and gradient 0, whatever they hold."""
    q, k, v = _qkv(queries, keys)
    cu = _cu(0, 4, 9)
    with torch.no_grad():
        for x in (q, k, v):
            x[9:] = math.nan
    out, lse, _ = _call(q, k, v, cu, causal=causal, return_attn_probs=True)
    inside = attention(q[:9], k[:9], v[:9], DocumentLayout.from_lengths([4, 5]), causal=causal)
    torch.testing.assert_close(out[:9], inside)
    assert not out[9:].any()
    assert (lse[:, 9:] == -torch.inf).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    for grad in grads:
        assert grad[:9].isfinite().all()
        assert not grad[9:].any()


def test_empty_documents() -> None:
    q, k, v = _qkv(5)
    out = _call(q, k, v, _cu(0, 0, 2, 2, 5, 5), causal=True)
    torch.testing.assert_close(out, _call(q, k, v, _cu(0, 2, 5), causal=True))


def test_bad_input() -> None:
    q, k, v = _qkv(9)
    for cu, message in (
        (torch.tensor([0, 9]), "cu_seqlens_q must be int32, got torch.int64"),
        (_cu(1, 9), "cu_seqlens must start at 0, got 1"),
        (_cu(0, 5, 3), "cu_seqlens must not decrease"),
        (_cu(0, 12), "cu_seqlens_q ends at 12, but there are only 9 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            _call(q, k, v, cu)
    with pytest.raises(ValueError, match=r"cu_seqlens_k must be int32, got torch.int64"):
        _call(q, k, v, _cu(0, 9), torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="cu_seqlens_k must be int32, got list"):
        flash_attn_varlen_func(q, k, v, _cu(0, 9), [0, 9], 9, 9)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"alibi_slopes must have shape \[num_heads\] = \[4\]"):
        _call(q, k, v, _cu(0, 9), alibi_slopes=torch.ones(1, 4))
    with pytest.raises(ValueError, match="cu_seqlens_k ends at 12, but there are only 9"):
        _call(q, k, v, _cu(0, 9), _cu(0, 12))
    with pytest.raises(ValueError, match=r"must have one shape, got \[2\] and \[3\]"):
        _call(q, k, v, _cu(0, 9), _cu(0, 4, 9))


class _Recorder(TorchDispatchMode):
    """Counts the operators that read a value on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += "_local_scalar_dense" in function.name() or "nonzero" in function.name()
        return function(*args, **(kwargs or {}))


def test_boundaries_on_a_device_are_not_read() -> None:
    """The way of a GPU, on CPU tensors to see the values and on meta tensors, which have none."""
    cu = _cu(0, 3, 3, 8)
    with _Recorder() as recorder:
        layout = _layout_on_device("cu_seqlens_q", cu, 10)
        visibility = layout.visibility(False)
    assert recorder.reads == 0
    assert layout.lengths == (3, 0, 5, 2)
    wanted = DocumentLayout.from_lengths([3, 0, 5, 2], padding=[0, 0, 0, 1]).visibility(False)
    assert torch.equal(visibility.dense(), wanted.dense())

    on_meta = _layout_on_device("cu_seqlens_q", cu.to("meta"), 10).visibility()
    assert on_meta.key_start.shape == (10,)
    with _Recorder() as recorder:
        assert cu.any()
    assert recorder.reads == 1, "the recorder sees what it is there to see"


@pytest.mark.parametrize("cu", [_cu(1, 9), _cu(0, 5, 3), _cu(0, 12)])
def test_bad_boundaries_are_asserted_on_a_device(cu: Tensor) -> None:
    with pytest.raises(RuntimeError, match="cu_seqlens_q must start at 0, never decrease"):
        _layout_on_device("cu_seqlens_q", cu, 9)


@pytest.mark.parametrize("causal", [True, False])
def test_equal_documents_given_apart_are_the_same_attention(causal: bool) -> None:
    """On a device, two tensors of boundaries are cross attention, whatever they hold."""
    q, k, v = _qkv(9)
    layout = _layout_on_device("cu_seqlens_q", _cu(0, 4, 7), 9)
    other = _layout_on_device("cu_seqlens_k", _cu(0, 4, 7), 9)
    out = attention(q, k, v, layout, key_layout=other, causal=causal, backend="reference")
    wanted = _call(q, k, v, _cu(0, 4, 7), causal=causal)
    torch.testing.assert_close(out, wanted)


@pytest.mark.gpu
def test_a_call_on_a_gpu_waits_for_nothing() -> None:
    q, k, v = (x.detach().cuda() for x in _qkv(9))
    cu, other = _cu(0, 4, 7).cuda(), _cu(0, 4, 7).cuda()
    _call(q, k, v, cu, other, causal=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = _call(q, k, v, cu, other, causal=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not out[7:].any()


def test_paged_keys_are_refused() -> None:
    q, k, v = _qkv(9)
    with pytest.raises(NotImplementedError, match="block_table: paged"):
        _call(q, k, v, _cu(0, 9), block_table=torch.zeros(1, 1, dtype=torch.int32))
