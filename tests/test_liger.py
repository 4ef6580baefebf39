"""Liger's kernels on a patched model: fused loss, RoPE, norms and MLPs, whichever comes first.

They run in Triton's interpreter here, which needs two things of theirs said otherwise;
`tests/test_gpu_training.py` runs them as they are.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
from packed_attn_patches import tiny
from torch import Tensor
from transformers import Trainer

from packed_attn import PackedCollator, PackedLoss, pack_dataset, patch_model, unpatch_model
from packed_attn.audit import leaks_between_documents
from packed_attn.callbacks import IsolationCallback
from tests.exactness import documents, gradients, packed, relative, token_mean
from tests.liger import ORDERS, Order, apply_liger, both, interpret_liger, keep_modeling
from tests.models import tiny_model
from tests.test_trainer import arguments

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs a process started with TRITON_INTERPRET=1 (make test)", allow_module_level=True
    )
pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")

LENGTHS = (3, 1, 5)
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    interpret_liger(monkeypatch)


def one_by_one(model: Any, docs: list[Tensor]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = token_mean(model, docs)
    loss.backward()
    return loss.item(), gradients(model)


def check_exact(model: Any, docs: list[Tensor], want: tuple[float, dict[str, Tensor]]) -> None:
    """A pack whose labels go on over boundaries, which the patch takes out."""
    model.zero_grad()
    batch = packed(docs)
    output = model(**{**batch, "labels": batch["input_ids"]})
    output.loss.backward()
    assert output.logits is None, "the fused loss did not run"
    assert output.loss.item() == pytest.approx(want[0], rel=1e-6)
    assert relative(gradients(model), want[1]) <= 1e-5


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "family",
    ["llama", *(pytest.param(f, marks=slow) for f in ("qwen3", "gemma2", "phi3", "gpt_oss"))],
)
def test_packs_equal_documents(family: str, order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family, num_hidden_layers=1).train()
    docs = documents(lengths=LENGTHS)
    both(model, order, monkeypatch)
    want = one_by_one(model, docs)
    check_exact(model, docs, want)
    unpatch_model(model)
    again = one_by_one(model, docs)
    assert again[0] == want[0]
    assert relative(again[1], want[1]) == 0


@slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "hunyuan_v1_moe"])
def test_experts(family: str, order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of an expert share a tile whichever document they are of, and each has its own row."""
    first_dense = {"first_k_dense_replace": 0} if family == "deepseek_v3" else {}
    model: Any = tiny.tiny_model(family, num_hidden_layers=1, **first_dense).train()
    docs = documents(lengths=(1, 4))
    stock = one_by_one(model, docs)
    both(model, order, monkeypatch)
    assert_liger_experts(model)
    want = one_by_one(model, docs)
    assert want[0] == pytest.approx(stock[0], rel=1e-6)
    assert relative(want[1], stock[1]) <= 1e-5
    check_exact(model, docs, want)


def assert_liger_experts(model: Any) -> None:
    names = [
        m.forward.__func__.__qualname__ for n, m in model.named_modules() if n.endswith(".experts")
    ]
    assert names
    assert set(names) == {"LigerExperts.forward"}


@slow
def test_kernels_before_the_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    keep_modeling(type(tiny_model("llama")), monkeypatch)
    apply_liger_kernel_to_llama()
    model = tiny_model("llama", num_hidden_layers=1).train()
    docs = documents(lengths=LENGTHS)
    want = one_by_one(model, docs)
    check_exact(patch_model(model), docs, want)


@slow
@pytest.mark.parametrize("order", ORDERS)
def test_models_that_are_unpacked(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's forward over that of the patch is refused, and run by it once it is patched again."""
    model: Any = tiny.tiny_model("falcon_h1").train()
    docs = documents(lengths=LENGTHS)
    both(model, order, monkeypatch)
    want = one_by_one(model, docs)
    if order == "patch, liger":
        with pytest.raises(NotImplementedError, match=r"falcon_h1\.lce_forward after patch_model"):
            model(**packed(docs))
    check_exact(patch_model(model), docs, want)


@slow
def test_labels_that_were_shifted_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `context_parallel` and Trainer's accumulation hand over."""
    model = patch_model(tiny_model("llama", num_hidden_layers=1)).train()
    apply_liger(model, monkeypatch)
    docs = documents(lengths=LENGTHS)
    batch = packed(docs)
    want = model(**batch).loss.item()
    shifted = batch.pop("labels").roll(-1)
    targets = sum(len(doc) - 1 for doc in docs)
    got = model(**batch, shift_labels=shifted, num_items_in_batch=2 * targets).loss.item()
    assert got == pytest.approx(want / 2, rel=1e-6)


@slow
@pytest.mark.parametrize("weighting", [None, "document"])
def test_a_trainer(weighting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """use_liger_kernel=True: the losses of the same run without, trained, watched and evaluated."""
    packs = pack_dataset(documents(lengths=LENGTHS), 6, overflow="error")
    keep_modeling(type(tiny_model("llama")), monkeypatch)
    found = []
    for liger in (False, True):
        model = patch_model(tiny_model("llama", num_hidden_layers=1))
        trainer = Trainer(
            model,
            arguments(tmp_path, max_steps=2, per_device_train_batch_size=1,
                      per_device_eval_batch_size=2, use_liger_kernel=liger),
            train_dataset=packs,
            eval_dataset=packs,
            data_collator=PackedCollator(loss_weighting=weighting or "token"),
            compute_loss_func=weighting and PackedLoss(model, weighting),
        )  # fmt: skip
        trainer.add_callback(IsolationCallback(trainer, every=1))
        trainer.train()
        assert isinstance(vars(model).get("forward"), MethodType) == liger
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found.append([*losses, trainer.evaluate()["eval_loss"]])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert leaks_between_documents(model) is None
