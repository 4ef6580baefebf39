"""audit: isolated models pass, leaking ones are caught with the first leaking module named."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from packed_attn_patches import tiny
from torch import nn

from packed_attn import PackedCollator, audit, patch_model
from packed_attn.audit import leaks_between_documents
from packed_attn.audit.conventions import TELLING
from packed_attn.audit.precision import TOLERANCE
from tests.exactness import alone, documents, packed
from tests.models import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_patched_models_are_isolated(family: str) -> None:
    report = audit(patch_model(tiny_model(family)))
    assert report.isolated, str(report)
    if family not in ("qwen3_moe", "mixtral", "gpt_oss"):
        assert report.verdict == "isolated", str(report)


@pytest.mark.parametrize(
    "convention", ["position_ids", "position_ids and a mask of ones", "no boundaries"]
)
def test_stock_models_leak_and_the_module_is_named(convention: str) -> None:
    """position_ids alone leak because use_cache is left at its default."""
    report = audit(tiny_model("llama"), convention=convention)
    assert not report.isolated
    assert {c.verdict for c in report.checks} == {"fails"}
    assert report.first_leaking_module == "model.layers.0.self_attn (LlamaAttention)"
    assert "leaks" in str(report)
    assert "model.layers.0.self_attn" in str(report)


class Smear(nn.Module):
    """A causal token mixer: each token takes a little of the one before."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x + 1e-3 * nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


def test_a_single_leaking_module_is_found() -> None:
    model = patch_model(tiny_model("llama"))
    model.model.layers[1].mlp = Smear(model.model.layers[1].mlp)
    report = audit(model)
    assert not report.isolated
    assert report.first_leaking_module == "model.layers.1.mlp (Smear)"


class Zeroing(nn.Module):
    """Multiplies all tokens by the first one's validity: leaks NaN alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0 * x[:, :1]


def test_a_leak_of_nan_alone_is_found() -> None:
    model = patch_model(tiny_model("llama"))
    model.model.norm = nn.Sequential(model.model.norm, Zeroing())
    verdicts = {c.name: c.verdict for c in audit(model).checks}
    assert verdicts.pop("NaN and Inf stay in their document") == "fails"
    assert set(verdicts.values()) == {"holds"}


class Rounding(nn.Module):
    """What experts do: another token's content changes the rounding, and no gradient flows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1e-7 * x.detach().sum().sin()


def test_rounding_is_told_from_a_leak() -> None:
    model = patch_model(tiny_model("llama"))
    model.model.norm = nn.Sequential(model.model.norm, Rounding())
    report = audit(model)
    verdicts = {c.name: c.verdict for c in report.checks}
    assert verdicts["perturbing a document changes no other"] == "rounding", str(report)
    assert verdicts["gradient into other documents is 0"] == "holds"
    assert report.first_leaking_module == "model.norm.1 (Rounding)"


def test_experts_at_a_width_where_rounding_shows() -> None:
    """Experts group tokens by content: a neighbour changes the shape of a product."""
    report = audit(patch_model(tiny_model("mixtral", hidden_size=512, num_local_experts=8)))
    assert report.isolated, str(report)
    assert (report.first_leaking_module is None) == (report.verdict == "isolated"), str(report)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    audit(model)
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    report = audit(patch_model(tiny_model("llama")).to(dtype))
    assert report.isolated, str(report)


def test_logits_in_float32_that_are_computed_in_half_precision() -> None:
    """As accelerate's forwards give them: the bound is that of what the modules compute in."""
    model = patch_model(tiny_model("llama"))
    assert audit(model).checks[0].bound == TOLERANCE[torch.float32]
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    report = audit(model)
    assert report.verdict == "isolated", str(report)
    assert report.checks[0].bound == TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("model_type", ["gpt_oss", "granitemoeshared"])
def test_experts_that_a_rounding_chooses_are_no_leak(model_type: str) -> None:
    """In half precision a pack may go to other experts than its documents alone, in float32 not."""
    model = tiny.tiny_model(model_type).to(torch.bfloat16)
    assert audit(model).leaks
    report = audit(patch_model(model))
    assert report.isolated, str(report)
    assert any("a rounding may choose other experts" in note for note in report.notes)
    assert not any("experts" in note for note in audit(patch_model(tiny_model("mixtral"))).notes)


def test_a_choice_of_experts_that_cannot_be_held_is_not_compared_in_half_precision() -> None:
    """PhiMoE's routers ask for a maximum, and not for topk."""
    model = patch_model(tiny.tiny_model("phimoe"))
    report = audit(model)
    assert len(report.checks) == 5, str(report)
    report = audit(model.to(torch.bfloat16))
    assert report.verdict == "isolated", str(report)
    assert len(report.checks) == 3
    assert any("audit in float32" in note for note in report.notes)


def test_report_as_json() -> None:
    report = json.loads(json.dumps(audit(patch_model(tiny_model("llama"))).to_dict()))
    assert report["verdict"] == "isolated"
    assert len(report["checks"]) == 5


def test_bad_arguments() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="two documents"):
        audit(model, lengths=(5,))
    with pytest.raises(ValueError, match="convention must be one of"):
        audit(model, convention="rows")


def test_every_convention_of_a_patched_model() -> None:
    reports = audit(patch_model(tiny_model("llama", attention_dropout=0.1)), conventions=TELLING)
    assert {name: r.verdict for name, r in reports.items()} == dict.fromkeys(TELLING, "isolated")
    train = reports["train mode"]
    assert len(train.checks) == 6
    assert "dropout was set to 0" in str(train)
    assert pickle.loads(pickle.dumps(reports)) == reports


def test_a_document_alone_has_no_cache_under_checkpointing() -> None:
    """RoFormer's layers would find in it what they put there before they were computed again."""
    report = audit(patch_model(tiny.tiny_model("roformer")), convention="checkpointing")
    assert report.isolated


def test_a_live_batch_in_train_mode() -> None:
    docs = [torch.arange(3, 3 + n) for n in (5, 1, 9, 9, 22, 3)]
    batch = PackedCollator("documents", pad_to_multiple_of=64)([{"input_ids": d} for d in docs])
    model = tiny_model("llama").train()
    stock = {k: v for k, v in batch.items() if k != "layout"}
    leak = leaks_between_documents(model, stock)
    assert leak is not None
    assert (leak.module, leak.module_class) == ("model.layers.0.self_attn", "LlamaAttention")
    assert leaks_between_documents(patch_model(model), batch) is None
    with pytest.raises(ValueError, match="tells no documents apart"):
        leaks_between_documents(model, {"input_ids": batch["input_ids"]})


class Plain(nn.Module):
    """Any module: token ids in, a tensor out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, input_ids: torch.Tensor, position_ids: object = None) -> torch.Tensor:
        return self.head(self.table(input_ids))


def test_any_module_with_token_embeddings() -> None:
    assert audit(Plain()).verdict == "isolated"
    with pytest.raises(ValueError, match="without a text path"):
        audit(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="on the meta device"):
        audit(Plain().to("meta"))


def test_terms_that_mix_documents_by_design_are_named() -> None:
    report = audit(tiny_model("mixtral"), convention="position_ids, no cache")
    assert any("load-balancing loss, mixes documents by design" in note for note in report.notes)


def test_a_model_that_is_half_patched_is_refused() -> None:
    model = patch_model(tiny_model("llama"))
    del model.__dict__["_packed_attn_record"]
    with pytest.raises(ValueError, match="LlamaForCausalLM is half patched"):
        audit(model)


def test_experts_round_but_pass_no_gradient() -> None:
    """With routing held, another document moves a logit by rounding alone and has no gradient."""
    model = patch_model(tiny_model("mixtral", hidden_size=512, num_local_experts=8))
    docs = documents()
    batch = packed(docs)
    ids = batch.pop("input_ids")
    first = len(docs[0])
    leaf = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=leaf, **batch).logits[0]
    with torch.no_grad():
        rounding = (logits - alone(model, docs)).abs().max()
        ids[0, :first] = 150 - ids[0, :first]
        moved = model(input_ids=ids, **batch).logits[0] - logits
    floor = torch.finfo(logits.dtype).eps * logits.abs().max()
    assert moved[first:].abs().max() <= 4 * torch.maximum(rounding, floor)
    assert moved[:first].abs().max() > 1e-3 * logits.abs().max()
    (gradient,) = torch.autograd.grad(logits[first:].square().sum(), leaf)
    assert gradient[0, first:].any()
    assert not gradient[0, :first].any()
