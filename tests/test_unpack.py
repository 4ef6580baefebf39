"""Models that run on documents batched by length: as exact as those whose attention is packed."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from packed_attn import PackedCollator, audit, patch_model, unpatch_model
from tests.exactness import (
    alone,
    close,
    documents,
    gradients,
    packed,
    relative,
    stock_results,
    token_mean,
)
from tests.models import UNPACKED, tiny_config, tiny_model


@pytest.fixture(scope="module")
def mamba() -> nn.Module:
    return patch_model(tiny_model("mamba"))


@pytest.mark.parametrize("family", UNPACKED)
def test_loss_and_gradients_equal_the_documents_alone(family: str) -> None:
    model = tiny_model(family).train()
    docs = documents()
    loss = token_mean(model, docs)
    loss.backward()
    want = gradients(model)
    patch_model(model)
    model.zero_grad()
    batch = packed(docs)
    got = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], labels=batch["labels"]
    ).loss
    got.backward()
    assert abs(got.item() - loss.item()) <= 1e-6 * abs(loss.item())
    assert relative(gradients(model), want) <= 2e-6


@pytest.mark.parametrize("family", UNPACKED)
def test_isolated_and_otherwise_untouched(family: str) -> None:
    model = tiny_model(family)
    before = stock_results(model)
    patch_model(model)
    report = audit(model)
    assert report.verdict == "isolated", str(report)
    assert all(torch.equal(a, b) for a, b in zip(before, stock_results(model)))
    unpatch_model(model)
    assert "forward" not in vars(model)
    assert all(torch.equal(a, b) for a, b in zip(before, stock_results(model)))


def test_stock_mamba_leaks_and_its_mixer_is_named() -> None:
    report = audit(tiny_model("mamba"))
    assert report.first_leaking_module == "backbone.layers.0.mixer (MambaMixer)"


def test_many_lengths_rows_and_padding(mamba: nn.Module) -> None:
    docs = documents(lengths=(3, 3, 3, 1, 1, 29, 30, 31, 2, 3))
    batch = PackedCollator("documents", pad_to_multiple_of=64)([{"input_ids": d} for d in docs])
    logits = mamba(**batch).logits
    assert logits.shape[:2] == (1, 128)
    total = sum(map(len, docs))
    assert close(logits[0, :total], alone(mamba, docs))
    assert not logits[0, total:].any()


def test_two_rows(mamba: nn.Module) -> None:
    a, b = documents(lengths=(5, 22))
    rows = torch.stack([torch.cat([a, b]), torch.cat([b, a])])
    seq_idx = torch.tensor([[0] * 5 + [1] * 22, [0] * 22 + [1] * 5])
    logits = mamba(input_ids=rows, seq_idx=seq_idx).logits
    assert close(logits[0], alone(mamba, [a, b]))
    assert close(logits[1], alone(mamba, [b, a]))


def test_loss_over_a_given_number_of_items(mamba: nn.Module) -> None:
    """Gradient accumulation divides by the targets of all its batches."""
    batch = packed(documents())
    mean = mamba(**batch).loss
    targets = int((batch["labels"] != -100).sum())
    got = mamba(**batch, num_items_in_batch=torch.tensor(4 * targets)).loss
    assert got.item() == pytest.approx(mean.item() / 4, rel=1e-6)


def test_documents_without_targets_add_nothing(mamba: nn.Module) -> None:
    model = copy.deepcopy(mamba).train()
    docs = documents(lengths=(1, 1, 20))
    loss = model(**packed(docs)).loss
    loss.backward()
    assert loss.item() == pytest.approx(token_mean(model, docs).item(), rel=1e-6)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_hidden_states_come_back_in_stream_order(mamba: nn.Module) -> None:
    docs = documents()
    states = mamba(**packed(docs), output_hidden_states=True).hidden_states
    for layer, state in enumerate(states):
        want = torch.cat(
            [
                mamba(input_ids=d[None], output_hidden_states=True).hidden_states[layer][0]
                for d in docs
            ]
        )
        assert close(state[0], want)


def test_outputs_without_rows_are_refused_and_not_dropped() -> None:
    torch.manual_seed(0)
    config = tiny_config("bart")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    patch_model(model)
    with pytest.raises(NotImplementedError, match="the output attentions has no rows"):
        model(**packed(documents()), output_attentions=True)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_patched_and_independent(clone: Any) -> None:
    model = patch_model(tiny_model("mamba"))
    twin = clone(model)
    docs = documents()
    want = alone(model, docs)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    assert close(twin(**packed(docs)).logits[0], want)


def test_trainer_reads_the_names_of_forward(mamba: nn.Module) -> None:
    stock = list(inspect.signature(tiny_model("mamba").forward).parameters)
    assert list(inspect.signature(mamba.forward).parameters) == stock
