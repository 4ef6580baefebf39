"""Encoder-decoders: packs of source and target documents, as exact as each pair alone."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from packed_attn_patches import families, tiny
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSeq2SeqLM,
    BartForSequenceClassification,
    T5ForSequenceClassification,
)
from transformers import T5ForConditionalGeneration as T5
from transformers.modeling_outputs import BaseModelOutput

from packed_attn import DocumentLayout, PackedCollator, audit, patch_model, unpatch_model
from packed_attn.audit import leaks_between_documents
from tests.exactness import close, gradients, relative
from tests.sweep import sweep_type
from tests.sweep_pairs import SOURCES, TARGETS, StockPairs, drawn

# Relative positions and a shift of the model's own; positions counted by padding; equal lengths.
REPRESENTATIVES = ("t5", "m2m_100", "encoder-decoder")


def tiny_seq2seq(model_type: str = "t5", **overrides: Any) -> Any:
    return tiny.tiny_model(model_type, auto_class=AutoModelForSeq2SeqLM, **overrides)


def pairs(sources: tuple[int, ...] = SOURCES, targets: tuple[int, ...] = TARGETS) -> list[Any]:
    return [
        {"input_ids": drawn(i, n, seed=1), "labels": drawn(i, m, seed=2)}
        for i, (n, m) in enumerate(zip(sources, targets))
    ]


def collate(features: list[Any], **options: Any) -> dict[str, Any]:
    return PackedCollator("documents", encoder_decoder=True, **options)(features)


def alone(model: nn.Module, features: list[Any]) -> Tensor:
    """Logits of each pair by itself, given labels."""
    with torch.no_grad():
        return torch.cat([model(**{k: v[None] for k, v in f.items()}).logits[0] for f in features])


@pytest.fixture(scope="module")
def stock() -> Any:
    return tiny_seq2seq()


@pytest.fixture(scope="module")
def t5() -> Any:
    return patch_model(tiny_seq2seq())


@pytest.mark.parametrize("model_type", REPRESENTATIVES)
def test_exact_under_every_convention(model_type: str) -> None:
    outcome = sweep_type("seq2seq", model_type)
    assert outcome.status == "exact", outcome


def test_targets_that_see_no_source_are_no_proof() -> None:
    config: Any = tiny.tiny_config("encoder-decoder")
    assert config.decoder.is_decoder
    assert config.decoder.add_cross_attention
    config.decoder.is_decoder = config.decoder.add_cross_attention = False
    with pytest.raises(RuntimeError, match="depend on no source"):
        StockPairs(AutoModelForSeq2SeqLM.from_config(config).eval())


def test_float64_loss_and_gradients_equal_the_pairs_alone() -> None:
    model = tiny_seq2seq().double().train()
    features = pairs()
    features[3]["labels"][:5] = -100
    count = sum(int((f["labels"] != -100).sum()) for f in features)
    for f in features:
        share = int((f["labels"] != -100).sum()) / count
        (model(**{k: v[None] for k, v in f.items()}).loss * share).backward()
    want = gradients(model)
    patch_model(model)
    model.zero_grad()
    model(**collate(features)).loss.backward()
    assert relative(gradients(model), want) <= 1e-13
    model.zero_grad()
    model(**collate(features), num_items_in_batch=torch.tensor(2 * count)).loss.backward()
    assert relative(gradients(model), {n: g / 2 for n, g in want.items()}) <= 1e-13


def test_each_document_begins_with_the_start_token(t5: Any) -> None:
    """Labels are shifted per document: its first decoder input is no label of a neighbour."""
    given: list[Tensor] = []
    embed = t5.decoder.embed_tokens
    handle = embed.register_forward_hook(lambda m, args, out: given.append(args[0]))
    t5(**collate(pairs()))
    handle.remove()
    starts = torch.cat([ids[:, 0] for ids in given])
    assert len(starts) == len(TARGETS)
    assert (starts == t5.config.decoder_start_token_id).all()


def test_decoder_inputs_of_the_collator_are_those_of_the_model(t5: Any) -> None:
    batch = collate(pairs(), decoder_start_token_id=3)
    logits = t5(**batch).logits
    assert torch.equal(logits, t5(**{**batch, "decoder_input_ids": None}).logits)
    assert close(logits[0], alone(t5, pairs()))


def test_decoder_inputs_that_were_shifted_over_the_row_are_refused(t5: Any) -> None:
    batch = collate(pairs())
    shifted = t5.prepare_decoder_input_ids_from_labels(batch["labels"])
    with pytest.raises(ValueError, match="the last label of the document before: they were"):
        t5(**batch, decoder_input_ids=shifted)


def test_each_side_needs_boundaries(t5: Any) -> None:
    batch = collate(pairs())
    no_target = {k: v for k, v in batch.items() if k != "decoder_layout"}
    with pytest.raises(ValueError, match="no boundaries of decoder_input_ids: give decoder_l"):
        t5(**no_target)
    only_target = {k: batch[k] for k in ("input_ids", "labels", "decoder_layout")}
    with pytest.raises(ValueError, match="tells no boundaries of input_ids: give layout"):
        t5(**only_target)
    states = t5.get_encoder()(input_ids=batch["input_ids"])
    with pytest.raises(ValueError, match="encoder_outputs were made elsewhere"):
        t5(encoder_outputs=states, labels=batch["labels"], decoder_layout=batch["decoder_layout"])


def test_sides_that_contradict_each_other_are_refused(t5: Any) -> None:
    batch = collate(pairs())
    total = sum(TARGETS)
    for lengths, message in (
        ((total,), r"rows have \[5\] and \[1\] documents"),
        ((total - 1,), "decoder_input_ids: layout covers 61 tokens, but the batch has 1 x 62"),
        ((9, 0, 24, 8, 21), "document 1 has 1 tokens of input_ids and 0 of decoder_input_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            t5(**{**batch, "decoder_layout": DocumentLayout.from_lengths(lengths)})
    forest = DocumentLayout.from_lengths(TARGETS, parents=(-1, 0, 0, -1, -1))
    with pytest.raises(NotImplementedError, match="no forest"):
        t5(**{**batch, "decoder_layout": forest})


def test_rows_pair_their_own_documents(t5: Any) -> None:
    ids = torch.arange(10, 26).view(2, 8)
    source = DocumentLayout.from_lengths((3, 5, 8))
    target = DocumentLayout.from_lengths((8, 2, 6))
    with pytest.raises(ValueError, match=r"rows have \[2, 1\] and \[1, 2\] documents"):
        t5(input_ids=ids, labels=ids, layout=source, decoder_layout=target)
    logits = t5(input_ids=ids, labels=ids, layout=source, decoder_layout=source).logits
    split = [ids[0, :3], ids[0, 3:], ids[1]]
    assert close(logits.flatten(0, 1), alone(t5, [{"input_ids": x, "labels": x} for x in split]))


def test_padding_and_empty_pairs(t5: Any) -> None:
    features = pairs((3, 0, 30, 1), (2, 0, 5, 1))
    batch = collate(features, pad_to_multiple_of=64)
    assert batch["input_ids"].shape == batch["labels"].shape == (1, 64)
    out = t5(**batch)
    assert close(out.logits[0, :8], alone(t5, [f for f in features if len(f["labels"])]))
    assert not out.logits[0, 8:].any()
    assert not out.encoder_last_hidden_state[0, 34:].any()


def test_hidden_states_come_back_on_their_own_side(t5: Any) -> None:
    features = pairs()
    got = t5(**collate(features), output_hidden_states=True)
    single = [t5(**{k: v[None] for k, v in f.items()}, output_hidden_states=True) for f in features]
    for name in ("encoder_hidden_states", "decoder_hidden_states"):
        for layer, states in enumerate(got[name]):
            assert close(states[0], torch.cat([s[name][layer][0] for s in single]))
    with pytest.raises(NotImplementedError, match="the output decoder_attentions has no rows"):
        t5(**collate(features), output_attentions=True)


def test_predictions_further_ahead() -> None:
    """ProphetNet's `[batch, ngram - 1, length, vocabulary]`."""
    model = tiny_seq2seq("prophetnet", ngram=3)
    for name, parameter in model.named_parameters():
        if "relative_pos" in name:
            nn.init.normal_(parameter, std=0.3)
    features = pairs((5, 3, 5), (4, 6, 4))  # the first and the last in one batch
    want = [model(**{k: v[None] for k, v in f.items()}).logits_ngram for f in features]
    patch_model(model)
    got = model(**collate(features)).logits_ngram
    assert got.shape[:3] == (1, 2, 14)
    assert close(got, torch.cat(want, dim=2))


def test_inner_models(stock: Any) -> None:
    """An encoder by itself takes packs; a decoder cannot tell whose encoder states it is given."""
    model = patch_model(copy.deepcopy(stock))
    features = pairs()
    batch = collate(features)
    source = {k: batch[k] for k in ("input_ids", "layout")}
    got = model.get_encoder()(**source).last_hidden_state[0]
    want = [stock.get_encoder()(input_ids=f["input_ids"][None])[0][0] for f in features]
    assert close(got, torch.cat(want))
    with pytest.raises(NotImplementedError, match="its encoder_hidden_states belong to: call an"):
        model.get_decoder()(**source, encoder_hidden_states=got[None])


@pytest.mark.parametrize("head", ["sequence", "token"])
def test_classifiers_of_t5gemma(head: str) -> None:
    """They shift their sources into targets, and set use_cache themselves."""
    outcome = sweep_type(head, "t5gemma")
    assert outcome.status == "exact", outcome


@pytest.mark.parametrize("cls", [BartForSequenceClassification, T5ForSequenceClassification])
def test_heads_of_a_sequence_make_their_own_targets(cls: Any) -> None:
    """A pack of sources gives a row a document, pooled at its own end token."""
    torch.manual_seed(0)
    config = tiny.tiny_config(cls.config_class.model_type, decoder_start_token_id=3, num_labels=3)
    model = cls(config).eval()
    docs = [torch.cat([drawn(i, n, seed=1), torch.tensor([3])]) for i, n in enumerate(SOURCES)]
    want = torch.cat([model(input_ids=d[None]).logits for d in docs])
    labels = torch.tensor([0, 1, 2, 1, 0])
    patch_model(model)
    batch = PackedCollator("documents")([{"input_ids": d} for d in docs])
    got = model(**{**batch, "labels": labels})
    assert close(got.logits, want)
    assert got.loss.item() == pytest.approx(cross_entropy(want, labels).item(), rel=1e-5)
    with pytest.raises(NotImplementedError, match="which documents its decoder_input_ids belong"):
        model(**{**batch, "labels": labels}, decoder_input_ids=batch["input_ids"])


def test_pairs_of_like_lengths_share_a_forward(t5: Any) -> None:
    model = copy.deepcopy(t5)
    calls: list[torch.Size] = []
    model.encoder.register_forward_hook(lambda m, args, out: calls.append(out[0].shape))
    model(**collate(pairs()))
    assert sorted(shape[0] for shape in calls) == [1, 2, 2]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_patched_and_independent(clone: Any, stock: Any) -> None:
    model = patch_model(copy.deepcopy(stock))
    twin = clone(model)
    want = alone(model, pairs())
    with torch.no_grad():
        model.shared.weight.zero_()
        model.encoder.embed_tokens.weight.zero_()
    assert close(twin(**collate(pairs())).logits[0], want)


def test_undone(stock: Any) -> None:
    model = patch_model(copy.deepcopy(stock))
    unpatch_model(model)
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_pre_hooks


def test_audit_names_the_leak_of_a_stock_model(stock: Any) -> None:
    report = audit(stock)
    assert report.verdict == "leaks"
    assert report.first_leaking_module == "encoder.block.0.layer.0.SelfAttention (T5Attention)"


def test_a_leak_of_the_decoder_alone_is_named(stock: Any) -> None:
    """An encoder that keeps documents apart, before a decoder that does not."""
    model = copy.deepcopy(stock)
    embed = model.encoder.embed_tokens
    model.encoder.forward = lambda input_ids, **others: BaseModelOutput(embed(input_ids))
    report = audit(model)
    assert report.first_leaking_module == "decoder.block.0.layer.0.SelfAttention (T5Attention)"


@pytest.mark.parametrize("convention", ["packed batch", "two rows", "padded tail", "checkpointing"])
def test_audit_proves_a_patched_model(t5: Any, convention: str) -> None:
    report = audit(t5, convention=convention)
    assert report.verdict == "isolated", str(report)


def test_a_live_batch_is_probed(stock: Any, t5: Any) -> None:
    batch = collate(pairs())
    assert leaks_between_documents(t5, batch) is None
    positions = {
        "input_ids": batch["input_ids"],
        "labels": batch["labels"],
        "position_ids": batch["position_ids"],
        "decoder_position_ids": batch["decoder_layout"].position_ids[None],
    }
    leak = leaks_between_documents(stock, positions)
    assert leak is not None
    assert leak.module == "encoder.block.0.layer.0.SelfAttention"


class Derived(T5):
    """A class of a user's own, over code that is known."""


def test_a_derived_class_is_probed_and_verified() -> None:
    model = Derived(tiny.tiny_config("t5", decoder_start_token_id=3)).eval()
    assert patch_model(model, verify=True) is model


@pytest.mark.parametrize(
    ("model_type", "setting", "message"),
    [
        ("bigbird_pegasus", {"attention_type": "block_sparse"}, "attention_type='original_full'"),
        ("fsmt", {"use_cache": True}, "use_cache=False"),
        ("nllb-moe", {"moe_eval_capacity_token_fraction": 1.0}, "capacity_token_fraction=-1.0"),
    ],
)
def test_settings_that_leave_a_document_uncertain_are_refused(
    model_type: str, setting: dict[str, Any], message: str
) -> None:
    for on_unknown in ("raise", "unpack"):
        with pytest.raises(NotImplementedError, match=message):
            patch_model(tiny_seq2seq(model_type, **setting), on_unknown=on_unknown)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotImplementedError, match="padding_free: T5ForConditionalGeneration has"):
        patch_model(tiny_seq2seq(), padding_free=True)
    monkeypatch.setattr(families, "PAIRS_MASKED", frozenset())
    with pytest.raises(NotImplementedError, match="encoder-decoders of model type 't5' are not"):
        patch_model(tiny_seq2seq())
    model = patch_model(tiny_seq2seq(), on_unknown="unpack")
    features = pairs()
    assert close(model(**collate(features)).logits[0], alone(model, features))


def padded(features: list[Any]) -> dict[str, Tensor]:
    """What everybody trains on: rows with a mask."""
    pad = nn.utils.rnn.pad_sequence
    ids = [torch.as_tensor(f["input_ids"]) for f in features]
    labels = [torch.as_tensor(f["labels"]) for f in features]
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(x) for x in ids], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }


def test_a_trainer_takes_packs_of_pairs(stock: Any, tmp_path: Path) -> None:
    """Steps of a Trainer with defaults have the losses of padded batches of the same pairs."""
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    rows = [{k: v.tolist() for k, v in f.items()} for f in pairs() * 2]

    def losses(model: Any, collator: Any) -> list[float]:
        arguments = Seq2SeqTrainingArguments(
            output_dir=str(tmp_path),
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            use_cpu=True,
            logging_steps=1,
            max_steps=3,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
        )
        dataset = datasets.Dataset.from_list(rows)
        trainer = Seq2SeqTrainer(model, arguments, train_dataset=dataset, data_collator=collator)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    collator = PackedCollator("documents", encoder_decoder=True)
    packed = losses(patch_model(copy.deepcopy(stock)), collator)
    assert packed == pytest.approx(losses(copy.deepcopy(stock), padded), rel=2e-5)
    assert len(set(packed)) == 3
