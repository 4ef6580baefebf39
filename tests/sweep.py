"""One model type held to everything that "exact" promises, under every convention.

`tests/test_sweep.py` checks a few types and, marked slow, all of them; `benchmarks/sweep_models.py`
writes the table. A type is built tiny and random, its documents are run alone on the stock model,
and then the patched model is compared with them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers
from packed_attn_patches import route_of
from packed_attn_patches.families import is_encoder_decoder
from packed_attn_patches.fast_mixers import reason_against
from packed_attn_patches.tiny import tiny_model
from torch import Tensor, nn

from packed_attn import DocumentLayout, patch_model, unpatch_model
from packed_attn.audit.embeddings import input_embeddings
from tests.exactness import documents, stock_outcomes
from tests.exactness import packed as packed_batch
from tests.sweep_precision import (
    FLOAT32,
    NOT_HELD,
    Alone,
    Expected,
    Precision,
    _gradients,
    _largest,
    is_of_rounding,
)

# Two pairs of like length, which unpacking pads to one batch each, and a single token.
LENGTHS = (5, 1, 37, 4, 31)
GOOD = ("exact", "rounding", "refused")
# Of a brief sweep, which perturbs these documents only: a long one in the middle and the last.
BRIEF = ("default cache", "tail padding", "isolation", "training")
BRIEF_DOCUMENTS = (2, 4)
# The checks in half precision: what a batch may carry is read in the same way in any.
OF_NUMBERS = (
    "default cache",
    "tail padding",
    "isolation",
    "not finite",
    "training",
    "reentrant checkpointing",
    "dtypes",
    "undone",
)


@dataclass
class Outcome:
    """What became of one model type.

    Attributes:
        head: key of `HEADS`.
        status: "exact", "refused" (by name), "not built" (stock does not run it) or "wrong".
        route: how it was made exact.
        reason: why it was refused, or what stock raised.
        checks: each check's verdict: "exact", "rounding" (grouped experts), "refused" (a forest, by
            a model that looks both ways), or what was found.
    """

    head: str
    model_type: str
    model: str = ""
    status: str = "not built"
    route: str = ""
    reason: str = ""
    checks: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Head:
    """A kind of head: how to load it, and the labels of one document of token ids."""

    auto_class: str
    mapping: str
    labels: Callable[[Tensor], Tensor]
    per_document: bool = False
    pairs: bool = False  # of a source and a target document: see `sweep_pairs.py`


def _some_tokens(ids: Tensor) -> Tensor:
    return ids.masked_fill(ids % 3 == 0, -100)


def _some_classes(ids: Tensor) -> Tensor:
    return (ids % 2).masked_fill(ids % 3 == 0, -100)


HEADS = {
    "causal": Head("AutoModelForCausalLM", "CAUSAL_LM", torch.Tensor.clone),
    "masked": Head("AutoModelForMaskedLM", "MASKED_LM", _some_tokens),
    "token": Head("AutoModelForTokenClassification", "TOKEN_CLASSIFICATION", _some_classes),
    "sequence": Head(
        "AutoModelForSequenceClassification",
        "SEQUENCE_CLASSIFICATION",
        lambda ids: ids[:1] % 2,
        per_document=True,
    ),
    "vision": Head("AutoModelForImageTextToText", "IMAGE_TEXT_TO_TEXT", torch.Tensor.clone),
    "seq2seq": Head(
        "AutoModelForSeq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM", torch.Tensor.clone, pairs=True
    ),
}


def model_types(head: str) -> list[str]:
    """Every type of this head in the installed transformers.

    An encoder-decoder that another auto class knows too is of the head of pairs.
    """
    from transformers.models.auto import modeling_auto

    names = getattr(modeling_auto, f"MODEL_FOR_{HEADS[head].mapping}_MAPPING_NAMES")
    pairs = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()
    return sorted(
        t for t, c in names.items() if HEADS[head].pairs == (c in pairs and _takes_pairs(c))
    )


def _takes_pairs(name: str) -> bool:
    """Whether a class takes a target beside a text; some of the auto class take speech alone."""
    names = inspect.signature(getattr(transformers, name).forward).parameters
    return "input_ids" in names and "decoder_input_ids" in names


def sweep_type(
    head: str,
    model_type: str,
    *,
    device: str = "cpu",
    attn_implementation: str | None = None,
    precision: Precision = FLOAT32,
    **overrides: Any,
) -> Outcome:
    """All checks of one type; what it or transformers raises is part of the outcome.

    In half precision an error may pass its bound by chance, as that of the documents alone is near
    0 by chance: then the type is wrong if one of two other random models passes a bound too.

    Args:
        overrides: fields of its config.
    """

    def once(**more: Any) -> Outcome:
        outcome = Outcome(head, model_type)
        try:
            built = tiny_model(
                model_type,
                auto_class=getattr(transformers, HEADS[head].auto_class),
                attn_implementation=attn_implementation,
                **{**overrides, **more},
            ).to(device)
        except Exception as error:
            outcome.reason = said(error)
            return outcome
        return sweep_model(outcome, built, precision=precision)

    outcome = once()
    found = {n: v for n, v in outcome.checks.items() if v not in GOOD}
    if precision.is_wide or not found or not all(map(is_of_rounding, found.values())):
        return outcome
    if model_type in NOT_HELD:
        outcome.status, outcome.reason = "exact", f"{NOT_HELD[model_type]}: {found}"
        return outcome
    for seed in (1, 2):
        other = once(seed=seed)
        if other.status != "exact":
            return outcome
    outcome.status, outcome.reason = "exact", f"one of three random models: {found}"
    return outcome


def sweep_model(
    outcome: Outcome, built: Any, *, precision: Precision = FLOAT32, brief: bool = False
) -> Outcome:
    """The checks of one model; `outcome` names its head and type.

    Args:
        built: the model, as it is before `precision` loads it.
        brief: only the checks of `BRIEF`, on some documents.
    """
    from tests.sweep_pairs import StockPairs, pair_checks

    head = HEADS[outcome.head]
    outcome.model = type(built).__name__
    device = next(built.parameters()).device.type
    try:
        model = precision.loaded(built)
        with precision.held(model):
            stock: Any = (
                StockPairs(model, precision, brief)
                if head.pairs
                else _Stock(model, head, precision, brief)
            )
    except Exception as error:
        outcome.reason = said(error)
        return outcome
    try:
        patch_model(model)
    except NotImplementedError as error:
        outcome.status, outcome.reason = "refused", str(error)
        return outcome
    outcome.route = _route(model, device)
    checks = _checks(model, stock) if isinstance(stock, _Stock) else pair_checks(model, stock)
    for name, check in checks.items():
        if brief and name not in BRIEF:
            continue
        try:
            with precision.held(model):
                outcome.checks[name] = check()
        except Exception as error:
            outcome.checks[name] = f"raises {said(error)}"
    good = all(verdict in GOOD for verdict in outcome.checks.values())
    outcome.status = "exact" if good else "wrong"
    return outcome


def _route(model: nn.Module, device: str) -> str:
    """By which way a patched model is exact on this device."""
    layout = DocumentLayout.from_lengths(LENGTHS).to(device)
    fast = reason_against(model, layout) is None
    return "fast_mixers" if fast else route_of(model).name.lower()


class _Stock:
    """What the model gives before it is patched: documents alone, their gradients, and the rest."""

    def __init__(
        self, model: nn.Module, head: Head, precision: Precision = FLOAT32, brief: bool = False
    ) -> None:
        from tests.sweep_forest import StockForest

        self.head = head
        self.perturbed = BRIEF_DOCUMENTS if brief else range(len(LENGTHS))
        device = next(model.parameters()).device
        self.end = _end_token(model) if head.per_document else None
        docs = documents(lengths=LENGTHS)
        if self.end is not None:
            docs = [torch.cat([d[d != self.end], torch.tensor([self.end])]) for d in docs]
        self.docs = [d.to(device) for d in docs]
        self._check_power(model)
        self.dtypes = _dtypes(model, {"input_ids": self.docs[0][None]})
        self.otherwise = {} if brief else stock_outcomes(model)
        self.expected = Expected.of(precision, model, self._alone)
        longest = self.docs[2], self.labels()[2]
        self.reentrant = runs_reentrant(model, lambda: self._loss(model, *longest))
        of_tokens = len(self.expected.alone.rows) == sum(LENGTHS) and precision.is_wide
        self.forest = StockForest(model, precision) if of_tokens and not brief else None

    def labels(self) -> list[Tensor]:
        return [self.head.labels(d) for d in self.docs]

    def _check_power(self, model: nn.Module) -> None:
        """Raises where no output depends on another token: then no leak could be seen."""
        doc = max(self.docs, key=len)
        other = doc.clone()
        other[1:-1] = 3 + (doc[1:-1] - 2) % 147
        with torch.no_grad():
            moved = _rows(model(input_ids=other[None])) - _rows(model(input_ids=doc[None]))
        if not self.head.per_document:
            moved[1:-1] = 0
        if not moved.any():
            raise RuntimeError("no output depends on another token: a leak could not be seen")

    def _alone(self, model: nn.Module) -> Alone:
        with torch.no_grad():
            rows = torch.cat([_rows(model(input_ids=d[None])) for d in self.docs])
        loss = self._backward(model.train())
        model.eval()
        return Alone(rows, loss, _gradients(model))

    def _backward(self, model: nn.Module) -> Tensor:
        """The mean loss over all targets, from documents one by one."""
        model.zero_grad()
        skipped = int(self._shifts(model))
        targets = [int((x[skipped:] != -100).sum()) for x in self.labels()]
        losses = []
        for doc, labels, share in zip(self.docs, self.labels(), targets):
            if share:
                loss = self._loss(model, doc, labels) * share / sum(targets)
                loss.backward()
                losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _shifts(self, model: nn.Module) -> bool:
        """Whether the first label has no part in the loss."""
        if self.head.per_document:
            return False
        doc = self.docs[0]
        first, other = torch.full_like(doc, -100), torch.full_like(doc, -100)
        first[0], other[-1] = 1, 1
        with torch.no_grad():
            both = first.where(first != -100, other)
            return torch.equal(self._loss(model, doc, both), self._loss(model, doc, other))

    def _loss(self, model: nn.Module, doc: Tensor, labels: Tensor) -> Tensor:
        given = labels if self.head.per_document else labels[None]
        return model(input_ids=doc[None], labels=given).loss


def _end_token(model: Any) -> int | None:
    """What every document ends with, where a head of a sequence pools at it and takes none without.

    Heads of encoder-decoders do.
    """
    return model.config.eos_token_id if is_encoder_decoder(model) else None


def _checks(model: nn.Module, stock: _Stock) -> dict[str, Callable[[], str]]:
    from tests.sweep_forest import forest

    batch = packed_batch(stock.docs)
    packed = {name: batch[name] for name in ("input_ids", "position_ids")}
    ones = {"attention_mask": torch.ones_like(packed["input_ids"])}
    flash = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
    boundaries = {name: batch[name] for name in flash}

    def same(kwargs: Mapping[str, Any], rows: int = 1, beyond: int = 0) -> Callable[[], str]:
        return lambda: _same_outputs(model, stock, kwargs, rows, beyond)

    checks = {
        "position_ids": same({**packed, "use_cache": False}),
        "default cache": same(packed),
        "mask of ones": same({**packed, **ones}),
        "cu_seq_lens and seq_idx": same({**packed, **boundaries}),
        "two rows": same(_repeated(packed), rows=2),
        "tail padding": same(_padded({**packed, **ones}), beyond=7),
        "isolation": lambda: _isolated(model, stock, packed),
        "training": lambda: _trains(model, stock, packed),
        **checkpointed(model, lambda: _trains(model, stock, packed), stock.reentrant),
        "dtypes": lambda: _same_dtypes(_dtypes(model, packed), stock.dtypes),
        **({"forest": lambda: forest(model, whole)} if (whole := stock.forest) else {}),
        "everything else": lambda: untouched(stock_outcomes(model), stock.otherwise),
        "undone": lambda: untouched(stock_outcomes(unpatch_model(model)), stock.otherwise),
    }
    return checks if stock.expected.wide else {n: c for n, c in checks.items() if n in OF_NUMBERS}


def _repeated(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.repeat(2, 1) for name, value in packed.items()}


def _padded(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: nn.functional.pad(value, (0, 7)) for name, value in packed.items()}


def _same_outputs(
    model: nn.Module, stock: _Stock, kwargs: Mapping[str, Any], rows: int, beyond: int
) -> str:
    with torch.no_grad():
        output = model(**kwargs)
    got = _rows(output) if beyond == 0 or stock.head.per_document else output.logits[0, :-beyond]
    return stock.expected.outputs(got, rows)


def _isolated(model: nn.Module, stock: _Stock, packed: Mapping[str, Tensor]) -> str:
    """Other tokens in each document in turn change no bit and no gradient of the others."""
    spans = _spans([1] * len(stock.docs) if stock.head.per_document else map(len, stock.docs))
    places = _spans(map(len, stock.docs))
    with torch.no_grad():
        clean = _rows(model(**packed))
    scale, rounding = stock.expected.scale, _largest(clean - stock.expected.alone.rows)
    bound = 4 * max(rounding, torch.finfo(clean.dtype).eps * scale)
    worst = 0.0
    for (a, b), (first, last) in [(spans[d], places[d]) for d in stock.perturbed]:
        ids = packed["input_ids"].clone()
        ids[0, first:last] = 3 + (ids[0, first:last] - 2) % 147
        ids = _ending(ids, packed["input_ids"], stock.end)
        with torch.no_grad():
            moved = _rows(model(**{**packed, "input_ids": ids})) - clean
        moved[a:b] = 0
        worst = max(worst, _largest(moved))
        own = torch.zeros(ids.numel(), dtype=torch.bool)
        own[first:last] = True
        leaked = _gradient_outside(model, packed, slice(a, b), own, end=stock.end)
        if leaked > 0:
            return f"leaks: gradient {leaked:.1e}"
    if worst > bound:
        return f"leaks: moved by {worst / scale:.1e}"
    return "exact" if worst == 0 else "rounding"


def _ending(ids: Tensor, batch: Tensor, end: int | None) -> Tensor:
    """`ids` with the end tokens of the batch at their places."""
    return ids if end is None else batch.where(batch == end, ids)


def _gradient_outside(
    model: nn.Module,
    packed: Mapping[str, Any],
    rows: slice | Tensor,
    own: Tensor,
    end: int | None = None,
) -> float:
    """The largest gradient of a document's outputs (`rows`) in the embeddings of all tokens but its
    own, bool `[T]`.

    A forward may embed its tokens in batches of its own. So the document is one token id over and
    over and the others are another: an embedding's id says whose it is. An `end` token is of the
    document before it.
    """
    ids = torch.full_like(packed["input_ids"], 4)
    ids[0, own] = 5
    ids = _ending(ids, packed["input_ids"], end)
    embedded: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        given = args[0] if args else next(iter(kwargs.values()))
        whole = output if isinstance(output, tuple) else (output,)  # quantised: with its scale
        leaf = whole[0].detach().clone().requires_grad_()
        embedded.append((given, leaf))
        return (leaf.clone(), *whole[1:]) if isinstance(output, tuple) else leaf.clone()

    handle = input_embeddings(model).register_forward_hook(note, with_kwargs=True)
    try:
        outputs = _rows(model(**{**packed, "input_ids": ids}))[rows]
    finally:
        handle.remove()
    weights = torch.linspace(-1, 1, outputs.numel(), device=outputs.device).view_as(outputs)
    leaves = [leaf for _, leaf in embedded]
    gradients = torch.autograd.grad((outputs * weights).sum(), leaves, allow_unused=True)
    owners = [x if end is None else x.where(x != end, x.roll(1, -1)) for x, _ in embedded]
    others = [g[owner == 4] for owner, g in zip(owners, gradients) if g is not None]
    if not any(g is not None and bool(g.any()) for g in gradients):
        raise RuntimeError("the outputs depend on no embedding: the check sees nothing")
    return max(map(_largest, others))


def _trains(model: nn.Module, stock: _Stock, packed: Mapping[str, Tensor]) -> str:
    labels = torch.cat(stock.labels())
    given = labels if stock.head.per_document else labels[None]
    return trained(model, {**packed, "labels": given}, stock.expected)


def trained(model: nn.Module, kwargs: Mapping[str, Any], expected: Expected) -> str:
    """Loss and gradients of one step in train mode against those of the documents alone."""
    model.train().zero_grad()
    loss = model(**kwargs).loss
    loss.backward()
    model.eval()
    return expected.trained(loss, _gradients(model))


def checkpointed(
    model: Any, check: Callable[[], str], reentrant: bool
) -> dict[str, Callable[[], str]]:
    """A check with gradient checkpointing of both kinds, where the model has them."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        return {}
    checks = {"checkpointing": lambda: _with_checkpointing(model, False, check)}
    if reentrant:
        checks["reentrant checkpointing"] = lambda: _with_checkpointing(model, True, check)
    return checks


def runs_reentrant(model: Any, loss: Callable[[], Tensor]) -> bool:
    """Whether a model that is not patched trains with reentrant checkpointing."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        return False
    try:
        model.train()
        _with_checkpointing(model, True, lambda: loss().backward())
    except RuntimeError:
        return False
    finally:
        model.eval().zero_grad()
    return True


def _with_checkpointing(model: Any, reentrant: bool, run: Callable[[], Any]) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    try:
        return run()
    finally:
        model.gradient_checkpointing_disable()


def _dtypes(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, set[torch.dtype]]:
    """Those of every output, by name, with the hidden states of each layer where they are given."""
    with torch.no_grad():
        try:
            output = model(**kwargs, output_hidden_states=True)
        except NotImplementedError:  # some have no rows per token to put back
            output = model(**kwargs)
    named = {n: v if isinstance(v, tuple) else (v,) for n, v in output.items()}
    return {n: {x.dtype for x in v if isinstance(x, Tensor)} for n, v in named.items()}


def _same_dtypes(got: Mapping[str, Any], want: Mapping[str, Any]) -> str:
    other = {n: (got[n], want[n]) for n in got.keys() & want.keys() if got[n] != want[n]}
    return f"other dtypes: {other}" if other else "exact"


def untouched(outcomes: Mapping[str, Tensor | str], otherwise: Mapping[str, Tensor | str]) -> str:
    """What a model gives beside packing against what it gave before, to the bit."""
    for name, got in outcomes.items():
        want = otherwise[name]
        same = torch.equal(got, want) if isinstance(got, Tensor) else got == want
        if not same:
            return f"{name} changed" if isinstance(got, Tensor) else f"{name}: {got}"
    return "exact"


def _rows(output: Any) -> Tensor:
    """Logits `[tokens or documents, width]`."""
    return output.logits.flatten(0, -2)


def _spans(lengths: Any) -> list[tuple[int, int]]:
    spans, at = [], 0
    for length in lengths:
        spans.append((at, at + length))
        at += length
    return spans


def said(error: Exception) -> str:
    words = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {words[0][:200]}"
