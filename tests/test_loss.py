"""PackedLoss: token and document means, over accumulation and evaluation, as without packing."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from packed_attn import PackedCollator, PackedIterableDataset, PackedLoss, pack_dataset, patch_model
from packed_attn.loss import document_losses
from tests.exactness import packed
from tests.models import tiny_model
from tests.processes import in_processes
from tests.test_data_parallel import as_launched
from tests.test_trainer import CAPACITY, arguments, documents


def token_means(model: nn.Module, docs: list[list[int]]) -> Tensor:
    """Each document's own mean, run alone."""
    return torch.stack(
        [
            nn.functional.cross_entropy(
                model(input_ids=torch.tensor(d)[None]).logits[0, :-1], torch.tensor(d)[1:]
            )
            for d in docs
        ]
    )


def test_document_losses_equal_the_documents_alone() -> None:
    model, docs = patch_model(tiny_model("llama")), [torch.tensor(d) for d in documents()[:6]]
    docs.insert(2, torch.tensor([7]))
    batch = packed(docs)
    sums, counts = document_losses(model(**batch).logits, batch["labels"], batch["layout"])
    assert counts.tolist() == [len(d) - 1 for d in docs]
    with torch.no_grad():
        want = token_means(model, [d.tolist() for d in docs if len(d) > 1])
    torch.testing.assert_close(sums[counts > 0] / counts[counts > 0], want)
    assert sums[2] == 0


def trained(
    folder: Path, weighting: Any, docs: list[list[int]], packs: Any = None, **settings: Any
) -> Trainer:
    packs = pack_dataset(docs, CAPACITY, overflow="error") if packs is None else packs
    model = patch_model(tiny_model("llama"))
    trainer = Trainer(
        model,
        arguments(folder, max_steps=1, lr_scheduler_type="constant", **settings),
        train_dataset=packs,
        data_collator=PackedCollator(loss_weighting=weighting),
        compute_loss_func=PackedLoss(model, weighting),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("weighting", ["token", "document"])
def test_accumulated_steps_equal_one_batch(tmp_path: Path, weighting: str) -> None:
    """Packs hold unlike numbers of documents, and the mean counts each document all the same."""
    docs = documents()
    packs = len(pack_dataset(docs, CAPACITY, overflow="error"))
    trainer = trained(tmp_path, weighting, docs, gradient_accumulation_steps=packs,
                      per_device_train_batch_size=1)  # fmt: skip
    with torch.no_grad():
        means = token_means(tiny_model("llama"), docs)
    targets = torch.tensor([len(d) - 1.0 for d in docs])
    want = means.mean() if weighting == "document" else (means * targets).sum() / targets.sum()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("share_prefixes", [False, True])
def test_a_stream_counts_every_document(tmp_path: Path, share_prefixes: bool) -> None:
    """accelerate keeps of a stream's tensors what it takes for their first row."""
    docs = documents()
    stream = PackedIterableDataset(
        docs, CAPACITY, overflow="error", share_prefixes=share_prefixes, min_shared=1
    )
    steps = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": len(list(stream))}
    trainer = trained(tmp_path, "document", docs, stream, remove_unused_columns=False, **steps)
    with torch.no_grad():
        want = token_means(tiny_model("llama"), docs).mean()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want.item(), rel=1e-5)


def test_document_gradients_equal_the_documents_alone() -> None:
    docs = [torch.tensor(d) for d in documents()[:5]]
    plain = tiny_model("llama")
    token_means(plain, [d.tolist() for d in docs]).mean().backward()
    model = patch_model(tiny_model("llama"))
    loss = PackedLoss(model, "document")
    batch = PackedCollator("documents", loss_weighting="document")([{"input_ids": d} for d in docs])
    labels = batch.pop("labels")
    loss(model(**batch), labels, batch["shift_labels"].ne(-100).sum()).backward()
    for (name, want), got in zip(plain.named_parameters(), model.parameters()):
        torch.testing.assert_close(got.grad, want.grad, msg=name, rtol=1e-4, atol=1e-6)


def evaluator(folder: Path, docs: list[list[int]], **settings: Any) -> Trainer:
    model = patch_model(tiny_model("llama"))
    loss = PackedLoss(model)
    return Trainer(
        model,
        arguments(folder, per_device_eval_batch_size=2, **settings),
        eval_dataset=pack_dataset(docs, CAPACITY, overflow="error"),
        data_collator=PackedCollator(),
        compute_loss_func=loss,
        compute_metrics=loss.compute_metrics,
        preprocess_logits_for_metrics=loss.preprocess_logits_for_metrics,
    )


@pytest.mark.parametrize("by_batch", [False, True])
def test_evaluation_of_packs_equals_unpacked_evaluation(tmp_path: Path, by_batch: bool) -> None:
    """One document a batch is what unpacked evaluation averages over; twice, so that an evaluation
    whose metrics come batch by batch leaves nothing to the next."""
    docs = documents()
    trainer = evaluator(tmp_path, docs, batch_eval_metrics=by_batch)
    trainer.evaluate()
    packed_metrics = trainer.evaluate()
    rows = datasets.Dataset.from_dict({"input_ids": docs, "labels": docs})
    alone = Trainer(
        tiny_model("llama"), arguments(tmp_path, per_device_eval_batch_size=1), eval_dataset=rows
    ).evaluate()
    assert packed_metrics["eval_loss_per_document"] == pytest.approx(alone["eval_loss"], rel=1e-5)
    assert packed_metrics["eval_documents"] == len(docs)
    assert packed_metrics["eval_tokens"] == sum(len(d) - 1 for d in docs)


def test_metrics_of_logits_are_refused(tmp_path: Path) -> None:
    """Where a Trainer was given the one function and not the other, figures would be of logits."""
    trainer = evaluator(tmp_path, documents())
    trainer.preprocess_logits_for_metrics = None
    with pytest.raises(ValueError, match=r"preprocess_logits_for_metrics=loss\."):
        trainer.evaluate()


FIGURES = ("eval_loss_per_token", "eval_loss_per_document", "eval_tokens", "eval_documents")


def evaluated_on_rank(folder: Path) -> list[float]:
    from accelerate.state import AcceleratorState

    # A Trainer of an earlier test has left its state of one process.
    AcceleratorState._reset_state(reset_partial_state=True)
    as_launched()
    found = evaluator(folder, documents()).evaluate()
    return [found[name] for name in FIGURES]


def test_evaluation_of_two_processes_equals_that_of_one(tmp_path: Path) -> None:
    """Whose batches have other lengths and other numbers of documents."""
    found = evaluator(tmp_path, documents()).evaluate()
    want = [found[name] for name in FIGURES]
    for rank in in_processes(2, evaluated_on_rank, tmp_path):
        assert rank == pytest.approx(want, rel=1e-6)


def test_documents_without_targets_do_not_count() -> None:
    features = [{"input_ids": [5, 6, 7]}, {"input_ids": [8]}, {"input_ids": [9, 10]}]
    features[2]["completion_mask"] = [0, 0]
    batch = PackedCollator("documents", loss_weighting="document", capacity=8)(features)
    assert batch["shift_labels"].tolist() == [[[1, -100, -100, -100]]]


def test_a_collator_of_another_weighting_is_refused() -> None:
    model = patch_model(tiny_model("llama"))
    loss = PackedLoss(model, "document")
    batch = PackedCollator("documents")([{"input_ids": [5, 6, 7]}])
    labels = batch.pop("labels")
    with pytest.raises(ValueError, match=r"by document, but the collator counts tokens: use Pack"):
        loss(model(**batch), labels, 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shared", [False, True])
def test_counts_without_the_loss_are_refused(
    tmp_path: Path, shared: bool, smoothing: float
) -> None:
    """Trainer's own token mean, smoothed or not, would be divided by a number of documents, or
    predict an answer's first token from another answer."""
    model, system = patch_model(tiny_model("llama")), list(range(20, 60))
    docs = [system + answer for answer in ([70, 71], [80], [90, 91, 92])]
    packs = pack_dataset(docs, CAPACITY, share_prefixes=shared)
    trainer = Trainer(
        model,
        arguments(
            tmp_path, max_steps=1, label_smoothing_factor=smoothing, remove_unused_columns=False
        ),
        train_dataset=packs,
        data_collator=PackedCollator(loss_weighting="token" if shared else "document"),
    )
    with pytest.raises(ValueError, match="pass compute_loss_func=PackedLoss"):
        trainer.train()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM is not patched"):
        PackedLoss(tiny_model("llama"))
    with pytest.raises(ValueError, match="weighting must be 'token' or 'document', got 'row'"):
        PackedLoss(patch_model(tiny_model("llama")), "row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loss_weighting must be 'token' or 'document'"):
        PackedCollator(loss_weighting="row")  # type: ignore[arg-type]
    model = patch_model(tiny_model("llama"))
    with pytest.raises(ValueError, match="labels are missing"):
        PackedLoss(model)({"logits": torch.zeros(1, 2, 3)}, None)


def test_a_model_with_the_loss_copies_and_pickles() -> None:
    model = patch_model(tiny_model("llama"))
    PackedLoss(model)
    batch = packed([torch.tensor([5, 6, 7]), torch.tensor([8, 9])])
    want = model(**batch).loss
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**batch).loss, want)


class Bound(TrainerCallback):
    """Gives a trainer that makes its own models the loss of the one that it trains."""

    trainer: Any

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.compute_loss_func = PackedLoss(self.trainer.model, "document")


def test_models_that_the_trainer_makes(tmp_path: Path) -> None:
    """A loss of another model would take rows for documents: it is refused, and can be set."""
    docs = documents()
    want = trained(tmp_path, "document", docs).state.log_history[0]

    def trainer(weighting: Any) -> Trainer:
        return Trainer(
            model_init=lambda: patch_model(tiny_model("llama")),
            args=arguments(tmp_path, max_steps=1, lr_scheduler_type="constant"),
            train_dataset=pack_dataset(docs, CAPACITY, overflow="error"),
            data_collator=PackedCollator(loss_weighting=weighting),
            compute_loss_func=PackedLoss(patch_model(tiny_model("llama")), weighting),
        )

    with pytest.raises(RuntimeError, match="a model that has not run"):
        trainer("token").train()
    with pytest.raises(ValueError, match=r"no PackedLoss of this model .* in on_train_begin"):
        trainer("document").train()
    bound, callback = trainer("document"), Bound()
    callback.trainer = bound
    bound.add_callback(callback)
    bound.train()
    for name in ("loss", "grad_norm"):
        assert bound.state.log_history[0][name] == pytest.approx(want[name], rel=1e-6)
