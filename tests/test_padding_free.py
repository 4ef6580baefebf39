"""patch_model(padding_free=True): padded batches without their padding, the same rows out."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from packed_attn import patch_model, unpatch_model
from tests.exactness import gradients, relative
from tests.models import tiny_config, tiny_model

LENGTHS = (9, 1, 14, 6)


def rows(side: str) -> dict[str, Tensor]:
    """Padded rows, their mask and labels."""
    generator = torch.Generator().manual_seed(3)
    width = max(LENGTHS)
    ids = torch.randint(3, 150, (len(LENGTHS), width), generator=generator)
    place = torch.arange(width)
    lengths = torch.tensor(LENGTHS)[:, None]
    real = place < lengths if side == "right" else place >= width - lengths
    return {
        "input_ids": torch.where(real, ids, 0),
        "attention_mask": real.long(),
        "labels": torch.where(real, ids, -100),
    }


def run(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits of real tokens, loss and gradients."""
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    return output.logits[batch["attention_mask"] == 1], output.loss, gradients(model)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mamba", "gpt_neo"])
def test_right_padded_rows_give_what_they_gave(family: str) -> None:
    assert_unchanged(tiny_model(family).train(), rows("right"))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_left_padded_rows_give_what_they_gave(family: str) -> None:
    batch = rows("left")
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert_unchanged(tiny_model(family).train(), batch)


def assert_unchanged(model: nn.Module, batch: dict[str, Tensor]) -> None:
    want_logits, want_loss, want = run(model, batch)
    patch_model(model, padding_free=True)
    logits, loss, got = run(model, batch)
    assert relative({"logits": logits}, {"logits": want_logits}) <= 1e-5
    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-6)
    assert relative(got, want) <= 1e-5


def test_the_backbone_sees_no_padding() -> None:
    model = patch_model(tiny_model("llama"), padding_free=True).train()
    seen: list[torch.Size] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    output = model(**rows("right"))
    assert seen[0][:2] == (1, sum(LENGTHS))
    assert output.logits.shape[:2] == (len(LENGTHS), max(LENGTHS))


def test_hidden_states_come_back_as_rows() -> None:
    model = tiny_model("llama").train()
    batch = rows("right")
    want = model(**batch, output_hidden_states=True).hidden_states
    got = patch_model(model, padding_free=True)(**batch, output_hidden_states=True).hidden_states
    real = batch["attention_mask"] == 1
    assert len(got) == len(want)
    for ours, theirs in zip(got, want):
        assert torch.allclose(ours[real], theirs[real], atol=1e-5)
        assert not ours[~real].any()


def test_heads_pool_as_before() -> None:
    """A reward model's scalar per row."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=1))
    batch = rows("right")
    del batch["labels"]
    with torch.no_grad():
        want = model(**batch, use_cache=False).logits
        got = patch_model(model, padding_free=True)(**batch, use_cache=False).logits
    assert torch.allclose(got, want, atol=1e-5)


def test_router_logits_come_back_as_rows() -> None:
    """The load-balancing loss counts real tokens by the padded mask."""
    model, batch = tiny_model("mixtral").train(), rows("right")
    want = model(**batch, output_router_logits=True)
    got = patch_model(model, padding_free=True)(**batch, output_router_logits=True)
    assert got.aux_loss.item() == pytest.approx(want.aux_loss.item(), rel=1e-5)


def test_generation_and_undoing_are_untouched() -> None:
    model, batch = tiny_model("llama").eval(), rows("left")
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    want = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    hooks = len(model.model._forward_pre_hooks), len(model.model._forward_hooks)
    patch_model(model, padding_free=True)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), want)
    unpatch_model(model)
    assert (len(model.model._forward_pre_hooks), len(model.model._forward_hooks)) == hooks


def test_copies_and_pickles_work_alone() -> None:
    model, batch = patch_model(tiny_model("llama"), padding_free=True).train(), rows("right")
    want = model(**batch).loss
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**batch).loss, want)


def test_packed_batches_still_run() -> None:
    """Boundaries say more than a mask."""
    model = patch_model(tiny_model("llama"), padding_free=True).train()
    plain = patch_model(tiny_model("llama")).train()
    ids = torch.arange(3, 15)[None]
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4]])
    batch = {"input_ids": ids, "position_ids": position_ids}
    assert torch.equal(model(**batch).logits, plain(**batch).logits)


def test_a_mask_with_a_gap_is_refused() -> None:
    model, batch = patch_model(tiny_model("llama"), padding_free=True).train(), rows("right")
    batch["attention_mask"][2, 5] = 0
    with pytest.raises(ValueError, match="ones side by side, but row 2 has them in 2 places"):
        model(**batch)


def test_checkpointing_gives_the_same_bits() -> None:
    model, batch = patch_model(tiny_model("llama"), padding_free=True).train(), rows("right")
    _, want_loss, want = run(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, loss, got = run(model, batch)
    assert torch.equal(loss, want_loss)
    assert all(torch.equal(got[name], want[name]) for name in want)
