"""Many architectures by every convention, stock beside patched, each in a child process."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from packed_attn.audit.conventions import TELLING
from packed_attn.audit.proof import cell, outcome_of
from packed_attn.audit.report import VERDICTS, IsolationReport
from packed_attn.audit.subject import LENGTHS, Subject
from packed_attn.facts import machine_facts

# The auto class of each head, and transformers' table of the types that have it.
HEADS = {
    "causal-lm": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "masked-lm": ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    "sequence-classification": (
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
    "token-classification": (
        "AutoModelForTokenClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    ),
}
# One architecture takes 2 to 10 s of CPU time by every convention.
SECONDS = 180
SIDES = ("stock", "patched")


@dataclass(frozen=True)
class Cell:
    """One model by one convention.

    Attributes:
        verdict: one of `VERDICTS`.
        detail: the first leaking module, or why the model did not run; "" where neither.
    """

    verdict: str
    detail: str = ""

    @staticmethod
    def of(report: IsolationReport) -> Cell:
        return Cell(report.verdict, report.reason or report.first_leaking_module or "")


@dataclass(frozen=True)
class MatrixRow:
    """One model by every convention.

    Attributes:
        name: its model type, or what it was loaded from.
        model_class: its class; "" where it could not be built.
        head: a key of `HEADS`; "" for a model that was loaded.
        stock, patched: a cell for each convention; empty where that side was not asked for.
        notes: loss terms that mix documents by design, and what else its reports say.
        seconds: of CPU time that the row took.
    """

    name: str
    model_class: str
    head: str
    stock: dict[str, Cell]
    patched: dict[str, Cell]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Matrix:
    """Rows of models by columns of conventions.

    Attributes:
        conventions: the columns.
        rows: the models.
        facts: versions, machine and date.
        seconds: that the whole matrix took.
    """

    conventions: tuple[str, ...]
    rows: tuple[MatrixRow, ...]
    facts: dict[str, str]
    seconds: float

    def counts(self, side: str, convention: str) -> dict[str, int]:
        """Models with each verdict that occurs, in the order of `VERDICTS`."""
        cells = [getattr(row, side).get(convention) for row in self.rows]
        found = Counter(c.verdict for c in cells if c is not None)
        return {verdict: found[verdict] for verdict in VERDICTS if found[verdict]}

    def cells(self, side: str) -> Iterator[Cell]:
        """Every cell of one side."""
        for row in self.rows:
            yield from getattr(row, side).values()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return asdict(self)


def model_types(head: str = "causal-lm") -> list[str]:
    """Every model type of the installed transformers with this head."""
    from transformers.models.auto import modeling_auto

    return sorted(getattr(modeling_auto, HEADS[head][1]))


def audit_architectures(
    model_types: Sequence[tuple[str, str]],
    *,
    conventions: Sequence[str] = TELLING,
    processes: int = 2,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Matrix:
    """The matrix of tiny random models, each in a child process with a memory and a time limit.

    A model that cannot be built, crashes or hangs has "error" cells with the reason.

    Args:
        model_types: (head, model type) of each row.
        processes: how many children run at a time.
        progress: wraps the rows as they come, such as a progress bar.
    """
    from packed_attn_patches.children import in_children

    started = time.monotonic()
    items = [(head, name, tuple(conventions)) for head, name in model_types]
    found = in_children(audit_architecture, items, processes=processes, seconds=SECONDS)
    rows = [
        row if isinstance(row, MatrixRow) else _failed(head, name, conventions, str(row))
        for (head, name), row in zip(model_types, progress(found))
    ]
    return _matrix(rows, conventions, started)


def audit_models(
    models: Iterable[tuple[str, nn.Module]],
    *,
    conventions: Sequence[str] = TELLING,
    patch: Callable[[nn.Module], Any] | None,
) -> Matrix:
    """The matrix of models that are loaded already; they stay patched.

    Args:
        models: (name, model) of each row.
        patch: patches a model; None audits it as it is.
    """
    started = time.monotonic()
    rows = [_row(name, "", model, conventions, patch) for name, model in models]
    return _matrix(rows, conventions, started)


def audit_architecture(head: str, model_type: str, conventions: Sequence[str]) -> MatrixRow:
    """The row of one tiny random model, in this process."""
    import warnings

    import transformers
    from packed_attn_patches.tiny import tiny_model

    from packed_attn.patching import patch_model

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    try:
        model = tiny_model(model_type, auto_class=getattr(transformers, HEADS[head][0]))
    except Exception as error:  # some types have no tiny config: a cell says why
        reason = f"could not be built: {outcome_of(error)[1]}"
        return _failed(head, model_type, conventions, reason)
    return _row(model_type, head, model, conventions, patch_model)


def _row(
    name: str,
    head: str,
    model: nn.Module,
    conventions: Sequence[str],
    patch: Callable[[nn.Module], Any] | None,
) -> MatrixRow:
    started = time.process_time()
    stock, notes = _side(model, conventions)
    patched: dict[str, Cell] = {}
    if patch is not None:
        try:
            patch(model)
            patched, more = _side(model, conventions)
            notes = notes | more
        except Exception as error:  # a refusal is a finding
            patched = dict.fromkeys(conventions, Cell(*outcome_of(error)))
    seconds = round(time.process_time() - started, 2)
    return MatrixRow(name, type(model).__name__, head, stock, patched, tuple(notes), seconds)


def _side(model: nn.Module, conventions: Sequence[str]) -> tuple[dict[str, Cell], dict[str, None]]:
    """Cells by convention, and what the reports noted, each note once."""
    try:
        subject = Subject(model, LENGTHS, 0)
    except ValueError as error:
        return dict.fromkeys(conventions, Cell(*outcome_of(error))), {}
    reports = {name: cell(subject, name, stop_at_leak=True) for name in conventions}
    notes = {note: None for report in reports.values() for note in report.notes}
    return {name: Cell.of(report) for name, report in reports.items()}, notes


def _failed(head: str, name: str, conventions: Sequence[str], reason: str) -> MatrixRow:
    cells = dict.fromkeys(conventions, Cell("error", reason))
    return MatrixRow(name, "", head, cells, cells)


def _matrix(rows: Sequence[MatrixRow], conventions: Sequence[str], started: float) -> Matrix:
    facts = machine_facts("torch", "transformers")
    return Matrix(tuple(conventions), tuple(rows), facts, round(time.monotonic() - started, 1))
