"""The same training steps packed and one document at a time, and how far apart they end.

What an audit proves of one forward, this shows of training: losses, gradients by parameter group,
and the weights after some optimizer steps, on the user's own model and data.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from packed_attn.collator import IGNORE_INDEX, PackedCollator
from packed_attn.packing import pack_lengths
from packed_attn.patching import patch_model


@dataclass(frozen=True)
class EquivalenceReport:
    """How far a packed run is from the same run unpacked. All figures are relative.

    Attributes:
        steps, documents, tokens: what was trained on.
        loss: largest difference of a step's loss.
        gradients: of the first step, by parameter group (the name of a parameter without its
            numbers): norm of the difference over norm.
        weights: after the last step, all parameters in one vector.
        worst_weight: the largest of any one parameter.
        losses: (packed, unpacked) of each step, in nats a token.
    """

    steps: int
    documents: int
    tokens: int
    loss: float
    gradients: dict[str, float]
    weights: float
    worst_weight: float
    losses: tuple[tuple[float, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        first, last = self.losses[0], self.losses[-1]
        width = max(map(len, self.gradients))
        lines = [
            f"{self.steps} steps on {self.documents:,} documents, {self.tokens:,} tokens",
            f"  loss packed    {first[0]:.7f} -> {last[0]:.7f}",
            f"  loss unpacked  {first[1]:.7f} -> {last[1]:.7f}",
            f"  largest relative difference of a loss      {self.loss:.1e}",
            f"  weights after the last step                {self.weights:.1e}",
            f"  the worst of one parameter                 {self.worst_weight:.1e}",
            "  gradients of the first step, by parameter group",
            *(f"    {name:<{width}}  {value:.1e}" for name, value in self.gradients.items()),
        ]
        return "\n".join(lines)


def equivalence(
    model: nn.Module,
    documents: Sequence[Any],
    *,
    capacity: int,
    steps: int = 10,
    learning_rate: float = 1e-4,
    backend: str = "auto",
) -> EquivalenceReport:
    """Trains two copies of a model, packed and one document at a time, on the same documents.

    One pack is one optimizer step (AdamW without weight decay); the loss is the mean over target
    tokens of the step. Dropout is off: no two runs draw the same. So is a router's load-balancing
    loss (`output_router_logits`), which is over all tokens of a batch by design (see `audit`).

    Args:
        model: an unpatched model of an accepted architecture; it is left as it is.
        documents: token lists, or mappings with `input_ids` and optionally `labels` or masks.
        capacity: tokens a pack holds; longer documents are cut at it for both runs.
        steps: packs trained on, in turns where there are fewer.

    Raises:
        ValueError: no documents to learn from, or fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    packs = _packs(documents, capacity)
    packed = _Run(patch_model(copy.deepcopy(model), backend=backend), learning_rate)
    unpacked = _Run(copy.deepcopy(model), learning_rate)
    losses, gradients, seen = [], {}, 0
    for step in range(steps):
        pack = packs[step % len(packs)]
        seen += len(pack)
        losses.append((packed.step([pack]), unpacked.step([[feature] for feature in pack])))
        if step == 0:
            gradients = _by_group(packed.gradients(), unpacked.gradients())
    got, want = packed.weights(), unpacked.weights()
    return EquivalenceReport(
        steps=steps,
        documents=seen,
        tokens=sum(
            feature["input_ids"].numel()
            for step in range(steps)
            for feature in packs[step % len(packs)]
        ),
        loss=max(abs(a - b) / abs(b) for a, b in losses),
        gradients=gradients,
        weights=_relative(_joined(got), _joined(want)),
        worst_weight=max(_relative(got[name], want[name]) for name in want),
        losses=tuple(losses),
    )


class _Run:
    """One copy of the model and its optimizer."""

    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        self.model = model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if "attention_dropout" in vars(module):
                vars(module)["attention_dropout"] = 0.0
        _leave_balance_out(model)
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=learning_rate, weight_decay=0.0, eps=1e-6
        )
        self._collate = PackedCollator("documents")

    def step(self, batches: Sequence[Sequence[dict[str, Tensor]]]) -> float:
        """One optimizer step over all batches; their loss."""
        collated = [self._collate(batch) for batch in batches]
        targets = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in collated)
        self._optimizer.zero_grad()
        total = 0.0
        for batch in collated:
            if not bool((batch["labels"] != IGNORE_INDEX).any()):
                continue
            # A document alone needs no boundaries, and an unpatched model could not read them.
            names = ("input_ids", "labels") if len(batches) > 1 else tuple(batch)
            device = next(self.model.parameters()).device
            inputs = {n: v.to(device) if hasattr(v, "to") else v for n, v in batch.items()}
            output = self.model(**{n: inputs[n] for n in names}, num_items_in_batch=targets)
            output.loss.backward()
            total += output.loss.item()
        self._optimizer.step()
        return total

    def gradients(self) -> dict[str, Tensor]:
        named = self.model.named_parameters()
        return {n: p.grad.double() for n, p in named if p.grad is not None}

    def weights(self) -> dict[str, Tensor]:
        return {n: p.detach().double() for n, p in self.model.named_parameters()}


def _leave_balance_out(model: nn.Module) -> None:
    """Takes a term out of the loss that is no mean over documents; the config is the copy's own."""
    whole: Any = getattr(model, "config", None)
    text: Any = whole.get_text_config() if hasattr(whole, "get_text_config") else None
    for config in (whole, text):
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False


def _packs(documents: Sequence[Any], capacity: int) -> list[list[dict[str, Tensor]]]:
    """Documents in packs of at most `capacity` tokens, two in each and something to learn."""
    features = []
    for document in documents:
        columns = document if hasattr(document, "keys") else {"input_ids": document}
        cut = {name: torch.as_tensor(columns[name])[:capacity] for name in columns}
        if cut["input_ids"].numel() > 1:
            features.append(cut)
    plan = pack_lengths([f["input_ids"].numel() for f in features], capacity)
    packs = [
        [features[d] for d in plan.order[a:b]] for a, b in zip(plan.offsets[:-1], plan.offsets[1:])
    ]
    packs = [pack for pack in packs if len(pack) > 1]
    several = bool(packs)
    collate = PackedCollator("documents")
    packs = [pack for pack in packs if bool((collate(pack)["labels"] != IGNORE_INDEX).any())]
    if several and not packs:
        raise ValueError(f"documents must have labels in their first {capacity} tokens, got none")
    if not packs:
        raise ValueError(
            f"documents must fill a pack of {capacity} tokens with two at least, got "
            f"{len(features)} of two tokens or more"
        )
    return packs


def _by_group(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Relative differences of parameters that have one name but for their numbers."""
    groups: dict[str, list[str]] = {}
    for name in want:
        group = ".".join(part for part in name.split(".") if not part.isdigit())
        groups.setdefault(group, []).append(name)
    return {
        group: _relative(_joined({n: got[n] for n in names}), _joined({n: want[n] for n in names}))
        for group, names in groups.items()
    }


def _joined(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors.values()])


def _relative(got: Tensor, want: Tensor) -> float:
    scale = float(want.norm())
    return float((got - want).norm()) / scale if scale else float((got - want).norm())
