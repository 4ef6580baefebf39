"""A prompt computed once for all of its answers, against a copy for each, forward and backward.

    python -m benchmarks.bench_forest [--device cuda] [--rows attention,planning] [--json PATH]

Packed attention of one prompt with n answers: as a forest, and as n documents of prompt and answer
without padding. Prints how many times fewer tokens and attention FLOPs (pairs of query and key that
see each other) the forest has, how many times less time it takes and how its time grows with the
answers (attention), and, on the CPU, how fast forests are planned (planning).

On the CPU times are CPU time on one thread, which other work on the machine disturbs little, of two
heads in float32; on CUDA the device's time of an eager call, of Llama 3 8B's heads in bfloat16.
There the copies run the kernels that a pack without shared prompts runs. Both sides take turns in
one process and a ratio is the median over rounds. Outputs and gradients are compared before
anything is timed, and say how many rounds a shape gets: on the CPU the largest (64 answers of 2048
after 2048 tokens) takes half a minute to a minute and gets one. All take some minutes of CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from benchmarks.bench_cpu import machine
from benchmarks.timing import median_ratio, paired_milliseconds, paired_seconds
from packed_attn import DocumentLayout, attention, pack_lengths
from packed_attn.facts import gpu_facts
from packed_attn.packing.forest import ForestPlan, plan_forest, plan_prompts

Call = Callable[[], list[Tensor]]

ROUNDS = 5
RESULTS = Path(__file__).parent / "results"
# A shape gets as many rounds as take so many seconds, but one at least.
SECONDS = 20
RATIOS, GROUPS = (1, 4, 16), (2, 8, 16, 64)  # prompt : answer, and answers
# (prompt, answer, answers): at 2048-token prompts FLOPs decide, at 512 fixed costs count too.
GRID = tuple((2048, 2048 // ratio, answers) for ratio in RATIOS for answers in GROUPS)
SHORT = ((512, 512, 8), (512, 128, 8), (512, 128, 64), (512, 32, 8), (512, 32, 64))
GROWTH = (1, 4, 16, 64)


@dataclass(frozen=True)
class Side:
    """Where and on what both sides run.

    Attributes:
        heads: of q, and of k and v.
        tolerance: largest difference of out and gradients to their copies', over the largest
            element.
    """

    device: str
    backend: str
    dtype: torch.dtype
    heads: tuple[int, int]
    head_dim: int
    tolerance: float

    def seconds(self, candidates: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
        """Of each candidate in each round; all have run before."""
        if self.device == "cpu":
            return paired_seconds(candidates, rounds, warmup=0, clock=time.process_time)
        calls = {name: lambda _, call=call: call() for name, call in candidates.items()}
        milliseconds = paired_milliseconds(calls, self.device, rounds, warmup=0)
        return {name: [ms / 1e3 for ms in found] for name, found in milliseconds.items()}

    def now(self) -> float:
        """CPU time of the process, or wall time once the device is idle."""
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def draw(self, tokens: int) -> list[Tensor]:
        """q, k, v and the gradient of out."""
        generator = torch.Generator(self.device).manual_seed(0)
        q, kv = self.heads
        draw = lambda heads: torch.randn(  # noqa: E731
            tokens, heads, self.head_dim, generator=generator, device=self.device, dtype=self.dtype
        )
        return [draw(q), draw(kv), draw(kv), draw(q)]

    def run(self, layout: DocumentLayout, inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
        """out and the gradients of q, k and v."""
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = attention(*leaves, layout, backend=self.backend)  # type: ignore[misc]
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


SIDES = {
    "cpu": Side("cpu", "cpu", torch.float32, (2, 2), 64, 1e-5),
    "cuda": Side("cuda", "triton", torch.bfloat16, (32, 8), 128, 2e-2),
}


@dataclass(frozen=True)
class Row:
    """One prompt with its answers, measured.

    Attributes:
        tokens, flops: how many times more the copies have.
        time: how many times longer the copies take.
        rounds: the median is over so many.
        milliseconds: of the forest, forward and backward.
        difference: largest of out and gradients, over the largest element.
    """

    prompt: int
    answer: int
    answers: int
    tokens: float
    flops: float
    time: float
    rounds: int
    milliseconds: float
    difference: float

    @property
    def of_flops(self) -> float:
        return self.time / self.flops


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=SIDES, default="cpu")
    parser.add_argument("--rows", default="attention,planning", help="which, by name")
    parser.add_argument("--json", type=Path, default=None, help="where the figures go")
    options = parser.parse_args(arguments)
    side = SIDES[options.device]
    on_cpu = side.device == "cpu"
    if on_cpu:
        torch.set_num_threads(1)
    path = options.json or RESULTS / ("forest_cpu.json" if on_cpu else "forest_gpu.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    report = json.loads(path.read_text()) if path.exists() else {}
    report |= {
        "machine": machine() if on_cpu else machine() | gpu_facts(),
        "clock": "CPU time of the process, one thread" if on_cpu else "events on the device",
        "heads": side.heads,
        "head_dim": side.head_dim,
        "dtype": str(side.dtype),
    }
    rows = options.rows.split(",")
    if "attention" in rows:
        report["rows"] = [{**asdict(row), "of_flops": row.of_flops} for row in timed(side)]
        report["time_per_pair_by_answers"] = growth(side)
    if "planning" in rows and on_cpu:
        report["planning"] = planning()
    path.write_text(json.dumps(report, indent=2) + "\n")


def timed(side: Side) -> list[Row]:
    """What is saved of tokens, FLOPs and time."""
    rows = []
    print("| prompt | answers | fewer tokens | fewer FLOPs | less time | of FLOPs | forest, ms |")
    print("|---|---|---|---|---|---|---|")
    for prompt, answer, answers in (*GRID, *SHORT):
        print(f"{prompt} + {answers} x {answer}", file=sys.stderr, flush=True)
        row = measured(side, prompt, answer, answers)
        rows.append(row)
        print(
            f"| {prompt} | {answers} of {answer} | {row.tokens:.2f}x | {row.flops:.2f}x | "
            f"{row.time:.2f}x | {row.of_flops:.2f} | {row.milliseconds:.1f} |",
            flush=True,
        )
    return rows


def _saved(prompt: int, answer: int, answers: int) -> tuple[float, float]:
    """How many times fewer tokens and FLOPs the forest has."""
    tokens = answers * (prompt + answer) / (prompt + answers * answer)
    return tokens, _pairs(prompt + answer, 0, 1) * answers / _pairs(prompt, answer, answers)


def measured(side: Side, prompt: int, answer: int, answers: int) -> Row:
    """Checks one shape, then times it.

    Raises:
        RuntimeError: the forest's numbers are not those of the copies.
    """
    forest = _forest(prompt, answer, answers).to(side.device)
    copies = DocumentLayout.from_lengths((prompt + answer,) * answers).to(side.device)
    q, k, v, grad_out = side.draw(forest.total_tokens)
    token = torch.arange(forest.total_tokens, device=side.device)
    both = [torch.cat([token[:prompt], x]) for x in token[prompt:].split(answer)]
    places = torch.cat(both)  # of each token of the copies in the forest
    # The prompt's gradient counts once in the forest, so in one of its copies.
    weights = torch.ones(len(places), 1, 1, device=side.device, dtype=side.dtype)
    weights.view(answers, -1)[1:, :prompt] = 0.0

    copied = [x[places] for x in (q, k, v)], grad_out[places] * weights
    candidates: dict[str, Call] = {
        "forest": lambda: side.run(forest, [q, k, v], grad_out),
        "copies": lambda: side.run(copies, *copied),
    }
    begin = side.now()
    got, wanted = candidates["forest"](), candidates["copies"]()
    rounds = max(1, min(ROUNDS, int(SECONDS / (side.now() - begin))))
    summed = [
        torch.zeros_like(x, dtype=torch.float32).index_add_(0, places, y.float())
        for x, y in zip((q, k, v), wanted[1:])
    ]
    difference = max(
        float((a - b).abs().max() / b.abs().max())
        for a, b in ((got[0][places], wanted[0]), *zip(got[1:], summed))
    )
    if not difference <= side.tolerance:
        raise RuntimeError(f"the forest is off by {difference:.2e}; nothing was timed")
    seconds = side.seconds(candidates, rounds)
    return Row(
        prompt,
        answer,
        answers,
        *_saved(prompt, answer, answers),
        time=median_ratio(seconds["copies"], seconds["forest"]),
        rounds=rounds,
        milliseconds=1e3 * statistics.median(seconds["forest"]),
        difference=difference,
    )


def growth(side: Side) -> dict[int, float]:
    """Time a pair of query and key of 512 + n x 64 tokens, over that of one answer."""
    candidates: dict[str, Call] = {}
    for answers in GROWTH:
        layout = _forest(512, 64, answers).to(side.device)
        *leaves, grad = side.draw(layout.total_tokens)
        candidates[str(answers)] = partial(side.run, layout, leaves, grad)
        candidates[str(answers)]()
    seconds = side.seconds(candidates, ROUNDS)
    one = _pairs(512, 64, 1)
    found = {
        n: median_ratio(seconds[str(n)], seconds["1"]) * one / _pairs(512, 64, n) for n in GROWTH
    }
    for answers, per_pair in found.items():
        print(f"512 + {answers} x 64: {per_pair:.2f} times the time a pair that 1 answer takes")
    return found


def planning() -> dict[str, float]:
    """Documents and tokens planned a second of CPU time, on one core."""
    random = np.random.default_rng(0)
    figures = {}
    # All but the first split every tree.
    for group, capacity in ((8, 8192), (64, 8192), (8, 2048), (2, 1024)):
        lengths = random.integers(600, 900, 1_000_000)
        ids = random.permutation(np.arange(lengths.size) // group)
        prompts = np.full(lengths.size, 512)

        def named(n, ids=ids, prompts=prompts) -> ForestPlan:
            return plan_prompts(n, ids, prompts)

        def packs(lengths=lengths, capacity=capacity, share=named) -> object:
            return pack_lengths(lengths, capacity, share=share)

        name = f"documents_per_second_prompt_ids_groups_of_{group}"
        if name not in figures:
            figures[name] = lengths.size / _seconds(lambda n=lengths, share=named: share(n))
        figures[f"{name}_and_packs_of_{capacity}"] = lengths.size / _seconds(packs)
    for prompts, group, prompt, answer in (
        (1000, 8, 512, 128),
        (20000, 2, 32, 16),
        (125_000, 8, 16, 16),
        (62_500, 16, 24, 8),
    ):
        lists = _arrow_groups(random, prompts, group, prompt, answer)
        name = f"tokens_per_second_found_in_{len(lists)}_of_{prompt}_and_{answer}"
        found = _seconds(lambda lists=lists: plan_forest(lists))
        figures[name] = len(lists) * (prompt + answer) / found
    for name, figure in figures.items():
        print(f"{name.replace('_', ' ')}: {figure / 1e6:.1f} M")
    return figures


def _arrow_groups(
    random: np.random.Generator, prompts: int, group: int, prompt: int, answer: int
) -> pa.ListArray:
    """Groups of documents with a prompt each, mixed, in int32 Arrow lists."""
    heads = random.integers(0, 50000, (prompts, prompt), dtype=np.int32).repeat(group, axis=0)
    answers = random.integers(0, 50000, (prompts * group, answer), dtype=np.int32)
    rows = random.permutation(np.concatenate([heads, answers], axis=1))
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rows.ravel()))


def _seconds(call: Callable[[], object]) -> float:
    """The median over rounds."""
    return statistics.median(paired_seconds({"it": call}, ROUNDS, clock=time.process_time)["it"])


def _forest(prompt: int, answer: int, answers: int) -> DocumentLayout:
    return DocumentLayout.from_lengths([prompt, *[answer] * answers], parents=[-1, *[0] * answers])


def _pairs(prompt: int, answer: int, answers: int) -> float:
    """Pairs of query and key that see each other."""
    own = prompt * (prompt + 1) / 2 + answers * answer * (answer + 1) / 2
    return own + answers * answer * prompt


if __name__ == "__main__":
    main()
