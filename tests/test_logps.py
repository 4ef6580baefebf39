"""unpack_logps: what one-by-one gives, over trees of prompts and answers, and in bfloat16."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from packed_attn import DocumentLayout, patch_model, unpack_logps
from packed_attn.logps import predecessors
from packed_attn.packing.forest import ForestPlan, plan_forest
from tests.exactness import gradients, relative
from tests.models import UNPACKED, tiny_model
from tests.shared_prompts import answered_questions

DATA = os.environ.get("PACKED_ATTN_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="PACKED_ATTN_DATA names no folder of data")


def packed(plan: ForestPlan, lists: list[list[int]]) -> dict[str, Any]:
    """One row of the forest, for a model."""
    places = zip(plan.lists.tolist(), plan.starts.tolist(), plan.lengths.tolist())
    ids = [token for i, start, n in places for token in lists[i][start : start + n]]
    layout = DocumentLayout.from_lengths(plan.lengths.tolist(), parents=plan.parents.tolist())
    return {"input_ids": torch.tensor(ids)[None], "layout": layout}


def of_list(plan: ForestPlan, logps: tuple[Tensor, ...], index: int) -> Tensor:
    """The log-probabilities of one list's tokens, [length]; a first token's is 0."""
    return torch.cat([logps[d] for d in plan.path(index)])


def alone(model: torch.nn.Module, ids: list[int]) -> Tensor:
    rows = model(input_ids=torch.tensor(ids)[None]).logits[0].float().log_softmax(-1)
    return torch.cat([rows.new_zeros(1), rows[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]])


def check(lists: list[list[int]], family: str = "llama", **model_options: Any) -> ForestPlan:
    """Log-probabilities of every token, and the gradients of a weighted sum of them."""
    plan = plan_forest(lists, min_shared=2)
    model = patch_model(tiny_model(family, **model_options))
    plain = tiny_model(family, **model_options)
    batch = packed(plan, lists)
    logps = unpack_logps(model(**batch).logits, batch["layout"], batch["input_ids"])
    weights = [1.0 if i % 2 else -0.5 for i in range(len(lists))]
    total = torch.zeros(())
    for i, ids in enumerate(lists):
        want = alone(plain, ids)
        got = of_list(plan, logps, i)
        assert float((got - want).norm()) <= 1e-6 * float(want.norm()), i
        total = total + weights[i] * got.sum()
        (weights[i] * want.sum()).backward()
    total.backward()
    assert relative(gradients(model), gradients(plain)) <= 1e-6
    return plan


def test_prompts_and_answers_equal_one_by_one() -> None:
    """Nested prompts, an answer that is empty, a document that is another's prompt, one token."""
    check([d["input_ids"] for d in answered_questions()])


@pytest.mark.parametrize(
    "lists",
    [
        [[5, 6, 7, 8, 9]],  # a group of one
        [[5, 6, 7], [5, 6, 7, 8], [5, 6, 7, 9, 9]],  # an empty answer
        [[5, 6, 7, 5, 6, 7], [5, 6, 7, 8]],  # an answer equal to its prompt
        [[5, 6, 7, 8, 9], [5, 6, 7, 10], [5, 6, 7, 8, 9, 11], [5, 6, 7, 8, 9, 12]],  # nested
        [[5, 6, 7], [5, 6, 7]],  # equal documents
    ],
)
def test_edge_cases(lists: list[list[int]]) -> None:
    check(lists)


def test_empty_documents_stand_in_no_way() -> None:
    """An empty answer, and an empty prompt whose answers are then first tokens."""
    layout = DocumentLayout.from_lengths([2, 0, 2, 0, 1, 1], parents=[-1, 0, 1, -1, 3, 3])
    assert predecessors(layout).tolist() == [-1, 0, 1, 2, -1, -1]
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 2, 3, -100, 5, 6])
    logps = unpack_logps(logits, layout, labels)
    assert [x.numel() for x in logps] == [2, 0, 2, 0, 1, 1]
    rows = logits.log_softmax(-1)
    want = [0.0, rows[0, 2], rows[1, 3], 0.0, 0.0, 0.0]
    torch.testing.assert_close(torch.cat(logps), torch.tensor(want))


def test_plain_packs_and_float64() -> None:
    layout = DocumentLayout.from_lengths([3, 1, 2])
    logits = torch.randn(1, 6, 9, dtype=torch.float64)
    labels = torch.tensor([[1, 2, 3, 4, 5, 6]])
    first, second, third = unpack_logps(logits, layout, labels)
    rows = logits[0].log_softmax(-1)
    assert first.dtype == torch.float64
    assert first.tolist() == [0.0, float(rows[0, 2]), float(rows[1, 3])]
    assert second.tolist() == [0.0]
    assert third.tolist() == [0.0, float(rows[4, 6])]


def test_bfloat16_is_as_exact_as_plain_torch() -> None:
    """Within twice the error that the documents have alone in bfloat16, and one rounding."""
    lists = [d["input_ids"] for d in answered_questions()]
    plan = plan_forest(lists, min_shared=2)
    exact, narrow = tiny_model("llama").double(), tiny_model("llama").bfloat16()
    batch = packed(plan, lists)
    got_logits = patch_model(tiny_model("llama").bfloat16())(**batch).logits
    logps = unpack_logps(got_logits, batch["layout"], batch["input_ids"])
    assert logps[0].dtype == torch.float32
    errors, plain = [], []
    for i, ids in enumerate(lists):
        want = alone(exact, ids)
        errors.append(of_list(plan, logps, i) - want)
        plain.append(alone(narrow, ids) - want)
    error, bound = (torch.cat(x).norm() for x in (errors, plain))
    assert error <= 2 * bound


def test_bad_shapes() -> None:
    layout = DocumentLayout.from_lengths([2, 1], parents=[-1, 0])
    with pytest.raises(ValueError, match=r"logits must be of 3 tokens, got shape \[4, 9\]"):
        unpack_logps(torch.zeros(4, 9), layout, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"labels must be of 3 tokens, got shape \[2\]"):
        unpack_logps(torch.zeros(3, 9), layout, torch.zeros(2, dtype=torch.long))


RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": UNPACKED["mamba"],
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1},
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 8, "num_hidden_layers": 3},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_dim": 64},
}


@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_and_convolutional_models_equal_one_by_one(family: str) -> None:
    """What a state or a window of a convolution carries goes along each path and nowhere else."""
    lists = [d["input_ids"] for d in answered_questions()]
    check(lists, family, **RECURRENT[family])


def byte_tokens(text: str) -> list[int]:
    """Letters as ids that the tiny model has; real text repeats as words do."""
    return [3 + byte % 150 for byte in text.encode()]


@needs_data
def test_real_preference_pairs() -> None:
    """Conversations with a chosen and a rejected answer."""
    pairs = json.loads((Path(DATA or "") / "dpo_en_demo.json").read_text())
    lists = []
    for pair in pairs:
        prompt = "".join(turn["value"] for turn in pair["conversations"])
        texts = [prompt + pair[side]["value"] for side in ("chosen", "rejected")]
        if max(map(len, texts)) < 900 and len(lists) < 8:
            lists += [byte_tokens(text) for text in texts]
    assert len(lists) == 8
    plan = check(lists, max_position_embeddings=1024)
    assert plan.tokens < sum(map(len, lists)) - 4 * 16


@needs_data
def test_real_questions_with_groups_of_answers() -> None:
    """gsm8k: a question with its own answer and seven sampled ones, as a group of rollouts."""
    lines = (Path(DATA or "") / "gsm8k_train.jsonl").read_text().splitlines()[:60]
    questions = [json.loads(line) for line in lines]
    sampler, lists = random.Random(0), []
    for question in questions[:2]:
        answers = [question["answer"], *(q["answer"] for q in sampler.sample(questions, 7))]
        lists += [byte_tokens(question["question"] + "\n" + text[:200]) for text in answers]
    plan = check(lists, max_position_embeddings=1024)
    shared = sum(len(ids) for ids in lists) - plan.tokens
    assert shared >= 7 * sum(len(byte_tokens(q["question"])) for q in questions[:2])
    assert np.isin(-1, plan.parents)
