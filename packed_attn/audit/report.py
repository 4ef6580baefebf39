"""What an audit found: plain frozen values that pickle and turn into JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["holds", "rounding", "fails"]
# A masked score of -inf is a weight of 0, and 0 x NaN is NaN: dense masks fail this check alone.
NONFINITE = "NaN and Inf stay in their document"
# A convention's verdict, from best to worst.
VERDICTS = (
    "isolated",
    "isolated up to rounding",
    "refused",
    "not offered",
    "leaks only NaN and Inf",
    "leaks",
    "error",
)


@dataclass(frozen=True)
class Check:
    """One of the checks.

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
    """What `audit` found by one convention. `str(report)` is a table.

    Attributes:
        model: class of the audited model.
        convention: which boundaries the batch carried (see `CONVENTIONS`).
        checks: the checks; empty where the model did not run.
        first_leaking_module: path and class of the first module whose inputs for a document were
            clean and whose outputs were not; None when nothing leaks.
        notes: what a reader should know beside the verdict, such as loss terms that mix documents
            by design.
        outcome: how a model that did not run said no: "refused" (a stated reason), "not offered"
            (the architecture lacks the mode) or "error" (any other exception); None where it ran.
        reason: of `outcome`, one line.
    """

    model: str
    convention: str
    checks: tuple[Check, ...]
    first_leaking_module: str | None = None
    notes: tuple[str, ...] = ()
    outcome: str | None = None
    reason: str | None = None

    @property
    def isolated(self) -> bool:
        """Whether the model ran and every check holds, exactly or up to rounding."""
        return self.outcome is None and all(check.verdict != "fails" for check in self.checks)

    @property
    def leaks(self) -> bool:
        """Whether a check fails."""
        return self.outcome is None and not self.isolated

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`."""
        if self.outcome is not None:
            return self.outcome
        failing = {check.name for check in self.checks if check.verdict == "fails"}
        if failing:
            return "leaks only NaN and Inf" if failing == {NONFINITE} else "leaks"
        rounding = any(check.verdict == "rounding" for check in self.checks)
        return "isolated up to rounding" if rounding else "isolated"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {"verdict": self.verdict, "isolated": self.isolated, **asdict(self)}

    def __str__(self) -> str:
        lines = [f"{self.model}, given {self.convention}: {self.verdict}"]
        if self.reason is not None:
            lines.append(f"  {self.reason}")
        width = max((len(check.name) for check in self.checks), default=0)
        for check in self.checks:
            figure = f"{check.figure:.1e} (bound {check.bound:.1e})"
            lines.append(f"  {check.name:{width}}  {check.verdict:8}  {figure}")
        if self.first_leaking_module:
            word = "first leaking module" if not self.isolated else "rounding begins in"
            lines.append(f"  {word}: {self.first_leaking_module}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)
