"""The goals of speed on a Hopper GPU, and what a run has measured of each."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.attention_figures import US, Attention, Missing, Way
from benchmarks.regimes import REGIMES

BY_LETTER = dict(zip("abcdef", REGIMES))
# What the goals take for a card's ceilings; a run says its own card's beside them.
PRODUCT_TFLOPS, COPY_TB_S = 790.0, 4.3
BEST, PRODUCT, COPY = "best exact peer", "product", "copy"


@dataclass(frozen=True)
class Goal:
    """At least so many times as fast as a peer, or such a share of a ceiling.

    Attributes:
        regime: a letter of `BY_LETTER`.
        against: a heading of `attention_figures.PEERS`, `BEST`, `PRODUCT` or `COPY`.
    """

    regime: str
    way: Way
    against: str
    least: float

    def __str__(self) -> str:
        if self.against == PRODUCT:
            return f">= {self.least:.0%} of {PRODUCT_TFLOPS:g} TFLOP/s"
        if self.against == COPY:
            return f">= {self.least:.0%} of {COPY_TB_S:g} TB/s"
        return f">= {self.least:.2f}x {self.against}"


GOALS = (
    Goal("a", "forward", "FA3", 0.95),
    Goal("a", "forward", "FA2", 1.7),
    Goal("a", "forward", "cuDNN", 1.05),
    Goal("a", "forward", PRODUCT, 0.80),
    Goal("b", "forward", BEST, 1.0),
    Goal("c", "forward", BEST, 2.5),
    Goal("c", "forward", COPY, 0.50),
    Goal("d", "forward", BEST, 1.05),
    Goal("d", "forward", "FA2", 1.7),
    Goal("e", "forward", BEST, 1.05),
    Goal("e", "forward", "FA2", 2.5),
    Goal("a", "backward", "FA3", 0.95),
    Goal("a", "backward", "FA2", 1.6),
    Goal("a", "backward", PRODUCT, 0.66),
    Goal("b", "backward", BEST, 1.1),
    Goal("c", "backward", BEST, 2.5),
    Goal("c", "backward", COPY, 0.40),
    Goal("d", "backward", BEST, 1.25),
    Goal("e", "backward", BEST, 1.5),
)


@dataclass(frozen=True)
class Reached:
    """What was measured of a goal, as it is told, and whether that is enough."""

    told: str
    holds: bool


def reached(goal: Goal, attention: Attention) -> Reached | Missing:
    """What the run says about the goal."""
    case = BY_LETTER[goal.regime]
    if goal.against in (PRODUCT, COPY):
        return _share(goal, case, attention)
    ratio = (
        attention.best(case, goal.way)
        if goal.against == BEST
        else attention.ratio(case, goal.way, goal.against)
    )
    if isinstance(ratio, Missing):
        return ratio
    return Reached(f"{ratio} ({ratio.candidate})", ratio.value >= goal.least)


def _share(goal: Goal, case: str, attention: Attention) -> Reached | Missing:
    ours = attention.timed(case, goal.way, US)
    if isinstance(ours, Missing):
        return ours
    if goal.against == PRODUCT:
        got, assumed, unit = attention.tflops(case, goal.way, ours), PRODUCT_TFLOPS, "TFLOP/s"
    else:
        got = attention.moved_bytes(case, goal.way) / ours.direction.median / 1e9
        assumed, unit = COPY_TB_S, "TB/s"
    told = f"{got / assumed:.0%} ({got:.3g} {unit}"
    if attention.ceilings is not None:
        ceilings = attention.ceilings
        own = ceilings.product_tflops if goal.against == PRODUCT else ceilings.copy_tb_s
        told += f", {got / own:.0%} of this card's {own:.3g}"
    return Reached(told + ")", got / assumed >= goal.least)
