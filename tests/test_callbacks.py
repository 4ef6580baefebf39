"""IsolationCallback catches every injected fault; PackingCallback counts what the data has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

from packed_attn import DocumentLayout, PackedCollator, pack_dataset, patch_model
from packed_attn.audit import OneDocument, leaks_between_documents
from packed_attn.callbacks import IsolationCallback, IsolationError, PackingCallback
from tests.models import tiny_model
from tests.test_trainer import CAPACITY, arguments, documents

Collator = Callable[[Any], dict[str, Any]]


def trainer(folder: Path, model: nn.Module, collator: Collator, **settings: Any) -> Trainer:
    return Trainer(
        model,
        arguments(folder, **{"max_steps": 3, "per_device_train_batch_size": 2, **settings}),
        train_dataset=pack_dataset(documents(), CAPACITY, overflow="error"),
        data_collator=collator,
    )


def logged(run: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_patched_run_is_clean(tmp_path: Path, checkpointing: bool) -> None:
    run = trainer(tmp_path, patch_model(tiny_model("llama")), PackedCollator(),
                  max_steps=4, gradient_checkpointing=checkpointing)  # fmt: skip
    run.add_callback(IsolationCallback(run, every=2))
    run.train()
    assert logged(run, "isolation/largest_gradient") == [0.0, 0.0, 0.0]


def test_the_probe_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    """Same losses to the bit: the probe draws no random number that training would have drawn."""
    losses = []
    for watch in (False, True):
        run = trainer(tmp_path, patch_model(tiny_model("llama")), PackedCollator())
        if watch:
            run.add_callback(IsolationCallback(run, every=1))
        run.train()
        losses.append(logged(run, "loss"))
    assert losses[0] == losses[1]


def ones_mask(batch: dict[str, Any]) -> dict[str, Any]:
    """What a padding collator adds; stock models then leak."""
    kept = {k: batch[k] for k in ("input_ids", "labels", "position_ids")}
    return {**kept, "attention_mask": torch.ones_like(batch["input_ids"])}


def dropped(batch: dict[str, Any]) -> dict[str, Any]:
    """A collator that knows nothing of packs."""
    return {k: batch[k] for k in ("input_ids", "labels")}


def shuffled(batch: dict[str, Any]) -> dict[str, Any]:
    """Boundaries that are not the documents' own, beside positions that are."""
    lengths = list(batch["layout"].lengths)[::-1]
    layout = DocumentLayout.from_lengths(lengths)
    kept = {k: batch[k] for k in ("input_ids", "labels", "position_ids")}
    return {**kept, "cu_seq_lens_q": layout.cu_seqlens, "cu_seq_lens_k": layout.cu_seqlens}


class _Faulty:
    """PackedCollator's batch, broken on its way to the model."""

    def __init__(self, fault: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._fault, self._collator = fault, PackedCollator()

    def __call__(self, features: Any) -> dict[str, Any]:
        return self._fault(self._collator(features))


@pytest.mark.parametrize(
    ("fault", "patched", "words"),
    [
        (ones_mask, False, "another document's embeddings"),
        (dropped, True, "packed, but its batches carry no boundaries"),
        (dropped, False, "packed, but its batches carry no boundaries"),
        (shuffled, False, "contradicts?"),
    ],
)
def test_faults_in_the_batch_stop_the_run(
    tmp_path: Path, fault: Any, patched: bool, words: str
) -> None:
    model = tiny_model("llama")
    run = trainer(tmp_path, patch_model(model) if patched else model, _Faulty(fault))
    run.add_callback(IsolationCallback(run))
    with pytest.raises(IsolationError, match=f"step 1: .*{words}"):
        run.train()


def test_shuffled_boundaries_stop_a_patched_run_at_once(tmp_path: Path) -> None:
    run = trainer(tmp_path, patch_model(tiny_model("llama")), _Faulty(shuffled))
    run.add_callback(IsolationCallback(run))
    with pytest.raises(ValueError, match=r"contradicts?"):
        run.train()


def test_an_unpatched_layer_stops_the_run(tmp_path: Path) -> None:
    """A layer that a hook gave attention of its own is named."""
    model = patch_model(tiny_model("llama"))

    def naive(module: nn.Module, args: Any, kwargs: Any, output: Any) -> tuple[Tensor, None]:
        hidden = kwargs["hidden_states"]
        return hidden.cumsum(1) / torch.arange(1, hidden.shape[1] + 1)[:, None], None

    model.model.layers[1].self_attn.register_forward_hook(naive, with_kwargs=True)
    run = trainer(tmp_path, model, PackedCollator())
    run.add_callback(IsolationCallback(run))
    with pytest.raises(IsolationError, match=r"first in model\.layers\.1\.self_attn"):
        run.train()


def test_documents_one_a_row_have_nothing_to_probe(tmp_path: Path) -> None:
    rows = [{"input_ids": d[:8] * 2, "labels": d[:8] * 2} for d in documents() if len(d) >= 8]
    run = Trainer(
        patch_model(tiny_model("llama")),
        arguments(tmp_path, max_steps=1, per_device_train_batch_size=1),
        train_dataset=rows,  # type: ignore[arg-type]
    )
    run.add_callback(IsolationCallback(run))
    run.train()
    assert not logged(run, "isolation/largest_gradient")


def test_a_pack_of_one_document_has_nothing_to_reach(tmp_path: Path) -> None:
    """Told by its type, not by words: the run goes on, and other errors stop it."""
    packs = pack_dataset([d for d in documents() if len(d) > 33], CAPACITY, overflow="error")
    run = Trainer(
        patch_model(tiny_model("llama")),
        arguments(tmp_path, max_steps=1, per_device_train_batch_size=1),
        train_dataset=packs,
        data_collator=PackedCollator(),
    )
    run.add_callback(IsolationCallback(run))
    run.train()
    assert logged(run, "isolation/largest_gradient") == [0.0]
    batch = next(iter(run.get_train_dataloader()))
    with pytest.raises(OneDocument, match="two documents to tell apart, it has 1"):
        leaks_between_documents(run.model, batch)  # type: ignore[arg-type]


def test_packing_figures_are_those_of_the_data(tmp_path: Path) -> None:
    packs = pack_dataset(documents(), CAPACITY, overflow="error")
    run = Trainer(
        patch_model(tiny_model("llama")),
        arguments(tmp_path, max_steps=len(packs), per_device_train_batch_size=1),
        train_dataset=packs,
        data_collator=PackedCollator(capacity=CAPACITY),
    )
    run.args.logging_steps = len(packs)
    run.add_callback(PackingCallback(run))
    run.train()
    lengths = [len(d) for d in documents()]
    padded = sum(len(row) * max(row) for row in packs["seq_lengths"])
    assert logged(run, "packing/fill") == [pytest.approx(sum(lengths) / (CAPACITY * len(packs)))]
    assert logged(run, "packing/padding_saved") == [pytest.approx(1 - sum(lengths) / padded)]
    assert logged(run, "packing/documents_per_step") == [pytest.approx(24 / len(packs))]
    config = run.model.config
    flops = 6 * sum(n * n for n in lengths) * config.num_attention_heads * config.head_dim * 2
    want = flops / len(packs) / 1e12
    assert logged(run, "packing/attention_teraflop") == [pytest.approx(want)]
    assert logged(run, "packing/tokens_per_second")[0] > 0
    assert not logged(run, "packing/mfu"), "no peak is known for a CPU"


@pytest.mark.parametrize("first", [IsolationCallback, PackingCallback])
def test_a_probe_is_no_training(
    tmp_path: Path, first: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokens, FLOPs and seconds are not in the figures, whichever callback was added first."""
    now = 0.0

    def probe(model: nn.Module, batch: dict[str, Any]) -> Any:
        nonlocal now
        now += 1000.0
        return leaks_between_documents(model, batch)

    def clock() -> float:
        nonlocal now
        now += 1.0
        return now

    monkeypatch.setattr("packed_attn.callbacks.leaks_between_documents", probe)
    monkeypatch.setattr("packed_attn.callbacks.time.perf_counter", clock)
    found = []
    for watch in (False, True):
        run = trainer(tmp_path, patch_model(tiny_model("llama")), PackedCollator())
        callbacks = {IsolationCallback, PackingCallback} if watch else {PackingCallback}
        for kind in sorted(callbacks, key=lambda kind: kind is not first):
            run.add_callback(kind(run))
        run.train()
        assert min(logged(run, "packing/tokens_per_second")) > 1
        found.append([logged(run, f"packing/{name}") for name in FIGURES])
    assert found[0] == found[1]


def test_the_model_of_each_run_is_watched(tmp_path: Path) -> None:
    """With model_init the trainer makes another for every run."""
    run = Trainer(
        model_init=lambda: patch_model(tiny_model("llama")),
        args=arguments(tmp_path, max_steps=2),
        train_dataset=pack_dataset(documents(), CAPACITY, overflow="error"),
        data_collator=PackedCollator(),
    )
    run.add_callback(IsolationCallback(run, every=1))
    run.add_callback(PackingCallback(run))
    for _ in range(2):
        run.train()
        assert logged(run, "isolation/largest_gradient") == [0.0, 0.0]
        assert len(logged(run, "packing/fill")) == 2


FIGURES = ("fill", "padding_saved", "documents_per_step", "attention_teraflop")


@pytest.mark.parametrize("every", [0, -1, 2.5, True])
def test_every_must_be_a_number_of_steps(tmp_path: Path, every: Any) -> None:
    run = trainer(tmp_path, patch_model(tiny_model("llama")), PackedCollator())
    with pytest.raises(ValueError, match="every must be an integer of at least 1"):
        IsolationCallback(run, every=every)
