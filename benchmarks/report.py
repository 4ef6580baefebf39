"""One Markdown report with plots of what the benchmarks wrote, measured beside predicted.

    python -m benchmarks.report [--results DIR] [--output DIR] [--readme]

Reads the JSON files of `benchmarks.suite` and computes every ratio from them. What a file does not
hold is named where it would stand. `--readme` prints the short table of speed that the README
holds and writes nothing. `packed-attn bench --report` is this command.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import report_plots
from benchmarks.attention_figures import Attention
from benchmarks.attention_table import case_table
from benchmarks.bench_cpu import HEAD as CPU_HEAD
from benchmarks.bench_cpu import Row as CPURow
from benchmarks.bench_cpu import markdown as cpu_markdown
from benchmarks.report_tables import (
    goals_table,
    host_table,
    memory_table,
    readme_table,
    speed_sections,
    training_table,
)
from benchmarks.suite import BENCHES, BY_NAME, MODELS, RESULTS

OUTPUT = Path("bench-report")
NO_ATTENTION = (
    "Attention has not yet been timed on a GPU by one whole run of `packed-attn bench attention`."
)

LEGEND = (
    "TFLOP/s count visible pairs alone. Under a peer stands how many times longer it takes than "
    "packed-attn: above 1, packed-attn is faster. Where it says eager, one of the two could not be "
    "captured and was timed as Python runs it. The contaminated kernel lets documents see each "
    "other and is there for scale."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the report, or prints the README's table; 2 where a file cannot be read."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder to write")
    parser.add_argument("--readme", action="store_true", help="print the README's table of speed")
    options = parser.parse_args(arguments)
    try:
        if options.readme:
            print(readme(options.results))
        else:
            print(write_report(options.results, options.output))
    except (OSError, ValueError, ImportError) as error:
        print(f"packed-attn bench: {error}", file=sys.stderr)
        return 2
    return 0


def readme(results: Path) -> str:
    """The README's table, or the sentence that stands there until a GPU has run all of it."""
    attention = _attention(results)
    if attention is None or attention.toy:
        return NO_ATTENTION
    return readme_table(attention)


def write_report(results: Path, output: Path) -> Path:
    """Writes report.md and its plots to a folder; the path of report.md.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: there is no folder of results, or the output cannot be written.
        ValueError: a file does not hold what its benchmark writes.
    """
    if find_spec("matplotlib") is None:
        raise ImportError("the report's plots need matplotlib: pip install packed-attn[plot]")
    if not results.is_dir():
        raise FileNotFoundError(f"{results} is no folder of results")
    output.mkdir(parents=True, exist_ok=True)
    attention = _attention(results)
    parts = ["# Measured", _files(results)]
    parts += [_absent("attention")] if attention is None else _attention_parts(attention, output)
    parts.append("## A training step")
    for name, models in (("training_step_gpu", MODELS), ("training_step", ("demo",))):
        parts.append(_section(results, name, lambda told, m=models: training_table(told, m)))
    parts += ["## Attention on the CPU", _section(results, "cpu", _cpu)]
    if attention is not None:
        parts.append("## Every candidate")
        parts += [
            case_table(told, attention.rows.get(name, [])) for name, told in attention.cases.items()
        ]
    path = output / "report.md"
    path.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
    return path


def _attention_parts(attention: Attention, output: Path) -> list[str]:
    return [
        "## Attention on a GPU",
        _run(attention),
        "### Goals",
        goals_table(attention),
        "### Speed",
        LEGEND,
        report_plots.speed(attention, output / "speed.png"),
        *speed_sections(attention),
        "### Roofline",
        report_plots.roofline(attention, output / "roofline.png"),
        "### Memory against length",
        report_plots.memory(attention, output / "memory.png"),
        memory_table(attention),
        "### Host time of a call",
        report_plots.host(attention, output / "host.png"),
        host_table(attention),
    ]


def _run(attention: Attention) -> str:
    """What the run was on, and what it did not come to."""
    lines = []
    if attention.toy:
        lines.append("- **Toy sizes on a CPU: these times mean nothing.**")
    if attention.ceilings is None:
        lines.append("- The card's own ceilings are not in attention.json.")
    else:
        lines.append(
            f"- This machine's own ceilings: {attention.ceilings.product_tflops:.4g} TFLOP/s in a "
            f"dense bf16 product, {attention.ceilings.copy_tb_s:.3g} TB/s in a copy."
        )
    if attention.left_out:
        lines.append(f"- Not run, since the seconds were over: {', '.join(attention.left_out)}.")
    lines += [f"- Not run: {name}: {why}." for name, why in attention.lost.items()]
    lines += [f"- {name} ended a run at {case}." for name, case in attention.without.items()]
    return "\n".join(lines)


def _files(results: Path) -> str:
    """Where each file comes from, or how it is made."""
    lines = ["| file | machine | date | command |", "|---|---|---|---|"]
    for bench in BENCHES:
        told = _read(results, bench.name)
        if told is None:
            lines.append(f"| {bench.name}.json | not in {results.name}/ | | `{bench.command}` |")
            continue
        machine = told.get("machine", {})
        where = machine.get("processor", "not told")
        if machine.get("gpu", "none") != "none":
            where = machine["gpu"]
        versions = [f"{name} {machine[name]}" for name in ("torch", "triton") if name in machine]
        date = machine.get("date", "not told")
        facts = ", ".join([where, *versions])
        lines.append(f"| {bench.name}.json | {facts} | {date} | `{bench.command}` |")
    return "\n".join(lines)


def _section(results: Path, name: str, table: Callable[[dict[str, Any]], str]) -> str:
    told = _read(results, name)
    if told is None:
        return _absent(name)
    try:
        return f"`{BY_NAME[name].command}`:\n\n{table(told)}"
    except (KeyError, TypeError) as error:
        path = results / f"{name}.json"
        raise ValueError(f"{path} is no result of {BY_NAME[name].command}: {error!r}") from error


def _absent(name: str) -> str:
    return f"Not measured: {name}.json is missing, which `{BY_NAME[name].command}` writes."


def _cpu(told: dict[str, Any]) -> str:
    return "\n".join([CPU_HEAD, *(cpu_markdown(CPURow(**row)) for row in told["rows"])])


def _attention(results: Path) -> Attention | None:
    path = results / "attention.json"
    return Attention.read(path) if path.exists() else None


def _read(results: Path, name: str) -> dict[str, Any] | None:
    path = results / f"{name}.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


if __name__ == "__main__":
    raise SystemExit(main())
