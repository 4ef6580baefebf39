"""A prompt computed once for all of its answers, against a copy for each, forward and backward.

    python benchmarks/bench_forest.py [--json PATH]

Packed attention on the CPU of one prompt with n answers: as a forest, and as n documents of prompt
and answer without padding. Prints how many times fewer tokens and attention FLOPs (pairs of query
and key that see each other) the forest has, how many times less time it takes, and how its time
grows with the answers. Both sides take turns in one process and a ratio is the median over rounds.
Outputs and gradients are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bench_cpu import machine
from timing import median_ratio, paired_seconds
from torch import Tensor

from packed_attn import DocumentLayout, attention

ROUNDS = 5
HEADS, HEAD_DIM = 2, 64
RESULTS = Path(__file__).parent / "results" / "forest_cpu.json"
# Largest difference of out and gradients to their copies', over the largest element.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Row:
    """One prompt with its answers, and the forest's advantages over copies of the prompt."""

    prompt: int
    answer: int
    answers: int
    tokens: float
    flops: float
    time: float
    milliseconds: float
    difference: float


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the figures go")
    options = parser.parse_args(arguments)
    rows = []
    print("| prompt | answers | fewer tokens | fewer FLOPs | less time | forest, ms |")
    print("|---|---|---|---|---|---|")
    for prompt, answer, answers in SHAPES:
        print(f"{prompt} + {answers} x {answer}", file=sys.stderr, flush=True)
        row = measured(prompt, answer, answers)
        rows.append(row)
        print(
            f"| {prompt} | {answers} of {answer} | {row.tokens:.2f}x | {row.flops:.2f}x | "
            f"{row.time:.2f}x | {row.milliseconds:.1f} |",
            flush=True,
        )
    growth = grown()
    for answers, per_pair in growth.items():
        print(f"512 + {answers} x 64: {per_pair:.2f} times the time a pair that 1 answer takes")
    report = {
        "machine": machine(),
        "rounds": ROUNDS,
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "rows": [asdict(row) for row in rows],
        "time_per_pair_by_answers": growth,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=2) + "\n")


# Prompt : answer of 1:1, 4:1 and 16:1; at 2048 tokens FLOPs decide.
SHAPES = (
    *((512, 512 // ratio, group) for ratio in (1, 4, 16) for group in (2, 8, 16)),
    (512, 128, 64),
    (2048, 512, 2),
    (2048, 512, 8),
)
GROUPS = (1, 4, 16, 64)


def measured(prompt: int, answer: int, answers: int) -> Row:
    """Checks one shape, then times it.

    Raises:
        RuntimeError: the forest's numbers are not those of the copies.
    """
    forest = _forest(prompt, answer, answers)
    copies = DocumentLayout.from_lengths((prompt + answer,) * answers)
    q, k, v, grad_out = _draw(forest.total_tokens)
    token = torch.arange(forest.total_tokens)
    both = [torch.cat([token[:prompt], x]) for x in token[prompt:].split(answer)]
    places = torch.cat(both)  # of each token of the copies in the forest
    # The prompt's gradient counts once in the forest, so in one of its copies.
    weights = torch.ones(len(places), 1, 1)
    weights.view(answers, -1)[1:, :prompt] = 0.0

    def run(layout: DocumentLayout, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = attention(*leaves, layout, backend="cpu")  # type: ignore[misc]
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    copied = [x[places] for x in (q, k, v)], grad_out[places] * weights
    got, wanted = run(forest, [q, k, v], grad_out), run(copies, *copied)
    summed = [torch.zeros_like(x).index_add_(0, places, y) for x, y in zip((q, k, v), wanted[1:])]
    difference = max(
        float((a - b).abs().max() / b.abs().max())
        for a, b in ((got[0][places], wanted[0]), *zip(got[1:], summed))
    )
    if not difference <= TOLERANCE:
        raise RuntimeError(f"the forest is off by {difference:.2e}; nothing was timed")
    candidates: dict[str, Callable[[], object]] = {
        "forest": lambda: run(forest, [q, k, v], grad_out),
        "copies": lambda: run(copies, *copied),
    }
    seconds = paired_seconds(candidates, ROUNDS)
    return Row(
        prompt,
        answer,
        answers,
        tokens=copies.total_tokens / forest.total_tokens,
        flops=_pairs(prompt + answer, 0, 1) * answers / _pairs(prompt, answer, answers),
        time=median_ratio(seconds["copies"], seconds["forest"]),
        milliseconds=1e3 * statistics.median(seconds["forest"]),
        difference=difference,
    )


def grown() -> dict[int, float]:
    """Time a pair of query and key of 512 + n x 64 tokens, over that of one answer."""
    candidates: dict[str, Callable[[], object]] = {}
    for answers in GROUPS:
        layout = _forest(512, 64, answers)
        q, k, v, grad_out = _draw(layout.total_tokens)

        def both_ways(layout=layout, leaves=(q, k, v), grad=grad_out) -> object:
            qkv = [x.detach().requires_grad_() for x in leaves]
            return torch.autograd.grad(attention(*qkv, layout, backend="cpu"), qkv, grad)  # type: ignore[misc]

        candidates[str(answers)] = both_ways
    seconds = paired_seconds(candidates, ROUNDS)
    one = _pairs(512, 64, 1)
    return {
        n: median_ratio(seconds[str(n)], seconds["1"]) * one / _pairs(512, 64, n) for n in GROUPS
    }


def _forest(prompt: int, answer: int, answers: int) -> DocumentLayout:
    return DocumentLayout.from_lengths([prompt, *[answer] * answers], parents=[-1, *[0] * answers])


def _draw(tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, HEADS, HEAD_DIM, generator=generator) for _ in range(4)]


def _pairs(prompt: int, answer: int, answers: int) -> float:
    """Pairs of query and key that see each other."""
    own = prompt * (prompt + 1) / 2 + answers * answer * (answer + 1) / 2
    return own + answers * answer * prompt


if __name__ == "__main__":
    main()
