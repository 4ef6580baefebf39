"""NEFTune on a patched model: the noise of a document in a pack is that of the document alone."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_attn_patches import tiny
from packed_attn_patches.noise import DocumentNoise
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, Trainer, TrainingArguments
from transformers.integrations.neftune import (
    activate_neftune,
    deactivate_neftune,
    neftune_post_forward_hook,
)

from packed_attn import DocumentLayout, PackedCollator, patch_model, unpatch_model
from tests.exactness import alone, close, documents, gradients, packed, relative, token_mean
from tests.models import tiny_model

ALPHA = 5.0
READ = ("input_ids", "position_ids", "labels")


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise is its bound: what a document gets can be told to the bit."""

    def bound(self: Tensor, low: Any = 0.0, high: Any = 1.0, **_: Any) -> Tensor:
        return self.fill_(float(high))

    monkeypatch.setattr(torch.Tensor, "uniform_", bound)


def noised(family: str = "llama") -> Any:
    model = tiny.tiny_model(family).train()
    activate_neftune(model, ALPHA)
    return model


def hooks_of_noise(model: Any) -> list[Any]:
    hooks = model.get_input_embeddings()._forward_hooks.values()
    return [h for h in hooks if h is neftune_post_forward_hook or isinstance(h, DocumentNoise)]


def late(family: str) -> Any:
    """As in a Trainer run: patched first."""
    model = patch_model(tiny.tiny_model(family)).train()
    activate_neftune(model, ALPHA)
    return model


@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "gpt_oss", "lfm2", "mamba"])
@pytest.mark.parametrize("first", ["patch", "noise"])
def test_losses_and_gradients_equal_the_documents_alone(family: str, first: str) -> None:
    docs = documents()
    model = noised(family)
    want_loss = token_mean(model, docs)
    want_loss.backward()
    want = gradients(model)
    model = patch_model(noised(family)) if first == "noise" else late(family)
    # A tail of padding, and boundaries that are read from positions.
    batch = packed(docs, pad_to_multiple_of=16)
    got_loss = model(**{name: batch[name] for name in READ}).loss
    got_loss.backward()
    assert abs(got_loss.item() - want_loss.item()) <= 1e-6 * want_loss.item()
    assert relative(gradients(model), want) <= 2e-6


@pytest.mark.usefixtures("fixed")
def test_several_rows_and_what_is_no_pack() -> None:
    """Rows of unlike documents; then padded rows, evaluation and embeddings as they always were."""
    stock, model = noised(), late("llama")
    docs = documents(lengths=(5, 11, 16))
    ids = torch.cat(docs).view(2, 16)
    layout = DocumentLayout.from_lengths([5, 11, 16])
    got = model(input_ids=ids, layout=layout).logits.flatten(0, 1)
    assert close(got, alone(stock, docs))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    for use in (
        lambda m: m(input_ids=ids, attention_mask=mask).logits,
        lambda m: m.get_input_embeddings()(ids),
        lambda m: m(inputs_embeds=m.get_input_embeddings()(ids)).logits,
        lambda m: m.eval()(input_ids=ids).logits,
        lambda m: m.generate(ids, max_new_tokens=4, do_sample=False),
    ):
        assert torch.equal(use(model), use(stock))
    assert close(model(input_ids=ids, layout=layout).logits.flatten(0, 1), alone(stock, docs))


def test_the_scale_of_drawn_noise() -> None:
    """Without a fixed draw: uniform up to alpha / sqrt(L x d) in each document, and independent."""
    model = late("llama")
    embeddings = model.get_input_embeddings()
    clean = embeddings.weight.detach()
    docs = documents(lengths=(4, 400))
    noise: list[Tensor] = []
    embeddings.register_forward_hook(lambda _, a, out: noise.append(out[0] - clean[a[0][0]]))
    model(**packed(docs))
    for drawn in noise[0].split([4, 400]):
        bound = ALPHA / (drawn.shape[0] * drawn.shape[1]) ** 0.5
        assert 0.9 * bound < float(drawn.abs().max()) <= bound * (1 + 1e-5)
        assert float(drawn.std()) == pytest.approx(bound / 3**0.5, rel=0.1)
        assert abs(float(drawn.mean())) < 0.15 * bound


@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_padded_rows_without_padding_have_noise_by_their_own_length(family: str) -> None:
    docs = documents(lengths=(5, 11, 16))
    ids = torch.nn.utils.rnn.pad_sequence(docs, batch_first=True)
    mask = (torch.arange(16) < torch.tensor([5, 11, 16])[:, None]).long()
    model = patch_model(noised(family), padding_free=True)
    got = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    assert close(got, alone(noised(family), docs))


@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_shared_tokens_are_refused_by_name(family: str) -> None:
    layout = DocumentLayout.from_lengths([5, 2, 3], parents=[-1, 0, 0])
    ids = torch.cat(documents(lengths=(10,)))[None]
    model = late(family)
    with pytest.raises(NotImplementedError, match="shares prefixes and NEFTune is on"):
        model(input_ids=ids, layout=layout)
    model.eval()(input_ids=ids, layout=layout)


@pytest.mark.usefixtures("fixed")
def test_sources_of_pairs() -> None:
    """Of the encoder-decoders, transformers puts noise on the encoder of some."""

    def model() -> Any:
        return tiny.tiny_model("marian", auto_class=AutoModelForSeq2SeqLM).train()

    stock, patched = model(), patch_model(model())
    activate_neftune(stock, ALPHA)
    activate_neftune(patched, ALPHA)
    features = [
        {"input_ids": s, "labels": t}
        for s, t in zip(documents(lengths=(5, 9, 4)), documents(2, lengths=(3, 4, 8)))
    ]
    got = patched(**PackedCollator("documents", encoder_decoder=True)(features)).logits[0]
    want = [stock(**{k: v[None] for k, v in f.items()}).logits[0] for f in features]
    assert close(got, torch.cat(want))


@pytest.mark.usefixtures("fixed")
def test_copies_pickles_and_undoing() -> None:
    docs = documents()
    model = late("llama")
    want = alone(noised(), docs)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert close(twin(**packed(docs)).logits[0], want)
    assert hooks_of_noise(unpatch_model(model)) == [neftune_post_forward_hook]


def test_a_model_that_embeds_other_tokens_is_refused() -> None:
    model = late("llama")
    hook = lambda module, args: (args[0].clone(),)  # noqa: E731
    model.get_input_embeddings().register_forward_pre_hook(hook)
    with pytest.raises(RuntimeError, match="embeds other tokens"):
        model(**packed(documents()))


RUNS: list[dict[str, Any]] = [
    {},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    {"torch_compile": True, "torch_compile_backend": "eager"},
]


@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize("settings", RUNS, ids=["plain", "checkpointed", "compiled"])
@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "lora"])
def test_a_trainer_run_equals_the_documents_one_by_one(
    tmp_path: Path, settings: dict[str, Any], adapter: bool
) -> None:
    """Trainer switches the noise on when the run begins, and off when it ends."""
    docs = documents(lengths=(5, 9, 30, 17))

    def run(packed: bool) -> tuple[list[float], Any]:
        model: Any = tiny_model("llama")
        if packed:
            patch_model(model)
        if adapter:
            peft = pytest.importorskip("peft", reason="PEFT is not installed")
            torch.manual_seed(0)
            model = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False))
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            use_cpu=True,
            logging_steps=1,
            max_steps=3,
            learning_rate=1e-2,
            neftune_noise_alpha=ALPHA,
            per_device_train_batch_size=4 if packed else 1,
            gradient_accumulation_steps=1 if packed else 4,
            **(settings if packed else {}),
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=[{"input_ids": d} for d in docs],  # type: ignore[arg-type]
            data_collator=PackedCollator("documents") if packed else one_row,
        )
        trainer.train()
        return [e["loss"] for e in trainer.state.log_history if "loss" in e], model

    want, _ = run(False)
    got, model = run(True)
    assert got == pytest.approx(want, rel=1e-5)
    assert not hooks_of_noise(model)
    assert torch.isfinite(model.train()(**packed(docs)).loss)


def one_row(features: list[dict[str, Any]]) -> dict[str, Any]:
    ids = features[0]["input_ids"][None]
    return {"input_ids": ids, "labels": ids.clone()}


def test_noise_that_trainer_takes_off_by_its_handle() -> None:
    model = patch_model(tiny_model("llama")).train()
    handle = activate_neftune(model, ALPHA)
    model(**packed(documents()))
    deactivate_neftune(model, handle)
    assert not hooks_of_noise(model)
