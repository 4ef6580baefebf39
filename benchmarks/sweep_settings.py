"""Every model type in settings that its default config never has, one field at a time or two.

    python -m benchmarks.sweep_settings [--head causal ...] [--types llama ...] [--kinds flag ...]
        [--resume] [--json PATH] [--log PATH]

A type is built tiny and random, and each field of its config that its own code reads takes other
values (`tests/settings.py`), and then two fields at once (the kind "pair": `settings_pairs.py`
there). What changes nothing of the stock model is only compared; what does is held to a short form
of the sweep (`tests/sweep.py`): packed logits, a padded tail, isolation, gradients. Prints each
setting that is refused or wrong as it is found, counts at the end, and which fields were left out
and why. The JSON has counts, and what was refused or wrong, beside those of other heads, types and
kinds of settings that the file has from the same versions; the log has a line for each setting.
Exit status 1 when a setting is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packed_attn_patches.children import ChildFailed, in_children

from packed_attn.facts import machine_facts
from tests.settings import (
    AS_DEFAULT,
    KINDS,
    STATUSES,
    Finding,
    Setting,
    settings_of,
    sweep_settings,
)
from tests.settings_pairs import pairs_of
from tests.sweep import HEADS, model_types

RESULTS = Path(__file__).parent / "results" / "settings.json"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head", nargs="*", choices=HEADS, default=["causal"])
    parser.add_argument("--types", nargs="*", help="model types; all by default")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--fields", nargs="*", help="fields of configs; all by default")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="only types that the file lacks")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the outcomes go")
    parser.add_argument("--log", type=Path, help="where a line for each setting goes")
    options = parser.parse_args(arguments)
    report = Report(options.json)
    wrong = 0
    for head in options.head:
        types = [t for t in model_types(head) if not options.types or t in options.types]
        if options.resume:
            types = [t for t in types if not report.has(head, t, options.kinds)]
        items = [(head, t, tuple(options.kinds), options.fields) for t in types]
        start = time.perf_counter()
        found = in_children(swept, items, processes=options.processes, seconds=1200)
        for number, (model_type, result) in enumerate(zip(types, found), 1):
            if isinstance(result, ChildFailed):
                result = _in_parts(head, model_type, items[number - 1], result)
            findings, left_out = result
            if options.fields is None:
                report.add(head, model_type, options.kinds, findings, left_out)
            _log(options.log, findings)
            for f in findings:
                if f.status in ("refused", "wrong") and f.reason != AS_DEFAULT:
                    wrong += f.status == "wrong"
                    print(f"{head} {f.model_type} {f.field}={f.value}: {f.status}. {f.reason}")
            seconds = time.perf_counter() - start
            counts = Counter(f.status for f in findings)
            progress = f"[{head} {number}/{len(types)} {seconds:.0f} s] {model_type} {dict(counts)}"
            print(progress, file=sys.stderr, flush=True)
            sys.stdout.flush()
    print(report.table())
    print(report.left_out())
    return int(wrong > 0)


Result = tuple[list[Finding], dict[str, str]]


def swept(head: str, model_type: str, kinds: Sequence[str], fields: Sequence[str] | None) -> Result:
    """All settings of one type, and the fields left out; nothing where the default has no model."""
    try:
        settings, left_out = _planned(head, model_type, kinds, fields)
    except Exception as error:
        return [], {"": f"stock builds no tiny model: {type(error).__name__}"}
    return sweep_settings(head, model_type, settings), left_out


def _planned(
    head: str, model_type: str, kinds: Sequence[str], fields: Sequence[str] | None
) -> tuple[list[Setting], dict[str, str]]:
    _quiet()
    settings, left_out = settings_of(head, model_type)
    settings = [s for s in settings if not fields or s.field in fields]
    pairs = pairs_of(head, model_type, settings) if "pair" in kinds else []
    return [s for s in settings if s.kind in kinds] + pairs, left_out


def _some(head: str, model_type: str, settings: list[Setting]) -> list[Finding]:
    _quiet()
    return sweep_settings(head, model_type, settings)


def _in_parts(head: str, model_type: str, item: tuple[Any, ...], failure: ChildFailed) -> Result:
    """A type one of whose settings ends the process: that one is found and counts as not built."""
    (planned,) = in_children(_planned, [item], processes=1)
    if isinstance(planned, ChildFailed):
        return [], {"": f"stock builds no tiny model: {failure}"}
    settings, left_out = planned
    findings: list[Finding] = []
    waiting = [settings]
    while waiting:
        part = waiting.pop(0)
        seconds = 30 + 2 * len(part)
        (result,) = in_children(_some, [(head, model_type, part)], processes=1, seconds=seconds)
        if not isinstance(result, ChildFailed):
            findings += result
        elif len(part) == 1:
            s = part[0]
            told = Finding(head, model_type, s.kind, s.field, s.words, "not built", str(result))
            findings.append(told)
        elif part:
            half = len(part) // 2
            waiting += [part[:half], part[half:]]
    return findings, left_out


def _quiet() -> None:
    """Without the warnings that transformers has for tiny configs."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    warnings.simplefilter("ignore")


def _log(path: Path | None, findings: Sequence[Finding]) -> None:
    if path is not None:
        with path.open("a") as log:
            log.writelines(json.dumps(f.to_dict()) + "\n" for f in findings)


class Report:
    """The file of outcomes: counts by head, type and kind, and what was refused or wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path
        machine = machine_facts("torch", "transformers")
        self.content: dict[str, Any] = {
            "machine": machine,
            "counts": {},
            "left_out": {},
            "found": [],
        }
        if path.exists():
            kept = json.loads(path.read_text())
            if all(kept["machine"][n] == machine[n] for n in ("torch", "transformers")):
                self.content = {**kept, "machine": machine}

    def has(self, head: str, model_type: str, kinds: Sequence[str]) -> bool:
        return set(kinds) <= set(self.content["counts"].get(head, {}).get(model_type, {}))

    def add(
        self,
        head: str,
        model_type: str,
        kinds: Sequence[str],
        findings: Sequence[Finding],
        left_out: dict[str, str],
    ) -> None:
        counts = self.content["counts"].setdefault(head, {}).setdefault(model_type, {})
        for kind in kinds:
            counts[kind] = dict(Counter(f.status for f in findings if f.kind == kind))
        for field, reason in left_out.items():
            fields = self.content["left_out"].setdefault(reason, [])
            if field not in fields:
                fields.append(field)
        names = ("head", "model_type", "kind")
        again = {(head, model_type, kind) for kind in kinds}
        kept = [f for f in self.content["found"] if tuple(f[n] for n in names) not in again]
        listed = [f for f in findings if f.status in ("refused", "wrong")]
        new = [f.to_dict() for f in listed if f.reason != AS_DEFAULT]
        self.content["found"] = kept + new
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(_text(self.content))

    def table(self) -> str:
        """Counts per head as a Markdown table."""
        lines = [f"| head | types | settings | {' | '.join(STATUSES)} |", "|---" * 9 + "|"]
        for head, types in self.content["counts"].items():
            total: Counter[str] = Counter()
            for kinds in types.values():
                for counts in kinds.values():
                    total.update(counts)
            cells = [str(total[s]) for s in STATUSES]
            lines.append(f"| {head} | {len(types)} | {total.total()} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def left_out(self) -> str:
        """Which fields were left as they are, by reason."""
        reasons = self.content["left_out"].items()
        return "\n".join(f"left out ({why}): {', '.join(sorted(f))}" for why, f in reasons)


def _text(content: dict[str, Any]) -> str:
    """JSON with a line for each type and each finding."""
    lines = ["{", f'"machine": {json.dumps(content["machine"])},', '"counts": {']
    heads = []
    for head, types in content["counts"].items():
        rows = ",\n".join(f"  {json.dumps(t)}: {json.dumps(c)}" for t, c in sorted(types.items()))
        heads.append(f" {json.dumps(head)}: {{\n{rows}\n }}")
    lines += [",\n".join(heads), "},", f'"left_out": {json.dumps(content["left_out"])},']
    lines += ['"found": [', ",\n".join(" " + json.dumps(f) for f in content["found"]), "]", "}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
