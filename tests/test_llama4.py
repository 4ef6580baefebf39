"""Llama 4 scales queries by their place: in the document, not in the pack."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from packed_attn_patches import tiny
from packed_attn_patches.llama4 import scaling_layers
from torch import Tensor, nn

from packed_attn import DocumentLayout, patch_model, unpatch_model
from packed_attn.audit import audit
from tests.exactness import (
    alone,
    close,
    compile_and_compare,
    documents,
    gradients,
    packed,
    relative,
    stock_results,
    token_mean,
)

LENGTHS = (5, 1, 37, 22, 9)


def model_of(**options: Any) -> nn.Module:
    """Scaled from the fourth token on, where the published models begin with the 8192nd."""
    floor: dict[str, Any] = {"floor_scale": 4, "attn_scale": 0.3, "no_rope_layers": [1, 0]}
    return tiny.tiny_model("llama4_text", attn_temperature_tuning=True, **{**floor, **options})


@pytest.fixture(scope="module")
def docs() -> list[Tensor]:
    return documents(lengths=LENGTHS)


def test_each_document_is_scaled_by_its_own_places(docs: list[Tensor]) -> None:
    model = model_of()
    want = alone(model, docs)
    # The scale matters at these lengths.
    assert not close(alone(model_of(attn_scale=0.0), docs), want, 1e-3)
    assert len(scaling_layers(model)) == 1
    patch_model(model)
    with torch.no_grad():
        assert close(model(**packed(docs)).logits[0], want)
    assert audit(model).isolated


def test_two_rows(docs: list[Tensor]) -> None:
    model = model_of()
    rows = [docs[2][:20], docs[3][:10], docs[4], docs[2][:21]]
    want = alone(model, rows)
    layout = DocumentLayout.from_lengths([len(d) for d in rows])
    logits = patch_model(model)(input_ids=torch.cat(rows).view(2, 30), layout=layout).logits
    assert close(logits.detach().flatten(0, 1), want)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients(docs: list[Tensor], checkpointing: bool) -> None:
    model = model_of().train()
    token_mean(model, docs).backward()
    want = gradients(model)
    model.zero_grad()
    patch_model(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model(**packed(docs)).loss.backward()
    assert relative(gradients(model), want) <= 1e-5


def test_shared_prefixes_count_on(docs: list[Tensor]) -> None:
    prompt, one, other = docs[4], docs[3], docs[0]
    model = model_of()
    want = alone(model, [torch.cat([prompt, one]), torch.cat([prompt, other])])
    layout = DocumentLayout.from_lengths([9, 22, 5], parents=[-1, 0, 0])
    ids = torch.cat([prompt, one, other])[None]
    logits = patch_model(model)(input_ids=ids, layout=layout).logits[0].detach()
    assert close(logits, torch.cat([want[:31], want[40:]]))


def test_everything_else_is_untouched(docs: list[Tensor]) -> None:
    model = model_of()
    before = stock_results(model)
    patch_model(model)(**packed(docs))
    assert all(torch.equal(a, b) for a, b in zip(before, stock_results(model)))
    unpatch_model(model)
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(before, stock_results(model)))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(docs: list[Tensor], clone: Any) -> None:
    model = model_of()
    want = alone(model, docs)
    twin = clone(patch_model(model))
    unpatch_model(model)
    assert close(twin(**packed(docs)).logits[0].detach(), want)


@pytest.mark.slow
def test_compiled() -> None:
    compile_and_compare(patch_model(model_of()), lambda docs: alone(model_of(), docs))
