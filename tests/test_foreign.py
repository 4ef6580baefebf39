"""Code in a known model that is not its type's: audited by the patch, refused where it mixes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from packed_attn_patches.foreign import foreign_parts
from torch import Tensor, nn
from transformers import GPT2Config, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from packed_attn import audit, patch_model
from packed_attn.audit import leaks_between_documents
from tests.exactness import alone, close, documents, packed
from tests.models import tiny_config, tiny_model
from tests.test_seq2seq import collate, pairs, tiny_seq2seq


class Running(nn.Module):
    """A sum over all tokens before."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * x.cumsum(1)


class InTraining(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * x.cumsum(1) if self.training else x


class Detached(nn.Module):
    """No gradient tells of it."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * x.detach().cumsum(1)


class Gated(nn.Module):
    """Nothing is mixed before the first step of training."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * x.cumsum(1)


class Skipped(Gated):
    """Nor is anything computed, so no NaN tells of it either."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.gate.item() else x + self.gate


class Ranked(nn.Module):
    """Half of a row's tokens are chosen, by integers."""

    def forward(self, x: Tensor) -> Tensor:
        ranks = x[..., :1].argsort(1).argsort(1)
        return torch.where(ranks < x.shape[1] // 2, 2 * x, x)


class Counting(nn.Module):
    """Scales by how many tokens there are."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + x.shape[1] / 1000)


class Remembering(nn.Module):
    """What a call saw changes the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        x, seen = x + self.seen, x.detach().mean((0, 1))
        self.seen.copy_(seen)
        return x


class Normalised(nn.Module):
    """Statistics of the batch, and of those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(64)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


MIXING = (Running, InTraining, Detached, Gated, Skipped, Ranked, Counting, Remembering, Normalised)


class Before(nn.Module):
    """A layer of a model with something before it."""

    def __init__(self, mixer: nn.Module, inner: nn.Module) -> None:
        super().__init__()
        self.mixer, self.inner = mixer, inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.mixer(x))


class Derived(LlamaForCausalLM):
    """A class of a user's own over code that is known."""

    def __init__(self, config: Any, mixer: type[nn.Module]) -> None:
        super().__init__(config)
        self.mixer = mixer()

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        hidden = self.model(input_ids, **kwargs)[0]
        return CausalLMOutput(logits=self.lm_head(self.mixer(hidden)))


def derived(mixer: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    return Derived(tiny_config("llama"), mixer).eval()


def with_layer(mixer: type[nn.Module]) -> Any:
    model: Any = tiny_model("llama")
    model.model.layers[0].mlp = Before(mixer(), model.model.layers[0].mlp)
    return model.eval()


def with_hook(mixer: type[nn.Module]) -> Any:
    model: Any = tiny_model("llama")
    module = mixer()
    model.model.layers[0].register_forward_hook(lambda _, __, output: module(output))
    return model


@pytest.mark.parametrize("mixer", MIXING)
@pytest.mark.parametrize("made", [derived, with_layer])
def test_what_mixes_is_refused(made: Callable[..., Any], mixer: type[nn.Module]) -> None:
    model = made(mixer)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NotImplementedError, match=r"not what is in it \(.*test_foreign\."):
        patch_model(model)
    assert "_packed_attn_record" not in vars(model)
    assert not model._forward_pre_hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("mixer", [Running, Ranked])
def test_hooks_that_mix_are_refused(mixer: type[nn.Module]) -> None:
    with pytest.raises(NotImplementedError, match=r"with_hook\.<lambda> on model\.layers\.0"):
        patch_model(with_hook(mixer))


@pytest.mark.parametrize(
    "head",
    [
        lambda: nn.TransformerEncoderLayer(64, 4, batch_first=True),
        lambda: nn.Sequential(nn.Linear(64, 64), nn.TransformerEncoderLayer(64, 4, 96)),
    ],
)
def test_layers_of_torch_that_mix(head: Callable[[], nn.Module]) -> None:
    model: Any = tiny_model("llama")
    model.lm_head = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 199))
    assert not foreign_parts(model)
    model.lm_head = head()
    with pytest.raises(NotImplementedError, match=r"torch\.nn\.modules\.transformer\."):
        patch_model(model)


def test_a_forward_that_a_class_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", Running.forward)
    words = r"test_foreign\.Running\.forward on model\.layers\.0\.mlp and 1 more"
    with pytest.raises(NotImplementedError, match=words):
        patch_model(tiny_model("llama"))


@pytest.mark.parametrize("made", [derived, with_layer, with_hook])
def test_what_mixes_nothing_is_accepted(made: Callable[..., Any]) -> None:
    model, docs = made(nn.Identity), documents()
    want = alone(model, docs)
    assert foreign_parts(model)
    assert patch_model(patch_model(model)) is model
    assert close(model(**without_labels(docs)).logits[0], want)


@pytest.mark.parametrize("made", [derived, with_layer, with_hook])
def test_what_mixes_runs_on_documents_of_equal_length(made: Callable[..., Any]) -> None:
    model, docs = made(Ranked), documents()
    want = alone(model, docs)
    patch_model(model, on_unknown="unpack")
    assert close(model(**without_labels(docs)).logits[0], want)


def test_what_mixes_the_rows_of_a_batch_is_refused_there_too() -> None:
    with pytest.raises(NotImplementedError, match=r"Expected more than 1 value per channel"):
        patch_model(derived(Normalised), on_unknown="unpack")


def test_what_came_in_after_the_patch_is_audited_by_the_next() -> None:
    model = patch_model(tiny_model("llama"))
    model.model.layers[0].mlp = Before(Running(), model.model.layers[0].mlp)
    with pytest.raises(NotImplementedError, match=r"first in model\.layers\.0\.mlp\.mixer"):
        patch_model(model)


@pytest.mark.parametrize("family", ["llama", "mamba", "t5"])
def test_what_came_in_after_the_patch_is_refused_by_packs(family: str) -> None:
    if family == "t5":
        model, batch = patch_model(tiny_seq2seq()), collate(pairs())
    else:
        model, batch = patch_model(tiny_model(family)), without_labels(documents())
    for _ in range(5):
        model(**batch)
    path = next(n for n, m in model.named_modules() if isinstance(m, nn.Linear))
    model.set_submodule(path, Before(Running(), model.get_submodule(path)))
    words = rf"{re.escape(path)} \(.*Before\) came into {type(model).__name__} after patch_model"
    for _ in range(2):  # the sixth and the seventh
        model(**batch)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=words):
            model(**batch)
    model(**{name: value for name, value in batch.items() if name in ("input_ids", "labels")})


def test_a_forward_that_a_class_was_given_after_the_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch_model(tiny_model("llama"))
    monkeypatch.setattr(LlamaMLP, "forward", Running.forward)
    with pytest.raises(RuntimeError, match=r"Running\.forward on model\.layers\.0\.mlp came into"):
        model(**without_labels(documents()))


def test_what_trainers_and_users_put_in_after_the_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks that look at outputs, layers of converters, kernels of the hub, which are exchanged
    with the mode, and what was there, in another place."""
    model, docs = patch_model(with_layer(nn.Identity)), documents()
    want = model(**without_labels(docs)).logits
    model = patch_model(with_layer(nn.Identity))
    model.lm_head.register_forward_hook(lambda *_: None)
    converted = type("Converted", (nn.Linear,), {"__module__": "torchao.float8"})
    model.model.layers[1].mlp.up_proj.__class__ = converted
    monkeypatch.setattr(LlamaRMSNorm, "kernel_layer_name", "RMSNorm", raising=False)
    norm, stock = model.model.norm, LlamaRMSNorm.forward
    norm.forward = MethodType(lambda norm, x: stock(norm, x), norm)
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp)
    assert torch.equal(model(**without_labels(docs)).logits, want)


def test_a_layer_of_another_type_is_foreign() -> None:
    model: Any = tiny_model("llama")
    assert not foreign_parts(model)
    model.model.layers[0].mlp = GPT2MLP(96, GPT2Config(n_embd=64)).eval()
    assert foreign_parts(model)[0].startswith("model.layers.0.mlp (transformers.models.gpt2.")
    patch_model(model)
    assert audit(model).isolated


def test_gates_that_are_0_hide_nothing_from_an_audit() -> None:
    model = patch_model(tiny_model("llama"))
    gated = Gated()
    model.model.layers[0].mlp = Before(gated, model.model.layers[0].mlp)
    report = audit(model)
    assert report.verdict == "leaks"
    assert report.first_leaking_module == "model.layers.0.mlp.mixer (Gated)"
    note = "had random values here: 1, the first model.layers.0.mlp.mixer.gate"
    assert any(note in n for n in report.notes)
    assert leaks_between_documents(model) is not None
    assert not gated.gate.any()


def test_what_moves_beyond_a_rounding_is_not_called_one() -> None:
    """Where no gradient tells, and packed is not alone either."""
    model = patch_model(tiny_model("llama"))
    model.model.layers[0].mlp = Before(Detached(), model.model.layers[0].mlp)
    assert {check.verdict for check in audit(model).checks} == {"holds", "fails"}


def test_an_audit_leaves_running_statistics_as_they_were() -> None:
    """Its NaN would stay in them for good."""
    model: Any = tiny_model("llama")
    norm = Normalised()
    model.model.layers[0].mlp = Before(norm, model.model.layers[0].mlp)
    batch = {n: v for n, v in packed(documents(0, (5, 3, 9))).items() if n != "layout"}
    model.train()
    before = copy.deepcopy(norm.state_dict())
    assert not audit(model, convention="train mode", lengths=(5, 3, 9)).isolated
    assert leaks_between_documents(model, batch) is not None
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name]), name


def without_labels(docs: list[Tensor]) -> dict[str, Any]:
    return {name: value for name, value in packed(docs).items() if name != "labels"}
