"""What the table's columns mean: peak memory, loss, gradient error and leaked tokens, measured."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

IGNORED_LABEL = -100
Batch = Mapping[str, Any]


class PeakMemory:
    """Peak memory in MiB above what was in use when this was made.

    On CUDA the peak of allocated bytes; on a CPU the peak of the process's resident memory, less
    the same peak at the start, so that imports and weights do not count. NaN where the system
    does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._start = self._peak_bytes()

    def mib(self) -> float:
        """The peak so far."""
        return (self._peak_bytes() - self._start) / 2**20

    def _peak_bytes(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _peak_resident_bytes()


def completion_loss(model: nn.Module, batch: Batch, completion_tokens: int) -> Tensor:
    """The loss summed over the batch's completion tokens, divided by `completion_tokens`."""
    output = model(**batch, num_items_in_batch=completion_tokens)
    return output.loss


def alone(document: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """One document as a batch of its own: what every way of packing should equal."""
    return {name: torch.tensor([document[name]], device=device) for name in ("input_ids", "labels")}


def mean_loss(model: nn.Module, documents: Iterable[Mapping[str, Any]]) -> float:
    """Nats per completion token, every document run by itself, as a user of the model would."""
    documents = list(documents)
    count, device = count_completion_tokens(documents), device_of(model)
    with torch.no_grad():
        losses = [completion_loss(model, alone(d, device), count) for d in documents]
    return float(torch.stack(losses).double().sum())


def gradient_alone(model: nn.Module, documents: Iterable[Mapping[str, Any]]) -> Tensor:
    """The gradient of the mean loss over all completion tokens, one document at a time.

    Returns float64 `[num_parameters]`; the sum over documents is kept in float64.
    """
    documents = list(documents)
    count, device = count_completion_tokens(documents), device_of(model)
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for document in documents:
        total += gradient(model, alone(document, device), count)
    return total


def gradient(model: nn.Module, batch: Batch, completion_tokens: int) -> Tensor:
    """The gradient of one batch, float64 `[num_parameters]` on the CPU."""
    model.zero_grad()
    completion_loss(model, batch, completion_tokens).backward()
    parts = [
        (torch.zeros_like(p) if p.grad is None else p.grad).double().flatten().cpu()
        for p in model.parameters()
    ]
    model.zero_grad()
    return torch.cat(parts)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of `expected`."""
    return float((value - expected).norm() / expected.norm())


def count_leaked_tokens(model: nn.Module, batch: Batch, owners: Tensor, seed: int) -> int:
    """Tokens whose logits change in any bit when other documents' tokens are replaced.

    For each document in turn, every other document's tokens become random ones, and the
    document's own logits are compared bit for bit with those of the untouched batch.

    Args:
        batch: what the collator made.
        owners: int64 `[B, T]`, the document of each token, -1 for padding.
        seed: fixes the random tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = batch["input_ids"]
    vocab_size = int(model.config.vocab_size)  # pyright: ignore
    leaked = 0
    with torch.no_grad():
        untouched = _logits(model, batch, tokens)
        for document in range(int(owners.max()) + 1):
            # Adding 1 to vocab_size - 1 modulo vocab_size never gives the same token.
            shift = torch.randint(1, vocab_size, tokens.shape, generator=generator)
            others = (owners != document) & (owners >= 0)
            changed = torch.where(others, (tokens.cpu() + shift) % vocab_size, tokens.cpu())
            logits = _logits(model, batch, changed.to(tokens.device))
            differs = (logits != untouched).any(dim=-1)
            leaked += int((differs & (owners == document)).sum())
    return leaked


def count_completion_tokens(documents: Iterable[Mapping[str, Any]]) -> int:
    """Labels that the loss counts."""
    return sum(label != IGNORED_LABEL for d in documents for label in d["labels"])


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device


def _logits(model: nn.Module, batch: Batch, tokens: Tensor) -> Tensor:
    without_labels = {name: value for name, value in batch.items() if name != "labels"}
    return model(**{**without_labels, "input_ids": tokens}).logits.cpu()


def _peak_resident_bytes() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: on Linux a child inherits its parent's through exec.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024.0 * int(line.split()[1])
    try:
        import resource
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else 1024 * peak)
