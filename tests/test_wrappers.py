"""Wrapped models: unwrapped and patched, whichever comes first, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import accelerate.utils
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from packed_attn import audit, patch_model, unpatch_model
from tests.exactness import alone, close, documents, gradients, packed, relative, token_mean
from tests.models import tiny_config, tiny_model

peft = pytest.importorskip("peft", reason="needs peft")


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    init = f"file://{tmp_path / 'group'}"
    torch.distributed.init_process_group("gloo", init_method=init, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def lora(model: Any) -> Any:
    names = ["q_proj", "v_proj"] if hasattr(model, "model") else ["in_proj"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=names))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # starts at 0, where an adapter does nothing
            nn.init.normal_(parameter, std=0.05)
    return wrapped


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def dispatched(model: Any) -> Any:
    """What device_map="auto" does: accelerate's hooks take the place of forward."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for module in (model, *model.children()):
        add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))
    return model


def check_exact(model: Any) -> None:
    """Logits and gradients of a pack against the same documents alone."""
    docs = documents()
    batch = packed(docs)
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    assert close(model(**inputs).logits[0], alone(model, docs))
    loss = token_mean(model, docs)
    loss.backward()
    want = gradients(model)
    model.zero_grad()
    got = model(**inputs, labels=batch["labels"]).loss
    got.backward()
    assert abs(got.item() - loss.item()) <= 1e-6 * abs(loss.item())
    assert relative(gradients(model), want) <= 1e-5


@pytest.mark.parametrize("first", ["patch", "wrap"])
@pytest.mark.parametrize(
    ("family", "wrap"),
    [("llama", lora), ("mamba", lora), ("llama", dispatched), ("mamba", dispatched)],
)
def test_exact_whichever_comes_first(family: str, wrap: Callable[[Any], Any], first: str) -> None:
    model = tiny_model(family)
    if first == "patch":
        wrapped = wrap(patch_model(model))
    else:
        wrapped = wrap(model)
        assert patch_model(wrapped) is wrapped
    check_exact(wrapped)
    assert audit(wrapped).isolated
    unpatch_model(wrapped)
    report = audit(wrapped)
    assert not report.isolated, str(report)


def fused_loss(model: Any, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
    """A forward as kernel libraries put it on an instance: logits are never made."""
    hidden = model.backbone(input_ids=input_ids, **kwargs)[0]
    targets = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].flatten()
    logits = model.lm_head(hidden).flatten(0, 1)
    return CausalLMOutput(loss=nn.functional.cross_entropy(logits, targets))


@pytest.mark.parametrize("first", ["patch", "forward"])
def test_a_forward_put_on_an_unpacked_model(first: str) -> None:
    """It runs the documents; put over that of the patch it is refused until patched again."""
    model: Any = tiny_model("mamba").train()
    docs = documents()
    want = token_mean(model, docs)
    want.backward()
    wanted = gradients(model)
    batch = packed(docs)
    batch["labels"] = batch["input_ids"]
    if first == "patch":
        patch_model(model)
    model.forward = MethodType(fused_loss, model)
    if first == "patch":
        with pytest.raises(NotImplementedError, match=r"replaced by \S+\.fused_loss after patch"):
            model(**batch)
    with pytest.warns(RuntimeWarning, match="no audit could run"):  # it makes a loss alone
        patch_model(model)
    for patched in (model, copy.deepcopy(model)):
        patched.zero_grad()
        output = patched(**batch)
        output.loss.backward()
        assert output.logits is None
        assert output.loss.item() == pytest.approx(want.item(), rel=1e-6)
        assert relative(gradients(patched), wanted) <= 1e-5
    unpatch_model(model)
    assert model.forward == MethodType(fused_loss, model)


@pytest.mark.parametrize("ran", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled(ran: bool) -> None:
    model = compiled(tiny_model("llama"))
    docs = documents()
    batch = packed(docs)
    with torch.no_grad():
        if ran:
            model(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
        want = alone(model, docs)
        assert patch_model(model) is model
        assert close(model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0], want)
    report = audit(model)
    assert report.isolated
    assert "compiled code does not call an audit's hooks" in str(report)


def test_distributed_data_parallel(one_process: None) -> None:
    model = nn.parallel.DistributedDataParallel(tiny_model("llama"))
    patch_model(model)
    docs = documents()
    batch = packed(docs)
    model(**batch).loss.backward()
    assert close(model(**batch).logits[0], alone(model.module, docs))
    assert audit(model).isolated
    unpatch_model(model)


def test_fully_sharded(one_process: None) -> None:
    from torch.distributed.fsdp import fully_shard

    model = tiny_model("llama")
    docs = documents()
    want = alone(model, docs)
    fully_shard(model)
    patch_model(model)
    assert close(model(**packed(docs)).logits[0].detach(), want)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_unwrapped_by_accelerate(family: str) -> None:
    """Whose unwrap_model(keep_fp32_wrapper=False) binds the forward it had found to the model."""
    model, docs = patch_model(tiny_model(family, num_key_value_heads=4)), documents()
    want = alone(model, docs)
    model._original_forward = model.forward
    inside = torch.autocast("cpu", enabled=False)(model.forward)
    model.forward = accelerate.utils.convert_outputs_to_fp32(inside)
    for called in (model, accelerate.utils.extract_model_from_parallel(model, False)):
        for batch in (packed(docs), {k: packed(docs)[k] for k in ("input_ids", "layout")}):
            assert close(called(**batch).logits[0].detach(), want)
    unpatch_model(model)
    assert "forward" not in vars(model)
    assert close(alone(model, docs), want)


def test_data_parallel_is_refused() -> None:
    """Before the patch and after it, by whatever is put into it."""
    refused = pytest.raises(NotImplementedError, match="refuses DataParallel")
    with refused:
        patch_model(nn.DataParallel(tiny_model("llama")))
    model = patch_model(tiny_model("llama"))
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    for wrapped in (model, peft.get_peft_model(model, config)):
        with refused:
            nn.DataParallel(wrapped)
    nn.DataParallel(unpatch_model(model))


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_learned_tokens_are_refused_by_name(kind: str) -> None:
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny_model("llama"), config)
    with pytest.raises(NotImplementedError, match=r"refuses PeftModel.*_TUNING"):
        patch_model(model)


@pytest.mark.parametrize(
    "kind", ["PrefixTuningConfig", "PromptTuningConfig", "PromptEncoderConfig"]
)
@pytest.mark.parametrize(
    "names", [("position_ids",), ("position_ids", "attention_mask"), ("layout",)]
)
@pytest.mark.parametrize("family", ["llama", pytest.param("bloom", marks=pytest.mark.slow)])
def test_learned_tokens_after_the_patch_are_refused_by_the_model(
    family: str, names: tuple[str, ...], kind: str
) -> None:
    """Prompt tuning drops position_ids: nothing in the forward inside tells the documents apart."""
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = patch_model(tiny_model(family, num_key_value_heads=4))
    wrapped = peft.get_peft_model(model, config)
    batch = packed(documents())
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch = {name: batch[name] for name in ("input_ids", "labels", *names)}
    with pytest.raises(NotImplementedError, match=r"refuses PeftModel.*(PROMPT|PREFIX|P)_TUNING"):
        wrapped(**batch)
    ids = batch["input_ids"]
    unpatch_model(model)
    want = wrapped(input_ids=ids).logits
    with pytest.raises(NotImplementedError, match="batches without packing"):
        patch_model(wrapped)
    assert torch.equal(wrapped(input_ids=ids).logits, want)


class WithLoss(LlamaForCausalLM):
    """What users derive: a known model with something of its own around it."""


class Smearing(LlamaForCausalLM):
    """A derived class that mixes tokens behind the layers."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids, **kwargs)
        output.logits = output.logits + 1e-3 * output.logits.roll(1, 1)
        return output


def test_derived_classes_are_probed() -> None:
    assert audit(patch_model(WithLoss(tiny_config("llama")))).isolated
    model = Smearing(tiny_config("llama"))
    with pytest.raises(NotImplementedError, match=r"refuses Smearing.*not what is in it"):
        patch_model(model)
    assert "_packed_attn_record" not in vars(model)


def test_code_that_came_with_a_checkpoint_is_refused() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    model.__class__ = type(
        "LlamaForCausalLM", (LlamaForCausalLM,), {"__module__": "transformers_modules.a.b"}
    )
    with pytest.raises(NotImplementedError, match=r"its code is transformers_modules\.a\.b"):
        patch_model(model)
    patch_model(model, on_unknown="unpack")
    assert audit(model).isolated


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.parametrize("patched_first", [True, False])
def test_fully_sharded_of_the_first_kind(one_process: None, patched_first: bool) -> None:
    """torch's older FSDP, on one process: FSDP2 is tested on two."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = tiny_model("llama").eval()
    docs = documents()
    want = alone(model, docs)
    if patched_first:
        patch_model(model)
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    patch_model(wrapped)
    output = wrapped(**packed(docs))
    assert close(output.logits[0], want)
    output.loss.backward()


def test_layers_on_disk(tmp_path: Path) -> None:
    """What a device_map gives where a model does not fit: hooks that fetch each layer's weights."""
    stock = tiny_model("llama").eval()
    stock.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(
        ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
    )
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert hasattr(model.model.layers[1], "_hf_hook")
    docs = documents()
    patch_model(model)
    assert close(model(**packed(docs)).logits[0], alone(stock, docs))


@pytest.mark.parametrize("settings", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_quantised(tmp_path: Path, settings: dict[str, Any]) -> None:
    """The same documents through the same quantised weights, packed and alone."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny_model("llama").save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**settings, bnb_4bit_compute_dtype=torch.float32)
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config).eval()
    docs = documents()
    want = alone(model, docs)
    patch_model(model)
    assert close(model(**packed(docs)).logits[0], want)
    assert audit(model).isolated
