"""What the attention benchmark found: rows, and a JSON file that is always up to date."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.candidates import Timing, Timings
from benchmarks.ceilings import Ceilings
from benchmarks.model import DESIGNS, DEVICES, predict, visible_pairs
from packed_attn.facts import gpu_facts, machine_facts
from tests.cases import Case

WRONG, ENDED, RAISED = "wrong, so not timed", "ended a run", "raised"
FAILED = (WRONG, ENDED, RAISED)
PACKAGES = ("torch", "triton", "transformers", "flash-attn", "flash-attn-4", "nvidia-cudnn-cu13")


@dataclass(frozen=True)
class Direction:
    """Milliseconds of one direction, and what useful work that is."""

    median: float
    quartiles: tuple[float, float]
    rounds: int
    tflops: float


@dataclass(frozen=True)
class Row:
    """One candidate on one case: two directions, or why there are none.

    host_us: microseconds until an eager forward returns, and until forward and backward have.
    eager: why the directions hold Python's time too; empty where CUDA graphs were timed.
    peak_bytes: what forward and backward take on the GPU at once, above the inputs; None without
        one.
    """

    case: str
    candidate: str
    exact: bool
    forward: Direction | None
    backward: Direction | None
    host_us: tuple[float, float] | None
    eager: tuple[str, ...]
    refused: tuple[str, ...]
    peak_bytes: int | None = None


class Report:
    """All that a run has found, on disk after each step.

    Attributes:
        cases, rows: what is done.
        without: candidates that ended an earlier run, and at which case.
        left_out: cases that are still to come.
        ceilings: of the GPU, once they are measured.
    """

    def __init__(self, path: Path, toy: bool) -> None:
        self._path = path
        self._facts = {"machine": machine_facts(*PACKAGES) | gpu_facts(), "toy": toy}
        self.cases: list[dict[str, Any]] = []
        self._rows: list[dict[str, Any]] = []
        self._running: tuple[str, str | None] | None = None
        self.rows: list[Row] = []
        self.without: dict[str, str] = {}
        self.left_out: list[str] = []
        self.ceilings: Ceilings | None = None

    @staticmethod
    def read(path: Path) -> Report:
        """What a run before this one has written, to go on from."""
        told = json.loads(path.read_text())
        report = Report(path, told["toy"])
        report.ceilings = Ceilings(**told["ceilings"]) if told.get("ceilings") else None
        report.cases, report._rows = told["cases"], told["rows"]
        report.rows = [row_of(row) for row in report._rows]
        report.without, running = told["without"], told["running"]
        report._running = None if running is None else (running[0], running[1])
        return report

    @property
    def done(self) -> set[str]:
        """Names of the cases that are not run again."""
        return {case["name"] for case in self.cases}

    def run(self, case: str, candidate: str | None) -> None:
        """Says, before it happens, what runs next; None is the timing of all candidates."""
        self._running = case, candidate
        self.write()

    def give_up_running(self) -> None:
        """What was running when the last run ended takes no part in this one."""
        if self._running is None:
            return
        case, candidate = self._running
        self._running = None
        if candidate is None:
            self.cases.append({"name": case, "lost": "a run ended while it was timed"})
        else:
            self.without[candidate] = case

    def add(
        self,
        case: Case,
        exact: Mapping[str, bool],
        reasons: Mapping[str, tuple[str, ...]],
        timings: Mapping[str, Timings],
    ) -> list[Row]:
        """The rows of a case that is done, which are also written."""
        flops = _useful_flops(case)
        rows = [
            _finished(case.name, name, exact[name], reasons[name], timings.get(name), flops)
            for name in exact
        ]
        self.rows += rows
        self._rows += [asdict(row) for row in rows]
        self.cases.append(described(case) | _clock())
        self._running = None
        self.write()
        return rows

    def write(self) -> None:
        told = self._facts | {
            "ceilings": None if self.ceilings is None else asdict(self.ceilings),
            "cases": self.cases,
            "rows": self._rows,
            "left_out": self.left_out,
            "running": self._running,
            "without": self.without,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(told, indent=1) + "\n")


def described(case: Case) -> dict[str, Any]:
    """The case and what the model predicted for it, milliseconds from fastest to slowest."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    device = DEVICES["H200" if "H200" in gpu else "H100"]
    design = next(d for d in DESIGNS if d.name == "listed, heavy first")
    predicted = {
        direction: [round(1e3 * s, 4) for s in predict(case, design, device, backward).seconds]
        for direction, backward in (("forward", False), ("backward", True))
    }
    shape = (case.num_heads, case.num_kv_heads, case.head_dim, case.value_head_dim or case.head_dim)
    return {
        "name": case.name,
        "tokens": sum(case.lengths),
        "documents": len(case.lengths),
        "longest": max(case.lengths, default=0),
        "heads, kv heads, head_dim, value_head_dim": shape,
        "mask and modifiers": case.kwargs() | {"sinks": case.sinks},
        "visible_pairs": visible_pairs(case),
        "device": device.name,
        "predicted, ms": predicted,
    }


def _finished(
    case: str,
    name: str,
    exact: bool,
    reasons: tuple[str, ...],
    timings: Timings | None,
    flops: float,
) -> Row:
    if timings is None:
        return Row(case, name, exact, None, None, None, (), reasons)
    return Row(
        case,
        name,
        exact,
        _direction(timings.forward, flops),
        _direction(timings.backward, 2.5 * flops),
        timings.host_us,
        timings.eager,
        reasons,
        timings.peak_bytes,
    )


def _direction(timing: Timing, flops: float) -> Direction:
    tflops = round(flops / timing.median / 1e9, 1)
    return Direction(timing.median, timing.quartiles, timing.rounds, tflops)


def row_of(told: dict[str, Any]) -> Row:
    """A row as it was written."""
    fields = dict(told)
    for name in ("forward", "backward"):
        if fields[name] is not None:
            fields[name] = Direction(**fields[name])
    return Row(**fields | {"refused": tuple(told["refused"]), "eager": tuple(told["eager"])})


def _useful_flops(case: Case) -> float:
    value_dim = case.value_head_dim or case.head_dim
    return 2.0 * visible_pairs(case) * case.num_heads * (case.head_dim + value_dim)


def _clock() -> dict[str, int]:
    """The clock just after the timing; an idle GPU would tell another one."""
    try:
        return {"sm_clock_mhz": torch.cuda.clock_rate()}
    except (ModuleNotFoundError, RuntimeError, AssertionError):  # no pynvml, no GPU
        return {}
