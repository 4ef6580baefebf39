"""The tables of the report and of the README. A figure that is missing is named below its table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.attention_figures import PEERS, US, WAYS, Attention, Missing, Ratio, Way
from benchmarks.goals import BY_LETTER, GOALS, reached
from benchmarks.regimes import REGIMES

NONE = "–"
LETTERS = {case: letter for letter, case in BY_LETTER.items()}
# Of the README: the regimes of packing but the forest, which no peer has, and other head sizes.
README_CASES = {
    "llama3_8b/one_32k": "one document of 32,768",
    "llama3_8b/64x512": "64 documents of 512",
    "llama3_8b/1000x32": "1000 documents of 32",
    "llama3_8b/log_normal": "log-normal lengths",
    "llama3_8b/one_16k_256x64": "one of 16,384 and 256 of 64",
    "llama3_8b/log_normal/head_dim_64": "log-normal, 32:8 heads of 64",
    "llama3_8b/log_normal/head_dim_256": "log-normal, 16:4 heads of 256",
}
README_PEERS = ("FA2", "FA3")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def goals_table(attention: Attention) -> str:
    """Each goal with what was measured of it."""
    rows, absent, held = [], Absent(), 0
    for goal in GOALS:
        case = BY_LETTER[goal.regime]
        found = reached(goal, attention)
        if isinstance(found, Missing):
            absent.add(str(goal), f"{goal.regime} {goal.way}", found)
            told, holds = NONE, "not measured"
        else:
            told, holds = found.told, "yes" if found.holds else "no"
            held += found.holds
        speed = _speed(attention, case, goal.way)
        rows.append([f"{goal.regime}: {case}", goal.way, str(goal), told, holds, *speed])
    count = f"{held} of {len(GOALS)} goals hold, {absent.count} are not measured."
    head = ["regime", "direction", "goal", "measured", "holds", "TFLOP/s", "predicted"]
    return f"{count}\n\n{table(head, rows)}{absent}"


def speed_sections(attention: Attention) -> list[str]:
    """A table for each direction of each group of cases."""
    groups: dict[str, list[str]] = {}
    for case in [*REGIMES, *attention.cases]:
        cases = groups.setdefault(_group(case), [])
        if case not in cases:
            cases.append(case)
    return [
        f"#### {group}, {way}\n\n{_speed_table(attention, cases, way)}"
        for group, cases in groups.items()
        for way in WAYS
    ]


def _group(case: str) -> str:
    what = case.rsplit("/", 1)[-1]
    if case in REGIMES:
        return "Regimes of packing"
    if what.startswith("head_dim_"):
        return "Head sizes"
    if what.startswith("heads_"):
        return "Groups of heads"
    if what.startswith(("window", "bidirectional")):
        return "Masks"
    return "Other layouts and models"


def _speed_table(attention: Attention, cases: Sequence[str], way: Way) -> str:
    rows, absent = [], Absent()
    for case in cases:
        ours = attention.timed(case, way, US)
        ratios: dict[str, Ratio | Missing] = {
            peer: attention.ratio(case, way, peer) for peer in PEERS
        }
        best = attention.best(case, way)
        if isinstance(ours, Missing):
            absent.add("ours", LETTERS.get(case, case), ours)
        else:
            for peer, ratio in {**ratios, "best exact peer": best}.items():
                if isinstance(ratio, Missing):
                    absent.add(peer, LETTERS.get(case, case), ratio)
        named = NONE if isinstance(best, Missing) else f"{best} {best.candidate}"
        cells = [_told(ratio) for ratio in ratios.values()]
        shape = _shape(attention, case) if case in attention.cases else NONE
        rows.append([_lettered(case), shape, *_speed(attention, case, way), *cells, named])
    head = ["case", "heads and mask", "TFLOP/s", "predicted", *PEERS, "best exact peer"]
    return f"{table(head, rows)}{absent}"


def _speed(attention: Attention, case: str, way: Way) -> tuple[str, str]:
    """Ours in TFLOP/s, and the range that was predicted."""
    if case not in attention.cases:
        return NONE, NONE
    ours = attention.timed(case, way, US)
    measured = NONE
    if not isinstance(ours, Missing):
        measured = f"{attention.tflops(case, way, ours):.3g}" + " eager" * ours.eager
    slow, fast = attention.predicted_tflops(case, way)
    return measured, f"{slow:.3g} to {fast:.3g}"


def memory_table(attention: Attention) -> str:
    """MiB of a forward and backward above the inputs."""

    def cell(row: Any) -> str | None:
        return None if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}"

    note = (
        "MiB of an eager forward and backward above the inputs; first what must be there at the end"
    )
    ends = {
        case: f"{attention.result_bytes(case) / 2**20:,.0f}"
        for case in REGIMES
        if case in attention.cases
    }
    return _by_regime(attention, note, cell, "peak memory", {"out, lse, gradients": ends})


def host_table(attention: Attention) -> str:
    """Microseconds until an eager call returns."""

    def cell(row: Any) -> str | None:
        if row.host_us is None:
            return None
        return f"{row.host_us[0]:,.0f} + {row.host_us[1] - row.host_us[0]:,.0f}"

    note = "Microseconds until an eager call returns to Python, forward + backward"
    return _by_regime(attention, note, cell, "host time", {})


def _by_regime(
    attention: Attention,
    note: str,
    cell: Any,
    what: str,
    first: Mapping[str, Mapping[str, str]],
) -> str:
    """Candidates by regimes of packing."""
    cases = [case for case in REGIMES if case in attention.cases]
    found: dict[str, dict[str, str]] = {name: dict(cells) for name, cells in first.items()}
    absent = Absent()
    for case in cases:
        for row in attention.rows.get(case, []):
            told = cell(row)
            if told is not None:
                found.setdefault(row.candidate, {})[case] = told
            elif row.forward is not None:
                absent.add(
                    row.candidate,
                    LETTERS.get(case, case),
                    Missing(f"its {what} is not in attention.json"),
                )
    for case in REGIMES:
        if case not in cases:
            absent.add("all candidates", LETTERS[case], Missing("the case was not run"))
    rows = [[name, *(cells.get(case, NONE) for case in cases)] for name, cells in found.items()]
    head = ["candidate", *(_lettered(case) for case in cases)]
    return f"{note}.\n\n{table(head, rows)}{absent}"


def training_table(told: Mapping[str, Any], models: Sequence[str]) -> str:
    """Whole steps: speed over the others, memory, launches and waits where a GPU told them.

    Args:
        models: those of which the file should have a step.
    """
    rows, absent = [], Absent()
    for step in told["steps"]:
        ours, graph = step.get("packed-attn"), step.get("packed-attn, CUDA graph", {})
        rows.append(
            [
                step.get("model", "demo"),
                str(step["capacity"]),
                str(step["documents"]),
                f"{step['tokens_per_second']:,.0f}",
                f"{step['mfu']:.2f}" if "mfu" in step else NONE,
                *(
                    f"{step[f'over_{other}']:.2f}x" if f"over_{other}" in step else NONE
                    for other in ("stock", "padded", "contaminated")
                ),
                f"{step['loss_error']:.1e}",
                " / ".join(
                    f"{step[name]['step_bytes'] / 2**30:.2f}" if name in step else NONE
                    for name in ("packed-attn", "stock packing", "padded", "contaminated")
                ),
                NONE if ours is None else f"{ours['kernels']}, {ours['host_waits']}",
                graph.get("reason") or (f"{graph['eager_over_graph']:.2f}x" if graph else NONE),
            ]
        )
    head = ["model", "capacity", "documents", "real tokens/s", "MFU", "stock packing", "padded"]
    head += ["contaminated", "losses differ", "GiB: ours / stock / padded / contaminated"]
    head += ["kernels, host waits", "CUDA graph over eager"]
    for model in models:
        if model not in [row[0] for row in rows]:
            absent.add("a step", model, Missing("the file holds none"))
    note = f"Ratios are ours over theirs; {NONE}: the file does not say."
    return f"{table(head, rows)}\n\n{note}{absent}"


def readme_table(attention: Attention) -> str:
    """Ours in TFLOP/s and times faster than flash-attn, on one page's width."""
    machine, absent, rows = attention.machine, Absent(), []
    for case, named in README_CASES.items():
        row = [named]
        for way in WAYS:
            ours = attention.timed(case, way, US)
            ratios = [attention.ratio(case, way, peer) for peer in README_PEERS]
            best = attention.best(case, way)
            if isinstance(ours, Missing):
                absent.add(f"ours, {way},", named, ours)
                row += [NONE] * 4
                continue
            for peer, ratio in zip((*README_PEERS, "best exact peer"), (*ratios, best)):
                if isinstance(ratio, Missing):
                    absent.add(f"{peer}, {way},", named, ratio)
            cells = [_told(ratio) for ratio in ratios]
            last = NONE if isinstance(best, Missing) else f"{best} {best.candidate}"
            row += [f"{attention.tflops(case, way, ours):.0f}", *cells, last]
        rows.append(row)
    columns = ("TFLOP/s", *(f"over {peer}" for peer in README_PEERS), "over the best exact peer")
    head = ["32k tokens, 32:8 heads of 128", *(f"{way}, {c}" for way in WAYS for c in columns)]
    facts = ", ".join(
        f"{name} {machine[name]}" for name in ("torch", "triton", "flash-attn") if name in machine
    )
    return (
        f"{machine['gpu']} ({facts}; {machine['date']}), bf16, causal, medians of CUDA graph "
        "replays (`packed-attn bench attention`); eager: one of the two could not be captured:"
        f"\n\n{table(head, rows)}{absent}"
    )


class Absent:
    """Figures that are missing, by their reasons; as text, a list to stand below a table."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, list[str]]] = {}

    def add(self, what: str, where: str, missing: Missing) -> None:
        """One figure and the row in which it would stand."""
        self._found.setdefault(missing.why, {}).setdefault(what, []).append(where)

    @property
    def count(self) -> int:
        """How many figures."""
        return sum(len(rows) for whats in self._found.values() for rows in whats.values())

    def __str__(self) -> str:
        lines = [f"- {_places(whats)} ({why})" for why, whats in self._found.items()]
        return "\n\nNot measured:\n\n" + "\n".join(lines) if lines else ""


def _places(whats: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{what} at {', '.join(rows)}" for what, rows in whats.items())


def _told(ratio: Ratio | Missing) -> str:
    return NONE if isinstance(ratio, Missing) else str(ratio)


def _lettered(case: str) -> str:
    return f"{LETTERS[case]}: {case}" if case in LETTERS else case


def _shape(attention: Attention, case: str) -> str:
    heads, kv_heads, head_dim, value_dim = attention.shape(case)
    sizes = f"{head_dim}" if head_dim == value_dim else f"{head_dim}, values {value_dim}"
    options = attention.cases[case]["mask and modifiers"]
    mask = ["causal" if options["causal"] else "bidirectional"]
    if any(side >= 0 for side in options["window_size"]):
        mask.append("window {}, {}".format(*options["window_size"]))
    mask += [f"chunks of {n}" for n in (options.get("chunk_size"),) if n is not None]
    mask += [f"softcap {n:g}" for n in (options.get("softcap"),) if n is not None]
    mask += ["sinks"] * bool(options.get("sinks"))
    return f"{heads}:{kv_heads} of {sizes}, {', '.join(mask)}"
