"""LoRA in a Trainer run: packed against the same documents one by one, in the same steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from packed_attn import PackedCollator, patch_model
from tests.exactness import relative
from tests.models import tiny_model

peft = pytest.importorskip("peft", reason="needs peft")

STEPS, TOGETHER = 2, 4
slow = pytest.mark.slow


def features() -> list[dict[str, list[int]]]:
    """Documents of 1 to 40 tokens; the first token of each has nothing that predicts it."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1, *torch.randint(2, 40, (STEPS * TOGETHER - 1,), generator=generator).tolist()]
    docs = [torch.randint(3, 150, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": doc, "labels": [-100, *doc[1:]]} for doc in docs]


def rows(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """One document a batch, nothing else."""
    return {name: torch.tensor([batch[0][name]]) for name in batch[0]}


def lora(model: Any) -> Any:
    names = ["q_proj", "k_proj", "v_proj", "up_proj"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=names, r=4))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # starts at 0, where an adapter does nothing
            torch.manual_seed(1)
            nn.init.normal_(parameter, std=0.05)
    return wrapped


def as_it_is(model: Any) -> Any:
    return model


def prepared_for_kbit(model: Any) -> Any:
    """Norms, embeddings and head in float32, frozen projections in half precision."""
    model = peft.prepare_model_for_kbit_training(model)
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)
    assert model.model.norm.weight.dtype == torch.float32
    return model


@dataclass(frozen=True)
class Run:
    losses: Tensor
    gradients: dict[str, Tensor]
    checkpointed: bool


class Gradients(TrainerCallback):
    """Of the first optimizer step."""

    def __init__(self) -> None:
        self.first: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.first:
            parameters = kwargs["model"].named_parameters()
            self.first = {n: p.grad.clone() for n, p in parameters if p.grad is not None}


def run(folder: Path, model: Any, *, packed: bool, **settings: Any) -> Run:
    """Two optimizer steps of four documents each."""
    batches = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": TOGETHER}
    if packed:
        patch_model(model)
        batches = {"per_device_train_batch_size": TOGETHER}
    recorded, recomputed = Gradients(), []
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(folder),
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            use_cpu=True,
            logging_steps=1,
            max_steps=STEPS,
            learning_rate=1e-2,
            max_grad_norm=0.0,
            **batches,  # type: ignore[arg-type]
            **settings,
        ),
        train_dataset=features(),  # type: ignore[arg-type]
        data_collator=PackedCollator("documents") if packed else rows,
        callbacks=[recorded],
    )
    layer = model.get_decoder().layers[0].self_attn
    layer.register_forward_pre_hook(lambda *_: recomputed.append(torch.is_grad_enabled()))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    forwards = STEPS * (1 if packed else TOGETHER)
    return Run(torch.tensor(losses), recorded.first, len(recomputed) == 2 * forwards)


CHECKPOINTED = [
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    for reentrant in (False, True)
]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", CHECKPOINTED[1]),
        pytest.param("llama", CHECKPOINTED[0], marks=slow),
        pytest.param("qwen3", CHECKPOINTED[1], marks=slow),
        pytest.param("gpt_oss", CHECKPOINTED[0], marks=slow),
    ],
)
def test_lora_on_a_frozen_base_with_checkpointing(
    tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    """Trainer makes the input embeddings require gradients: a frozen base has no other way in."""
    want = run(tmp_path, lora(tiny_model(family)), packed=False, **settings)
    got = run(tmp_path, lora(tiny_model(family)), packed=True, **settings)
    assert want.checkpointed
    assert got.checkpointed
    assert all("lora" in name for name in want.gradients)
    assert torch.allclose(got.losses, want.losses, rtol=1e-6, atol=0)
    assert relative(got.gradients, want.gradients) <= 1e-5


@pytest.mark.parametrize(
    ("family", "prepare", "settings"),
    [
        # Rotary embeddings leave q and k in float32 beside a v of half precision.
        pytest.param("llama", as_it_is, {}, marks=slow),
        ("qwen3", prepared_for_kbit, CHECKPOINTED[1]),
        pytest.param("llama", prepared_for_kbit, CHECKPOINTED[0], marks=slow),
        pytest.param("qwen3", as_it_is, {}, marks=slow),
        pytest.param("gemma2", prepared_for_kbit, {}, marks=slow),
        pytest.param("gpt_oss", as_it_is, CHECKPOINTED[1], marks=slow),
    ],
)
def test_mixed_precision(
    tmp_path: Path, family: str, prepare: Any, settings: dict[str, Any]
) -> None:
    """Autocast, with float32 norms around projections of half precision or float32 weights: no
    further from float32 than the unpacked run is."""
    exact = run(tmp_path, lora(tiny_model(family)), packed=False)
    plain = run(tmp_path, lora(prepare(tiny_model(family))), packed=False, bf16=True, **settings)
    got = run(tmp_path, lora(prepare(tiny_model(family))), packed=True, bf16=True, **settings)
    rounding = float((plain.losses - exact.losses).abs().max())
    # 2^-12 is far below one rounding of a loss of 5 to bfloat16.
    assert (got.losses - exact.losses).abs().max() <= 2 * rounding + 2**-12
    assert relative(got.gradients, exact.gradients) <= 3 * relative(
        plain.gradients, exact.gradients
    )


def test_norms_in_float32_before_attention_in_half_precision() -> None:
    """q and k come from float32 norms, v from a projection: attention runs in v's dtype, as flash
    attention does, where torch's own refuses."""
    model = tiny_model("qwen3").to(torch.bfloat16)
    for layer in model.model.layers:
        layer.self_attn.q_norm.float()
        layer.self_attn.k_norm.float()
    patch_model(model)
    batch = PackedCollator("documents")(features())
    lengths = batch["layout"].lengths
    logits = model(**batch).logits[0]
    alone = [model(**PackedCollator("documents")([feature])).logits[0] for feature in features()]
    for found, wanted in zip(logits.split(lengths), alone, strict=True):
        assert torch.equal(found, wanted)
