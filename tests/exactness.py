"""What "exact" means for a model: its documents alone, and how far a packed run is from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from packed_attn import PackedCollator

LENGTHS = (5, 1, 37, 22)


def documents(seed: int = 1, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 150, (n,), generator=generator) for n in lengths]


def packed(docs: list[Tensor], **options: Any) -> dict[str, Any]:
    """The collator's batch of these documents, on their device."""
    batch = PackedCollator("documents", **options)([{"input_ids": d} for d in docs])
    return on_device(batch, docs[0].device)


def on_device(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """A batch with its tensors and layouts moved, as a trainer moves them."""
    return {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}


def alone(model: nn.Module, docs: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=d[None]).logits[0] for d in docs])


def close(got: Tensor, want: Tensor, bound: float = 1e-5) -> bool:
    return float((got - want).abs().max()) <= bound * float(want.abs().max())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def relative(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    assert got.keys() == want.keys()
    difference = sum(float((got[n] - want[n]).double().square().sum()) for n in want)
    return (difference / sum(float(w.double().square().sum()) for w in want.values())) ** 0.5


def token_mean(model: nn.Module, docs: list[Tensor]) -> Tensor:
    """The loss of the documents one by one: the mean over all targets of all documents."""
    targets = sum(len(doc) - 1 for doc in docs)
    loss = torch.tensor(0.0, device=docs[0].device)
    for doc in docs:
        if len(doc) > 1:
            labels = doc[None].clone()
            labels[0, 0] = -100
            loss = loss + model(input_ids=doc[None], labels=labels).loss * (len(doc) - 1) / targets
    return loss


def compile_and_compare(
    model: nn.Module, one_by_one: Callable[[list[Tensor]], Tensor], capacity: int = 64
) -> None:
    """A patched model, compiled whole, is exact for any boundaries and compiled but few times."""
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    collator, counts = PackedCollator(capacity=capacity), []
    for lengths in ((5, 37, 16), (16, 16, 1, 20), (60,), (1, 2, 3, 4, 5, 40)):
        docs = documents(lengths=lengths)
        ids = torch.cat(docs).tolist()
        batch = collator([{"input_ids": ids, "seq_lengths": list(lengths)}])
        with torch.no_grad():
            logits = compiled(**batch).logits[0, : sum(lengths)]
        assert close(logits, one_by_one(docs))
        counts.append(counter.frame_count)
    assert counts[-1] <= 3 * counts[0]


def stock_results(model: nn.Module) -> list[Tensor]:
    """What users do with a model beside packing: rows, padding on either side, generation."""
    with torch.no_grad():
        return [use() for use in _uses(model).values()]


def stock_outcomes(model: nn.Module) -> dict[str, Tensor | str]:
    """`stock_results` by name, for models that may not take all of it: what they raise counts."""
    return attempted(_uses(model))


def attempted(uses: Mapping[str, Callable[[], Tensor]]) -> dict[str, Tensor | str]:
    """What each use gives, or what it raises."""
    found: dict[str, Tensor | str] = {}
    for name, use in uses.items():
        try:
            with torch.no_grad():
                found[name] = use()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def _uses(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 150, (2, 12), generator=generator).to(device)
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[0, :5] = 0
    right[1, 8:] = 0
    generate: Any = model.generate if hasattr(model, "generate") else None
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    uses: dict[str, Callable[[], Tensor]] = {
        "rows": lambda: model(input_ids=ids).logits,
        "right padding": lambda: model(input_ids=ids, attention_mask=right).logits,
        "left padding": lambda: model(input_ids=ids, attention_mask=left).logits,
        "one document": lambda: (
            model(input_ids=ids[:1], position_ids=torch.arange(12, device=device)[None]).logits
        ),
    }
    if generate is not None:
        uses["generation"] = lambda: generate(ids, attention_mask=left, **options)
    return uses
