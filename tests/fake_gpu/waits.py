"""Where a training step's host waits for its device, by the code that made it wait."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import packed_attn_kernels
import packed_attn_patches
import torch
import transformers
from packed_attn_patches.tiny import tiny_model

import packed_attn
from packed_attn import PackedCollator, patch_model
from tests.exactness import documents, on_device
from tests.fake_gpu.install import native, set_sync_debug_mode
from tests.sweep import HEADS, Head

OURS = tuple(
    str(Path(package.__file__ or "").parent)
    for package in (packed_attn, packed_attn_kernels, packed_attn_patches)
)
TORCH = str(Path(torch.__file__).parent)
# As many documents, and other batches of them.
STEPS = ((5, 1, 37, 4, 31), (7, 30, 2, 19, 20))


def own_waits(head: str, model_type: str, device: str, padding: int) -> set[str]:
    """Those of the package's own code in a training step, on boundaries that it never saw.

    Kernels are compiled and mixers proven in the step before. The batch is the collator's, with so
    many tokens of padding.
    """
    kind = HEADS[head]
    model = tiny_model(model_type, auto_class=getattr(transformers, kind.auto_class))
    patch_model(model.to(device).train())
    seen: set[str] = set()
    for lengths in STEPS:
        batch = batch_of(kind, lengths, padding, device)
        seen = set()
        with observed(seen.add):
            model(**batch).loss.backward()
    return {place for place in seen if place.startswith(OURS)}


def batch_of(head: Head, lengths: tuple[int, ...], padding: int, device: str) -> dict[str, Any]:
    """What a trainer hands on: the collator's batch, moved, with labels of this head."""
    docs, capacity = documents(lengths=lengths), sum(lengths) + padding
    labels = documents(lengths=lengths[::-1]) if head.pairs else [head.labels(d) for d in docs]
    features = [{"input_ids": d, "labels": x} for d, x in zip(docs, labels)]
    if head.per_document:
        features = [{"input_ids": d} for d in docs]
    collator = PackedCollator("documents", capacity=capacity, encoder_decoder=head.pairs)
    batch = on_device(collator(features), device)
    if head.per_document:
        batch["labels"] = torch.cat(labels).to(device)
    return batch


@contextmanager
def observed(note: Callable[[str], None]) -> Iterator[None]:
    """Hands `note` the place of every wait meanwhile: the innermost code outside torch, or none
    where a backward runs what torch has itself."""

    def seen(operator: str) -> None:
        frame = sys._getframe().f_back
        while frame is not None and frame.f_code.co_filename.startswith(TORCH):
            frame = frame.f_back
        place = "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"
        note(f"{place} {operator}")

    native.observe_waits(seen)
    try:
        yield
    finally:
        set_sync_debug_mode("default")


def waits(operation: Callable[[], Any]) -> bool:
    """Whether an operation does."""
    found: list[str] = []
    with observed(found.append):
        operation()
    return bool(found)
