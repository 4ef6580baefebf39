"""PEFT's adapters on a patched model: exact, or refused by name where they look at a row."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from packed_attn_patches import tiny
from torch import Tensor

from packed_attn import DocumentLayout, patch_model
from tests.exactness import alone, close, documents, gradients, packed, relative, token_mean

peft = pytest.importorskip("peft", reason="needs peft")

QV = {"target_modules": ["q_proj", "v_proj"]}
TOKENS = list(range(3, 60))
# What works on each token by itself.
LORA: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "modules to save": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "tokens": {"trainable_token_indices": TOKENS},
    "kasa": {"kasa_config": "KasaConfig"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "AdaLoraConfig": {**QV, "total_step": 10},
    "IA3Config": {"target_modules": ["down_proj"], "feedforward_modules": ["down_proj"]},
    "OFTConfig": QV,
    "VeraConfig": {**QV, "r": 8},
    "TrainableTokensConfig": {"target_modules": ["embed_tokens"], "token_indices": TOKENS},
    "AdaptionPromptConfig": {"adapter_len": 4, "adapter_layers": 2},
}
REST: dict[str, dict[str, Any]] = {
    "BOFTConfig": QV,
    "BeftConfig": QV,
    "C3AConfig": {**QV, "block_size": 16},
    "DeftConfig": QV,
    "DeloraConfig": QV,
    "FourierFTConfig": {**QV, "n_frequency": 50},
    "FrodConfig": QV,
    "GloraConfig": QV,
    "GraloraConfig": {**QV, "r": 8, "gralora_k": 2},
    "HRAConfig": QV,
    "HiraConfig": QV,
    "LNTuningConfig": {"target_modules": ["input_layernorm"]},
    "LoHaConfig": QV,
    "LoKrConfig": QV,
    "MissConfig": QV,
    "OSFConfig": QV,
    "PeanutConfig": QV,
    "PsoftConfig": QV,
    "RandLoraConfig": QV,
    "RoadConfig": {**QV, "group_size": 16},
    "ShiraConfig": {**QV, "r": 8},
    "SupertuningConfig": QV,
    "TinyLoraConfig": {**QV, "init_weights": "uniform"},
    "UniLoraConfig": QV,
    "VBLoRAConfig": {**QV, "vector_length": 16, "num_vectors": 20},
    "WaveFTConfig": {**QV, "n_frequency": 50},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ("LoraConfig", {**QV, **changes}) for name, changes in LORA.items()},
    **{name: (name, changes) for name, changes in OTHERS.items()},
}


def config_of(kind: str, changes: dict[str, Any]) -> Any:
    for needed in (kind, *(["KasaConfig"] if "kasa_config" in changes else [])):
        if not hasattr(peft, needed):
            pytest.skip(f"this PEFT has no {needed}")
    made = {k: getattr(peft, v)() if k == "kasa_config" else v for k, v in changes.items()}
    return getattr(peft, kind)(task_type="CAUSAL_LM", **made)


def adapted(config: Any, *, family: str = "llama", first: str = "", **patch: Any) -> Any:
    """A model with the adapter, none of whose weights are 0, patched before, after, or not."""
    model = tiny.tiny_model(family)
    if first == "patch":
        patch_model(model, **patch)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, copy.deepcopy(config))
    drawn(model)
    if first == "adapter":
        patch_model(model, **patch)
    return model.train()


def drawn(model: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *(pytest.param(*case, id=name) for name, case in CASES.items()),
        *(pytest.param(kind, REST[kind], marks=pytest.mark.slow, id=kind) for kind in REST),
    ],
)
def test_exact_whichever_comes_first(kind: str, changes: dict[str, Any]) -> None:
    config, docs = config_of(kind, changes), documents()
    stock = adapted(config)
    want_loss = token_mean(stock, docs)
    want_loss.backward()
    want = gradients(stock)
    for first in ("patch", "adapter"):
        model = adapted(config, first=first)
        loss = model(**packed(docs)).loss
        loss.backward()
        assert abs(loss.item() - want_loss.item()) <= 2e-6 * want_loss.item()
        assert relative(gradients(model), want) <= 1e-5


def mixing(kind: str) -> Any:
    """Adapters that would mix documents of a row."""
    docs = documents()
    if kind == "aLoRA":
        invoked = docs[2][10:12].tolist()
        return config_of("LoraConfig", {**QV, "alora_invocation_tokens": invoked})
    return config_of(kind, QV if kind == "LilyConfig" else {})


MIXING = ["aLoRA", "LilyConfig", "ShadowConfig"]


@pytest.mark.parametrize(
    ("family", "kind"),
    [*(("llama", kind) for kind in MIXING), ("bloom", "aLoRA"), ("bloom", "LilyConfig")],
)
@pytest.mark.parametrize("first", ["patch", "adapter"])
def test_those_that_look_at_a_row_are_refused_by_name(family: str, kind: str, first: str) -> None:
    """In packs, where they would mix documents; other forwards are as they were."""
    config = mixing(kind)
    if family == "bloom":
        config.target_modules = {"query_key_value"}
    model = adapted(config, family=family, first=first)
    batch = packed(documents())
    names = ("input_ids", "position_ids", "labels")
    for given in (batch, {name: batch[name] for name in names}):
        with pytest.raises(NotImplementedError, match="refuses its adapter 'default', which"):
            model(**given)
    ids, mask = rows()
    found, wanted = (
        m.eval()(input_ids=ids, attention_mask=mask).logits
        for m in (model, adapted(config, family=family))
    )
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", MIXING)
def test_they_are_refused_where_rows_lose_their_padding(kind: str) -> None:
    model = adapted(mixing(kind), first="patch", padding_free=True)
    ids, mask = rows()
    with pytest.raises(NotImplementedError, match="refuses its adapter 'default', which"):
        model(input_ids=ids, attention_mask=mask)


# Of each family: where an adapter goes.
TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "gemma3": ["q_proj"],
    "bloom": ["query_key_value"],
    "mamba": ["in_proj"],
}


@pytest.fixture
def calls_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT before 0.21, which calls the forward of the model inside and none of its hooks."""
    from peft.tuners.tuners_utils import BaseTuner

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.model.forward(*args, **kwargs)

    monkeypatch.setattr(BaseTuner, "forward", forward)


@pytest.mark.parametrize("first", ["patch", "adapter"])
@pytest.mark.parametrize("kind", ["LoraConfig", "AdaLoraConfig"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "bloom", "mamba"])
def test_calls_past_the_hooks(family: str, kind: str, first: str, calls_forward: None) -> None:
    """By every convention; labels of first tokens, which nothing predicts, count nothing."""
    config = config_of(kind, {"total_step": 10} if kind == "AdaLoraConfig" else {})
    config.target_modules = TARGETS[family]
    config.orth_reg_weight = 1e-9  # AdaLoRA adds a loss of its weights
    model, docs = adapted(config, family=family, first=first), documents()
    want, loss = alone(model, docs), token_mean(model, docs).item()
    batch = {**packed(docs), "labels": torch.cat(docs)[None]}
    for names in ((*batch,), ("position_ids",), ("seq_idx",), ("cu_seq_lens_q",), ("layout",)):
        given = {name: batch[name] for name in {"input_ids", "labels", *names}}
        output = model(**given)
        assert close(output.logits[0].detach(), want)
        assert abs(output.loss.item() - loss) <= 2e-6 * loss


def test_a_model_without_a_head_past_its_hooks(calls_forward: None) -> None:
    model = patch_model(tiny.tiny_model("llama", auto_class=transformers.AutoModel))
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="FEATURE_EXTRACTION")
    model, docs = peft.get_peft_model(model, config), documents()
    batch, outputs = packed(docs), [model(input_ids=d[None])[0][0] for d in docs]
    got = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"])[0][0]
    assert close(got.detach(), torch.cat(outputs).detach())


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_forward_that_is_called_by_name(family: str) -> None:
    """It runs the hooks once, the user's among them, and so it does inside what wraps it."""
    model, docs = patch_model(tiny.tiny_model(family)), documents()
    want, calls = alone(model, docs), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    batch = {name: packed(docs)[name] for name in ("input_ids", "position_ids")}
    assert close(model.forward(**batch).logits[0].detach(), want)
    assert len(calls) == 1
    model.forward = torch.autocast("cpu", enabled=False)(model.forward)  # as accelerate does
    for called in (model, model.forward):
        calls.clear()
        assert close(called(**batch).logits[0].detach(), want)
        assert len(calls) == 1
    assert close(copy.deepcopy(model)(**batch).logits[0].detach(), want)


def test_a_compiled_call_past_the_hooks(calls_forward: None) -> None:
    config = config_of("LoraConfig", QV)
    model, docs = adapted(config, first="patch"), documents()
    batch = {**packed(docs), "labels": torch.cat(docs)[None]}
    torch._dynamo.reset()
    output = torch.compile(model, backend="eager")(**batch)
    assert close(output.logits[0].detach(), alone(model, docs))
    loss = token_mean(model, docs).item()
    assert abs(output.loss.item() - loss) <= 2e-6 * loss


def test_those_that_look_at_a_row_are_refused_past_the_hooks(calls_forward: None) -> None:
    """A fused head calls the backbone by itself, which has no adapters written on it."""
    utils = pytest.importorskip("trl.trainer.utils", reason="needs trl")
    model = patch_model(tiny.tiny_model("llama"))
    utils.add_fused_lm_head(model)
    wrapped = peft.get_peft_model(model, mixing("aLoRA"))
    batch = {name: packed(documents())[name] for name in ("input_ids", "position_ids", "labels")}
    with pytest.raises(NotImplementedError, match="refuses its adapter 'default', which"):
        wrapped(**batch, fused_lm_head=True)


def rows() -> tuple[Tensor, Tensor]:
    """Two rows, one of them padded."""
    docs = documents(lengths=(9, 16))
    ids = torch.nn.utils.rnn.pad_sequence(docs, batch_first=True)
    return ids, (torch.arange(16) < torch.tensor([9, 16])[:, None]).long()


def two_adapters(family: str, **patch: Any) -> Any:
    """LoRA "default" and "other", which a batch may name for each row."""
    names = {"llama": ["q_proj", "v_proj"], "bloom": ["query_key_value"]}[family]
    model = patch_model(tiny.tiny_model(family), **patch)
    config = peft.LoraConfig(target_modules=names, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    model.add_adapter("other", config)
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        drawn(model)
    return model.eval()


def test_adapters_by_row() -> None:
    """Through the interface rows stay rows; where they do not, names for them are refused."""
    docs = documents(lengths=(7, 9, 16))
    ids, layout = torch.cat(docs).view(2, 16), DocumentLayout.from_lengths([7, 9, 16])
    names = ["other", "default"]
    llama = two_adapters("llama")
    got = llama(input_ids=ids, layout=layout, adapter_names=names).logits.flatten(0, 1)
    want = []
    for doc, name in zip(docs, ("other", "other", "default")):
        llama.set_adapter(name)
        want.append(llama(input_ids=doc[None]).logits[0])
    assert close(got.detach(), torch.cat(want).detach())

    bloom = two_adapters("bloom")
    two = torch.cat(documents(lengths=(16, 9))), DocumentLayout.from_lengths([16, 9])
    with pytest.raises(NotImplementedError, match="adapters have adapter_names for each row"):
        bloom(input_ids=two[0][None], layout=two[1], adapter_names=names)
    free, (ids, mask) = two_adapters("llama", padding_free=True), rows()
    with pytest.raises(NotImplementedError, match="adapters have adapter_names for each row"):
        free(input_ids=ids, attention_mask=mask, use_cache=False, adapter_names=names)
    for model in (bloom, free):
        model(input_ids=ids, attention_mask=mask, adapter_names=names)


def test_tasks_by_row() -> None:
    """Poly draws its experts in training; in evaluation its packs equal the documents."""
    config, docs = config_of("PolyConfig", {**QV, "n_tasks": 2, "r": 4}), documents()
    tasks = torch.tensor([1])
    stock, model = adapted(config).eval(), adapted(config, first="patch").eval()
    want = [stock(input_ids=d[None], task_ids=tasks).logits[0] for d in docs]
    got = model(**packed(docs), task_ids=tasks).logits[0]
    assert close(got.detach(), torch.cat(want).detach())
    config.target_modules = {"query_key_value"}
    unpacked = adapted(config, family="bloom", first="patch")
    with pytest.raises(NotImplementedError, match="adapter 'default' has its task_ids"):
        unpacked(**packed(docs), task_ids=tasks)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_merging_switching_and_leaving_out(family: str) -> None:
    """What PEFT does to a patched model holds for packs as it does for the documents."""
    docs, model = documents(), two_adapters(family)

    def exact() -> Tensor:
        want = alone(model, docs)
        got = model(**packed(docs)).logits[0].detach()
        assert close(got, want)
        return got

    other = exact()
    model.set_adapter("default")
    default = exact()
    assert not close(default, other)
    model.merge_adapter()
    assert close(exact(), default)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert not close(exact(), default)
    assert close(exact(), default)
    model = model.merge_and_unload()
    assert close(exact(), default)
