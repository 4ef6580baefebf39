"""The cases that benchmarks, tuning and the model share: those of the tests, and relatives.

All come from `tests.cases.REAL`; what the issue of speed asks for beyond them is one of them with
another mask or other heads, named after what changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packed_attn import DocumentLayout, attention
from tests.cases import BY_NAME, REAL, Case, Inputs

# Regimes of packing, in the order of the speed table: long, short, tiny, mixed, skewed, forest.
REGIMES = tuple(
    f"llama3_8b/{layout}"
    for layout in ("one_32k", "64x512", "1000x32", "log_normal", "one_16k_256x64", "forest")
)


def benchmark_cases() -> tuple[Case, ...]:
    """Every real case, then Llama's layouts with other masks, heads and head sizes."""
    one, mixed = BY_NAME["llama3_8b/one_32k"], BY_NAME["llama3_8b/log_normal"]
    relatives = [
        _changed(one, "window_4096", window_size=(4095, 0)),
        _changed(one, "bidirectional", causal=False),
        _changed(mixed, "bidirectional", causal=False),
    ]
    for case in (one, mixed):
        relatives += [
            _changed(case, "heads_64:8", num_heads=64, num_kv_heads=8),
            _changed(case, "heads_16:16", num_heads=16, num_kv_heads=16),
            _changed(case, "head_dim_64", head_dim=64),
            _changed(case, "head_dim_256", num_heads=16, num_kv_heads=4, head_dim=256),
        ]
    return (*REAL, *relatives)


def speed_cases(real: Sequence[Case] = ()) -> list[Case]:
    """The cases of the speed table, the most important first: a run on a GPU may end early.

    The regimes of packing, `real` ones, then Llama's layouts with other head sizes, masks and
    groups.
    """
    mixed, one = "llama3_8b/log_normal/", "llama3_8b/one_32k/"
    by_name = {case.name: case for case in benchmark_cases()}
    first = (
        *(f"{at}head_dim_{dim}" for dim in (64, 256) for at in (mixed, one)),
        f"{one}window_4096",
        f"{mixed}bidirectional",
        *(f"{mixed}heads_{heads}" for heads in ("64:8", "16:16")),
        f"{one}bidirectional",
    )
    return [*(by_name[name] for name in REGIMES), *real, *(by_name[name] for name in first)]


def real_cases(folder: str | None) -> tuple[Case, ...]:
    """Llama's shape on the first 32k tokens of real data sets; empty without their folder.

    No tokenizer is at hand: a token is taken to be four bytes of text.
    """
    if folder is None:
        return ()
    gsm8k = (Path(folder) / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
    alpaca = json.loads((Path(folder) / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    llama = BY_NAME["llama3_8b/log_normal"]
    return tuple(
        replace(llama, name=f"llama3_8b/{name}", lengths=_lengths(rows, sum(llama.lengths)))
        for name, rows in (("gsm8k", map(json.loads, gsm8k)), ("alpaca", alpaca))
    )


def chosen_cases(cases: Sequence[Case], words: Sequence[str]) -> list[Case]:
    """Cases whose name holds one of the words; all without words.

    Raises:
        ValueError: no name holds any of them.
    """
    chosen = [case for case in cases if not words or any(word in case.name for word in words)]
    if not chosen:
        raise ValueError(f"no case has {' or '.join(map(repr, words))} in its name")
    return chosen


def run_case(
    case: Case,
    inputs: Inputs,
    layout: DocumentLayout,
    backend: str = "triton",
    *,
    backward: bool = True,
    **options: Any,
) -> tuple[Tensor, ...]:
    """out and, after the backward, the gradients of q, k and v; `options` are attention's own."""
    leaves = [x.detach().requires_grad_(backward) for x in (inputs.q, inputs.k, inputs.v)]
    given = {**case.kwargs(), **inputs.kwargs(), "sinks": inputs.sinks, **options}
    out = attention(*leaves, layout, backend=backend, **given)  # type: ignore[misc]
    if not backward:
        return (out,)
    return out.detach(), *torch.autograd.grad(out, leaves, inputs.grad_out)


def toy(case: Case) -> Case:
    """The same kind of case for a CPU: two kv heads, head_dim 16, some 60 tokens."""
    group = case.num_heads // case.num_kv_heads
    small = case.shortened(max(1, sum(case.lengths) // 60))
    if case.parents is None:
        small = replace(small, lengths=small.lengths[:24])
    return replace(
        small,
        name=case.name,
        num_heads=2 * min(group, 2),
        num_kv_heads=2,
        head_dim=16,
        value_head_dim=None if case.value_head_dim is None else 8,
    )


def _lengths(rows: Iterable[dict[str, str]], total: int) -> tuple[int, ...]:
    """Documents until `total` tokens are full; the last one is cut to fit."""
    lengths: list[int] = []
    for row in rows:
        left = total - sum(lengths)
        if left == 0:
            break
        size = sum(len(text.encode()) for text in row.values())
        lengths.append(min(left, max(1, size // 4)))
    return tuple(lengths)


def _changed(case: Case, what: str, **fields: object) -> Case:
    return replace(case, name=f"{case.name}/{what}", **fields)
