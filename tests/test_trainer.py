"""HF Trainer with default TrainingArguments: packs stay packs, a step equals the unpacked one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments, default_data_collator

from packed_attn import PackedCollator, pack_dataset, patch_model
from tests.models import tiny_model

CAPACITY = 64


def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 40, (24,), generator=generator).tolist()
    return [torch.randint(3, 150, (n,), generator=generator).tolist() for n in lengths]


def arguments(folder: Path, **kwargs: Any) -> TrainingArguments:
    settings = {
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        "logging_steps": 1,
    }
    return TrainingArguments(output_dir=str(folder), **{**settings, **kwargs})


def losses(trainer: Trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_run_with_defaults_equals_the_documents_one_by_one(
    tmp_path: Path, batch_size: int
) -> None:
    """Trainer drops the columns that forward does not name; position_ids survive."""
    docs = documents()
    packs = pack_dataset(
        datasets.Dataset.from_dict({"input_ids": docs}), CAPACITY, overflow="error"
    )
    seen: list[tuple[int, ...]] = []

    class Watched(PackedCollator):
        def __call__(self, features: Any) -> dict[str, Any]:
            batch = super().__call__(features)
            seen.append(batch["layout"].lengths)
            return batch

    settings = {"max_steps": 4, "per_device_train_batch_size": batch_size, "learning_rate": 1e-2}
    trainer = Trainer(
        patch_model(tiny_model("llama")),
        arguments(tmp_path, **settings),
        train_dataset=packs,
        data_collator=Watched(),
    )
    packed_losses = losses(trainer)
    assert all(len(lengths) > batch_size for lengths in seen[:2])

    # The same documents per step, each alone in the batch, in the order that the packs had.
    model = tiny_model("llama").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    alone_losses = [
        one_by_one(model, optimizer, ids, 1e-2 * (1 - step / 4))
        for step, ids in enumerate(steps_of(trainer, packs, batch_size))
    ]
    assert packed_losses == pytest.approx(alone_losses, rel=2e-5)


def steps_of(trainer: Trainer, packs: Any, batch_size: int) -> list[list[list[int]]]:
    """The documents of each step, read from the trainer's own data loader."""
    torch.manual_seed(trainer.args.seed)
    from transformers import set_seed

    set_seed(trainer.args.seed)
    steps = []
    for batch in list(trainer.get_train_dataloader())[:4]:
        ids = batch["input_ids"][0]
        steps.append([d.tolist() for d in ids.split(batch["layout"].lengths)])
    return steps


def one_by_one(
    model: nn.Module, optimizer: torch.optim.Optimizer, docs: list[list[int]], rate: float
) -> float:
    """One optimizer step in which every document runs alone."""
    targets = sum(len(doc) - 1 for doc in docs)
    total = 0.0
    optimizer.zero_grad()
    for doc in docs:
        ids = torch.tensor(doc)
        logits = model(input_ids=ids[None]).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits, ids[1:], reduction="sum") / targets
        loss.backward()
        total += loss.item()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return total


def test_packs_that_lost_their_boundaries_stop_the_run(tmp_path: Path) -> None:
    """seq_lengths alone do not survive Trainer's column removal."""
    packs = pack_dataset(datasets.Dataset.from_dict({"input_ids": documents()}), CAPACITY)
    trainer = Trainer(
        patch_model(tiny_model("llama")),
        arguments(tmp_path, max_steps=1),
        train_dataset=packs.remove_columns("position_ids"),
        data_collator=PackedCollator(),
    )
    with pytest.raises(ValueError, match="has no boundaries"):
        trainer.train()


def test_evaluation_counts_each_target_once(tmp_path: Path) -> None:
    docs = documents()
    packs = pack_dataset(datasets.Dataset.from_dict({"input_ids": docs}), CAPACITY)
    model = patch_model(tiny_model("llama"))
    trainer = Trainer(
        model,
        arguments(tmp_path, per_device_eval_batch_size=len(packs)),
        eval_dataset=packs,
        data_collator=PackedCollator(),
    )
    with torch.no_grad():
        total = sum(
            nn.functional.cross_entropy(
                model(input_ids=torch.tensor(d)[None]).logits[0, :-1],
                torch.tensor(d)[1:],
                reduction="sum",
            ).item()
            for d in docs
        )
    want = total / sum(len(d) - 1 for d in docs)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-6)


def test_a_resumed_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    """From a checkpoint in the middle of an epoch: the same remaining packs, the same bits."""
    packs = pack_dataset(documents(), CAPACITY, overflow="error")

    def run(folder: Path, resume: str | None = None) -> tuple[Trainer, list[Any]]:
        seen: list[Any] = []

        class Watched(PackedCollator):
            def __call__(self, features: Any) -> dict[str, Any]:
                batch = super().__call__(features)
                seen.append(batch["layout"].lengths)
                return batch

        settings = TrainingArguments(
            output_dir=str(folder),
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            max_steps=5,
            save_strategy="steps",
            save_steps=2,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
        )
        trainer = Trainer(
            patch_model(tiny_model("llama")),
            settings,
            train_dataset=packs,
            data_collator=Watched(),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer, seen

    whole, all_seen = run(tmp_path / "whole")
    resumed, later = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 5
    # Trainer collates what it skips; the packs that it trains on are the last ones.
    assert later[-6:] == all_seen[-6:]
    for (name, want), got in zip(whole.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(got, want), name


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_labels_that_nothing_predicts_are_refused_where_they_were_counted(
    tmp_path: Path, family: str
) -> None:
    """The collator of language models makes labels of all tokens, first ones of documents too."""
    packs = pack_dataset(documents(), CAPACITY)

    def run(collator: Any) -> float:
        trainer = Trainer(
            patch_model(tiny_model(family)),
            arguments(tmp_path, max_steps=1, per_device_train_batch_size=1),
            train_dataset=packs,
            data_collator=collator,
        )
        return losses(trainer)[0]

    def of_all_tokens(features: list[dict[str, Any]]) -> dict[str, Any]:
        batch = default_data_collator(features)
        return {**batch, "labels": batch["input_ids"].clone()}

    with pytest.raises(ValueError, match="Use PackedCollator"):
        run(of_all_tokens)
    assert run(default_data_collator) == pytest.approx(run(PackedCollator()), rel=1e-6)


def test_several_gpus_of_one_process_are_refused(tmp_path: Path) -> None:
    """There a Trainer wraps the model in DataParallel and multiplies its loss by their number."""
    settings = arguments(tmp_path)
    settings._n_gpu = 2
    packs = pack_dataset(documents(), CAPACITY, overflow="error")
    model = patch_model(tiny_model("llama"))
    trainer = Trainer(model, settings, train_dataset=packs, data_collator=PackedCollator())
    with pytest.raises(NotImplementedError, match=r"refuses DataParallel.*CUDA_VISIBLE_DEVICES"):
        trainer.train()
