"""What a batch says of its documents: contradictions and what would be left out are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from packed_attn import DocumentLayout, patch_model
from tests.exactness import alone, close, documents, packed
from tests.models import tiny_model


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return patch_model(tiny_model("llama"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layout": DocumentLayout.from_lengths([4])}, "layout covers 4 tokens"),
        ({"position_ids": torch.arange(65)[None]}, "position_ids contradict layout"),
        ({"attention_mask": torch.tensor([[0] + [1] * 64])}, "attention_mask hides tokens"),
        ({"attention_mask": torch.ones(1, 1, 65, 65)}, r"has shape \[1, 1, 65, 65\]: leave out"),
        ({"attention_mask": {"full_attention": torch.ones(1, 1, 65, 65)}}, "leave out one of"),
        ({"attention_mask": torch.ones(1, 10)}, r"has shape \[1, 10\]: leave out one of"),
    ],
)
def test_contradictions_are_named(llama: nn.Module, change: dict, words: str) -> None:
    batch = {**packed(documents()), **change}
    with pytest.raises(ValueError, match=words):
        llama(**batch)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cu_seq_lens_q": torch.tensor([1, 65], dtype=torch.int32)}, "start at 0"),
        ({"cu_seq_lens_q": torch.tensor([0, 9, 5, 65], dtype=torch.int32)}, "must not decrease"),
        ({"cu_seq_lens_q": torch.tensor([0, 64], dtype=torch.int32)}, "must end at"),
        ({"cu_seq_lens_q": torch.tensor([0, 6, 43, 65], dtype=torch.int32)}, "contradict"),
        ({"position_ids": torch.tensor([list(range(60)) + [-1] * 5])}, "negative"),
        ({"cu_seq_lens_k": torch.tensor([0, 6, 43, 65])}, "contradicts cu_seq_lens_k"),
        ({"position_ids": None, "seq_lengths": torch.tensor([5, 60])}, "by seq_lengths, which"),
        ({"position_ids": None, "document_ids": torch.ones(1, 65)}, "by document_ids, which"),
        ({"attention_mask": torch.full((1, 65), 1.5)}, "no whole ones"),
    ],
)
def test_bad_boundaries_are_named(llama: nn.Module, change: dict, words: str) -> None:
    batch = packed(documents())
    kwargs = {k: batch[k] for k in ("input_ids", "position_ids")}
    with pytest.raises(ValueError, match=words):
        llama(**{**kwargs, **change})


def test_a_mask_hides_padding_alone(llama: nn.Module) -> None:
    """Also where the layout has padding, of which other tokens are no part."""
    docs = documents()
    layout = DocumentLayout.from_lengths([*map(len, docs), 5], padding=[False] * len(docs) + [True])
    ids = nn.functional.pad(packed(docs)["input_ids"], (0, 5))
    mask = (ids != 0).long()
    mask[0, -5:] = 0
    got = llama(input_ids=ids, layout=layout, attention_mask=mask).logits[0, :-5]
    assert close(got, alone(llama, docs))
    mask[0, 3] = 0
    with pytest.raises(ValueError, match="hides tokens that are no padding"):
        llama(input_ids=ids, layout=layout, attention_mask=mask)


def test_a_filled_cache_is_refused(llama: nn.Module) -> None:
    cache = llama(input_ids=torch.ones(1, 3, dtype=torch.long), use_cache=True).past_key_values
    batch = packed(documents())
    with pytest.raises(ValueError, match="past_key_values was given"):
        llama(**batch, past_key_values=cache)


@pytest.mark.parametrize("family", ["llama", "bloom", "mamba", "rwkv", "minimax"])
def test_generation_from_a_pack_is_refused(family: str) -> None:
    """It fills no cache to go on from: each new token would see itself alone."""
    model, batch = patch_model(tiny_model(family)), packed(documents())
    names = ("input_ids", "position_ids")
    with pytest.raises(ValueError, match="neither goes on from tokens nor fills a cache"):
        model.generate(**{n: batch[n] for n in names}, max_new_tokens=3)


def test_traces_that_would_keep_boundaries_are_refused(llama: nn.Module) -> None:
    batch = packed(documents())
    names = ("input_ids", "position_ids")

    def logits(ids: Tensor, positions: Tensor) -> Tensor:
        return llama(input_ids=ids, position_ids=positions).logits

    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace would keep the boundaries"):
        torch.jit.trace(logits, tuple(batch[n] for n in names), check_trace=False)


def test_a_document_may_not_cross_rows(llama: nn.Module) -> None:
    layout = DocumentLayout.from_lengths([5, 3])
    with pytest.raises(ValueError, match="crosses from row 0 to row 1"):
        llama(input_ids=torch.ones(2, 4, dtype=torch.long), layout=layout)
