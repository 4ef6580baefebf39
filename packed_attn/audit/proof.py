"""audit: runs the model it is given and shows whether packed documents see each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, overload

import torch
from torch import Tensor, nn

from packed_attn.audit.conventions import CONVENTIONS, AuditBatch
from packed_attn.audit.embeddings import Embeddings
from packed_attn.audit.gradients import (
    difference,
    gradient_alone,
    gradients_by_document,
    largest,
    reached,
)
from packed_attn.audit.limits import unreached
from packed_attn.audit.modes import NotOffered, drops, mode
from packed_attn.audit.precision import HALF, TOLERANCE
from packed_attn.audit.report import NONFINITE, Check, IsolationReport, Verdict
from packed_attn.audit.routing import HeldRouting
from packed_attn.audit.subject import BLIND, LENGTHS, NoRowPerDocument, Subject, is_compiled
from packed_attn.audit.terms import mixing_terms
from packed_attn.audit.trace import Trace, first_parting

# Of gradients, relative to the largest gradient: a backward rounds in more places.
GRADIENT_FACTOR = 10
ALONE = "packed logits equal alone"


@overload
def audit(
    model: nn.Module,
    *,
    convention: str | None = None,
    lengths: Sequence[int] = LENGTHS,
    seed: int = 0,
) -> IsolationReport: ...


@overload
def audit(
    model: nn.Module,
    *,
    conventions: Sequence[str],
    lengths: Sequence[int] = LENGTHS,
    seed: int = 0,
) -> dict[str, IsolationReport]: ...


def audit(
    model: nn.Module,
    *,
    convention: str | None = None,
    conventions: Sequence[str] | None = None,
    lengths: Sequence[int] = LENGTHS,
    seed: int = 0,
) -> IsolationReport | dict[str, IsolationReport]:
    """Proves on this very model that packed documents do not see each other, or shows the leak.

    Five checks on a small packed batch of random tokens: (1) packed logits equal those of each
    document alone; (2) other tokens in one document change no bit of another's logits; (3) the
    gradient of one document's logits in another's embeddings is exactly 0; (4) NaN and Inf in one
    document's embeddings stay there; (5) another order of the documents gives the same logits. In
    train mode also (6) the gradient in a document's own embeddings equals that of it alone.

    Parameters that are all 0, biases excepted, have random values meanwhile: they would hide what
    they multiply until the first step of training.

    Works on any module that takes `input_ids` and returns logits or hidden states, a row a token
    or, where a model pools, a row a document. A document of an encoder-decoder is a source and a
    target, changed, poisoned and differentiated together.

    Args:
        model: a model, patched or not, wrapped or not, of any size; it is left as it was found.
        convention: a key of `CONVENTIONS`: which boundaries the batch carries. By default all that
            `PackedCollator` emits for a patched model, and position_ids for any other.
        conventions: several of them; the result is a report for each, also where the model raises.
        lengths: tokens of each document, at least two documents; of an encoder-decoder those of
            its targets. A model that computes otherwise from some length on (a `longrope`) shows
            it at such a length alone; a note of the report says so.
        seed: of the random tokens.

    Raises:
        ValueError: fewer than two documents, an unknown convention, a model without token
            embeddings or whose weights are on the meta device, or a patch that holds by half.
    """
    for name in (convention, *(conventions or ())):
        if name is not None and name not in CONVENTIONS:
            raise ValueError(f"convention must be one of {list(CONVENTIONS)}, got {name!r}")
    if convention is not None and conventions is not None:
        raise ValueError("give convention or conventions, not both")
    subject = Subject(model, lengths, seed)
    if conventions is not None:
        return {name: cell(subject, name) for name in conventions}
    if convention is None:
        convention = "packed batch" if subject.patched else "position_ids"
    return _report(subject, convention, type(model).__name__)


def cell(subject: Subject, convention: str, *, stop_at_leak: bool = False) -> IsolationReport:
    """The report of one convention, also where the model does not run."""
    name = type(subject.model).__name__
    try:
        return _report(subject, convention, name, stop_at_leak=stop_at_leak)
    except Exception as error:  # whatever a model raises is what its report says
        outcome, reason = outcome_of(error)
        return IsolationReport(name, convention, (), outcome=outcome, reason=reason)


def outcome_of(error: Exception) -> tuple[str, str]:
    """(outcome, one line) of an exception: what kind of no it is."""
    lines = str(error).strip().splitlines() or [""]
    reason = f"{type(error).__name__}: {lines[0]}"
    stated = isinstance(error, (NotImplementedError, ValueError)) or lines[0].startswith(
        "packed-attn"
    )
    if isinstance(error, NotOffered):
        return "not offered", lines[0]
    if stated or (isinstance(error, TypeError) and "unexpected keyword" in lines[0]):
        return "refused", reason
    return "error", reason


def _report(
    subject: Subject, convention: str, name: str, *, stop_at_leak: bool = False
) -> IsolationReport:
    chosen = CONVENTIONS[convention]
    notes: list[str] = []
    if chosen.training and drops(subject.model):
        notes.append("dropout was set to 0: its masks differ between a pack and a document alone")
    if is_compiled(subject.model):
        notes.append("audited eagerly: compiled code does not call an audit's hooks")
    flags = {"training": chosen.training, "checkpointing": chosen.checkpointing}
    with mode(subject.model, **flags) as awake, subject.hooked():
        if awake:
            notes.append(
                f"parameters that are all 0 hide what they multiply, and had random values here: "
                f"{len(awake)}, the first {awake[0]}"
            )
        notes += mixing_terms(subject)
        notes += unreached(subject.model, subject.lengths)
        try:
            proof = _Proof(subject, convention)
        except NoRowPerDocument as reason:
            checks = (Check(ALONE, "fails", float("inf"), 0.0),)
            return IsolationReport(name, convention, checks, None, (*notes, str(reason)))
        if not subject.looks_beyond():
            notes.append(BLIND)
        checks = tuple(proof.checks(stop_at_leak))
    return IsolationReport(name, convention, checks, proof.leak, (*notes, *proof.notes))


class _Proof:
    """One convention under way: the clean packed run, and the checks on it."""

    def __init__(self, subject: Subject, convention: str) -> None:
        self.subject = subject
        self.convention = CONVENTIONS[convention]
        self.alone = subject.alone()
        self.dtype = subject.computes_in()
        self.batch = subject.batch(subject.documents, self.convention)
        self.spans = subject.spans(self.batch)
        self.clean = subject.packed(self.batch)
        self.scale = max(float(torch.nan_to_num(self.clean).abs().max()), 1e-30)
        self.rounding = 0.0
        self.moved = 0.0
        self.leak: str | None = None
        self.notes: list[str] = []
        # Where runs of unlike shapes are compared, and what the packed one gives there.
        self.routing: AbstractContextManager[Any] = nullcontext()
        self.compared = self.clean
        self._hold_routing()

    def _hold_routing(self) -> None:
        """In half precision, in which a choice of experts may differ by a rounding."""
        held = HeldRouting(self.subject.model)
        if self.dtype not in HALF or not held.experts:
            return
        self.routing = held
        with held:
            self.alone, self.compared = self.subject.alone_again(), self.subject.packed(self.batch)
        if held.chosen:
            self.notes.append(
                f"in {_named(self.dtype)} a rounding may choose other experts: a pack was compared "
                "with its documents alone, and with another order, at experts of a token's id"
            )

    def checks(self, stop_at_leak: bool) -> Iterator[Check]:
        """The checks, in order; `stop_at_leak` ends them with the first that fails."""
        compares = self._compares()
        if compares:
            yield (first := self._alone())
            if stop_at_leak and first.verdict == "fails":
                self._name_the_leak()
                return
        gradient, own = self._gradients()
        self.may_round = gradient.verdict == "holds"
        for check in (self._perturbed(), gradient, self._nonfinite()):
            yield check
            if stop_at_leak and check.verdict == "fails":
                return
        if compares:
            yield self._reordered()
            if self.convention.training:
                yield own

    def _compares(self) -> bool:
        """Whether runs of unlike shapes tell anything; if not, a note says why."""
        if self._drawn():
            reason = "the model draws at random in train mode"
        elif self._chooses_otherwise():
            reason = (
                f"a rounding of {_named(self.dtype)} may choose other experts (audit in float32)"
            )
        else:
            return True
        self.notes.append(
            f"{reason}: a pack was not compared with its documents alone, nor with another order"
        )
        return False

    def _drawn(self) -> bool:
        """Whether the model draws at random; then only runs of one shape compare."""
        if not self.convention.training:
            return False
        other = self.subject.run(self.batch.kwargs, seed=self.subject.seed + 1)
        return not torch.equal(self.subject.rows(other, self.batch), self.clean)

    def _chooses_otherwise(self) -> bool:
        """Whether packed and alone differ by more than a rounding, while routers were to be held
        and chose by something else than topk (PhiMoE)."""
        held = self.routing
        unheld = isinstance(held, HeldRouting) and not held.chosen
        return unheld and self._alone().verdict == "fails"

    def _alone(self) -> Check:
        worst = max(
            difference(self.compared[a:b], alone) for (a, b), alone in zip(self.spans, self.alone)
        )
        self.rounding = worst
        return self._within(ALONE, worst)

    def _perturbed(self) -> Check:
        """Other tokens in each document in turn."""
        worst = 0.0
        for index in range(len(self.spans)):
            batch = self._changed_batch(index)
            worst = max(worst, self._changed(index, batch, self.subject.packed(batch)))
        return self._unchanged("perturbing a document changes no other", worst)

    def _name_the_leak(self) -> None:
        """The first leaking module, where no check has looked for it yet."""
        for index in range(len(self.spans)):
            batch = self._changed_batch(index)
            self._changed(index, batch, self.subject.packed(batch))

    def _changed_batch(self, index: int) -> AuditBatch:
        changed = list(self.subject.documents)
        changed[index] = self.subject.replacements[index]
        return self.subject.batch(changed, self.convention)

    def _changed(
        self, index: int, batch: AuditBatch, logits: Tensor, poison: tuple | None = None
    ) -> float:
        """How far all documents but `index` moved; notes the module where the first one did."""
        others = self._outside(index, logits.shape[0], self.spans)
        moved = difference(logits[others], self.clean[others])
        if moved > self.moved:
            self.moved = moved
            self.leak = self._parting(index, batch, poison)
        return moved

    def _parting(self, index: int, batch: AuditBatch, poison: tuple | None) -> str | None:
        """The module where all documents but `index` first moved; an encoder-decoder's decoder is
        looked at where its encoder is clean."""
        for stream in (self.batch, self.batch.target):
            if stream is None:
                continue
            tokens = self._outside(index, stream.rows * stream.tokens, stream.spans)
            leak = first_parting(
                self._trace(self.batch, None, stream), self._trace(batch, poison, stream), tokens
            )
            if leak is not None:
                return leak
        return None

    def _trace(self, batch: AuditBatch, poison: tuple | None, stream: AuditBatch) -> Trace:
        """The calls of all modules; their values are made a second time only where they part."""
        with Trace(self.subject.model, stream.rows, stream.tokens) as trace:
            self._run(batch, poison)
        return trace

    def _run(self, batch: AuditBatch, poison: tuple | None) -> Tensor:
        if poison is None:
            return self.subject.packed(batch)
        with Embeddings(self.subject.model, poison=poison):
            return self.subject.packed(batch)

    def _unchanged(self, name: str, worst: float) -> Check:
        # Experts group tokens by content, so another document changes the shape of a matrix
        # product: allowed as far as the same model rounds between packed and alone.
        within = self.rounding <= TOLERANCE[self.dtype] * self.scale  # what is more is none
        rounding = self.rounding if within else 0.0
        bound = 4 * max(rounding, torch.finfo(self.dtype).eps * self.scale)
        verdict: Verdict = "holds" if worst == 0 else "fails"
        if 0 < worst <= bound and self.may_round:
            verdict = "rounding"
        return self._check(name, verdict, worst, 0.0)

    def _gradients(self) -> tuple[Check, Check]:
        """Of each document's logits in the embeddings of all others, and in its own."""
        worst = apart = 0.0
        with self.routing:
            found = gradients_by_document(self.subject, self.batch)
        scale = reached(self.subject, [own for own, _ in found])
        for index, (own, others) in enumerate(found):
            worst = max(worst, largest(others))
            if self.convention.training:
                with self.routing:
                    alone = gradient_alone(
                        self.subject, index, checkpointing=self.convention.checkpointing
                    )
                apart = max(apart, difference(own, alone))
        verdict: Verdict = "holds" if worst == 0 else "fails"
        gradient = Check("gradient into other documents is 0", verdict, worst, 0.0)
        bound = GRADIENT_FACTOR * TOLERANCE[self.dtype]
        verdict = "holds" if apart <= bound * scale else "fails"
        own = Check("gradient in its own tokens equals alone", verdict, apart / scale, bound)
        return gradient, own

    def _nonfinite(self) -> Check:
        """NaN, then Inf, in each document's embeddings."""
        worst = 0.0
        for value in (torch.nan, torch.inf):
            for index, pool in enumerate(self.subject.pools[: len(self.spans)]):
                poison = (pool, value)
                logits = self._run(self.batch, poison)
                worst = max(worst, self._changed(index, self.batch, logits, poison))
        return self._unchanged(NONFINITE, worst)

    def _reordered(self) -> Check:
        order = list(reversed(range(len(self.spans))))
        batch = self.subject.batch([self.subject.documents[i] for i in order], self.convention)
        with self.routing:
            logits, spans = self.subject.packed(batch), self.subject.spans(batch)
        worst = max(
            difference(logits[slice(*spans[place])], self.compared[slice(*self.spans[i])])
            for place, i in enumerate(order)
        )
        return self._within("another order gives the same logits", worst)

    def _within(self, name: str, worst: float) -> Check:
        bound = TOLERANCE[self.dtype]
        verdict: Verdict = "holds" if worst <= bound * self.scale else "fails"
        return self._check(name, verdict, worst, bound)

    def _check(self, name: str, verdict: Verdict, worst: float, bound: float) -> Check:
        return Check(name, verdict, worst / self.scale, bound)

    def _outside(self, index: int, rows: int, spans: Sequence[tuple[int, int]]) -> Tensor:
        """bool `[rows]`: those of all other documents."""
        outside = torch.zeros(rows, dtype=torch.bool, device=self.clean.device)
        for other, (a, b) in enumerate(spans):
            outside[a:b] = other != index
        return outside


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
