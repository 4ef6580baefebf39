"""TRL's trainers on a patched model, on the CPU: packs are exact, pairs lose their padding."""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from packed_attn import DocumentLayout, pack_dataset, patch_model
from packed_attn.trl import pack_wrapped, packed_sft_arguments
from tests.models import EXPERTS, tiny_config, tiny_model

pytest.importorskip("trl", reason="TRL is not installed")

from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

CHAT = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"
)


def texts() -> list[str]:
    """Docstrings of the standard library, of many lengths."""
    found = [inspect.getdoc(f) for m in (json, argparse) for _, f in inspect.getmembers(m)]
    return sorted({text[:150] for text in found if text and len(text) > 20})[:24]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    model = Tokenizer(models.BPE(unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=300,  # type: ignore[call-arg]
        special_tokens=["<pad>", "<s>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator(texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    common = {
        "output_dir": str(folder),
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
    }
    return {**common, **changes}


def model_for(tokenizer: PreTrainedTokenizerFast, family: str = "llama", seed: int = 0) -> Any:
    return tiny_model(family, seed, vocab_size=len(tokenizer), max_position_embeddings=512)


class Seen:
    """The batches that a model is trained on."""

    def __init__(self, model: nn.Module) -> None:
        self.batches: list[dict[str, Any]] = []
        model.register_forward_pre_hook(self._note, with_kwargs=True, prepend=True)

    def _note(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            self.batches.append(dict(kwargs))


def loss_alone(model: nn.Module, batch: dict[str, Any]) -> float:
    """The token mean of a packed batch's documents, each run by itself."""
    lengths = DocumentLayout.from_position_ids(batch["position_ids"]).lengths
    total, targets = 0.0, 0
    for ids, labels in zip(
        batch["input_ids"].flatten().split(lengths), batch["labels"].flatten().split(lengths)
    ):
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
        total, targets = total + loss.item(), targets + int((labels[1:] != -100).sum())
    return total / targets


def first_loss(trainer: Any) -> float:
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def plain(column: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({column: texts()})


def prompts_and_completions() -> datasets.Dataset:
    return datasets.Dataset.from_list([{"prompt": t[:12], "completion": t[12:]} for t in texts()])


def chats() -> datasets.Dataset:
    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    return datasets.Dataset.from_list(
        [{"messages": [turn("user", t[:12]), turn("assistant", t[12:])]} for t in texts()]
    )


@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        (plain("text"), {"packing": True, "packing_strategy": "bfd", "max_length": 256}),
        (plain("text"), {"packing": True, "packing_strategy": "bfd_split", "max_length": 24}),
        (plain("text"), {"padding_free": True, "max_length": None}),
        (prompts_and_completions(), {"packing": True, "max_length": 256}),
        (chats(), {"packing": True, "max_length": 256, "assistant_only_loss": True}),
    ],
    ids=["bfd", "bfd_split", "padding_free", "completion_only", "assistant_only"],
)
def test_sft_is_exact(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, dataset: Any, options: dict[str, Any]
) -> None:
    model = patch_model(model_for(tokenizer))
    seen = Seen(model)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(**settings(tmp_path, **options)),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    loss = first_loss(trainer)
    batch = seen.batches[0]
    assert (batch["position_ids"] == 0).sum() >= 2, "several documents in one batch"
    assert loss == pytest.approx(loss_alone(model_for(tokenizer), batch), rel=2e-5)


@pytest.mark.parametrize(
    ("family", "late"),
    [("lfm2", False), ("mamba", False), ("mamba", True)],
    ids=["lfm2, by its mixers", "mamba", "mamba, patched last"],
)
def test_sft_where_attention_takes_no_layout_equals_its_padded_run(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    family: str,
    late: bool,
) -> None:
    """SFTTrainer puts a forward of its own over the model's; an evaluation's logits go by ours."""

    def run(patched: bool) -> list[dict[str, float]]:
        size = {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
        layers = {"layer_types": ["conv", "full_attention"]} if family == "lfm2" else {}
        model = tiny_model(family, **size, **layers)
        if patched and not late:
            patch_model(model)
        options = settings(tmp_path, max_length=None, padding_free=patched, max_steps=3)
        trainer = SFTTrainer(
            model,
            args=SFTConfig(**options, eval_strategy="steps", eval_steps=1),
            train_dataset=plain("text"),
            eval_dataset=plain("text").select(range(2)),
            processing_class=tokenizer,
            preprocess_logits_for_metrics=real_logits,
            compute_metrics=lambda found: {"size": float(found.predictions[0])},
        )
        if patched and late:
            patch_model(trainer.model)
        trainer.train()
        return trainer.state.log_history

    names = {"loss", "grad_norm", "entropy", "mean_token_accuracy", "eval_loss", "eval_size"}
    want, got = (
        [{k: v for k, v in entry.items() if k in names} for entry in run(patched)]
        for patched in (False, True)
    )
    assert names <= {name for entry in want for name in entry}
    for ours, theirs in zip(got, want, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


JAMBA = {
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
}


@pytest.mark.parametrize(
    ("family", "layers", "multiple"),
    [
        pytest.param("jamba", JAMBA, None, id="jamba"),
        pytest.param("jamba", JAMBA, 64, id="jamba, padded", marks=pytest.mark.slow),
        pytest.param("mixtral", {}, 64, id="mixtral, padded"),
    ],
)
def test_sft_balances_experts(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    family: str,
    layers: dict[str, int],
    multiple: int | None,
) -> None:
    """The loss over the routers' choices is of the batch's real tokens: not of batches by length,
    and not of what TRL pads a stream with."""

    def run(patched: bool) -> list[dict[str, float]]:
        size = {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
        model = tiny_model(family, **size, **EXPERTS, **layers)
        options = settings(tmp_path, max_length=None, padding_free=patched, max_steps=3)
        options["pad_to_multiple_of"] = multiple if patched else None
        trainer = SFTTrainer(
            patch_model(model) if patched else model,
            args=SFTConfig(**options, router_aux_loss_coef=0.5),
            train_dataset=plain("text"),
            processing_class=tokenizer,
        )
        trainer.train()
        return [entry for entry in trainer.state.log_history if "loss" in entry]

    want, got = run(False), run(True)
    for name in ("loss", "grad_norm", "aux_loss"):
        found = [entry[name] for entry in got]
        assert found == pytest.approx([entry[name] for entry in want], rel=1e-4), name


def real_logits(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """The mean size of the logits that predict something."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits[:, :-1][labels[:, 1:] != -100].square().mean()[None]


@pytest.mark.parametrize("pack", [pack_dataset, pack_wrapped])
def test_our_packs_go_into_sft_untouched(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, pack: Any
) -> None:
    ids: Any = tokenizer(texts())["input_ids"]
    packs = pack(datasets.Dataset.from_dict({"input_ids": ids}), 64)
    model = patch_model(model_for(tokenizer))
    seen = Seen(model)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(**settings(tmp_path, **packed_sft_arguments())),
        train_dataset=packs,
        processing_class=tokenizer,
    )
    loss = first_loss(trainer)
    rows = {tuple(row) for row in packs["input_ids"]}
    assert tuple(seen.batches[0]["input_ids"][0, :64].tolist()) in rows
    assert loss == pytest.approx(loss_alone(model_for(tokenizer), seen.batches[0]), rel=2e-5)


def test_wrapped_rows_are_those_of_trl(tokenizer: PreTrainedTokenizerFast) -> None:
    from trl import pack_dataset as trl_pack_dataset

    ids: Any = tokenizer(texts())["input_ids"]
    dataset = datasets.Dataset.from_dict({"input_ids": ids})
    ours = pack_wrapped(dataset, 64)
    assert ours["input_ids"][:] == trl_pack_dataset(dataset, 64, "wrapped")["input_ids"][:]
    assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) for row in ours)


def pairs() -> datasets.Dataset:
    rows = [
        {"prompt": t[:40], "chosen": t[40:90], "rejected": t[20:60]} for t in texts() if len(t) > 90
    ]
    return datasets.Dataset.from_list(rows)


PADDING_FREE = {
    "padding-free": {"padding_free": True},
    "shared prompts": {"padding_free": True, "share_prefixes": True},
}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *(("llama", options) for options in PADDING_FREE.values()),
        ("mamba", PADDING_FREE["shared prompts"]),
    ],
    ids=[*PADDING_FREE, "shared prompts, mamba"],
)
def test_dpo_equals_its_padded_run(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, family: str, options: dict[str, bool]
) -> None:
    """Losses, gradient norms and rewards of policy and reference, three steps."""

    def run(**patch: bool) -> tuple[list[dict[str, float]], int]:
        policy, reference = model_for(tokenizer, family), model_for(tokenizer, family)
        if patch:
            policy, reference = patch_model(policy, **patch), patch_model(reference, **patch)
        tokens = []
        layer = policy.base_model.layers[0]
        layer.register_forward_pre_hook(lambda _, args: tokens.append(args[0][..., 0].numel()))
        trainer = DPOTrainer(
            policy,
            ref_model=reference,
            args=DPOConfig(**settings(tmp_path, max_steps=3)),
            train_dataset=pairs(),
            processing_class=tokenizer,
        )
        trainer.train()
        return [e for e in trainer.state.log_history if "loss" in e], sum(tokens)

    want, padded_tokens = run()
    got, tokens = run(**options)
    assert tokens < padded_tokens
    for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logps/rejected"):
        found = [entry[name] for entry in got]
        assert found == pytest.approx([entry[name] for entry in want], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("options", PADDING_FREE.values(), ids=PADDING_FREE)
def test_reward_model_equals_its_padded_run(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, options: dict[str, bool]
) -> None:
    def run(**patch: bool) -> list[dict[str, float]]:
        torch.manual_seed(0)
        config = tiny_config("llama", vocab_size=len(tokenizer), num_labels=1)
        config.max_position_embeddings = 512
        model = AutoModelForSequenceClassification.from_config(config)
        if patch:
            patch_model(model, **patch)
        trainer = RewardTrainer(
            model,
            args=RewardConfig(**settings(tmp_path, max_steps=3)),
            train_dataset=pairs(),
            processing_class=tokenizer,
        )
        trainer.train()
        return [e for e in trainer.state.log_history if "loss" in e]

    want, got = run(), run(**options)
    for name in ("loss", "grad_norm", "margin"):
        found = [entry[name] for entry in got]
        assert found == pytest.approx([entry[name] for entry in want], rel=1e-4, abs=1e-5), name
