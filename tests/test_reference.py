"""The specification against something simpler still: torch's own attention, paths run alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from packed_attn import DocumentLayout, attention


def _draw(total: int, heads: int, kv_heads: int, dim: int, keys: int | None = None, **kwargs):
    """q, k, v in float64, requiring gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(total, heads), *[(total if keys is None else keys, kv_heads)] * 2]
    dims = (dim, dim, kwargs.get("value_dim", dim))
    return [
        torch.randn(*shape, d, dtype=torch.float64, generator=generator).requires_grad_()
        for shape, d in zip(shapes, dims)
    ]


def _reference(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, **kwargs):
    return attention(q, k, v, layout, backend="reference", **kwargs)


def _grads(outputs: Tensor | Sequence[Tensor], inputs: Sequence[Tensor], grads) -> list[Tensor]:
    return list(torch.autograd.grad(outputs, list(inputs), grads))


def _assert_equal(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
def test_is_sdpa_document_by_document(causal: bool, heads: int, kv_heads: int) -> None:
    layout = DocumentLayout.from_lengths([5, 1, 0, 12])
    q, k, v = _draw(18, heads, kv_heads, 8, value_dim=6)
    alone = []
    for start, length in zip(layout.starts, layout.lengths):
        rows = slice(start, start + length)
        heads_first = [x[rows].transpose(0, 1) for x in (q, k, v)]
        out = scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=True)
        alone.append(out.transpose(0, 1))
    wanted = torch.cat(alone)
    grad = torch.randn_like(wanted)
    got = _reference(q, k, v, layout, causal=causal)
    _assert_equal([got], [wanted])
    _assert_equal(_grads(got, (q, k, v), grad), _grads(wanted, (q, k, v), grad))


def test_lse_is_the_sum_of_exponentials() -> None:
    q, k, v = _draw(7, 2, 1, 8)
    _, lse = _reference(
        q, k, v, DocumentLayout.from_lengths([7]), return_lse=True, softmax_scale=0.3
    )
    scores = torch.einsum("ihd,jd->hij", q, k[:, 0]) * 0.3
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    wanted = (scores.exp() * mask).sum(-1).log()
    _assert_equal([lse], [wanted])
    grad = torch.randn_like(wanted)
    _assert_equal(_grads(lse, (q, k), grad), _grads(wanted, (q, k), grad))


LENGTHS, PARENTS = (4, 3, 2, 0, 5, 3), (-1, 0, 1, 1, 3, 0)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"window_size": (3, 0)},
        {"chunk_size": 4},
        {"softcap": 2.0},
        {"alibi_slopes": torch.tensor([0.5, 0.25])},
    ],
    ids=lambda kwargs: "_".join(kwargs) or "plain",
)
def test_forest_is_each_path_run_alone(kwargs) -> None:
    """Each document's outputs are the last rows of its path as one plain document; what the paths
    send back adds up in the shared prompts."""
    layout = DocumentLayout.from_lengths(LENGTHS, parents=PARENTS)
    q, k, v = _draw(layout.total_tokens, 2, 1, 8)
    got = _reference(q, k, v, layout, **kwargs)
    outs = []
    for document, length in enumerate(LENGTHS):
        tokens = torch.cat(
            [torch.arange(LENGTHS[d]) + layout.starts[d] for d in layout.path(document)]
        )
        path = DocumentLayout.from_lengths([len(tokens)])
        out = _reference(q[tokens], k[tokens], v[tokens], path, **kwargs)
        outs.append(out[len(tokens) - length :])
    wanted = torch.cat(outs)
    _assert_equal([got], [wanted])
    grad = torch.randn_like(wanted)
    _assert_equal(_grads(got, (q, k, v), grad), _grads(wanted, (q, k, v), grad))


def test_sink_is_a_key_without_a_value() -> None:
    """One more key whose score is the sink and whose value is 0."""
    layout = DocumentLayout.from_lengths([3, 6])
    q, k, v = _draw(9, 2, 2, 8)
    sinks = torch.tensor([0.7, -1.2], dtype=torch.float64, requires_grad=True)
    got, lse = _reference(q, k, v, layout, sinks=sinks, return_lse=True)
    scores = torch.einsum("ihd,jhd->hij", q, k) * 8**-0.5
    scores = scores.masked_fill(~layout.visibility().dense(), -torch.inf)
    scores = torch.cat([sinks[:, None, None].expand(2, 9, 1), scores], dim=-1)
    values = torch.cat([torch.zeros_like(v[:1]), v])
    wanted = torch.einsum("hij,jhd->ihd", scores.softmax(-1), values)
    _assert_equal([got, lse], [wanted, scores.logsumexp(-1)])
    grad = torch.randn_like(wanted)
    inputs = (q, k, v, sinks)
    _assert_equal(_grads(got, inputs, grad), _grads(wanted, inputs, grad))


def test_alibi_is_a_bias_by_distance() -> None:
    layout = DocumentLayout.from_lengths([4])
    q, k, v = _draw(4, 2, 2, 8)
    slopes = torch.tensor([0.5, 0.1], dtype=torch.float64)
    distance = (torch.arange(4)[:, None] - torch.arange(4)).abs()
    heads_first = [x.transpose(0, 1) for x in (q, k, v)]
    wanted = scaled_dot_product_attention(
        *heads_first, attn_mask=-slopes[:, None, None] * distance
    ).transpose(0, 1)
    got = _reference(q, k, v, layout, alibi_slopes=slopes, causal=False)
    _assert_equal([got], [wanted])


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"window_size": (1, 0), "softcap": 3.0}, {"causal": False, "softmax_scale": 0.4}],
    ids=["plain", "window_softcap", "bidirectional_scale"],
)
def test_gradcheck(kwargs) -> None:
    layout = DocumentLayout.from_lengths([3, 1, 2], padding=[False, False, True])
    q, k, v = _draw(6, 2, 1, 2)
    sinks = torch.tensor([0.2, -0.3], dtype=torch.float64, requires_grad=True)

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = _reference(q, k, v, layout, sinks=sinks, return_lse=True, **kwargs)
        return out, lse[:, :4]

    assert torch.autograd.gradcheck(call, (q, k, v, sinks))


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(
    ("lengths", "key_lengths", "padding", "blind"),
    [
        ((3, 2), None, (True, True), [0, 1, 2, 3, 4]),
        ((3, 2), None, (False, True), [3, 4]),
        ((3, 2), (0, 2), None, [0, 1, 2]),
        # Two more queries than keys: the first two stand before the first key.
        ((4, 2), (2, 2), None, [0, 1]),
        ((3, 2), (0, 0), None, [0, 1, 2, 3, 4]),
    ],
)
def test_rows_that_see_nothing(lengths, key_lengths, padding, blind, with_sinks: bool) -> None:
    """out 0, lse -inf and gradient 0: not None and not NaN, with a sink too."""
    layout = DocumentLayout.from_lengths(lengths, padding=padding)
    keys = None if key_lengths is None else DocumentLayout.from_lengths(key_lengths)
    q, k, v = _draw(sum(lengths), 2, 1, 4, keys=sum(key_lengths or lengths))
    inputs = [q, k, v]
    sinks = torch.zeros(2, dtype=torch.float64, requires_grad=True) if with_sinks else None
    if sinks is not None:
        inputs.append(sinks)
    out, lse = _reference(q, k, v, layout, key_layout=keys, sinks=sinks, return_lse=True)
    assert not out[blind].any()
    assert (lse[:, blind] == -torch.inf).all()
    seeing = [i for i in range(len(q)) if i not in blind]
    assert lse[:, seeing].isfinite().all()
    assert out[seeing].all()
    grads = _grads((out, lse), inputs, (torch.ones_like(out), torch.ones_like(lse)))
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][blind].any()
    if not seeing:
        assert not any(grad.any() for grad in grads)


def test_rows_that_see_nothing_get_nothing_from_sinks() -> None:
    layout = DocumentLayout.from_lengths([3], padding=[True])
    q, k, v = _draw(3, 1, 1, 4)
    sinks = torch.ones(1, dtype=torch.float64, requires_grad=True)
    out, lse = _reference(q, k, v, layout, sinks=sinks, return_lse=True)
    grads = _grads((out, lse), [sinks], (torch.ones_like(out), torch.ones_like(lse)))
    assert grads[0].tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    layout = DocumentLayout.from_lengths([40, 9])
    q, k, v = (x.detach().to(dtype) for x in _draw(49, 2, 1, 16))
    out, lse = _reference(q, k, v, layout, return_lse=True)
    exact = _reference(q.double(), k.double(), v.double(), layout)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    # Half a unit in the last place, and the float32 inside.
    slack = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (
        (out.double() - exact).abs() <= 0.5 * torch.finfo(dtype).eps * exact.abs() + slack
    ).all()


def test_autocast_changes_nothing() -> None:
    layout = DocumentLayout.from_lengths([20, 9])
    q, k, v = (x.detach().float() for x in _draw(29, 2, 1, 16))
    wanted = _reference(q, k, v, layout)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_reference(q, k, v, layout), wanted)


def test_dropout_keeps_the_mean_and_the_boundaries() -> None:
    torch.manual_seed(0)
    layout = DocumentLayout.from_lengths([30, 30])
    q, k, v = (x.detach() for x in _draw(60, 1, 1, 4))
    plain = _reference(q, k, v, layout, causal=False)
    draws = [
        _reference(q, k, v, layout, causal=False, dropout_p=0.5, return_lse=True)
        for _ in range(200)
    ]
    assert not torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(draws[0][1], draws[1][1])
    mean = torch.stack([out for out, _ in draws]).mean(0)
    spread = torch.stack([out for out, _ in draws]).std(0) / 200**0.5
    assert ((mean - plain).abs() <= 5 * spread).all()
    v[:30] = 0.0
    out = _reference(q, k, v, layout, causal=False, dropout_p=0.5)
    assert not out[:30].any()


@pytest.mark.parametrize("reach", [0, 2, 30])
@pytest.mark.parametrize("causal", [True, False])
def test_bias_is_a_value_for_each_position_difference(reach: int, causal: bool) -> None:
    """Against sdpa with the bias written out, document by document; with its gradient."""
    layout = DocumentLayout.from_lengths([5, 1, 12])
    q, k, v = _draw(18, 2, 2, 8)
    bias = torch.randn(2, 2 * reach + 1, dtype=torch.float64, requires_grad=True)
    alone = []
    for start, length in zip(layout.starts, layout.lengths):
        rows = slice(start, start + length)
        heads_first = [x[rows].transpose(0, 1) for x in (q, k, v)]
        mask = torch.stack(
            [
                torch.stack(
                    [bias[:, reach + min(max(j - i, -reach), reach)] for j in range(length)]
                )
                for i in range(length)
            ]
        ).permute(2, 0, 1)
        if causal:
            mask = mask.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        out = scaled_dot_product_attention(*heads_first, attn_mask=mask)
        alone.append(out.transpose(0, 1))
    wanted = torch.cat(alone)
    grad = torch.randn_like(wanted)
    got = _reference(q, k, v, layout, causal=causal, bias=bias)
    _assert_equal([got], [wanted])
    leaves = (q, k, v, bias)
    _assert_equal(_grads(got, leaves, grad), _grads(wanted, leaves, grad))


def test_key_indices_choose_among_the_keys_that_the_mask_shows() -> None:
    """Against sdpa with a dense mask; keys of other documents and indices of none stay unseen."""
    layout = DocumentLayout.from_lengths([5, 1, 12])
    q, k, v = _draw(18, 2, 2, 8)
    indices = torch.randint(-2, 20, (18, 9), generator=torch.Generator().manual_seed(3))
    indices[:, 0] = torch.arange(18)  # every token sees itself
    documents = layout.document_ids
    i, j = torch.arange(18)[:, None], torch.arange(18)[None, :]
    mask = (documents[:, None] == documents[None, :]) & (j <= i)
    mask &= (indices[:, :, None] == torch.arange(18)).any(1)
    heads_first = [x.transpose(0, 1) for x in (q, k, v)]
    wanted = scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(0, 1)
    grad = torch.randn_like(wanted)
    wanted_grads = _grads(wanted, (q, k, v), grad)
    for dtype in (torch.int32, torch.int64):
        got = _reference(q, k, v, layout, key_indices=indices.to(dtype))
        _assert_equal([got], [wanted])
        _assert_equal(_grads(got, (q, k, v), grad), wanted_grads)


@pytest.mark.parametrize("sinks", [None, torch.zeros(2, dtype=torch.float64)])
def test_a_query_that_names_no_key_of_its_document_sees_nothing(sinks: Tensor | None) -> None:
    layout = DocumentLayout.from_lengths([3, 4])
    q, k, v = _draw(7, 2, 2, 8)
    for indices in (torch.full((7, 1), 2), torch.full((7, 2), -1), torch.empty(7, 0).long()):
        out, lse = _reference(q, k, v, layout, key_indices=indices, sinks=sinks, return_lse=True)
        assert not out[3:].any()
        assert (lse[:, 3:] == -torch.inf).all()
        assert not any(x[3:].any() for x in _grads(out, (q, k, v), torch.ones_like(out)))
