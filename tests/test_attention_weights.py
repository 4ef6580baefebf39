"""output_attentions=True in a packed forward: the weights of each document alone, 0 elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packed_attn_patches import tiny
from torch import Tensor, nn

from packed_attn import DocumentLayout, patch_model
from tests.exactness import documents
from tests.models import FAMILIES, tiny_model

LENGTHS = (5, 1, 12, 9)


def eager(family: str, **settings: Any) -> nn.Module:
    """A model whose stock attention returns weights."""
    make = tiny_model if family in FAMILIES else tiny.tiny_model
    model = make(family, **settings)
    model.set_attn_implementation("eager")
    return model


def alone(model: nn.Module, ids: Tensor, **more: Any) -> tuple[Tensor, ...]:
    weights = model(input_ids=ids[None], output_attentions=True, **more).attentions
    assert len(weights) == model.config.num_hidden_layers
    return weights


# Whose attention returns weights without sinks, or goes on from outputs that lie in one piece.
@pytest.mark.parametrize("family", [*FAMILIES, "granite_swa", "granitemoe_swa", "jetmoe", "afmoe"])
@pytest.mark.parametrize("rows", [1, 2])
def test_weights_are_those_of_documents_alone(family: str, rows: int) -> None:
    model = eager(family)
    docs = documents(lengths=LENGTHS * rows)
    wanted = [alone(model, ids) for ids in docs]
    patch_model(model)
    layout = DocumentLayout.from_lengths([*LENGTHS] * rows)
    ids = torch.cat(docs).view(rows, -1)
    output = model(input_ids=ids, layout=layout, output_attentions=True)
    got = output.attentions
    tokens = sum(LENGTHS)
    plain = model(input_ids=ids, layout=layout)
    torch.testing.assert_close(output.logits, plain.logits)
    assert plain.attentions is None
    for layer, weights in enumerate(got):
        assert weights.shape == (rows, model.config.num_attention_heads, tokens, tokens)
        left = weights.clone()
        for number, start in enumerate(layout.starts):
            row, first = divmod(start, tokens)
            inside = slice(first, first + docs[number].numel())
            own = left[row, :, inside, inside]
            torch.testing.assert_close(own, wanted[number][layer][0])
            own.zero_()
        assert not left.any()


def test_weights_of_models_on_other_implementations() -> None:
    """Stock sdpa warns and returns none; a packed forward returns what it was asked for."""
    model, reference = patch_model(tiny_model("llama")), eager("llama")
    ids = torch.arange(10)[None]
    (weights, *_) = model(
        input_ids=ids, layout=DocumentLayout.from_lengths([4, 6]), output_attentions=True
    ).attentions
    torch.testing.assert_close(weights[:, :, :4, :4], alone(reference, ids[0, :4])[0])


def test_weights_of_shared_prefixes_and_padding() -> None:
    model = eager("llama")
    prompt, first, second, pad = (documents(n, (n,))[0] for n in (4, 3, 5, 2))
    wanted = [alone(model, torch.cat([prompt, answer])) for answer in (first, second)]
    patch_model(model)
    layout = DocumentLayout.from_lengths(
        [4, 3, 5, 2], parents=[-1, 0, 0, -1], padding=[False, False, False, True]
    )
    ids = torch.cat([prompt, first, second, pad])[None]
    got = model(input_ids=ids, layout=layout, output_attentions=True).attentions
    for layer, weights in enumerate(got):
        for number, keys in enumerate((range(7), [*range(4), *range(7, 12)])):
            own = weights[0][:, keys][:, :, keys]
            torch.testing.assert_close(own, wanted[number][layer][0])
        assert not weights[0, :, 7:12, 4:7].any()
        assert not weights[0, :, 12:].any()
        assert not weights[0, :, :, 12:].any()


def test_weights_have_their_gradients_and_dropout() -> None:
    model = eager("llama", attention_dropout=0.5)
    ids = torch.cat(documents(lengths=LENGTHS))[None]
    layout = DocumentLayout.from_lengths(LENGTHS)
    patch_model(model).train()
    weights = model(input_ids=ids, layout=layout, output_attentions=True).attentions[-1]
    seen = weights[0, :, 6:18, 6:18].flatten(1)[:, torch.ones(12, 12).tril().flatten() > 0]
    assert 0.3 < (seen == 0).float().mean() < 0.7
    weights.square().sum().backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_weights_without_sinks_are_refused_under_dropout() -> None:
    model = eager("granite_swa", attention_dropout=0.5)
    ids = torch.arange(10)[None]
    batch = {"input_ids": ids, "layout": DocumentLayout.from_lengths([4, 6])}
    patch_model(model).train()
    with pytest.raises(NotImplementedError, match="returns weights without its sinks"):
        model(**batch, output_attentions=True)
    model(**batch)


def test_weights_by_config() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    patch_model(model)
    ids = torch.arange(10)[None]
    layout = DocumentLayout.from_lengths([4, 6])
    assert len(model(input_ids=ids, layout=layout).attentions) == 2
    assert not model(input_ids=ids, layout=layout, output_attentions=False).attentions
