"""patch_model: packed batches are exact by every convention, everything else is untouched."""

from __future__ import annotations

import copy
import pickle
import types
from typing import Any

import pytest
import torch
from packaging.version import Version
from packed_attn_patches import fast_mixers, tiny
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from packed_attn import DocumentLayout, PackedCollator, patch_model, unpatch_model
from tests.exactness import alone, close, documents, gradients, packed, relative, stock_results
from tests.models import FAMILIES, SMALL, tiny_config, tiny_model

CONVENTIONS = {
    "everything": lambda b: b,
    "layout": lambda b: {"layout": b["layout"]},
    "position_ids": lambda b: {"position_ids": b["position_ids"]},
    "position_ids, ones": lambda b: {
        "position_ids": b["position_ids"],
        "attention_mask": torch.ones_like(b["input_ids"]),
    },
    "cu_seq_lens": lambda b: {k: b[k] for k in ("cu_seq_lens_q", "cu_seq_lens_k")},
    "cu_seq_lens_k": lambda b: {"cu_seq_lens_k": b["cu_seq_lens_k"]},
    "seq_idx": lambda b: {"seq_idx": b["seq_idx"]},
    "segment mask": lambda b: {"attention_mask": b["seq_idx"].long() + 1},
    "segment mask of floats": lambda b: {"attention_mask": b["seq_idx"].float() + 1},
}


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return patch_model(tiny_model("llama"))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_convention_is_exact(llama: nn.Module, convention: str) -> None:
    docs = documents()
    batch = packed(docs)
    kwargs = {"input_ids": batch["input_ids"], **CONVENTIONS[convention](batch)}
    kwargs.pop("labels", None)
    assert close(llama(**kwargs).logits[0], alone(llama, docs))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_documents_alone(family: str) -> None:
    """Train mode, the cache at its default, checkpointing on: as a Trainer runs it."""
    model = tiny_model(family).train()
    docs = documents()
    targets = sum(len(d) - 1 for d in docs)
    loss = torch.tensor(0.0)
    for doc in docs:
        logits = model(input_ids=doc[None]).logits[0, :-1]
        loss = loss + nn.functional.cross_entropy(logits, doc[1:], reduction="sum") / targets
    loss.backward()
    want = gradients(model)

    patch_model(model)
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = packed(docs)
    got = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], labels=batch["labels"]
    ).loss
    got.backward()
    assert abs(got.item() - loss.item()) <= 1e-6 * abs(loss.item())
    # One matrix product over all documents sums its gradient in another order than one a document.
    assert relative(gradients(model), want) <= 2e-6


def test_reentrant_checkpointing_gives_the_same_bits(llama: nn.Module) -> None:
    batch = packed(documents())
    found = []
    for settings in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = copy.deepcopy(llama).train()
        if settings is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
            model.enable_input_require_grads()
        model(**batch).loss.backward()
        found.append(gradients(model))
    for other in found[1:]:
        assert all(torch.equal(found[0][n], other[n]) for n in found[0])


def test_two_packed_rows(llama: nn.Module) -> None:
    a, b = documents(lengths=(5, 22))
    rows = torch.stack([torch.cat([a, b]), torch.cat([b, a])])
    positions = torch.stack(
        [
            torch.cat([torch.arange(5), torch.arange(22)]),
            torch.cat([torch.arange(22), torch.arange(5)]),
        ]
    )
    logits = llama(input_ids=rows, position_ids=positions).logits
    assert close(logits[0], alone(llama, [a, b]))
    assert close(logits[1], alone(llama, [b, a]))


def test_tail_padding_beside_packed_positions(llama: nn.Module) -> None:
    """Stock transformers sees a padded row and forgets the documents."""
    docs = documents()
    batch = packed(docs)
    pad = torch.zeros(1, 7, dtype=torch.long)
    logits = llama(
        input_ids=torch.cat([batch["input_ids"], pad], 1),
        position_ids=torch.cat([batch["position_ids"], pad], 1),
        attention_mask=torch.cat([torch.ones_like(batch["input_ids"]), pad], 1),
    ).logits
    assert close(logits[0, :-7], alone(llama, docs))


def test_labels_never_cross_a_boundary(llama: nn.Module) -> None:
    """Also where the caller left the first label of each document in place."""
    batch = packed(documents())
    want = llama(**batch).loss
    raw = {**batch, "labels": batch["input_ids"].clone()}
    assert torch.equal(llama(**raw).loss, want)
    shifted = torch.nn.functional.pad(batch["input_ids"], (0, 1), value=-100)[:, 1:]
    raw = {**batch, "labels": batch["labels"], "shift_labels": shifted}
    assert torch.equal(llama(**raw).loss, want)


def test_positional_arguments(llama: nn.Module) -> None:
    docs = documents()
    batch = packed(docs)
    logits = llama(batch["input_ids"], None, batch["position_ids"]).logits
    assert close(logits[0], alone(llama, docs))


def test_a_forward_that_names_no_arguments() -> None:
    """Another method's call, led through forward, is not read; tokens without names are refused."""
    model = patch_model(tiny_model("llama"))
    batch = packed(documents())
    want = model(**batch).logits

    def other(*args: Any, **_: Any) -> Any:
        model.forward = stock
        return model(**batch).logits if args[0] is model else None

    stock, model.forward = model.forward, other
    assert torch.equal(model(model, batch), want)
    model.forward = other
    with pytest.raises(NotImplementedError, match=r"no names for 1 positional .* by keyword"):
        model(batch["input_ids"])


def test_inputs_embeds_and_the_base_model(llama: nn.Module) -> None:
    batch = packed(documents())
    want = llama.model(**{k: batch[k] for k in ("input_ids", "position_ids")}).last_hidden_state
    embeds = llama.get_input_embeddings()(batch["input_ids"])
    got = llama.model(inputs_embeds=embeds, position_ids=batch["position_ids"]).last_hidden_state
    assert torch.equal(got, want)
    assert torch.equal(llama.lm_head(got), llama(**batch).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_else_is_untouched(family: str) -> None:
    model = tiny_model(family)
    before = stock_results(model)
    patch_model(model)
    assert all(torch.equal(a, b) for a, b in zip(before, stock_results(model)))
    unpatch_model(model)
    assert all(torch.equal(a, b) for a, b in zip(before, stock_results(model)))


def test_eager_models_stay_eager() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        tiny_config("llama"), attn_implementation="eager"
    ).eval()
    before = stock_results(model)
    patch_model(model)
    assert all(torch.equal(a, b) for a, b in zip(before, stock_results(model)))


def test_undo_restores_configs_and_hooks() -> None:
    model = tiny_model("llama")
    config = model.config
    state = {
        name: (dict(vars(m)["_forward_pre_hooks"]), vars(m).get("config"), sorted(vars(m)))
        for name, m in model.named_modules()
    }
    unpatch_model(patch_model(model))
    assert model.config is config
    for name, module in model.named_modules():
        hooks, module_config, names = state[name]
        assert dict(module._forward_pre_hooks) == hooks
        assert vars(module).get("config") is module_config
        assert sorted(vars(module)) == names


def test_undo_keeps_what_was_set_since() -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    other.config = model.config
    patch_model(model).resize_token_embeddings(211)
    model.config.note = "mine"
    unpatch_model(model)
    assert (model.config.vocab_size, model.config.note) == (211, "mine")
    assert model.config is model.model.layers[0].self_attn.config
    assert model.config._attn_implementation == "sdpa"
    assert other.config.vocab_size == 199
    ids = torch.tensor([[210, 3, 4]])
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize(
    ("family", "layers"),
    [("llama", {}), ("lfm2", {"layer_types": ["conv", "full_attention"]})],
    ids=["llama", "lfm2, by its mixers"],
)
def test_another_attention_set_since_is_refused_until_patched_again(
    family: str, layers: dict[str, Any]
) -> None:
    model, docs = patch_model(tiny_model(family, **layers)), documents()
    if family == "lfm2" and not fast_mixers.takes_layout(model, packed(docs)["layout"]):
        pytest.skip("this transformers passes nothing on to LFM2's convolution")
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="was set to 'eager' after patch_model"):
        model(**packed(docs))
    assert close(patch_model(model)(**packed(docs)).logits[0], alone(model, docs))
    assert unpatch_model(model).config._attn_implementation == "eager"


def test_patching_twice_is_patching_once() -> None:
    model = tiny_model("llama")
    assert patch_model(patch_model(model)) is model
    assert len(model._forward_pre_hooks) == 1
    patch_model(model, backend="reference")
    assert len(model._forward_pre_hooks) == 1
    unpatch_model(model)
    assert not model._forward_pre_hooks
    with pytest.raises(ValueError, match="LlamaForCausalLM is not patched"):
        unpatch_model(model)


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    config = model.config
    model.model.layers[0].self_attn.config = copy.deepcopy(config)
    model.model.layers[0].self_attn.config._attn_implementation_internal = "paged|eager"
    with pytest.raises(KeyError):
        patch_model(model)
    assert model.config is config
    assert not model._forward_pre_hooks
    with pytest.raises(ValueError, match="is not patched"):
        unpatch_model(model)


def test_two_models_from_one_config_object() -> None:
    config = tiny_config("llama")
    first = AutoModelForCausalLM.from_config(config)
    second = AutoModelForCausalLM.from_config(config)
    name = second.config._attn_implementation
    patch_model(first)
    assert second.config._attn_implementation == config._attn_implementation == name
    assert first.config._attn_implementation == "packed_attn"


@pytest.mark.parametrize("stock", ["sdpa", "eager"])
def test_a_reference_built_like_a_patched_policy(stock: str) -> None:
    """TRL hands the policy's attention implementation to the reference that it loads."""
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(tiny_config("llama"), attn_implementation=stock)
    before = stock_results(policy.eval())
    name = patch_model(policy).config._attn_implementation
    reference = AutoModelForCausalLM.from_config(tiny_config("llama"), attn_implementation=name)
    reference.eval().load_state_dict(policy.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before, stock_results(reference)))
    docs = documents()
    assert close(patch_model(reference)(**packed(docs)).logits[0], alone(policy, docs))
    unpatch_model(reference)
    assert reference.config._attn_implementation == name
    assert all(torch.equal(a, b) for a, b in zip(before, stock_results(reference)))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_patched_and_independent(clone: Any) -> None:
    model = patch_model(tiny_model("llama"))
    twin = clone(model)
    docs = documents()
    batch = packed(docs)
    want = alone(model, docs)
    unpatch_model(model)
    assert close(twin(**batch).logits[0], want)
    unpatch_model(twin)
    assert twin.config._attn_implementation == "sdpa"


def test_the_patch_is_not_saved(tmp_path: Any) -> None:
    model = patch_model(tiny_model("llama"))
    model.save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_sdpa_without_softcap_is_refused() -> None:
    """transformers 5.17 lets gemma2 run on sdpa, which has no softcap."""
    model = tiny_model("gemma2")
    model.config._attn_implementation_internal = "sdpa"
    with pytest.raises(NotImplementedError, match="sdpa leaves out its softcap"):
        patch_model(model)


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig


def own_model() -> OwnModel:
    """A model of an architecture that no table names."""
    torch.manual_seed(0)
    return OwnModel(OwnConfig(**SMALL)).eval()


def test_unknown_models_are_refused_by_name() -> None:
    words = "refuses OwnModel: model type 'own' is not among .* on_unknown='unpack'"
    with pytest.raises(NotImplementedError, match=words):
        patch_model(own_model())
    with pytest.raises(NotImplementedError, match="refuses Linear: it is not a transformers"):
        patch_model(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="on_unknown must be"):
        patch_model(own_model(), on_unknown="ignore")  # type: ignore[arg-type]


def test_unknown_models_can_be_unpacked() -> None:
    model = own_model()
    patch_model(model, on_unknown="unpack", verify=True)
    docs = documents()
    assert close(model(**packed(docs)).logits[0], alone(model, docs))


def test_unknown_implementations_are_refused() -> None:
    model = tiny_model("llama")
    model.config._attn_implementation_internal = "paged|eager"
    with pytest.raises(NotImplementedError, match=r"'paged\|eager' is not one of sdpa"):
        patch_model(model)


def test_rotary_ids_that_restart_need_boundaries() -> None:
    from packed_attn_patches.boundaries import packed_layout

    batch = packed(documents())
    shape = types.SimpleNamespace(rows=1, tokens=65, device=torch.device("cpu"))
    rotary = batch["position_ids"].expand(3, 1, -1)
    with pytest.raises(ValueError, match="go back to 0, as packed documents do"):
        packed_layout(shape, {"position_ids": rotary})
    assert packed_layout(shape, {"position_ids": torch.arange(65).expand(3, 1, -1)}) is None
    given = packed_layout(shape, {"position_ids": rotary, "layout": batch["layout"]})
    assert given is batch["layout"]


def test_a_layout_on_a_device_is_not_read() -> None:
    """A meta tensor has no values: reading its lengths would raise, as a CUDA graph would."""
    from packed_attn_patches.boundaries import BatchShape, packed_layout

    shape = BatchShape(rows=1, tokens=65, device=torch.device("meta"))
    layout = DocumentLayout(packed(documents())["layout"].cu_seqlens.to("meta"), 65)
    assert packed_layout(shape, {"layout": layout}) is layout
    with pytest.raises((RuntimeError, NotImplementedError)):
        _ = layout.lengths


def test_what_is_captured_keeps_nothing_from_before(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph reads the boundaries of its own time, not what the layout held at the capture;
    on the CPU a forward is told that it is captured."""
    import packed_attn_patches.inputs as inputs

    monkeypatch.setattr(inputs, "_is_recorded", lambda device: True)
    docs = documents()
    ids = packed(docs)["input_ids"]
    layout = DocumentLayout.from_lengths([20, 20, 20, 5])
    llama(input_ids=ids, layout=layout)
    layout.visibility()
    layout.cu_seqlens.copy_(DocumentLayout.from_lengths([len(d) for d in docs]).cu_seqlens)
    assert close(llama(input_ids=ids, layout=layout).logits[0], alone(llama, docs))


def test_verify_undoes_a_leaking_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose attention ignores the layout: the audit sees it and the patch comes off."""
    import packed_attn_patches.interface as interface

    def one_document(
        q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, **kwargs: Any
    ) -> Tensor:
        from packed_attn import attention

        return attention(q, k, v, DocumentLayout.from_lengths([q.shape[0]]), **kwargs)

    monkeypatch.setattr(interface, "attention", one_document)
    model = tiny_model("llama")
    with pytest.raises(RuntimeError, match=r"undid its patch.*\n.*leaks"):
        patch_model(model, verify=True)
    assert model.config._attn_implementation == "sdpa"
    assert not model._forward_pre_hooks


def test_verify_passes_an_exact_model() -> None:
    patch_model(tiny_model("llama"), verify=True)


def test_boundaries_that_get_lost_raise(llama: nn.Module) -> None:
    """A layer that sees the empty mask without the layout must not run as one document."""
    from packed_attn_patches.interface import empty_mask

    layer = llama.model.layers[0].self_attn
    hidden = torch.zeros(1, 4, 64)
    rotary = llama.model.rotary_emb(hidden, torch.arange(4)[None])
    mask = empty_mask(1, DocumentLayout.from_lengths([4]), "auto").detach()
    with pytest.raises(RuntimeError, match="LlamaAttention ran in a packed forward without"):
        layer(hidden, position_embeddings=rotary, attention_mask=mask)


def test_unknown_models_name_the_module_that_mixes() -> None:
    """The probe runs the model as if its type were known and names what would leak."""
    model = own_model()
    model.model.layers[1].mlp = Mixing()
    words = r"documents mix first in model\.layers\.1\.mlp \(Mixing\)"
    with pytest.raises(NotImplementedError, match=words):
        patch_model(model)
    assert not model._forward_pre_hooks
    assert model.config._attn_implementation == "sdpa"


class Mixing(nn.Module):
    """A token mixer that nobody declared: a running mean over the whole row."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


def test_models_that_cannot_be_packed_are_refused_by_name() -> None:
    from transformers import BertForQuestionAnswering, ViTModel

    with pytest.raises(NotImplementedError, match="no text path, its forward takes pixel_values"):
        patch_model(ViTModel(tiny.tiny_config("vit")))
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_config("llama"))
    with pytest.raises(NotImplementedError, match="weights are on the meta device"):
        patch_model(model)
    with pytest.raises(NotImplementedError, match="a ForQuestionAnswering head are of a row"):
        patch_model(BertForQuestionAnswering(tiny.tiny_config("bert")))


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_an_exception_half_way_rolls_back(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import packed_attn_patches.apply as apply

    model = tiny.tiny_model(family)
    before = stock_results(model)
    calls = []

    def second_fails(module: nn.Module) -> int:
        calls.append(module)
        if len(calls) == 2:
            raise MemoryError("no room for the second hook")
        return 0

    monkeypatch.setattr(apply, "first_position", second_fails)
    with pytest.raises(MemoryError):
        patch_model(model)
    assert len(calls) == 2
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(before, stock_results(model)))
    with pytest.raises(ValueError, match="is not patched"):
        unpatch_model(model)


def test_untested_versions_are_warned_about_and_audited(monkeypatch: pytest.MonkeyPatch) -> None:
    import packed_attn_patches.apply as apply

    monkeypatch.setattr(apply, "TESTED", (Version("1.0"), Version("1.1")))
    with pytest.warns(RuntimeWarning, match="outside the tested range 1.0 to 1.1"):
        patch_model(tiny_model("llama"))
    leaking = tiny_model("llama")
    monkeypatch.setattr(Mixing.forward, "__module__", LlamaMLP.__module__)
    monkeypatch.setattr(LlamaMLP, "forward", Mixing.forward)  # as another version's might
    with (
        pytest.warns(RuntimeWarning, match="outside the tested range"),
        pytest.raises(RuntimeError, match=r"(?s)undid its patch.*model\.layers\.0\.mlp"),
    ):
        patch_model(leaking)
    assert not leaking._forward_pre_hooks


@pytest.mark.parametrize("padded", [False, True])
def test_the_balance_of_experts_is_over_all_real_tokens(padded: bool) -> None:
    """The router's auxiliary loss is a statistic of the batch, packed or padded."""
    model = tiny_model("mixtral")
    docs = documents()
    width = max(map(len, docs))
    ids = torch.stack([nn.functional.pad(d, (0, width - len(d))) for d in docs])
    mask = (torch.arange(width) < torch.tensor([[len(d)] for d in docs])).long()
    want = model(ids, attention_mask=mask, output_router_logits=True).aux_loss
    patch_model(model)
    collator = PackedCollator("documents", pad_to_multiple_of=70 if padded else None)
    batch = collator([{"input_ids": d} for d in docs])
    got = model(**batch, output_router_logits=True)
    assert got.aux_loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert torch.equal(got.logits, model(**batch).logits)


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        *(
            pytest.param(f, marks=pytest.mark.slow)
            for f in ("qwen3", "gemma2", "gpt_oss", "mistral", "bert", "mamba")
        ),
    ],
)
def test_compiled_after_patching(family: str) -> None:
    implementation = "eager" if family == "gemma2" else None
    model = patch_model(tiny.tiny_model(family, attn_implementation=implementation))
    docs = documents()
    batch = packed(docs)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager")
    assert close(compiled(**batch).logits[0], alone(model, docs))
