"""The flex backend: its block mask against torch's own, its results in torch's unfused form.

torch has no backward of FlexAttention on the CPU but computes it unfused, scores and all, once two
guards are lifted: what runs here is the mask, the score modifiers and the sinks, not the kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from packed_attn import DocumentLayout, attention
from packed_attn.backends import flex, machine
from packed_attn.visibility import Visibility
from tests.cases import BY_NAME, SMALL, Case
from tests.oracle import assert_exact, assert_isolated, documents_to_isolate, reasons_against

# The unfused form multiplies q and k in half precision, which no kernel does.
SINGLE = [case for case in SMALL if case.dtype == torch.float32]
# One of each kind in `make test`, all of them in `make test-all`.
# fmt: off
FEW = (
    "mixed", "empty_documents", "padding_between", "all_padding", "no_tokens", "no_documents",
    "group_of_three", "value_head_dim_smaller", "strided", "window_both", "chunk",
    "prefix_window", "everything", "sinks_padding", "alibi_bidirectional",
    "lse_gradient_sinks_softcap", "lse_gradient_padding", "forest_nested", "forest_window",
    "forest_alibi", "cross", "cross_sinks", "cross_alibi", "cross_padding", "dropout",
    "bias_softcap_sinks", "key_sets_sinks", "forest_key_sets", "cross_bias",
)
# fmt: on
ISOLATED = ["mixed", "padding_between", "forest_nested"]


def _cases(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(c, id=c.name, marks=[] if c.name in FEW else [pytest.mark.slow])
            for c in cases
        ],
    )


def _sizes(case: Case) -> tuple[int, int]:
    return sum(case.lengths), sum(case.lengths if case.key_lengths is None else case.key_lengths)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the backend run here."""
    monkeypatch.setattr(machine, "gpu_reasons", lambda *_, **__: [])
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "_flex", lambda: flex_attention)


@pytest.mark.usefixtures("on_cpu")
@_cases(SINGLE)
def test_exact_or_refused(case: Case) -> None:
    reasons = reasons_against("flex", case, "cpu")
    if not reasons:
        assert_exact("flex", case, "cpu")
    else:
        assert reasons == ["has no dropout"]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("name", ISOLATED)
def test_isolated(name: str) -> None:
    assert documents_to_isolate(BY_NAME[name])
    assert_isolated("flex", BY_NAME[name], "cpu")


@pytest.mark.usefixtures("on_cpu")
def test_sink_of_minus_infinity() -> None:
    """One that is turned off has gradient 0, on rows that see nothing too."""
    layout = DocumentLayout.from_lengths([3, 6], padding=[True, False])
    q, k, v = torch.randn(3, 9, 2, 16).unbind()
    sinks = torch.full((2,), -torch.inf, requires_grad=True)
    out, lse = attention(q, k, v, layout, sinks=sinks, backend="flex", return_lse=True)
    torch.testing.assert_close(out, attention(q, k, v, layout, backend="reference"))
    (gradient,) = torch.autograd.grad(out.sum() + lse[:, 3:].sum(), sinks)
    assert not gradient.any()


def _of(case: Case) -> Visibility:
    return case.layout().visibility(
        case.causal,
        case.window_size,
        chunk_size=case.chunk_size,
        prefix_lengths=case.prefix_lengths,
        key_layout=case.key_layout(),
    )


@pytest.mark.parametrize("block", [16, 128])
@_cases([case for case in SINGLE if 0 not in _sizes(case)])
def test_block_mask_is_that_of_torch(case: Case, block: int) -> None:
    """torch looks at every pair of tokens; one half of the rule gives the same tiles."""
    visibility = _of(case)
    queries, keys = visibility.key_start.numel(), visibility.query_start.numel()
    got = flex.block_mask(visibility, block)
    want = create_block_mask(
        got.mask_mod, None, None, queries, keys, device="cpu", BLOCK_SIZE=block
    )
    partial, full = _tiles(got.kv_num_blocks, got.kv_indices), _full(got)
    wanted_partial, wanted_full = _tiles(want.kv_num_blocks, want.kv_indices), _full(want)
    assert full == wanted_full
    if visibility.halves == "both":
        assert partial >= wanted_partial
    else:
        assert partial == wanted_partial
    assert got.shape == want.shape
    assert got.mask_mod is not None
    i, j = torch.arange(queries)[:, None], torch.arange(keys)[None, :]
    zero = torch.zeros((), dtype=torch.int64)
    assert torch.equal(got.mask_mod(zero, zero, i, j), visibility.dense())
    # The other side, which the backward walks, is the transpose.
    assert got.q_num_blocks is not None
    assert got.q_indices is not None
    assert {(q, k) for k, q in _tiles(got.q_num_blocks, got.q_indices)} == partial


def _tiles(numbers: torch.Tensor, indices: torch.Tensor) -> set[tuple[int, int]]:
    rows = zip(numbers[0, 0].tolist(), indices[0, 0].tolist())
    return {(row, column) for row, (n, columns) in enumerate(rows) for column in columns[:n]}


def _full(mask: torch_flex.BlockMask) -> set[tuple[int, int]]:
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    return _tiles(mask.full_kv_num_blocks, mask.full_kv_indices)


def test_block_mask_of_a_long_pack_is_sparse() -> None:
    """64 documents of 512 tokens: ten tiles of 128 x 128 each, six of them full; no T x T bools,
    which would be 1 GiB here."""
    mask = flex.block_mask(DocumentLayout.from_lengths([512] * 64).visibility())
    assert len(_full(mask)) == 64 * 6
    assert len(_tiles(mask.kv_num_blocks, mask.kv_indices)) == 64 * 4


@pytest.mark.usefixtures("on_cpu")
def test_block_mask_is_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make = flex.block_mask
    monkeypatch.setattr(flex, "block_mask", lambda v: made.append(v) or make(v))
    layout = DocumentLayout.from_lengths([5, 9])
    q, k, v = torch.randn(3, 14, 2, 16).unbind()
    for _ in range(3):
        attention(q, k, v, layout, backend="flex")
        attention(q, k, v, layout, backend="flex", window_size=(3, 0))
        attention(q, k, v, layout, backend="flex", prefix_lengths=[1, 2])
    assert len(made) == 3


def test_other_boundaries_compile_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """One compilation for every batch of one capacity, whatever its documents."""
    monkeypatch.setattr(machine, "gpu_reasons", lambda *_, **__: [])
    counter = CompileCounter()
    compiled = torch.compile(flex_attention, backend=counter, fullgraph=True)
    monkeypatch.setattr(flex, "_flex", lambda: compiled)
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"softcap": 3.0, "alibi_slopes": torch.ones(2)}
    with torch.no_grad():
        for documents in range(1, 6):
            cuts = torch.randperm(255, generator=generator)[: documents - 1].add(1).sort().values
            layout = DocumentLayout.from_cu_seqlens([0, *cuts.tolist(), 256])
            q, k, v = torch.randn(3, 256, 2, 16, generator=generator).unbind()
            out = attention(q, k, v, layout, backend="flex", **options)
            want = attention(q, k, v, layout, backend="reference", **options)
            torch.testing.assert_close(out, want)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compiles_whole_and_once_for_all_boundaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a user's compiled model: one graph, and one more for any number of documents."""
    monkeypatch.setattr(machine, "gpu_reasons", lambda *_, **__: [])
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def two_layers(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout) -> Tensor:
        q = attention(q, k, v, layout, backend="flex")
        return attention(q, k, v, layout, backend="flex")

    with torch.no_grad():
        for lengths in [(24, 40), (5, 9, 50), (64,), (1,) * 64]:
            layout = DocumentLayout.from_lengths(lengths)
            layout.visibility()
            q, k, v = torch.randn(3, 64, 2, 16).unbind()
            out = two_layers(q, k, v, layout)
            q = attention(q, k, v, layout, backend="reference")
            torch.testing.assert_close(out, attention(q, k, v, layout, backend="reference"))
    assert counter.frame_count == 2


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reasons_against("flex", BY_NAME["mixed"], "cpu") == [
        "needs a CUDA device, but q is on cpu"
    ]
    monkeypatch.setattr(machine, "gpu_reasons", lambda *_, **__: [])
    assert reasons_against("flex", BY_NAME["everything"], "cpu") == []
    assert reasons_against("flex", BY_NAME["forest_window_both"], "cpu") == []
    (reason,) = reasons_against("flex", BY_NAME["mixed"], "cpu", confine_nonfinite=True)
    assert "confine_nonfinite" in reason
    layout = DocumentLayout.from_lengths([3])
    x = torch.ones(3, 1, 8, dtype=torch.float64)
    with pytest.raises(NotImplementedError) as raised:
        attention(x, x, x, layout, backend="flex", alibi_slopes=torch.ones(1, requires_grad=True))
    for part in ("not torch.float64", "head_dim must be from 16 to 256, not 8", "alibi_slopes"):
        assert part in str(raised.value)
    huge = torch.ones(1).expand(4, 2**21, 256)
    x = torch.ones(4, 1, 256)
    with pytest.raises(NotImplementedError, match="wrong from 2\\^31 elements on"):
        attention(huge, x, x, DocumentLayout.from_lengths([4]), backend="flex")
