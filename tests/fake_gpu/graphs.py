"""A training step of a model as one CUDA graph, replayed on other documents of one capacity."""

from __future__ import annotations

import traceback
from typing import Any

import torch
import transformers
from packed_attn_patches import route_of
from packed_attn_patches.families import Route
from packed_attn_patches.tiny import tiny_model
from torch import Tensor

from packed_attn import DocumentLayout, patch_model
from tests.exactness import documents
from tests.fake_gpu.waits import OURS
from tests.sweep import HEADS, Head
from tests.test_gpu_training import BOUNDARIES, CAPACITY, captured


class NotCaptured(Exception):
    """Code of others does in a step what no graph can hold, or the model takes no layout."""


def errors_of_replays(head: str, model_type: str, device: str) -> list[tuple[float, float]]:
    """How far logits and loss, and gradients, of each replay are from the eager step on a layout
    that was made for its boundaries, relative to their largest.

    Raises:
        NotCaptured: why there is nothing to replay.
    """
    kind = HEADS[head]
    try:
        model: Any = tiny_model(model_type, auto_class=getattr(transformers, kind.auto_class))
    except Exception as error:
        raise NotCaptured(f"not built: {error}") from error
    patch_model(model.to(device).train())
    if route_of(model) is not Route.INTERFACE:
        raise NotCaptured("documents batched by length are planned on the host")
    if hasattr(model, "set_experts_implementation"):
        # Grouped products, which CUDA has, read their sizes on a CPU.
        model.set_experts_implementation("batched_mm")
    batches = [_batch(kind, lengths) for lengths in BOUNDARIES]
    static = {name: x.to(device) for name, x in batches[0].items()}
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step(layout: DocumentLayout) -> list[Tensor]:
        given = {name: static[name] for name in ("input_ids", "labels")}
        output = model(**given, layout=layout)
        found = torch.autograd.grad(output.loss, parameters, allow_unused=True)
        return [output.logits.detach(), output.loss.detach(), *(x for x in found if x is not None)]

    try:
        replayed = captured(lambda: step(DocumentLayout(static["cu_seqlens"], CAPACITY)))
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = [f.filename for f in frames if "/torch/" not in f.filename][-1]
        if place.startswith(OURS):
            raise
        raise NotCaptured(f"{place}: {error}") from error
    errors = []
    for lengths, batch in zip(BOUNDARIES, batches):
        for name, x in batch.items():
            static[name].copy_(x)
        got = [result.clone() for result in replayed()]
        want = step(DocumentLayout.from_lengths(lengths).to(device))
        apart = [_relative(x, y) for x, y in zip(got, want, strict=True)]
        errors.append((max(apart[:2]), max(apart[2:])))
    return errors


def _batch(head: Head, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    docs = documents(lengths=lengths, seed=len(set(lengths)))
    return {
        "input_ids": torch.cat(docs)[None],
        "labels": torch.cat([head.labels(d) for d in docs])[None],
        "cu_seqlens": DocumentLayout.from_lengths(lengths).cu_seqlens,
    }


def _relative(x: Tensor, y: Tensor) -> float:
    """NaN where x holds one: no bound is met then."""
    return float((x - y).abs().max() / y.abs().max().clamp(min=1e-12))
