"""Packed attention on CPU against torch with the dense mask, forward and backward, in one process.

    python -m benchmarks.bench_cpu [--json PATH]

The dense mask is sdpa's where sdpa can, and an eager softmax over all pairs where it cannot
(softcap and sinks, as transformers runs them). Prints a Markdown table and writes the figures with
the machine's facts as JSON. The candidates take turns in one process and a ratio is the median over
rounds, so that load on the machine slows both of its sides. Every case is checked against the
reference in float64 before it is timed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import median_ratio, paired_seconds
from packed_attn import DocumentLayout, attention
from packed_attn.facts import machine_facts

ROUNDS = 5
HEAD = """\
| forward + backward | tokens | heads | packed, ms | dense mask | target | is_causal | reference |
|---|---|---|---|---|---|---|---|"""
RESULTS = Path(__file__).parent / "results" / "cpu.json"


@dataclass(frozen=True)
class Case:
    """Documents, heads, and how many times faster than the dense mask this must be, if at all."""

    name: str
    lengths: tuple[int, ...]
    num_heads: int = 8
    num_kv_heads: int = 8
    head_dim: int = 64
    target: float | None = None
    mask: dict[str, Any] = field(default_factory=dict)
    softcap: float | None = None
    sinks: bool = False
    alibi: bool = False
    parents: tuple[int, ...] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether sdpa's own causal mask is this one but for the boundaries."""
        return not (self.mask or self.softcap or self.sinks or self.alibi or self.parents)


@dataclass(frozen=True)
class Row:
    """Milliseconds (medians) of one case and the ratios to packed attention's."""

    name: str
    tokens: int
    documents: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    milliseconds: dict[str, float]
    ratios: dict[str, float]
    target: float | None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the figures go")
    parser.add_argument("--only", default="", help="cases whose name this regular expression finds")
    options = parser.parse_args(arguments)
    cases = [case for case in CASES if re.search(options.only, case.name)]
    rows = []
    print(HEAD)
    for number, case in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}] {case.name}", file=sys.stderr, flush=True)
        rows.append(measured(case))
        print(markdown(rows[-1]), flush=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "rounds": ROUNDS, "rows": [asdict(row) for row in rows]}
    options.json.write_text(json.dumps(report, indent=2) + "\n")


def log_normal_lengths(
    documents: int, total: int, longest: int, sigma: float = 1.0, seed: int = 0
) -> tuple[int, ...]:
    """Log-normal lengths from 1 to `longest`, scaled and then nudged until they add to `total`."""
    rng = random.Random(seed)
    draws = [rng.lognormvariate(0.0, sigma) for _ in range(documents)]
    lengths = [min(longest, max(1, round(x * total / sum(draws)))) for x in draws]
    while (missing := total - sum(lengths)) != 0:
        step = 1 if missing > 0 else -1
        document = rng.randrange(documents)
        if 1 <= lengths[document] + step <= longest:
            lengths[document] += step
    return tuple(lengths)


LOG_NORMAL = log_normal_lengths(64, 4096, 512)
SHORT = log_normal_lengths(64, 2048, 512)
WINDOW = {"window_size": (127, 0)}
ANSWERS = (256, 64, 64, 64, 64) * 4
TREES = tuple(p for root in range(0, 20, 5) for p in (-1, *(root,) * 4))
CASES = (
    Case("128 documents of 32", (32,) * 128, target=5.0),
    Case("8 documents of 512", (512,) * 8, target=4.0),
    Case("64 documents, log-normal", LOG_NORMAL, target=3.0),
    Case("64 documents, log-normal, grouped 8:2", LOG_NORMAL, num_kv_heads=2),
    Case("8 documents of 512, grouped 8:2", (512,) * 8, num_kv_heads=2),
    Case("40 documents, log-normal, 4:2 heads of 32", log_normal_lengths(40, 2048, 512), 4, 2, 32),
    Case("log-normal, window of 128", SHORT, 4, 4, target=3.0, mask=WINDOW),
    Case("log-normal, bidirectional", SHORT, 4, 4, target=3.0, mask={"causal": False}),
    Case("log-normal, prefix of 16", SHORT, 4, 4, target=3.0, mask={"prefix_lengths": (16,) * 64}),
    Case("log-normal, softcap", SHORT, 4, 4, target=3.0, softcap=50.0),
    Case("log-normal, sinks and window", SHORT, 4, 4, target=3.0, sinks=True, mask=WINDOW),
    Case("log-normal, ALiBi", SHORT, 4, 4, target=3.0, alibi=True),
    Case("4 prompts of 256, 4 answers of 64 each", ANSWERS, 4, 4, target=3.0, parents=TREES),
    Case("one document of 2048, window of 128", (2048,), 4, 4, mask=WINDOW),
)


def measured(case: Case) -> Row:
    """Checks one case, then times it.

    Raises:
        RuntimeError: a candidate that should be exact is not.
    """
    candidates, inputs = _candidates(case)
    _check(candidates, inputs, case)
    grad_out = inputs["grad_out"]
    qkv = [inputs[name] for name in "qkv"]

    def both_ways(forward: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(*qkv), qkv, grad_out)

    seconds = paired_seconds({name: both_ways(f) for name, f in candidates.items()}, ROUNDS)
    return Row(
        case.name,
        sum(case.lengths),
        len(case.lengths),
        case.num_heads,
        case.num_kv_heads,
        case.head_dim,
        {name: round(1e3 * statistics.median(s), 2) for name, s in seconds.items()},
        {
            name: round(median_ratio(s, seconds["packed"]), 2)
            for name, s in seconds.items()
            if name != "packed"
        },
        case.target,
    )


def _candidates(case: Case) -> tuple[dict[str, Callable[..., Tensor]], dict[str, Tensor]]:
    """The contenders, each q, k, v -> out `[tokens, heads, head_dim]`, and the inputs."""
    layout = DocumentLayout.from_lengths(case.lengths, parents=case.parents)
    generator = torch.Generator().manual_seed(0)
    heads = {"q": case.num_heads, "k": case.num_kv_heads, "v": case.num_kv_heads}
    inputs = {
        name: torch.randn(layout.total_tokens, n, case.head_dim, generator=generator)
        for name, n in {**heads, "grad_out": case.num_heads}.items()
    }
    for name in heads:
        inputs[name].requires_grad_()
    options: dict[str, Any] = {**case.mask, "softcap": case.softcap}
    if case.sinks:
        options["sinks"] = torch.randn(case.num_heads, generator=generator)
    if case.alibi:
        options["alibi_slopes"] = 2.0 ** -torch.arange(1.0, case.num_heads + 1)
    candidates: dict[str, Callable[..., Tensor]] = {
        "packed": lambda q, k, v: attention(q, k, v, layout, backend="cpu", **options),
        "dense mask": _dense(case, layout, options),
        "reference": lambda q, k, v: attention(q, k, v, layout, backend="reference", **options),
    }
    if case.is_plain:
        candidates["contaminated"] = lambda q, k, v: _sdpa(q, k, v, is_causal=True)
    return candidates, inputs


def _dense(case: Case, layout: DocumentLayout, options: dict[str, Any]) -> Callable[..., Tensor]:
    """Attention of the whole stream under a mask of tokens x tokens, made once."""
    mask = layout.visibility(**case.mask).dense()
    if case.alibi:
        distance = (layout.position_ids[:, None] - layout.position_ids).abs()
        bias = -options["alibi_slopes"][:, None, None] * distance
        mask = bias.masked_fill(~mask, -torch.inf)
    if not case.sinks and case.softcap is None:
        return lambda q, k, v: _sdpa(q, k, v, attn_mask=mask.to(q.dtype) if case.alibi else mask)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        scores = (q @ k.transpose(1, 2)) * case.head_dim**-0.5
        if case.softcap is not None:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        scores = scores.masked_fill(~mask, -torch.inf)
        if case.sinks:
            sinks = options["sinks"].to(q.dtype)[:, None, None].expand(-1, q.shape[1], 1)
            scores = torch.cat([scores, sinks], dim=-1)
        return (scores.softmax(-1)[..., : k.shape[1]] @ v).transpose(0, 1)

    return eager


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **mask: Any) -> Tensor:
    """The whole stream as one sequence; grouped heads expanded, as transformers does."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **mask)[0].transpose(0, 1)


def _check(
    candidates: dict[str, Callable[..., Tensor]], inputs: dict[str, Tensor], case: Case
) -> None:
    """Packed and dense agree with float64 as well as plain float32 does, within small factors."""

    def results(name: str, dtype: torch.dtype) -> list[Tensor]:
        qkv = [inputs[n].detach().to(dtype).requires_grad_() for n in "qkv"]
        out = candidates[name](*qkv)
        return [out, *torch.autograd.grad(out, qkv, inputs["grad_out"].to(dtype))]

    exact = results("reference", torch.float64)
    plain = results("reference", torch.float32)
    for name in ("packed", "dense mask"):
        for i, got in enumerate(results(name, torch.float32)):
            rounding = (exact[i].float().double() - exact[i]).abs().max()
            allowed = (2 if i == 0 else 3) * ((plain[i] - exact[i]).abs().max() + rounding)
            error = (got - exact[i]).abs().max()
            if not error <= allowed:
                what = ("out", "dq", "dk", "dv")[i]
                raise RuntimeError(
                    f"{case.name}: {name} is off by {float(error):.2e} in {what}, "
                    f"over {float(allowed):.2e}; nothing was timed"
                )


def machine() -> dict[str, str]:
    """What the figures depend on."""
    return {
        **machine_facts("torch"),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }


def markdown(row: Row) -> str:
    """Milliseconds of packed attention, and how many times longer the others take."""
    heads = f"{row.num_heads}:{row.num_kv_heads} of {row.head_dim}"
    causal = f"{row.ratios['contaminated']:.1f}x" if "contaminated" in row.ratios else ""
    target = "" if row.target is None else f">= {row.target:g}x"
    return (
        f"| {row.name} | {row.tokens} | {heads} | {row.milliseconds['packed']:.1f} | "
        f"{row.ratios['dense mask']:.1f}x | {target} | {causal} | "
        f"{row.ratios['reference']:.1f}x |"
    )


if __name__ == "__main__":
    main()
