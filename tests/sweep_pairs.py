"""The sweep's checks of encoder-decoders: source and target documents packed in two streams.

What `sweep.py` asks of other heads is asked here of pairs; every verdict is "exact", "rounding" or
what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from packed_attn import PackedCollator, unpatch_model
from tests.exactness import attempted, on_device
from tests.sweep import (
    BRIEF_DOCUMENTS,
    OF_NUMBERS,
    _dtypes,
    _same_dtypes,
    _spans,
    checkpointed,
    runs_reentrant,
    trained,
    untouched,
)
from tests.sweep_precision import FLOAT32, Alone, Expected, Precision, _gradients, _largest

# Two pairs of like lengths, which unpacking pads to one batch each, and single tokens.
SOURCES = (5, 1, 37, 4, 31)
TARGETS = (9, 1, 23, 8, 21)
TAIL = 7
_POOL = 24  # tokens that one document draws from, and no other


class StockPairs:
    """What an encoder-decoder gives before it is patched: pairs alone, their gradients, the rest.

    Pair i is drawn from token ids of its own, so that an embedding's id says whose it is.
    """

    def __init__(
        self, model: nn.Module, precision: Precision = FLOAT32, brief: bool = False
    ) -> None:
        self.perturbed = BRIEF_DOCUMENTS if brief else range(len(TARGETS))
        device = next(model.parameters()).device
        self.sources = [drawn(i, n, seed=1).to(device) for i, n in enumerate(SOURCES)]
        self.targets = [drawn(i, n, seed=2).to(device) for i, n in enumerate(TARGETS)]
        with torch.no_grad():
            own, other = (
                model(input_ids=s[None], decoder_input_ids=self.targets[0][None]).logits
                for s in (self.sources[0], self.sources[2])
            )
        if torch.equal(own, other):
            raise RuntimeError("the outputs depend on no source: a pair that sees another's passes")
        first = {"input_ids": self.sources[0][None], "decoder_input_ids": self.targets[0][None]}
        self.dtypes = _dtypes(model, first)
        self.otherwise = {} if brief else outcomes(model)
        self.shifts = _shifts_labels(model, self.sources[0], self.targets[0])
        self.expected = Expected.of(precision, model, self._alone)
        self.reentrant = runs_reentrant(model, lambda: self._loss(model, 2))

    def given(self, labels: Tensor) -> dict[str, Tensor]:
        """Labels, and the decoder inputs where the model does not make them from labels."""
        if self.shifts:
            return {"labels": labels}
        return {"labels": labels, "decoder_input_ids": torch.cat(self.targets)[None]}

    def labels(self) -> list[Tensor]:
        return [t.masked_fill(t % 3 == 0, -100) for t in self.targets]

    def _alone(self, model: nn.Module) -> Alone:
        pairs = zip(self.sources, self.targets)
        with torch.no_grad():
            logits = [model(input_ids=s[None], decoder_input_ids=t[None]).logits for s, t in pairs]
        loss = self._backward(model.train())
        model.eval()
        return Alone(torch.cat(logits, 1)[0], loss, _gradients(model))

    def _backward(self, model: nn.Module) -> Tensor:
        """The mean loss over all labels, from pairs one by one."""
        model.zero_grad()
        counts = [int((x != -100).sum()) for x in self.labels()]
        losses = []
        for pair, count in enumerate(counts):
            if count:
                loss = self._loss(model, pair) * count / sum(counts)
                loss.backward()
                losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _loss(self, model: nn.Module, pair: int) -> Tensor:
        given = {} if self.shifts else {"decoder_input_ids": self.targets[pair][None]}
        labels = self.labels()[pair][None]
        return model(input_ids=self.sources[pair][None], labels=labels, **given).loss


def drawn(pool: int, length: int, seed: int) -> Tensor:
    """Random token ids that only pair `pool` has."""
    generator = torch.Generator().manual_seed(seed + 10 * pool)
    return 4 + pool * _POOL + torch.randint(_POOL, (length,), generator=generator)


def pair_checks(model: nn.Module, stock: StockPairs) -> dict[str, Callable[[], str]]:
    batch = packed_pairs(stock.sources, stock.targets)
    ids = {name: batch[name] for name in ("input_ids", "decoder_input_ids")}
    positions = {"position_ids": batch["position_ids"]}
    positions["decoder_position_ids"] = batch["decoder_layout"].position_ids[None]
    packed = {**ids, **positions}
    ones = {
        "attention_mask": torch.ones_like(ids["input_ids"]),
        "decoder_attention_mask": torch.ones_like(ids["decoder_input_ids"]),
    }

    def same(kwargs: Mapping[str, Any], rows: int = 1, beyond: int = 0) -> Callable[[], str]:
        return lambda: _same_outputs(model, stock, kwargs, rows, beyond)

    checks = {
        "position_ids": same({**packed, "use_cache": False}),
        "default cache": same(packed),
        "mask of ones": same({**packed, **ones}),
        "layouts": same(batch),
        "cu_seq_lens and seq_idx": same({**packed, **_flash(batch)}),
        "two rows": same({name: value.repeat(2, 1) for name, value in packed.items()}, rows=2),
        "tail padding": same(_padded({**packed, **ones}), beyond=TAIL),
        "isolation": lambda: _isolated(model, stock, packed),
        "not finite": lambda: _confined(model, stock, packed),
        "training": lambda: _trains(model, stock, packed),
        **checkpointed(model, lambda: _trains(model, stock, packed), stock.reentrant),
        "dtypes": lambda: _same_dtypes(_dtypes(model, packed), stock.dtypes),
        "everything else": lambda: untouched(outcomes(model), stock.otherwise),
        "undone": lambda: untouched(outcomes(unpatch_model(model)), stock.otherwise),
    }
    return checks if stock.expected.wide else {n: c for n, c in checks.items() if n in OF_NUMBERS}


def packed_pairs(sources: list[Tensor], targets: list[Tensor]) -> dict[str, Any]:
    """A batch of these pairs with decoder inputs in place of labels."""
    features = [{"input_ids": s, "labels": t} for s, t in zip(sources, targets)]
    batch = PackedCollator("documents", encoder_decoder=True)(features)
    batch = on_device(batch, sources[0].device)
    batch["decoder_input_ids"] = batch.pop("labels")
    return batch


def _flash(batch: Mapping[str, Any]) -> dict[str, Any]:
    target = batch["decoder_layout"]
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
    return {
        **{name: batch[name] for name in names},
        "decoder_cu_seq_lens_q": target.cu_seqlens,
        "decoder_seq_idx": target.document_ids[None],
    }


def _padded(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: nn.functional.pad(value, (0, TAIL)) for name, value in packed.items()}


def _logits(model: nn.Module, kwargs: Mapping[str, Any]) -> Tensor:
    return model(**kwargs).logits.flatten(0, 1)


def _same_outputs(
    model: nn.Module, stock: StockPairs, kwargs: Mapping[str, Any], rows: int, beyond: int
) -> str:
    with torch.no_grad():
        got = _logits(model, kwargs)
    if beyond and got[-beyond:].any():
        return "padding has logits"
    return stock.expected.outputs(got[: len(got) - beyond], rows)


def _isolated(model: nn.Module, stock: StockPairs, packed: Mapping[str, Tensor]) -> str:
    """Another source and target in each pair in turn change no bit and no gradient of others."""
    with torch.no_grad():
        clean = _logits(model, packed)
    scale, rounding = stock.expected.scale, _largest(clean - stock.expected.alone.rows)
    bound = 4 * max(rounding, torch.finfo(clean.dtype).eps * scale)
    worst = 0.0
    spans = _spans(TARGETS)
    for index in stock.perturbed:
        a, b = spans[index]
        with torch.no_grad():
            moved = _logits(model, _changed(packed, index)) - clean
        if not moved[a:b].any():
            return "a pair does not see itself"
        moved[a:b] = 0
        worst = max(worst, _largest(moved))
        own, others = _gradients_in_embeddings(model, packed, index, slice(a, b))
        if own == 0:
            return "no gradient reaches the embeddings"
        if others > 0:
            return f"leaks: gradient {others:.1e}"
    if worst > bound:
        return f"leaks: moved by {worst / scale:.1e}"
    return "exact" if worst == 0 else "rounding"


def _changed(packed: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """The batch with other tokens, of its own, in pair `index`."""
    changed = dict(packed)
    for name in ("input_ids", "decoder_input_ids"):
        ids = packed[name].clone()
        ids[_of(ids, index)] = 4 + index * _POOL + (ids[_of(ids, index)] - 4 + 5) % _POOL
        changed[name] = ids
    return changed


def _of(ids: Tensor, index: int) -> Tensor:
    """bool: which token ids are of pair `index`."""
    return (ids - 4) // _POOL == index


def _gradients_in_embeddings(
    model: nn.Module, packed: Mapping[str, Tensor], index: int, rows: slice
) -> tuple[float, float]:
    """The largest gradient of a pair's outputs in its own embeddings, and in all others'."""
    embedded: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaf = output.detach().clone().requires_grad_()
        embedded.append((args[0], leaf))
        return leaf.clone()

    handles = [m.register_forward_hook(note) for m in token_embeddings(model)]
    try:
        outputs = _logits(model, packed)[rows]
    finally:
        for handle in handles:
            handle.remove()
    weights = torch.linspace(-1, 1, outputs.numel(), device=outputs.device).view_as(outputs)
    leaves = [leaf for _, leaf in embedded]
    found = torch.autograd.grad((outputs * weights).sum(), leaves, allow_unused=True)
    # Decoder inputs that a batch begins with, and padding, are of no pair.
    pairs = [(ids, g) for (ids, _), g in zip(embedded, found) if g is not None]
    own = max(_largest(g[_of(ids, index)]) for ids, g in pairs)
    others = max(_largest(g[~_of(ids, index) & (ids >= 4)]) for ids, g in pairs)
    return own, others


def token_embeddings(model: nn.Module) -> list[nn.Module]:
    """The modules through which either side embeds its tokens: the tables of its vocabulary."""
    whole: Any = model
    size = whole.config.get_text_config().vocab_size
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding))
    return [m for m in tables if m.num_embeddings == size]


def _confined(model: nn.Module, stock: StockPairs, packed: Mapping[str, Tensor]) -> str:
    """NaN in every embedding of the first pair, Inf in those of the third, change no other."""
    keep = torch.ones(sum(TARGETS), dtype=torch.bool)
    for index in (0, 2):
        keep[slice(*_spans(TARGETS)[index])] = False

    def poison(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        poisoned = output.clone()
        poisoned[_of(args[0], 0)], poisoned[_of(args[0], 2)] = torch.nan, torch.inf
        return poisoned

    handles = [m.register_forward_hook(poison) for m in token_embeddings(model)]
    try:
        with torch.no_grad():
            got = _logits(model, packed)
    finally:
        for handle in handles:
            handle.remove()
    if got[~keep].isfinite().all():
        return "the poison reached nothing"
    return stock.expected.outputs(got, keep=keep)


def _trains(model: nn.Module, stock: StockPairs, packed: Mapping[str, Tensor]) -> str:
    kwargs = {k: v for k, v in packed.items() if k != "decoder_input_ids"}
    labels = stock.given(torch.cat(stock.labels())[None])
    return trained(model, {**kwargs, **labels}, stock.expected)


def outcomes(model: nn.Module) -> dict[str, Tensor | str]:
    """What users do with a model beside packing: rows, padding, generation; or what it raises."""
    whole: Any = model
    generator = torch.Generator().manual_seed(1)
    device = next(model.parameters()).device
    ids = torch.randint(4, 150, (2, 12), generator=generator).to(device)
    target = torch.randint(4, 150, (2, 9), generator=generator).to(device)
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[0, :5] = 0
    right[1, 8:] = 0
    both = {"input_ids": ids, "decoder_input_ids": target}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    uses: dict[str, Callable[[], Tensor]] = {
        "rows": lambda: whole(**both).logits,
        "right padding": lambda: whole(**both, attention_mask=right).logits,
        "left padding": lambda: whole(**both, attention_mask=left).logits,
        "labels": lambda: whole(input_ids=ids, labels=target).logits,
        "the encoder": lambda: whole.get_encoder()(input_ids=ids, attention_mask=right)[0],
        "generation": lambda: whole.generate(ids, attention_mask=left, **options),
    }
    return attempted(uses)


def _shifts_labels(model: nn.Module, source: Tensor, target: Tensor) -> bool:
    """Whether the model makes its decoder inputs from labels."""
    try:
        with torch.no_grad():
            output = model(input_ids=source[None], labels=target[None])
    except ValueError:
        return False
    return output.logits.shape[1] == len(target)
