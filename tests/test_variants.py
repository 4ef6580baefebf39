"""Settings of accepted types under which a document sees, or pools, other tokens than usual."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from packed_attn_patches.families import INTERFACE
from packed_attn_patches.tiny import tiny_config, tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from packed_attn import DocumentLayout, audit, patch_model
from tests.exactness import alone, close, documents, packed
from tests.sweep import sweep_type

# How config classes name the positions that they have embeddings for.
_PLACES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
OLD = Version(transformers.__version__) < Version("5.23")
WINDOWED = ["sliding_attention", "full_attention"]
NO_ROPE = {"no_rope_layers": [1, 0], "floor_scale": 4}


@pytest.mark.parametrize(
    ("head", "model_type", "implementation", "settings"),
    [
        # Queries scaled by their place in the row.
        ("causal", "llama4_text", None, NO_ROPE),
        ("causal", "llama4_text", None, {**NO_ROPE, "attn_temperature_tuning": False}),
        # A causal model turned both ways: through its windows, and right-padded.
        ("causal", "qwen3", "sdpa", {"is_causal": False}),
        ("causal", "mistral", "eager", {"is_causal": False}),
        ("causal", "nemotron", "eager", {"is_causal": False}),
        ("causal", "nemotron", "sdpa", {"is_causal": False}),
        ("causal", "falcon", None, {"is_causal": False}),
        ("causal", "qwen3_next", None, {"is_causal": False}),
        ("causal", "gemma4", None, {"is_causal": False}),
        (
            "causal",
            "gemma3_text",
            None,
            {"is_causal": False, "use_bidirectional_attention": True},
        ),
        ("token", "openai_privacy_filter", None, {"is_causal": False}),
        ("seq2seq", "bart", None, {"is_causal": False}),
        ("token", "biogpt", None, {"is_causal": False}),
        # A window that the mask has and the layer does not say.
        (
            "causal",
            "smollm3",
            None,
            {"use_sliding_window": False, "sliding_window": 8, "layer_types": WINDOWED},
        ),
        # A window that the config has, undeclared, and no mask.
        ("causal", "olmoe", "sdpa", {"sliding_window": 4}),
        ("causal", "olmoe", "eager", {"sliding_window": 4}),
        ("causal", "llama", "sdpa", {"sliding_window": 4, "layer_types": WINDOWED}),
        # Experts that mix the rows of a batch.
        ("causal", "doge", None, {"is_moe": True}),
        # Keys that are selected by scores, of which many are zero.
        ("causal", "deepseek_v32", None, {"index_n_heads": 1}),
        ("sequence", "axk2", None, {"index_n_heads": 1}),
        # Padding that is embedded, or pooled.
        ("masked", "mobilebert", None, {}),
        ("sequence", "xlm", None, {"summary_type": "last"}),
        ("sequence", "flaubert", None, {"summary_type": "mean"}),
        # A causal mask that takes no padding beside it.
        ("causal", "xlnet", None, {"attn_type": "uni"}),
        # Padding that cannot be embedded.
        ("sequence", "llama", None, {"pad_token_id": -1}),
        ("sequence", "gpt2", None, {"pad_token_id": 199}),
    ],
)
def test_exact_under_every_convention(
    head: str, model_type: str, implementation: str | None, settings: dict[str, Any]
) -> None:
    outcome = sweep_type(head, model_type, attn_implementation=implementation, **settings)
    if OLD and outcome.status == "not built":
        pytest.skip(f"stock does not run it: {outcome.reason}")
    assert outcome.status == "exact", outcome


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "jamba", "bert"])
def test_sequence_heads_pool_no_padding_of_embeddings(model_type: str) -> None:
    """Without ids they take the last place of a row."""
    model: Any = tiny_model(model_type, auto_class=AutoModelForSequenceClassification)
    lengths = (5, 1, 37, 4, 31)
    embedded = [model.get_input_embeddings()(d).detach() for d in documents(lengths=lengths)]
    with torch.no_grad():
        want = torch.cat([model(inputs_embeds=e[None]).logits for e in embedded])
        patch_model(model)
        layout = DocumentLayout.from_lengths(lengths)
        got = model(inputs_embeds=torch.cat(embedded)[None], layout=layout).logits
    assert close(got, want)


@pytest.mark.parametrize(
    ("model_type", "auto_class", "settings"),
    [
        ("xlm", AutoModelForTokenClassification, {}),
        ("flaubert", AutoModelForTokenClassification, {}),
        ("cohere_compass_text", AutoModelForSequenceClassification, {"pooling": "mean"}),
    ],
)
def test_padding_ids_in_a_text_are_as_alone(
    model_type: str, auto_class: Any, settings: dict[str, Any]
) -> None:
    model: Any = tiny_model(model_type, auto_class=auto_class, **settings)
    docs = documents(lengths=(37, 31, 5, 4))
    for doc in docs:
        doc[1::3] = getattr(model.config, "pad_index", model.config.pad_token_id)
    with torch.no_grad():
        want = torch.cat([model(input_ids=d[None]).logits.flatten(0, -2) for d in docs])
        patch_model(model)
        layout = DocumentLayout.from_lengths([len(d) for d in docs])
        got = model(input_ids=torch.cat(docs)[None], layout=layout).logits.flatten(0, -2)
    assert close(got, want)


@pytest.mark.parametrize(
    ("model_type", "name"), [("gemma3", "token_type_ids"), ("gemma4_unified", "mm_token_type_ids")]
)
def test_padding_is_of_no_block_that_looks_both_ways(model_type: str, name: str) -> None:
    model: Any = tiny_model(model_type, auto_class=AutoModelForImageTextToText)
    docs = documents(lengths=(5, 1, 4, 37, 31))
    kinds = [(torch.arange(len(d)) >= len(d) // 2).long() for d in docs]
    with torch.no_grad():
        want = torch.cat(
            [model(input_ids=d[None], **{name: k[None]}).logits[0] for d, k in zip(docs, kinds)]
        )
        patch_model(model)
        layout = DocumentLayout.from_lengths([len(d) for d in docs])
        types = {name: torch.cat(kinds)[None]}
        got = model(input_ids=torch.cat(docs)[None], layout=layout, **types).logits[0]
    assert close(got, want)


def test_padding_ids_that_only_a_document_alone_hides_are_refused() -> None:
    model: Any = patch_model(tiny_model("t5gemma", auto_class=AutoModelForTokenClassification))
    docs = documents(lengths=(5, 4))
    layout = DocumentLayout.from_lengths([5, 4, 3], padding=[False, False, True])
    ids = torch.cat([*docs, torch.zeros(3, dtype=torch.long)])[None]
    model(input_ids=ids, layout=layout)
    ids[0, 2] = 0
    with pytest.raises(NotImplementedError, match="hides the padding id 0"):
        model(input_ids=ids, layout=layout)


def test_a_call_that_looks_both_ways_is_not_padded() -> None:
    model: Any = tiny_model("gptj")
    docs = documents(lengths=(5, 4, 37, 31))
    with torch.no_grad():
        want = torch.cat([model(input_ids=d[None], is_causal=False).logits[0] for d in docs])
        causal = torch.cat([model(input_ids=d[None]).logits[0] for d in docs])
        if OLD and close(causal, want):
            pytest.skip("this transformers does not look both ways when asked")
        assert not close(causal, want)
        patch_model(model)
        layout = DocumentLayout.from_lengths([len(d) for d in docs])
        got = model(input_ids=torch.cat(docs)[None], layout=layout, is_causal=False).logits[0]
    assert close(got, want)
    forest = DocumentLayout.from_lengths([40, 20, 17], parents=[-1, 0, 0])
    with pytest.raises(NotImplementedError, match="looks both ways"):
        model(input_ids=torch.cat(docs)[None], layout=forest, is_causal=False)


@pytest.mark.parametrize(
    ("model_type", "auto_class", "implementation", "settings"),
    [
        ("gemma", AutoModelForCausalLM, "sdpa", {"use_bidirectional_attention": True}),
        ("gemma2", AutoModelForCausalLM, "eager", {"use_bidirectional_attention": True}),
        ("llama4_text", AutoModelForCausalLM, "sdpa", {"is_causal": False}),
        ("big_bird", AutoModelForMaskedLM, None, {"attention_type": "block_sparse"}),
        (
            "big_bird",
            AutoModelForCausalLM,
            None,
            {"attention_type": "block_sparse", "is_decoder": False},
        ),
        ("ibert", AutoModelForMaskedLM, None, {"quant_mode": True}),
        ("bamba", AutoModelForCausalLM, None, {"z_loss_coefficient": 0.5}),
    ],
)
def test_without_certain_outputs_alone_it_is_refused(
    model_type: str, auto_class: Any, implementation: str | None, settings: dict[str, Any]
) -> None:
    model = tiny_model(
        model_type, auto_class=auto_class, attn_implementation=implementation, **settings
    )
    with pytest.raises(NotImplementedError, match=f"{next(iter(settings))}|block-sparse"):
        patch_model(model)


@pytest.mark.parametrize("model_type", ["mamba", "roberta"])
def test_a_config_that_asks_for_tuples(model_type: str) -> None:
    model: Any = tiny_model(model_type, return_dict=False)
    docs = documents(lengths=(5, 1, 4))
    with torch.no_grad():
        want = torch.cat([model(input_ids=d[None])[0][0] for d in docs])
        patch_model(model)
        ids, layout = torch.cat(docs)[None], DocumentLayout.from_lengths([5, 1, 4])
        assert close(model(input_ids=ids, layout=layout)[0][0], want)
        assert close(model(input_ids=ids, layout=layout, return_dict=True).logits[0], want)


@pytest.mark.parametrize("auto_class", [AutoModelForMaskedLM, AutoModelForSequenceClassification])
def test_an_audit_that_could_see_no_leak_says_so(auto_class: Any) -> None:
    """Without its kernel MRA's attention is zero."""
    model = tiny_model("mra", auto_class=auto_class)
    with pytest.raises(NotImplementedError, match="a leak could not be seen"):
        patch_model(model)
    blind = [note for note in audit(model).notes if "a leak could not be seen" in note]
    # A stock head of a sequence has no row for each document, which is said before.
    assert len(blind) == (auto_class is AutoModelForMaskedLM)
    assert not audit(tiny_model("llama")).notes


def test_what_packs_have_no_way_to_say_is_refused() -> None:
    layout = DocumentLayout.from_lengths([5, 4])
    ids = torch.arange(3, 12)[None]
    model: Any = patch_model(tiny_model("hrm_text"))
    with pytest.raises(NotImplementedError, match="prefix_lm"):
        model(input_ids=ids, layout=layout, token_type_ids=(ids < 6).long())
    model = tiny_model("modernbert", auto_class=AutoModelForMaskedLM, sparse_prediction=True)
    model = patch_model(model)
    assert model(input_ids=ids, layout=layout).logits.shape[:2] == ids.shape
    with pytest.raises(NotImplementedError, match="sparse_prediction=False"):
        model(input_ids=ids, layout=layout, labels=ids)
    model = patch_model(tiny_model("llama4_text"))
    with pytest.raises(NotImplementedError, match="chunks are causal"):
        model(input_ids=ids, layout=layout, is_causal=False)


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=() if name == "llama4_text" else pytest.mark.slow)
        for name in sorted(INTERFACE & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    ],
)
def test_nothing_depends_on_the_place_in_a_long_row(model_type: str) -> None:
    """Published models begin to scale by position at 8192 tokens, which short rows never reach."""
    sizes = {name: 16384 for name in _PLACES if hasattr(tiny_config(model_type), name)}
    model = tiny_model(model_type, **sizes)
    docs = documents(lengths=(5, *(50,) * 166))
    last = docs[-1]
    want = alone(model, [last])
    with torch.no_grad():
        got = patch_model(model)(**packed(docs)).logits[0, -len(last) :]
    assert close(got, want)
