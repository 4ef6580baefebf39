"""Documents that share prompts, and what a Trainer run on packs of them must equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SYSTEM, QUESTIONS = 20, 4


def answered_questions(seed: int = 3) -> list[dict[str, list[int]]]:
    """A system prompt, questions below it, answers below those; a question asked alone, a document
    of other tokens, one of length 1, and two that are equal. The questions' masks are 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> list[int]:
        return torch.randint(3, 150, (n,), generator=generator).tolist()

    system, found = draw(SYSTEM), []
    for question in range(QUESTIONS):
        prompt = system + draw(5 + 4 * question)
        found += [masked(prompt, draw(n)) for n in (3, 11, 1)[: 1 + question]]
        if question == 2:
            found.append(masked(prompt, []))
    return [*found, masked(draw(4), draw(9)), masked([], draw(1)), found[1], masked(system, [])]


def masked(prompt: list[int], answer: list[int]) -> dict[str, list[int]]:
    return {"input_ids": prompt + answer, "completion_mask": [0] * len(prompt) + [1] * len(answer)}


def targets(document: dict[str, Any]) -> Tensor:
    """The labels of a document alone, shifted: int64 `[length - 1]`."""
    ids = torch.tensor(document["input_ids"])
    if "labels" in document:
        return torch.tensor(document["labels"])[1:]
    if "completion_mask" not in document:
        return ids[1:]
    return ids.masked_fill(torch.tensor(document["completion_mask"]) == 0, -100)[1:]


def alone(model: nn.Module, document: dict[str, Any]) -> tuple[Tensor, int]:
    """Summed cross-entropy of a document by itself, and its targets."""
    logits = model(input_ids=torch.tensor(document["input_ids"])[None]).logits[0, :-1]
    wanted = targets(document)
    loss = nn.functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum")
    return loss, int((wanted != -100).sum())


def mean_alone(model: nn.Module, documents: list[dict[str, Any]], weighting: str) -> Tensor:
    """The mean over tokens or over documents, each document run by itself."""
    sums = [entry for entry in (alone(model, d) for d in documents) if entry[1]]
    if weighting == "document":
        return torch.stack([loss / count for loss, count in sums]).mean()
    return torch.stack([loss for loss, _ in sums]).sum() / sum(count for _, count in sums)
