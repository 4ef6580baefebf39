"""The CPU backend: its buckets, exactness on every way through them, operators and compilation.

The conformance suite runs it on the shared small cases. Here are the documents that take each path
inside: read in place, in runs, gathered, padded; and what only this backend promises.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from packed_attn import DocumentLayout, attention, rectangles, softmax
from packed_attn.backends import cpu
from packed_attn.rectangles import Limits, MaskKind, plan_rectangles
from packed_attn.request import checked_request
from tests.cases import BY_NAME, Case
from tests.oracle import _clean, assert_confined, assert_exact, assert_isolated, run

BF16, FP16 = torch.bfloat16, torch.float16

# 512 elements a token: documents from 64 tokens, and runs of equal ones, are read in place.
WIDE = {"num_heads": 8, "num_kv_heads": 8, "head_dim": 64}
# Short ones gathered with padding; two runs, the second cut into several calls; long ones; empty.
EVERY_PATH = (5, 1, 6, 40, 37, 0, 90, 32, 32, 32, 7, 200, 1, 0, 33, *(24,) * 25)
CASES = (
    Case("every_path", EVERY_PATH, **WIDE),
    Case("grouped", EVERY_PATH, num_heads=8, num_kv_heads=2, head_dim=64),
    Case("multi_query", EVERY_PATH, num_heads=8, num_kv_heads=1, head_dim=64),
    Case("strided", EVERY_PATH, num_heads=8, num_kv_heads=2, head_dim=64, strided=True),
    Case("bidirectional", EVERY_PATH, **WIDE, causal=False),
    Case("window", EVERY_PATH, **WIDE, window_size=(20, 0)),
    Case("window_both", EVERY_PATH, **WIDE, causal=False, window_size=(20, 9)),
    Case("chunks", EVERY_PATH, **WIDE, chunk_size=36),
    Case("sinks", EVERY_PATH, **WIDE, sinks=True),
    Case("lse_gradient", EVERY_PATH, **WIDE, sinks=True, lse_gradient=True),
    Case("value_head_dim", EVERY_PATH, num_heads=8, head_dim=64, value_head_dim=40),
    Case("bf16", EVERY_PATH, **WIDE, dtype=BF16),
    Case("bf16_grouped", EVERY_PATH, num_heads=8, head_dim=64, dtype=BF16, lse_gradient=True),
    Case("fp16", EVERY_PATH, **WIDE, dtype=FP16),
    Case("one_long_document", (700,), num_heads=2, head_dim=16),
    Case("window_over_blocks", (700, 9), num_heads=2, head_dim=16, window_size=(40, 0)),
    Case("hundreds_of_tiny", (1, 2, 3, 1) * 50, num_heads=2, num_kv_heads=1, head_dim=16),
    Case("one_run", (32,) * 40, **WIDE),
    Case(
        "padding",
        (70, 3, 80, 5, 100),
        padding=(True, True, False, False, True),
        **WIDE,
        sinks=True,
        lse_gradient=True,
    ),
)
SEVERAL = [case for case in CASES if len(case.lengths) > 1]


def named(cases: list[Case] | tuple[Case, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


@named(CASES)
def test_exact(case: Case) -> None:
    assert_exact("cpu", case, "cpu")


@named(SEVERAL)
def test_other_documents_change_no_bit(case: Case) -> None:
    assert_isolated("cpu", case, "cpu")


@named(SEVERAL)
def test_nonfinite_values_stay_in_their_document(case: Case) -> None:
    assert_confined("cpu", case, "cpu")


@pytest.mark.parametrize("causal", [True, False])
def test_float64(causal: bool) -> None:
    case = Case("float64", EVERY_PATH, num_heads=8, num_kv_heads=2, head_dim=64, causal=causal)
    results = {}
    for backend in ("cpu", "reference"):
        inputs = case.inputs(dtype=torch.float64)
        qkv = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        out, lse = attention(*qkv, case.layout(), causal=causal, backend=backend, return_lse=True)
        results[backend] = [out, lse, *torch.autograd.grad(out, qkv, inputs.grad_out)]
    for got, exact in zip(results["cpu"], results["reference"]):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-13)


def test_document_of_one_token_is_its_value() -> None:
    """The weight is 1, exactly; what is left of dq and dk is the rounding of two equal sums."""
    case = Case("length_one", (1,) * 60)
    inputs = case.inputs()
    qkv = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = attention(*qkv, case.layout(), backend="cpu")
    assert torch.equal(out, inputs.v.repeat_interleave(2, dim=1))
    dq, dk, dv = torch.autograd.grad(out, qkv, inputs.grad_out)
    torch.testing.assert_close(dv, inputs.grad_out.unflatten(1, (2, 2)).sum(2))
    assert dq.abs().max() < 1e-5
    assert dk.abs().max() < 1e-5


def test_grad_out_of_a_sum() -> None:
    """`out.sum()` hands over a gradient whose strides are all 0."""
    case = Case("sum", EVERY_PATH, **WIDE)
    inputs = case.inputs()
    qkv = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = attention(*qkv, case.layout(), backend="cpu")
    expanded = torch.autograd.grad(out.sum(), qkv, retain_graph=True)
    dense = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense))


def test_inputs_are_left_alone() -> None:
    case = Case("inputs", EVERY_PATH, **WIDE, sinks=True, lse_gradient=True)
    inputs, before = case.inputs(), case.inputs()
    assert inputs.grad_lse is not None
    qkv = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out, lse = attention(*qkv, case.layout(), sinks=inputs.sinks, backend="cpu", return_lse=True)
    saved = (out.detach().clone(), lse.detach().clone())
    torch.autograd.grad((out, lse), qkv, (inputs.grad_out, inputs.grad_lse))
    assert torch.equal(out, saved[0])
    assert torch.equal(lse, saved[1])
    for name in ("q", "k", "v", "grad_out", "grad_lse", "sinks"):
        assert torch.equal(getattr(inputs, name), getattr(before, name)), name


def test_gradient_of_lse_alone() -> None:
    case = Case("lse", EVERY_PATH, **WIDE)
    grads = {}
    for backend in ("cpu", "reference"):
        inputs = case.inputs()
        qk = [x.requires_grad_() for x in (inputs.q, inputs.k)]
        lse = attention(*qk, inputs.v, case.layout(), backend=backend, return_lse=True)[1]
        grads[backend] = torch.autograd.grad(lse.square().sum(), qk)
    for got, expected in zip(grads["cpu"], grads["reference"]):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


# ---- documents cut into pieces ----

# Each way in which a long document is cut, and each in which results of calls add up.
IN_PIECES = (
    "window_left_long",
    "window_both",
    "window_right",
    "prefix",
    "prefix_window",
    "prefix_chunk",
    "chunk_window",
    "softcap_window",
    "dropout_everything",
    "alibi",
    "alibi_bidirectional",
    "lse_gradient_sinks_softcap",
    "forest_nested",
    "forest_many_answers",
    "forest_window",
    "forest_chunk",
    "forest_window_both",
    "forest_sinks_softcap",
    "forest_alibi",
    "forest_dropout",
    "forest_padding",
    "cross",
    "cross_window_both",
    "cross_chunk",
    "cross_alibi",
    "cross_dropout",
    "cross_padding",
    "bf16_forest",
    "bf16_gpt_oss",
)


@pytest.fixture
def tiny_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Limits so small that every document of the shared small cases is cut."""
    for module, name, value in (
        (cpu, "VIEW_ELEMENTS", 2**10),
        (cpu, "MASK_ELEMENTS", 100),
        (cpu, "WRITTEN_ELEMENTS", 150),
        (softmax, "SCORE_ELEMENTS", 100),
        (rectangles, "BAND_ROWS", 6),
        (rectangles, "HELD_ROWS", 5),
        (rectangles, "FEWEST_ROWS", 3),
    ):
        monkeypatch.setattr(module, name, value)
    rectangles._cached_plan.cache_clear()
    _clean.cache_clear()
    yield
    rectangles._cached_plan.cache_clear()
    _clean.cache_clear()


@pytest.mark.usefixtures("tiny_pieces")
@pytest.mark.parametrize("name", IN_PIECES)
def test_exact_in_pieces(name: str) -> None:
    assert_exact("cpu", BY_NAME[name], "cpu")


@pytest.mark.usefixtures("tiny_pieces")
@pytest.mark.parametrize("name", ["prefix_window", "dropout_everything", "forest_window"])
def test_pieces_are_isolated_and_confined(name: str) -> None:
    assert_isolated("cpu", BY_NAME[name], "cpu")
    assert_confined("cpu", BY_NAME[name], "cpu")


@pytest.mark.parametrize("name", ["window_left_long", "forest_nested", "forest_window"])
def test_gradients_are_the_same_bits_from_run_to_run(name: str) -> None:
    case = BY_NAME[name]
    first, second = (run("cpu", case, case.inputs(), "cpu") for _ in range(2))
    for gradient, again in zip(first.grads.values(), second.grads.values()):
        assert torch.equal(gradient, again)


@pytest.mark.parametrize(
    "change", [{}, {"window_size": (7, 0)}, {"softcap": 2.0}, {"causal": False}, {"sinks": True}]
)
@pytest.mark.parametrize("name", ["alibi", "forest_alibi", "cross_alibi"])
def test_gradient_of_alibi_slopes(name: str, change: dict) -> None:
    case = replace(BY_NAME[name], **change)
    gradients = {}
    for backend in ("cpu", "reference"):
        inputs = case.inputs(dtype=torch.float64)
        assert inputs.alibi_slopes is not None
        slopes = inputs.alibi_slopes.double().requires_grad_()
        sinks = None if inputs.sinks is None else inputs.sinks.double()
        out, lse = attention(
            inputs.q, inputs.k, inputs.v, case.layout(), key_layout=case.key_layout(),
            alibi_slopes=slopes, sinks=sinks, backend=backend, return_lse=True, **case.kwargs(),
        )  # fmt: skip
        loss = (out * inputs.grad_out).sum() + lse.masked_fill(lse == -torch.inf, 0).square().sum()
        (gradients[backend],) = torch.autograd.grad(loss, slopes)
    torch.testing.assert_close(gradients["cpu"], gradients["reference"], rtol=1e-10, atol=1e-10)


def test_masks_and_scores_are_bounded() -> None:
    """Whatever the length: a stated number of elements, or FEWEST_ROWS rows of one document."""
    length = 6_000
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
    limits = Limits(64, 512, pair_elements=4, elements=2**16, holds_scores=True)
    for kind in (MaskKind(-1, 0), MaskKind(-1, -1), MaskKind(100, 0), MaskKind(100, 100)):
        plan = plan_rectangles(cu_seqlens, None, None, None, None, None, kind, limits)
        sizes = [c.queries.batch * c.queries.length * c.keys.length * 4 for c in plan.calls]
        assert max(sizes) <= max(2**16, 4 * rectangles.FEWEST_ROWS * length)
        if kind.left >= 0:
            pairs = sum(size // 4 for size in sizes)
            assert pairs <= length * (3 * kind.left + 2 * rectangles.BAND_ROWS)


def test_cost_of_a_shared_prompt_grows_with_the_answers() -> None:
    """Pairs computed: prompt and answers once each, and every answer against the prompt."""
    pairs = {}
    for answers in (1, 4, 16, 64):
        layout = DocumentLayout.from_lengths([200, *[30] * answers], parents=[-1, *[0] * answers])
        limits = Limits(64, 512, pair_elements=1, elements=2**22, holds_scores=False)
        plan = plan_rectangles(
            layout.cu_seqlens, None, layout.parents, None, None, None, MaskKind(-1, 0), limits
        )
        pairs[answers] = sum(c.queries.batch * c.queries.length * c.keys.length for c in plan.calls)
    assert pairs == {n: 200 * 200 + n * 30 * 30 + n * 30 * 200 for n in pairs}


def test_autocast_changes_nothing() -> None:
    case = BY_NAME["softcap"]
    inputs = case.inputs()
    call = (inputs.q, inputs.k, inputs.v, case.layout())
    wanted = attention(*call, backend="cpu", **case.kwargs())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(*call, backend="cpu", **case.kwargs()), wanted)


# ---- what it refuses ----


def test_reasons_against_device_and_dtype() -> None:
    layout = DocumentLayout.from_lengths([3])
    x = torch.randn(3, 1, 4)
    narrow = replace(_request(x, x, x, layout), q=x.to(torch.float8_e4m3fn))
    assert "q is torch.float8_e4m3fn" in cpu.reasons_against(narrow)[0]
    elsewhere = torch.empty(3, 1, 4, device="meta")
    request = replace(_request(x, x, x, layout), q=elsewhere)
    assert "q is on meta" in cpu.reasons_against(request)[0]
    assert cpu.reasons_against(_request(x, x, x, layout)) == []


# ---- plans ----


def test_each_path_is_taken() -> None:
    """The layout that the tests above share has runs, documents in place, gathers and padding."""
    cu_seqlens = DocumentLayout.from_lengths(EVERY_PATH).cu_seqlens
    limits = Limits(64, 512, pair_elements=1, elements=2**22, holds_scores=False)
    plan = plan_rectangles(cu_seqlens, None, None, None, None, None, MaskKind(-1, 0), limits)
    assert all(call.keys is call.queries and call.is_causal for call in plan.calls)
    views = [call.queries for call in plan.calls if call.queries.tokens is None]
    gathered = [call.queries for call in plan.calls if call.queries.tokens is not None]
    assert {(b.batch, b.length) for b in views} == {(1, 90), (1, 200), (3, 32), (21, 24), (4, 24)}
    assert any(b.pads is not None for b in gathered)
    assert any(b.pads is None for b in gathered)


def test_one_plan_serves_all_layers() -> None:
    rectangles._cached_plan.cache_clear()
    case = Case("layers", (3, 4, 5))
    inputs = case.inputs()
    for _ in range(4):
        q = inputs.q.detach().requires_grad_()
        attention(q, inputs.k, inputs.v, case.layout(), backend="cpu").sum().backward()
    assert rectangles._cached_plan.cache_info().misses == 1


# ---- operators and compilation ----


def _options(layout: DocumentLayout, key_layout: DocumentLayout | None = None, **changes: Any):
    """The arguments of both operators after q, k, v and sinks."""
    options = {
        "alibi_slopes": None,
        "dropout_seed": None,
        "cu_seqlens": layout.cu_seqlens,
        "key_cu_seqlens": None if key_layout is None else key_layout.cu_seqlens,
        "parents": layout.parents,
        "padding": layout.padding,
        "key_padding": None,
        "prefix": None,
        "softmax_scale": 0.3,
        "softcap": None,
        "window_left": -1,
        "window_right": 0,
        "chunk_size": None,
        "dropout_p": 0.0,
        "slopes_gradient": False,
    }
    assert options.keys() >= changes.keys()
    return tuple({**options, **changes}.values())


@pytest.mark.parametrize("sinks", [False, True])
def test_opcheck(sinks: bool) -> None:
    case = Case(
        "opcheck", (5, 1, 0, 20, 6), padding=(False, True, False, False, False), sinks=sinks
    )
    inputs, layout = case.inputs(), case.layout()
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    per_head = None if inputs.sinks is None else inputs.sinks.requires_grad_()
    options = _options(layout, window_left=9, chunk_size=7)
    torch.library.opcheck(cpu.cpu_attention, (*leaves, per_head, *options))


def test_opcheck_of_everything_else() -> None:
    case = Case("opcheck", (5, 1, 9, 20, 6), parents=(-1, 0, 0, -1, -1), alibi=True)
    inputs, layout = case.inputs(), case.layout()
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    assert inputs.alibi_slopes is not None
    options = _options(
        layout,
        alibi_slopes=inputs.alibi_slopes.requires_grad_(),
        dropout_seed=torch.tensor([5]),
        softcap=3.0,
        dropout_p=0.2,
        slopes_gradient=True,
    )
    torch.library.opcheck(cpu.cpu_attention, (*leaves, None, *options))


def test_opcheck_backward() -> None:
    case = Case("opcheck", (5, 1, 0, 20, 6), lse_gradient=True)
    inputs, layout = case.inputs(), case.layout()
    arguments = (inputs.q, inputs.k, inputs.v, None, *_options(layout))
    out, lse = cpu.cpu_attention(*arguments)
    for grad_lse in (None, inputs.grad_lse):
        gradients = (inputs.grad_out, grad_lse, out, lse)
        torch.library.opcheck(cpu.cpu_attention_backward, (*gradients, *arguments))


def test_compiles_whole_and_once_for_all_boundaries() -> None:
    """One graph without breaks; besides the first, one compilation for any number of documents."""
    counter = CompileCounterWithBackend("aot_eager")

    def layer(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout) -> Tensor:
        out, _ = cpu.run(_request(q * 2, k, v, layout))
        return out.sin()

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for lengths in [(64,), (10, 54), (1,) * 64, (3, 0, 3, 58), (20, 20, 20, 4), (63, 1)]:
        case = Case("compiled", lengths)
        inputs, layout = case.inputs(), case.layout()
        layout.visibility()
        qkv = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        results = []
        for function in (compiled, layer):
            out = function(*qkv, layout)
            results.append([out, *torch.autograd.grad(out, qkv, inputs.grad_out)])
        assert all(torch.equal(a, b) for a, b in zip(*results))
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    "mask",
    [{}, {"window_size": (9, 0), "softcap": 3.0, "dropout_p": 0.1}, {"causal": False}],
    ids=["causal", "window_softcap_dropout", "bidirectional"],
)
def test_prepared_layouts_compile_attention_whole_and_at_most_twice(mask: dict[str, Any]) -> None:
    """`attention` itself, over 12 batches of one capacity with other boundaries and padding."""
    counter = CompileCounterWithBackend("eager")

    def layer(q: Tensor, layout: DocumentLayout, seed: Tensor) -> Tensor:
        return attention(q * 2, q, q, layout, dropout_seed=seed, **mask).sin()

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    seed, generator = torch.tensor([3]), torch.Generator().manual_seed(0)
    kind = {k: v for k, v in mask.items() if k in ("window_size", "causal")}
    for documents in range(2, 14):
        cuts = torch.randperm(63, generator=generator)[: documents - 1].add(1).sort().values
        lengths = torch.diff(cuts, prepend=torch.tensor([0]), append=torch.tensor([64]))
        padding = [False] * (documents - 1) + [True]
        layout = DocumentLayout.from_lengths(lengths, padding=padding).prepare([kind])
        q = torch.randn(64, 2, 16, generator=generator)
        assert torch.equal(compiled(q, layout, seed), layer(q, layout, seed))
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    "mask",
    [
        {"prefix_lengths": [2, 0, 5]},
        {"prefix_lengths": torch.tensor([2, 0, 5])},
        {"key_layout": DocumentLayout.from_lengths([4, 1, 8])},
    ],
    ids=["prefix", "prefix_tensor", "key_layout"],
)
def test_masks_of_callers_compile_whole(mask: dict[str, Any]) -> None:
    layout = DocumentLayout.from_lengths([5, 1, 7])

    def layer(q: Tensor) -> Tensor:
        return attention(q * 2, q, q, layout, **mask).sin()

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    q = torch.randn(13, 2, 16, requires_grad=True)
    results = []
    for function in (compiled, layer):
        out = function(q)
        results.append((out, *torch.autograd.grad(out.sum(), q)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def _request(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout):
    return checked_request(
        q,
        k,
        v,
        layout,
        key_layout=None,
        causal=True,
        window_size=(-1, -1),
        chunk_size=None,
        prefix_lengths=None,
        softmax_scale=None,
        softcap=None,
        sinks=None,
        alibi_slopes=None,
        dropout_p=0.0,
        deterministic=False,
        return_lse=False,
        confine_nonfinite=False,
    )
