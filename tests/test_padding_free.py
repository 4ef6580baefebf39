"""patch_model(padding_free=True): padded batches without their padding, the same rows out."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from packed_attn_patches import tiny
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from packed_attn import DocumentLayout, patch_model, unpatch_model
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


def pair_rows(side: str) -> dict[str, Tensor]:
    """Two prompts of 20 and 25 tokens with 3 and 2 answers, one row equal to its prompt, one alone;
    the completions have labels."""
    generator = torch.Generator().manual_seed(4)

    def draw(n: int) -> list[int]:
        return torch.randint(3, 150, (n,), generator=generator).tolist()

    prompts = [draw(20), draw(25)]
    answers = [(0, draw(6)), (1, draw(1)), (0, draw(9)), (1, []), (0, draw(3)), (1, draw(30))]
    rows = [(len(prompts[p]), prompts[p] + answer) for p, answer in answers] + [(0, draw(4))]
    width = max(len(ids) for _, ids in rows)
    batch = {
        "input_ids": torch.zeros(len(rows), width, dtype=torch.long),
        "attention_mask": torch.zeros(len(rows), width, dtype=torch.long),
        "labels": torch.full((len(rows), width), -100),
    }
    for row, (prompt, ids) in enumerate(rows):
        at = 0 if side == "right" else width - len(ids)
        batch["input_ids"][row, at : at + len(ids)] = torch.tensor(ids)
        batch["attention_mask"][row, at : at + len(ids)] = 1
        # Nothing predicts a row's first token but the padding on its left.
        prompt = max(prompt, 1)
        batch["labels"][row, at + prompt : at + len(ids)] = torch.tensor(ids[prompt:])
    if side == "left":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return batch


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss", "mixtral"])
def test_shared_prefixes_give_the_same_loss_and_gradients(family: str, side: str) -> None:
    model, batch = tiny_model(family).train(), pair_rows(side)
    want_logits, want_loss, want = run(model, batch)
    patch_model(model, padding_free=True, share_prefixes=True)
    seen: list[int] = []
    layer = model.model.layers[0]
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    logits, loss, got = run(model, batch)
    assert seen[0] == 20 + 25 + 6 + 1 + 9 + 3 + 30 + 4, "each prompt is computed once"
    assert relative({"logits": logits}, {"logits": want_logits}) <= 1e-5
    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-6)
    assert relative(got, want) <= 1e-5


def test_rows_without_padding_share_too() -> None:
    """A group of rollouts that all ran to the limit: a mask of ones."""
    model, generator = tiny_model("llama").train(), torch.Generator().manual_seed(5)
    prompt = torch.randint(3, 150, (20,), generator=generator)
    answers = torch.randint(3, 150, (4, 7), generator=generator)
    ids = torch.cat([prompt.expand(4, -1), answers], dim=1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    want_logits, want_loss, want = run(model, batch)
    patch_model(model, padding_free=True, share_prefixes=True)
    seen: list[int] = []
    layer = model.model.layers[0]
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    logits, loss, got = run(model, batch)
    assert seen == [20 + 4 * 7]
    assert relative({"logits": logits}, {"logits": want_logits}) <= 1e-5
    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-6)
    assert relative(got, want) <= 1e-5


def test_packs_beside_a_mask_of_ones_stay_packs() -> None:
    """Boundaries inside rows say more than a mask that hides nothing."""
    model = patch_model(tiny_model("llama"), padding_free=True, share_prefixes=True).train()
    plain = patch_model(tiny_model("llama")).train()
    ids = torch.arange(3, 23).view(2, 10)
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], [*range(7), 0, 1, 2]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": position_ids}
    assert torch.equal(model(**batch).logits, plain(**batch).logits)


def test_positions_must_agree_where_tokens_are_shared() -> None:
    model = patch_model(tiny_model("llama"), padding_free=True, share_prefixes=True).train()
    batch = pair_rows("left")
    batch["position_ids"][2] += 1
    with pytest.raises(ValueError, match="position_ids differs between rows that share a prefix"):
        model(**batch)


@pytest.mark.parametrize("family", ["mamba", "lfm2", "gpt_neo"])
def test_unpacked_models_share_prefixes_too(family: str) -> None:
    """Every row is a path that they compute whole, unless it is like another or part of one."""
    options = {"layer_types": ["conv", "full_attention"], "block_dim": 64}
    model = tiny_model(family, **(options if family == "lfm2" else {})).train()
    batch = pair_rows("right")
    want_logits, want_loss, want = run(model, batch)
    patch_model(model, padding_free=True, share_prefixes=True)
    rows: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, a, out: rows.append(out.shape[0]))
    logits, loss, got = run(model, batch)
    assert sum(rows) == 6, "the row that is its prompt is part of another"
    assert relative({"logits": logits}, {"logits": want_logits}) <= 1e-5
    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-6)
    assert relative(got, want) <= 1e-5


def test_unpacked_backbones_share_under_a_reward_head() -> None:
    model = tiny.tiny_model("bloom", auto_class=AutoModelForSequenceClassification, num_labels=1)
    batch = pair_rows("right")
    del batch["labels"]
    scores = []
    for _ in range(2):
        output = model.train()(**batch, use_cache=False).logits
        model.zero_grad()
        output.square().sum().backward()
        scores.append((output.detach(), gradients(model)))
        patch_model(model, padding_free=True, share_prefixes=True)
    (want, want_gradients), (got, got_gradients) = scores
    assert torch.allclose(got, want, atol=1e-5)
    assert relative(got_gradients, want_gradients) <= 1e-5


def test_models_that_cannot_share_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="share_prefixes: RobertaForCausalLM may look bo"):
        patch_model(tiny.tiny_model("roberta"), padding_free=True, share_prefixes=True)
    with pytest.raises(ValueError, match="needs padding_free=True"):
        patch_model(tiny_model("llama"), share_prefixes=True)


@pytest.mark.parametrize(
    ("family", "auto_class", "words"),
    [
        ("roberta", AutoModelForCausalLM, "RobertaForCausalLM may look both ways"),
        ("fnet", AutoModelForMaskedLM, "FNetForMaskedLM may look both ways"),
        ("bert", AutoModelForMaskedLM, "BertSelfAttention looks both ways"),
        ("llama", AutoModelForSequenceClassification, "gives one row a document"),
    ],
)
def test_a_forest_is_refused_by_what_looks_both_ways_or_pools(
    family: str, auto_class: Any, words: str
) -> None:
    layout = DocumentLayout.from_lengths([3, 2], parents=[-1, 0])
    model = patch_model(tiny.tiny_model(family, auto_class=auto_class))
    with pytest.raises(NotImplementedError, match=f"{words}.* plain packs, but no forest"):
        model(input_ids=torch.arange(3, 8)[None], layout=layout)
