"""The isolation proof: runs the model it is given and shows whether documents see each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from packed_attn.collator import PackedCollator
from packed_attn.trace import Trace, first_leak

# Documents of the audit: odd lengths, one of a single token, a sum that is unlikely to be a width.
LENGTHS = (5, 1, 37, 24)
# Packed against alone, relative to the largest logit: rounding of one computation in two shapes.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}

Verdict = Literal["holds", "rounding", "fails"]


@dataclass(frozen=True)
class Check:
    """One of the five checks.

    Attributes:
        name: what was checked.
        verdict: "holds" as stated; "rounding": holds up to the rounding of the same model
            (experts that group tokens by content); "fails".
        figure: the largest deviation, relative to the largest logit, or the largest gradient.
        bound: what the figure may be.
    """

    name: str
    verdict: Verdict
    figure: float
    bound: float


@dataclass(frozen=True)
class IsolationReport:
    """What `audit` found. `str(report)` is a table.

    Attributes:
        model: class of the audited model.
        convention: which boundaries the batch carried (see `CONVENTIONS`).
        checks: the five checks.
        first_leaking_module: path and class of the first module whose inputs for a document were
            clean and whose outputs were not; None when nothing leaks.
    """

    model: str
    convention: str
    checks: tuple[Check, ...]
    first_leaking_module: str | None

    @property
    def isolated(self) -> bool:
        """Whether every check holds, exactly or up to rounding."""
        return all(check.verdict != "fails" for check in self.checks)

    @property
    def verdict(self) -> str:
        """ "isolated", "isolated up to rounding" or "leaks"."""
        if not self.isolated:
            return "leaks"
        rounding = any(check.verdict == "rounding" for check in self.checks)
        return "isolated up to rounding" if rounding else "isolated"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {"verdict": self.verdict, "isolated": self.isolated, **asdict(self)}

    def __str__(self) -> str:
        lines = [f"{self.model}, given {self.convention}: {self.verdict}"]
        width = max(len(check.name) for check in self.checks)
        for check in self.checks:
            figure = f"{check.figure:.1e} (bound {check.bound:.1e})"
            lines.append(f"  {check.name:{width}}  {check.verdict:8}  {figure}")
        if self.first_leaking_module:
            word = "first leaking module" if not self.isolated else "rounding begins in"
            lines.append(f"  {word}: {self.first_leaking_module}")
        return "\n".join(lines)


CONVENTIONS: dict[str, tuple[str, ...]] = {
    "packed batch": (
        "position_ids",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "seq_idx",
        "layout",
    ),
    "position_ids": ("position_ids",),
    "position_ids and a mask of ones": ("position_ids", "attention_mask"),
    "no boundaries": (),
}


def audit(
    model: nn.Module,
    *,
    convention: str | None = None,
    lengths: Sequence[int] = LENGTHS,
    seed: int = 0,
) -> IsolationReport:
    """Proves on this very model that packed documents do not see each other, or shows the leak.

    Five checks on a small packed batch of random tokens: (1) packed logits equal those of each
    document alone; (2) other tokens in one document change no bit of another's logits; (3) the
    gradient of one document's logits in another's embeddings is exactly 0; (4) NaN and Inf in one
    document's embeddings stay there; (5) another order of the documents gives the same logits.

    Args:
        model: a transformers model, patched or not, of any size; it is left as it was found.
        convention: a key of `CONVENTIONS`: which boundaries the batch carries. By default all that
            `PackedCollator` emits for a patched model, and position_ids for any other.
        lengths: tokens of each document, at least two documents.
        seed: of the random tokens.

    Raises:
        ValueError: fewer than two documents, or an unknown convention.
    """
    if len(lengths) < 2 or min(lengths) < 1:
        raise ValueError(f"an audit needs two documents of a token or more, got {tuple(lengths)}")
    if convention is None:
        convention = "packed batch" if _is_patched(model) else "position_ids"
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {list(CONVENTIONS)}, got {convention!r}")
    with _quiet(model):
        return _Audit(model, convention, lengths, seed).report()


class _Audit:
    """One audit under way: the documents, the clean packed run, and the checks on them."""

    def __init__(
        self, model: nn.Module, convention: str, lengths: Sequence[int], seed: int
    ) -> None:
        self.model = model
        self.convention = convention
        self.pools = _pools(model, len(lengths), seed)
        self.documents, self.replacements = _documents(self.pools, lengths, seed)
        self.spans = _spans(self.documents)
        self.clean, self.clean_trace = self._traced(self.documents)
        self.scale = float(self.clean.abs().max())
        self.alone = [self._forward({"input_ids": d[None]}) for d in self.documents]
        self.rounding = 0.0
        self.moved = 0.0
        self.leak: str | None = None

    def report(self) -> IsolationReport:
        alone = self._alone()
        gradient = self._gradient()
        may_round = gradient.verdict == "holds"
        perturbed, nonfinite = self._perturbed(may_round), self._nonfinite(may_round)
        checks = (alone, perturbed, gradient, nonfinite, self._reordered())
        name = type(self.model).__name__
        return IsolationReport(name, self.convention, checks, self.leak)

    def _alone(self) -> Check:
        worst = max(
            _difference(self.clean[a:b], alone) for (a, b), alone in zip(self.spans, self.alone)
        )
        self.rounding = worst
        return self._within("packed logits equal alone", worst)

    def _perturbed(self, may_round: bool) -> Check:
        """Other tokens in each document in turn."""
        worst = 0.0
        for index in range(len(self.documents)):
            changed = list(self.documents)
            changed[index] = self.replacements[index]
            worst = max(worst, self._changed(index, *self._traced(changed)))
        return self._unchanged("perturbing a document changes no other", worst, may_round)

    def _changed(self, index: int, logits: Tensor, trace: Trace) -> float:
        """How far all documents but `index` moved; notes the module where the first one did."""
        others = self._outside(index)
        difference = _difference(logits[others], self.clean[others])
        if difference > self.moved:
            self.moved = difference
            self.leak = first_leak(self.clean_trace, trace, others)
        return difference

    def _unchanged(self, name: str, worst: float, may_round: bool) -> Check:
        # Experts group tokens by content, so another document changes the shape of a matrix
        # product: allowed as far as the same model rounds between packed and alone.
        bound = 4 * max(self.rounding, torch.finfo(self.clean.dtype).eps * self.scale)
        verdict: Verdict = "holds" if worst == 0 else "fails"
        if 0 < worst <= bound and may_round:
            verdict = "rounding"
        return self._check(name, verdict, worst, 0.0)

    def _gradient(self) -> Check:
        """Of each document's logits in the embeddings of all others."""
        worst = 0.0
        for index, (a, b) in enumerate(self.spans):
            with torch.enable_grad(), _Embeddings(self.model) as embeddings:
                logits = self._forward(self._batch(self.documents))[a:b]
                weights = torch.linspace(-1, 1, logits.numel(), device=logits.device)
                loss = (logits.flatten() * weights.to(logits.dtype)).sum()
                gradients = embeddings.gradients(loss)
            for ids, gradient in gradients:
                others = ~torch.isin(ids, self.pools[index])
                worst = max(worst, _largest(gradient[others]))
        verdict: Verdict = "holds" if worst == 0 else "fails"
        return Check("gradient into other documents is 0", verdict, worst, 0.0)

    def _nonfinite(self, may_round: bool) -> Check:
        """NaN, then Inf, in each document's embeddings."""
        worst = 0.0
        for value in (torch.nan, torch.inf):
            for index, pool in enumerate(self.pools):
                with _Embeddings(self.model, poison=(pool, value)):
                    logits, trace = self._traced(self.documents)
                worst = max(worst, self._changed(index, logits, trace))
        return self._unchanged("NaN and Inf stay in their document", worst, may_round)

    def _reordered(self) -> Check:
        order = list(reversed(range(len(self.documents))))
        documents = [self.documents[i] for i in order]
        logits = self._forward(self._batch(documents))
        spans = _spans(documents)
        worst = max(
            _difference(
                logits[spans[place][0] : spans[place][1]], self.clean[slice(*self.spans[i])]
            )
            for place, i in enumerate(order)
        )
        return self._within("another order gives the same logits", worst)

    def _within(self, name: str, worst: float) -> Check:
        bound = TOLERANCE[self.clean.dtype]
        verdict: Verdict = "holds" if worst <= bound * self.scale else "fails"
        return self._check(name, verdict, worst, bound)

    def _check(self, name: str, verdict: Verdict, worst: float, bound: float) -> Check:
        return Check(name, verdict, worst / self.scale, bound)

    def _outside(self, index: int) -> Tensor:
        """bool `[T]`: the tokens of all other documents."""
        a, b = self.spans[index]
        outside = torch.ones(self.spans[-1][1], dtype=torch.bool, device=self.clean.device)
        outside[a:b] = False
        return outside

    def _batch(self, documents: Sequence[Tensor]) -> dict[str, Any]:
        device = documents[0].device
        batch = PackedCollator("documents")([{"input_ids": d.cpu()} for d in documents])
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        names = ["input_ids", *CONVENTIONS[self.convention]]
        if not _is_patched(self.model):
            names = [name for name in names if name != "layout"]
        return {n: batch[n].to(device) if hasattr(batch[n], "to") else batch[n] for n in names}

    def _forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (hidden states of a model without a head), `[T, width]`, one row of tokens."""
        output = self.model(**batch)
        logits = getattr(output, "logits", None)
        if logits is None:
            logits = output.last_hidden_state
        return logits.flatten(0, -2)

    def _traced(self, documents: Sequence[Tensor]) -> tuple[Tensor, Trace]:
        batch = self._batch(documents)
        with Trace(self.model, batch["input_ids"].numel()) as trace:
            return self._forward(batch), trace


class _Embeddings:
    """A context in which embeddings are autograd leaves, and those of some token ids a value.

    A forward may embed its tokens in several calls and any order, so tokens are known by their
    ids, which no two documents of an audit share.

    Args:
        poison: (ids, value) of the tokens whose embeddings become `value`.
    """

    def __init__(self, model: nn.Module, poison: tuple[Tensor, float] | None = None) -> None:
        self._module: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        self._poison = poison
        self._calls: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> _Embeddings:
        self._handle = self._module.register_forward_hook(self._replace, with_kwargs=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()

    def gradients(self, loss: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(ids, gradient) of each embedding call that the loss depends on."""
        gradients = torch.autograd.grad(loss, [leaf for _, leaf in self._calls], allow_unused=True)
        return [(ids, g) for (ids, _), g in zip(self._calls, gradients) if g is not None]

    def _replace(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        ids = args[0] if args else next(iter(kwargs.values()))
        leaf = output.detach().clone()
        if self._poison is not None:
            poisoned, value = self._poison
            leaf[torch.isin(ids, poisoned)] = value
        leaf.requires_grad_(torch.is_grad_enabled())
        self._calls.append((ids, leaf))
        return leaf


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and back."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was in training.items():
            module.training = was


def _is_patched(model: nn.Module) -> bool:
    import sys

    patches = sys.modules.get("packed_attn_patches")
    return patches is not None and patches.is_patched(model)


def _pools(model: nn.Module, documents: int, seed: int) -> list[Tensor]:
    """Token ids for each document that no other has and that no embedding treats specially."""
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    special = {
        token
        for name in ("pad_token_id", "bos_token_id", "eos_token_id")
        for token in _as_list(getattr(text, name, None))
    }
    usual = torch.tensor([t for t in range(text.vocab_size) if t not in special])
    if len(usual) < 2 * documents:
        raise ValueError(
            f"an audit of {documents} documents needs a vocabulary of {2 * documents} plain "
            f"tokens, but the model has {len(usual)}"
        )
    order = torch.randperm(len(usual), generator=torch.Generator().manual_seed(seed))
    size = len(usual) // documents
    device = next(model.parameters()).device
    return [usual[order[i * size : (i + 1) * size]].to(device) for i in range(documents)]


def _documents(
    pools: Sequence[Tensor], lengths: Sequence[int], seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Random documents, and for each one another of its length that differs in every token."""
    generator = torch.Generator().manual_seed(seed)
    documents, replacements = [], []
    for pool, length in zip(pools, lengths):
        choice = torch.randint(len(pool), (length,), generator=generator)
        step = torch.randint(1, len(pool), (length,), generator=generator)
        documents.append(pool[choice.to(pool.device)])
        replacements.append(pool[((choice + step) % len(pool)).to(pool.device)])
    return documents, replacements


def _as_list(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _spans(documents: Sequence[Tensor]) -> list[tuple[int, int]]:
    spans, at = [], 0
    for document in documents:
        spans.append((at, at + document.numel()))
        at += document.numel()
    return spans


def _largest(x: Tensor) -> float:
    """The largest magnitude; a NaN counts as infinite."""
    if x.numel() == 0:
        return 0.0
    return float(torch.nan_to_num(x.double().abs(), nan=torch.inf).max())


def _difference(x: Tensor, y: Tensor) -> float:
    """The largest difference; a NaN or Inf on one side alone counts as infinite."""
    return 0.0 if torch.equal(x, y) else _largest(x.double() - y.double())
