"""Models that run on documents batched by length: as exact as those whose attention is packed."""

from __future__ import annotations

import copy
import inspect
import pickle
import weakref
from typing import Any

import pytest
import torch
from packed_attn_patches import tiny
from packed_attn_patches.unpack import PackedCalls
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    Qwen2VLForConditionalGeneration,
)

from packed_attn import DocumentLayout, PackedCollator, audit, patch_model, unpatch_model
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


@pytest.mark.parametrize("keep", [0, 1, 5, 99, torch.tensor([0, 3, 2])])
def test_logits_of_some_places_of_a_pack(mamba: nn.Module, keep: Any) -> None:
    """As of any row, also where no document is longer than what is kept."""
    kept = slice(-keep, None) if isinstance(keep, int) else keep
    for docs in (documents(), documents(1, (1, 1, 1, 1))):
        got = mamba(**packed(docs), logits_to_keep=keep).logits[0]
        assert close(got, alone(mamba, docs)[kept])


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


@pytest.mark.parametrize("family", ["mamba", "gpt_neo"])
def test_trainer_reads_the_names_of_forward(family: str) -> None:
    """And leaves out all other columns: position_ids are named, and taken, by every model."""
    stock, model = tiny_model(family), patch_model(tiny_model(family))
    want = set(inspect.signature(stock.forward).parameters)
    assert set(inspect.signature(model.forward).parameters) == want | {"position_ids"}
    ids = documents()[2][None]
    alone = model(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None])
    assert torch.equal(alone.logits, stock(input_ids=ids).logits)


def test_documents_of_like_length_share_a_forward(mamba: nn.Module) -> None:
    model = copy.deepcopy(mamba)
    calls = []
    model.backbone.layers[0].register_forward_hook(lambda *args: calls.append(args[1][0].shape))
    model(**packed(documents(lengths=(3, 3, 3, 1, 1, 29, 30, 31, 2, 3))))
    assert sorted(shape[0] for shape in calls) == [1, 2, 3, 4]


@torch.no_grad()
def test_a_batch_is_gathered_when_it_runs(mamba: nn.Module) -> None:
    """What one was made of is gone before the next is made: memory holds one at a time."""
    model, docs = copy.deepcopy(mamba), documents(lengths=(3, 9, 40, 1))
    alive, gathered = [], []

    def watch(module: nn.Module, args: Any, kwargs: Any) -> None:
        alive.append(sum(batch() is not None for batch in gathered))
        gathered.append(weakref.ref(kwargs["inputs_embeds"]))

    model.backbone.register_forward_pre_hook(watch, with_kwargs=True)
    batch = packed(docs)
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    assert close(model(**batch, inputs_embeds=embeds).logits[0], alone(mamba, docs))
    assert alive == [0, 0, 0, 0]


def reward_model(**overrides: Any) -> nn.Module:
    return tiny.tiny_model(
        "llama", auto_class=AutoModelForSequenceClassification, num_labels=1, **overrides
    )


@pytest.mark.parametrize("pad_token_id", [0, None])
def test_a_sequence_head_gives_one_row_a_document(pad_token_id: int | None) -> None:
    """Pooled at each document's own last token, with labels per document, in stream order."""
    model = reward_model(pad_token_id=pad_token_id)
    docs = documents(lengths=(7, 1, 29, 31, 8))
    want = torch.cat([model(input_ids=d[None]).logits for d in docs])
    labels = torch.arange(5.0)[:, None]
    patch_model(model)
    collator = PackedCollator("documents", pad_to_multiple_of=64)
    batch = {**collator([{"input_ids": d} for d in docs]), "labels": labels}
    got = model(**batch)
    assert got.logits.shape == (5, 1)
    assert close(got.logits, want)
    assert got.loss.item() == pytest.approx(((want - labels) ** 2).mean().item(), rel=1e-5)


def test_masked_language_models_keep_every_label() -> None:
    """Their loss shifts nothing, so a document's first label counts."""
    model = tiny.tiny_model("roberta", auto_class=AutoModelForMaskedLM)
    docs = documents(lengths=(7, 29, 31))
    labels = [d.masked_fill(torch.arange(len(d)) > 2, -100) for d in docs]
    losses = [model(input_ids=d[None], labels=x[None]).loss for d, x in zip(docs, labels)]
    patch_model(model)
    batch = {**packed(docs), "labels": torch.cat(labels)[None]}
    assert model(**batch).loss.item() == pytest.approx(sum(losses).item() / 3, rel=1e-6)


def test_the_sum_of_a_batch_may_be_more_than_float16_can_say() -> None:
    """A GPU's cross entropy of float16 logits adds up in float32: only the mean is float16."""

    class Calls(PackedCalls):
        num_items = None

        def targets(self, batch: int) -> torch.Tensor:
            return torch.tensor(batch)

    means = [torch.tensor(x, dtype=torch.float16, requires_grad=True) for x in (5.5, 11.0)]
    loss = Calls()._loss([(20000, means[0]), (10000, means[1])])
    loss.backward()
    assert loss.dtype == torch.float16
    assert loss.item() == pytest.approx(22 / 3, rel=1e-3)
    assert [m.grad.item() for m in means if m.grad is not None] == pytest.approx(
        [2 / 3, 1 / 3], rel=5e-4
    )


def test_positions_may_begin_behind_the_padding_id() -> None:
    model = patch_model(tiny.tiny_model("roberta"))
    docs = documents()
    batch = packed(docs)
    got = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"] + 1).logits[0]
    assert close(got, alone(model, docs))
    with pytest.raises(ValueError, match="position_ids must count up from 0"):
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"] + 2)


def test_text_of_a_vision_model_with_rotary_ids_of_three_axes() -> None:
    model = tiny.tiny_model("qwen2_5_vl", auto_class=AutoModelForImageTextToText)
    docs = documents()
    want = alone(model, docs)
    patch_model(model)
    batch = packed(docs)
    batch["position_ids"] = batch["position_ids"].expand(3, 1, -1)
    assert close(model(**batch).logits[0], want)
    with pytest.raises(NotImplementedError, match=r"pixel_values of shape .* takes text only"):
        model(**batch, pixel_values=torch.zeros(4, 1176))


class RemembersPositions(Qwen2VLForConditionalGeneration):
    """As transformers 5.17 after a generation: outputs carry where a next token's position is."""

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, **kwargs)
        output["rope_deltas"] = torch.zeros(len(input_ids), 1)
        return output


def test_what_generation_goes_on_from_is_no_output_of_a_pack() -> None:
    torch.manual_seed(0)
    model = RemembersPositions(tiny.tiny_config("qwen2_vl")).eval()
    docs = documents()
    want = alone(model, docs)
    output = patch_model(model)(**packed(docs))
    assert close(output.logits[0], want)
    assert "rope_deltas" not in output


def test_a_decoder_that_its_config_makes_an_encoder() -> None:
    """Later tokens reach earlier ones, so no padding may stand behind a document, and no answer
    behind a prompt that it shares."""
    model = tiny.tiny_model("gemma4_text", use_bidirectional_attention="all")
    docs = documents(lengths=(9, 8, 1, 8))
    want = alone(model, docs)
    changed = docs[0].clone()
    changed[-1] = 3
    assert not close(alone(model, [changed])[:-1], want[:8])
    patch_model(model)
    assert close(model(**packed(docs)).logits[0], want)
    layout = DocumentLayout.from_lengths([3, 2], parents=[-1, 0])
    with pytest.raises(NotImplementedError, match=r"may look both ways.* but no forest"):
        model(input_ids=torch.arange(3, 8)[None], layout=layout)


def test_predictions_further_ahead() -> None:
    """ProphetNet's decoder alone: its relative positions reach later tokens, so no batch is padded,
    and every stream of predictions comes back."""
    model: Any = tiny.tiny_model(
        "prophetnet", auto_class=AutoModelForCausalLM, ngram=3, eps=0.1
    ).train()
    for name, parameter in model.named_parameters():
        if "relative_pos" in name:
            nn.init.normal_(parameter, std=0.3)
    docs = documents(lengths=(5, 1, 5, 8, 5))
    later = docs[3].clone()
    later[-1] = 5 + docs[3][-1] % 9
    with torch.no_grad():
        changed = model(input_ids=later[None]).logits_ngram - model(docs[3][None]).logits_ngram
    assert changed[:, :, :-1].abs().max() > 1e-4

    outputs = [model(input_ids=d[None], labels=d[None], output_hidden_states=True) for d in docs]
    tokens = sum(map(len, docs))
    loss = sum(out.loss * len(d) / tokens for out, d in zip(outputs, docs))
    loss.backward()
    want = gradients(model)
    patch_model(model)
    model.zero_grad()
    batch = packed(docs)
    ids = batch["input_ids"]
    got = model(input_ids=ids, layout=batch["layout"], labels=ids, output_hidden_states=True)
    got.loss.backward()
    assert got.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert relative(gradients(model), want) <= 2e-6
    assert close(got.logits, torch.cat([out.logits for out in outputs], dim=1))
    assert close(got.logits_ngram, torch.cat([out.logits_ngram for out in outputs], dim=2))
    ahead = [out.hidden_states_ngram[1].unflatten(1, (3, -1)) for out in outputs]
    assert close(got.hidden_states_ngram[1].unflatten(1, (3, -1)), torch.cat(ahead, dim=2))
    assert audit(model.eval()).isolated
    with pytest.raises(NotImplementedError, match="may look both ways"):
        model(input_ids=ids, layout=DocumentLayout.from_lengths([24, 0], parents=[-1, 0]))


@pytest.mark.parametrize("by_config", [False, True])
@pytest.mark.parametrize("model_type", ["jamba", "qwen3_next", "minimax"])
def test_the_balance_of_experts_is_over_all_real_tokens(model_type: str, by_config: bool) -> None:
    """Loss, gradients and auxiliary loss of a padded batch, where stock says what it is over."""
    model: Any = tiny.tiny_model(model_type, router_aux_loss_coef=0.5)
    docs = documents(lengths=(5, 3, 30, 17))
    ids = nn.utils.rnn.pad_sequence(docs, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(d) for d in docs], batch_first=True)
    labels = ids.masked_fill(mask == 0, -100)
    plain = model(ids, attention_mask=mask, labels=labels).loss.item()
    asked = {} if by_config else {"output_router_logits": True}
    model.config.output_router_logits = by_config
    want = model(ids, attention_mask=mask, labels=labels, **asked)
    want.loss.backward()
    assert want.loss.item() > plain + 0.5
    expected = gradients(model)
    model.zero_grad()
    patch_model(model)
    got = model(**packed(docs, pad_to_multiple_of=64), **asked)
    got.loss.backward()
    assert got.aux_loss.item() == pytest.approx(want.aux_loss.item(), rel=1e-6)
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-6)
    assert relative(gradients(model), expected) <= 2e-6
    # Logits of routers as they are through the attention interface: of all tokens of the pack.
    assert {layer.shape for layer in got.router_logits} == {(64, want.router_logits[0].shape[1])}


def test_tuples_on_request(mamba: nn.Module) -> None:
    batch = packed(documents())
    loss, logits = mamba(**batch, return_dict=False)[:2]
    assert torch.equal(logits, mamba(**batch).logits)
    assert torch.equal(loss, mamba(**batch).loss)
