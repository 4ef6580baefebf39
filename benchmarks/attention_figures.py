"""What an attention.json says: speeds, ratios and predictions, or why there is none.

Candidates stand under headings: `US`, our kernels as `attention` runs them, and those of `PEERS`. A
ratio is how many times longer a peer takes than we do. Bytes are those that must cross the memory
bus once, whatever a kernel does: half precision, and lse in float32.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.attention_report import Direction, Row, row_of
from benchmarks.ceilings import Ceilings
from benchmarks.peers import OURS

Way = Literal["forward", "backward"]
WAYS: tuple[Way, Way] = ("forward", "backward")
US = "packed-attn"
# A heading, and how names of candidates begin whose fastest one stands under it.
PEERS: dict[str, tuple[str, ...]] = {
    "FA2": ("flash2", "aten flash-attn 2"),
    "FA3": ("flash3",),
    "FA4": ("flash4",),
    "cuDNN": ("cudnn",),
    "torch varlen": ("torch_varlen",),
    "flex": ("flex",),
    "padded": ("sdpa padded",),
    "contaminated": ("dense, contaminated",),
}
# Exact, but no peers: our own kernels in other ways, and what is not meant for a GPU.
OWN = (OURS, "cpu", "reference")


@dataclass(frozen=True)
class Missing:
    """There is no such figure."""

    why: str


@dataclass(frozen=True)
class Timed:
    """One direction of one candidate."""

    candidate: str
    direction: Direction
    eager: bool


@dataclass(frozen=True)
class Ratio:
    """How many times longer than ours the candidate takes."""

    candidate: str
    value: float
    eager: bool

    def __str__(self) -> str:
        return f"{self.value:.2f}x" + (" eager" if self.eager else "")


class Attention:
    """One run of the benchmark.

    Attributes:
        machine: its facts.
        toy: sizes for the CPU, whose times mean nothing.
        ceilings: of the card; None where the run did not measure them.
        cases: those that are done, by name, as `attention_report.described` tells them.
        left_out, lost, without: cases the run did not come to, or ended in; candidates that ended
            one, and where.
    """

    def __init__(self, told: dict[str, Any]) -> None:
        self.machine: dict[str, str] = told["machine"]
        self.toy: bool = told["toy"]
        self.ceilings = Ceilings(**told["ceilings"]) if told.get("ceilings") else None
        self.cases = {case["name"]: case for case in told["cases"] if "lost" not in case}
        self.lost = {case["name"]: case["lost"] for case in told["cases"] if "lost" in case}
        self.left_out: list[str] = told["left_out"]
        self.without: dict[str, str] = told["without"]
        self.rows: dict[str, list[Row]] = {}
        for row in told["rows"]:
            self.rows.setdefault(row["case"], []).append(row_of(row))

    @staticmethod
    def read(path: Path) -> Attention:
        """What the benchmark has written.

        Raises:
            OSError: there is no such file.
            ValueError: it is no attention.json.
        """
        try:
            return Attention(json.loads(path.read_text()))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no result of benchmarks.bench_attention: {error}"
            ) from error

    def under(self, case: str, heading: str) -> list[Row]:
        """The candidates of a heading, timed or not."""
        rows = self.rows.get(case, [])
        if heading == US:
            return [row for row in rows if row.candidate == OURS]
        return [row for row in rows if row.candidate.startswith(PEERS[heading])]

    def timed(self, case: str, way: Way, heading: str) -> Timed | Missing:
        """The fastest candidate of a heading."""
        return self._fastest(case, way, self.under(case, heading))

    def ratio(self, case: str, way: Way, peer: str) -> Ratio | Missing:
        """Of the peer with this heading, to ours."""
        return self._to_ours(case, way, self.timed(case, way, peer))

    def best(self, case: str, way: Way) -> Ratio | Missing:
        """Of the fastest exact peer, to ours."""
        rows = [
            row
            for row in self.rows.get(case, [])
            if row.exact and not row.candidate.startswith(OWN) and row.forward is not None
        ]
        return self._to_ours(case, way, self._fastest(case, way, rows))

    def flops(self, case: str, way: Way) -> float:
        """Of visible pairs: two products forward, five backward."""
        told = self.cases[case]
        heads, _, head_dim, value_dim = self.shape(case)
        forward = 2.0 * told["visible_pairs"] * heads * (head_dim + value_dim)
        return forward if way == "forward" else 2.5 * forward

    def tflops(self, case: str, way: Way, timed: Timed) -> float:
        """Useful TFLOP/s of a candidate."""
        return self.flops(case, way) / timed.direction.median / 1e9

    def moved_bytes(self, case: str, way: Way) -> float:
        """Operands in and results out, once; backward reads out and its gradient too."""
        queries, keys, values, outputs, lse = self._bytes(case)
        if way == "forward":
            return queries + keys + values + outputs + lse
        return 2 * (queries + keys + values + outputs) + lse

    def intensity(self, case: str, way: Way) -> float:
        """Useful FLOPs a byte that must move."""
        return self.flops(case, way) / self.moved_bytes(case, way)

    def result_bytes(self, case: str) -> float:
        """out, lse and the gradients of q, k and v: what any candidate holds at the end."""
        return sum(self._bytes(case))

    def predicted_tflops(self, case: str, way: Way) -> tuple[float, float]:
        """Slowest and fastest by `benchmarks.model`."""
        fast, slow = self.cases[case]["predicted, ms"][way]
        flops = self.flops(case, way) / 1e9
        return flops / slow, flops / fast

    def shape(self, case: str) -> tuple[int, int, int, int]:
        """Heads, kv heads, head_dim, value_head_dim."""
        heads, kv_heads, head_dim, value_dim = self.cases[case][
            "heads, kv heads, head_dim, value_head_dim"
        ]
        return heads, kv_heads, head_dim, value_dim

    def _bytes(self, case: str) -> tuple[float, float, float, float, float]:
        """q, k, v, out, lse; each gradient is as large as what it belongs to."""
        tokens = self.cases[case]["tokens"]
        heads, kv_heads, head_dim, value_dim = self.shape(case)
        return (
            2.0 * tokens * heads * head_dim,
            2.0 * tokens * kv_heads * head_dim,
            2.0 * tokens * kv_heads * value_dim,
            2.0 * tokens * heads * value_dim,
            4.0 * tokens * heads,
        )

    def _fastest(self, case: str, way: Way, rows: list[Row]) -> Timed | Missing:
        if case not in self.cases:
            return Missing(self._absent(case))
        found = [
            Timed(row.candidate, direction, bool(row.eager))
            for row in rows
            if (direction := getattr(row, way)) is not None
        ]
        if found:
            return min(found, key=lambda timed: timed.direction.median)
        reasons = [f"{row.candidate}: {reason[:150]}" for row in rows for reason in row.refused[:1]]
        return Missing("; ".join(reasons) or "no such candidate took part")

    def _to_ours(self, case: str, way: Way, peer: Timed | Missing) -> Ratio | Missing:
        ours = self.timed(case, way, US)
        if isinstance(peer, Missing):
            return peer
        if isinstance(ours, Missing):
            return Missing(f"ours was not timed: {ours.why}")
        value = peer.direction.median / ours.direction.median
        return Ratio(peer.candidate, value, peer.eager or ours.eager)

    def _absent(self, case: str) -> str:
        if case in self.left_out:
            return "the run's seconds were over before this case"
        return self.lost.get(case, "the run did not choose this case")
