"""What the compiled kernels need: registers, stack, shared memory, spills, instructions.

    python -m benchmarks.resources [--sm 90 86 ...] [--processes N] [--missing]

Compiles every job below with the installed triton, on any Linux machine, and puts its rows into
`benchmarks/results/sm90_resources.md` and its like, beside those of other versions. The tests of
the gate take the jobs from here and hold the machine code against the committed rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, get_args

import triton
from packed_attn_kernels.compile_gate import (
    GPUS,
    Resources,
    compile_backward_repair,
    compile_hopper_backward,
    compile_hopper_forward,
    compile_kernel,
    compile_shares_cast,
    instructions,
)
from packed_attn_kernels.configurations import (
    BY_KEYS,
    HOPPER,
    HOPPER_BACKWARD_TABLE,
    Configuration,
    KernelName,
    Problem,
    configuration,
)
from packed_attn_kernels.hopper_backward_launch import hopper_backward_constants
from packed_attn_kernels.hopper_launch import HOPPER_OPTIONS, ROWS, hopper_constants

# What a Hopper GPU runs besides; the repairs work where a NaN is.
HopperName = Literal[
    "hopper_forward", "hopper_backward", "shares_cast", "repair_forward", "repair_dkdv", "repair_dq"
]
# Those in Gluon, whose warps have roles: one copies blocks, two warpgroups multiply.
GLUON: tuple[HopperName, ...] = ("hopper_forward", "hopper_backward", "repair_forward")
# Those without a product.
PLAIN: tuple[KernelName | HopperName, ...] = ("delta", "dq_cast", "shares_cast")

# ptxas moves a few registers between equal sources; below this a change is not a regression.
REGISTER_MARGIN = 16

FLAGS: dict[str, dict[str, Any]] = {
    "causal": {},
    "forest": {"halves": "query"},
    "forest+window": {"halves": "both"},
    "softcap+sinks": {"has_softcap": True, "has_sinks": True},
    "alibi": {"has_alibi": True},
    "dropout": {"has_dropout": True},
    "everything": {
        "halves": "both",
        "has_softcap": True,
        "has_sinks": True,
        "has_alibi": True,
        "has_dropout": True,
    },
}
GROUP = 4
# The most bytes of stack, by (GPU, triton, kernel, width of the tile), where no tile that was tried
# is clean: at 256 columns the operands' addresses fill the registers that accumulators leave. In
# Gluon the registers of a role are given, and its tile follows from the warpgroups. "forest" adds
# what more a kernel may spill there.
KNOWN_SPILLS: dict[tuple[int, str, str, int], int] = {
    (90, "3.6", "forward", 256): 16,
    (90, "3.6", "dk", 256): 280,
    (90, "3.6", "dv", 256): 64,
    (90, "3.6", "dq", 256): 320,
    (90, "3.6", "dq", 128): 8,
    (90, "3.9", "dk", 256): 64,
    # The third stage, which makes the forward 1.16 times as fast.
    (90, "3.9", "forward", 128): 16,
    # Of the forward on 3.6 before and after an item's loop, not in it.
    (90, "3.6", "hopper_forward", 64): 16,
    (90, "3.6", "hopper_forward", 128): 16,
    (90, "3.6", "hopper_forward", 256): 16,
    (90, "3.6", "hopper_backward", 64): 16,
    (90, "3.6", "repair_forward", 128): 8,
    (90, "3.6", "repair_forward", 256): 232,
    (90, "3.6", "repair_dkdv", 128): 32,
    (90, "3.9", "hopper_forward", 64): 64,
    (90, "3.9", "hopper_forward", 128): 96,
    (90, "3.9", "hopper_backward", 64): 8,
    (90, "3.9", "repair_forward", 64): 16,
    (90, "3.9", "hopper_forward", 256): 72,
    (90, "3.9", "repair_forward", 128): 64,
    (90, "3.9", "repair_forward", 256): 400,
    (90, "3.9", "repair_dkdv", 128): 24,
    # Where the producer names the blocks; on 3.6 none of it is in the consumers' loops.
    (90, "3.6", "hopper_forward forest", 64): 32,
    (90, "3.6", "hopper_forward forest", 128): 72,
    (90, "3.6", "hopper_forward forest", 256): 72,
    (90, "3.6", "repair_forward forest", 64): 16,
    (90, "3.6", "repair_forward forest", 128): 64,
    (90, "3.6", "repair_forward forest", 256): 344,
    (90, "3.6", "repair_dq forest", 128): 48,
    (90, "3.9", "hopper_forward forest", 128): 96,
    (90, "3.9", "hopper_forward forest", 256): 96,
    (90, "3.9", "repair_forward forest", 64): 32,
    (90, "3.9", "repair_forward forest", 128): 384,
    (90, "3.9", "repair_forward forest", 256): 584,
    (90, "3.9", "repair_dq forest", 128): 56,
    # Half a block of keys would spill nothing, and twice as many steps cost more.
    (86, "3.9", "forward", 128): 16,
    (86, "3.9", "dq", 128): 16,
    (86, "3.9", "dq forest", 128): 32,
    (86, "3.6", "forward", 64): 40,
    (86, "3.6", "forward", 128): 112,
    (86, "3.6", "forward", 256): 40,
    (86, "3.6", "dkdv", 64): 16,
    (86, "3.6", "dkdv", 128): 8,
    (86, "3.6", "dq", 128): 32,
    # With everything at once.
    (100, "3.9", "dkdv", 128): 144,
    (100, "3.9", "dq", 128): 208,
    (120, "3.9", "dkdv", 128): 32,
}
# What `unordered_products` counts where nothing is wrong. It takes the first product after a store
# for the one that reads it. In the Hopper backward that is dv's, of weights in registers and of a
# block that TMA copied: ds, which was stored, is exchanged between the two warpgroups through an
# mbarrier and read after it, by the next product. Two warpgroups, two loops: four such places.
KNOWN_RACES: dict[str, int] = {"hopper_backward": 4}


@dataclass(frozen=True)
class Job:
    """One kernel to compile; dims are (head_dim, value_head_dim)."""

    kernel: KernelName | HopperName
    dims: tuple[int, int]
    flags: str
    element: str = "bf16"
    sm: int = 90  # key of `GPUS`

    def __str__(self) -> str:
        return f"{self.kernel} {self.size} {self.flags} {self.element}"

    @property
    def size(self) -> str:
        head_dim, value_dim = self.dims
        return str(head_dim) if head_dim == value_dim else f"{head_dim}/{value_dim}"

    @property
    def problem(self) -> Problem:
        fused = self.kernel in ("fused", "dq_cast", "hopper_backward")
        found = _problem(self.dims, self.flags, self.element, fused)
        return replace(found, architecture=GPUS[self.sm].architecture)

    @property
    def configuration(self) -> Configuration:
        """What the launch takes; kernels in Gluon start more warps themselves."""
        problem = self.problem
        match self.kernel:
            case "hopper_forward" | "repair_forward":
                is_repair = self.kernel == "repair_forward"
                values = hopper_constants(problem, HOPPER[problem.head_dim], is_repair)
                tile = (2 * ROWS, values["BLOCK_N"])
            case "hopper_backward":
                chosen = HOPPER_BACKWARD_TABLE[problem.head_dim]
                values = hopper_backward_constants(problem, chosen)
                tile = (values["BLOCK_M"], 2 * ROWS)
            case "shares_cast":
                values, tile = {"STAGES": 1}, (ROWS, 0)
            case "repair_dkdv":
                return configuration("dkdv", problem)
            case "repair_dq":
                return configuration("dq", problem)
            case portable:
                return configuration(portable, problem)
        return Configuration(*tile, HOPPER_OPTIONS["num_warps"], values["STAGES"])


@dataclass(frozen=True)
class Measured:
    """A row of the table."""

    configuration: Configuration
    resources: Resources


def default_jobs() -> list[Job]:
    """Members of `make test`: what most models run, every flag at 128, the hardest at 256."""
    jobs = [job for flags in FLAGS for job in _jobs((128, 128), flags)]
    jobs += [*_jobs((64, 64), "causal"), *_jobs((64, 64), "everything")]
    jobs += [*_jobs((256, 256), "causal"), Job("delta", (128, 128), "softcap+sinks")]
    jobs += _hopper_jobs("hopper_forward", "hopper_backward", "shares_cast", sizes=(64, 128))
    jobs += _hopper_jobs("hopper_forward", sizes=(128,), flags="forest")
    return jobs + _jobs((128, 128), "softcap+sinks", "fp32")


def all_jobs() -> list[Job]:
    """Those of `default_jobs`, other flags, the other head sizes of released models, fp16."""
    jobs = default_jobs() + _jobs((64, 64), "dropout")
    for flags in ("softcap+sinks", "forest+window", "everything"):
        jobs += _jobs((256, 256), flags)
    for dims in ((192, 128), (96, 96), (72, 72)):
        jobs += _jobs(dims, "causal")
    jobs += _jobs((128, 128), "causal", "fp16")
    jobs += [Job("fused", (size, size), "causal") for size in (64, 128)]
    jobs += [job for flags in ("alibi", "dropout") for job in _jobs((256, 256), flags)]
    jobs += [Job("delta", (size, size), "softcap+sinks") for size in (64, 256)]
    jobs += _hopper_jobs("repair_forward", "repair_dkdv", "repair_dq", sizes=(64, 128))
    jobs += _hopper_jobs("hopper_forward", "repair_forward", sizes=(256,))
    sizes = sorted(HOPPER)
    for flags in ("softcap+sinks", "forest"):
        jobs += _hopper_jobs("hopper_forward", "repair_forward", sizes=sizes, flags=flags)
    jobs += _hopper_jobs("hopper_forward", "repair_forward", sizes=(128,), flags="forest+window")
    jobs += _hopper_jobs("repair_dq", sizes=(64, 128), flags="forest")
    return list(dict.fromkeys([*jobs, Job("dq_cast", (128, 128), "causal")]))


def jobs_of(sm: int) -> list[Job]:
    """All that has a row in the table of a GPU; sm_86 stands for those that take its rows."""
    if sm == 90:
        return all_jobs()
    jobs = portable_jobs() if sm == 86 else few_jobs()
    return [replace(job, sm=sm) for job in [*jobs, *_jobs((256, 256), "causal", "fp32")]]


def portable_jobs() -> list[Job]:
    """What other GPUs than Hopper run."""
    hopper = get_args(HopperName)
    return [job for job in all_jobs() if job.kernel not in (*hopper, "fused", "dq_cast")]


def few_jobs() -> list[Job]:
    """Every width, and everything at once."""
    jobs = [job for size in (64, 128, 256) for job in _jobs((size, size), "causal")]
    return [*jobs, *_jobs((128, 128), "everything")]


def measure(jobs: Sequence[Job], processes: int) -> dict[Job, Measured]:
    """Compiles all, in processes of their own, where triton compiles and does not interpret."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return dict(zip(jobs, pool.map(compile_job, jobs)))


def compile_job(job: Job) -> Measured:
    """One row."""
    return Measured(job.configuration, _compile(job))


def faults(job: Job, found: Resources, version: str) -> list[str]:
    """Why the gate must stay shut for a job on a version of triton, in sentences.

    float32 may spill, and half precision where `KNOWN_SPILLS` says how much.
    """
    names = [job.kernel] if job.problem.halves == "either" else [job.kernel, f"{job.kernel} forest"]
    width = job.problem.width
    known = max(KNOWN_SPILLS.get((job.sm, version, name, width), 0) for name in names)
    if job.element == "fp32" or 0 < found.stack <= known:
        found = replace(found, stack=0, spills=0)
    if found.races <= KNOWN_RACES.get(job.kernel, 0):
        found = replace(found, races=0)
    if job.kernel in GLUON:
        return found.faults(*instructions(job.sm), sm=job.sm)
    needed = () if job.element == "fp32" or job.kernel in PLAIN else ("products",)
    return found.faults(*needed, sm=job.sm)


def regressions(now: Measured, committed: Measured, sm: int = 90) -> list[str]:
    """What became worse than the committed row, in sentences."""
    if now.configuration != committed.configuration:
        return [f"the table has {committed.configuration}: make resources"]
    new, old = now.resources, committed.resources
    worse = []
    if new.stack > old.stack or new.spills > old.spills:
        worse.append(f"spills: {new.stack} B and {new.spills}, were {old.stack} B and {old.spills}")
    for count, name in instructions(sm).items():
        if getattr(new, count) < getattr(old, count):
            worse.append(f"{getattr(new, count)} {name}, were {getattr(old, count)}")
    if new.registers > old.registers + REGISTER_MARGIN:
        worse.append(f"{new.registers} registers, were {old.registers}")
    if new.shared_memory > old.shared_memory:
        worse.append(f"{new.shared_memory} B of shared memory, were {old.shared_memory}")
    return worse


def installed_version() -> str:
    """Major and minor version of triton: patch releases share a row."""
    return ".".join(triton.__version__.split(".")[:2])


def read_table(text: str) -> dict[tuple[str, str], Measured]:
    """Rows by (triton version, job)."""
    rows = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) < 13 or not cells[0][:1].isdigit():
            continue
        version, kernel, size, flags, element, tile, *numbers = cells
        warps, stages, registers, stack, spills, shared, *counts = map(int, numbers)
        block_m, block_n = map(int, tile.split("x"))
        rows[version, f"{kernel} {size} {flags} {element}"] = Measured(
            Configuration(block_m, block_n, warps, stages),
            Resources(registers, stack, shared, spills, **dict(zip(instructions(90), counts))),
        )
    return rows


def write_table(rows: Mapping[tuple[str, str], Measured], sm: int = 90) -> str:
    """The whole file."""
    notes = [_NOTE, *([_NOTE_90] if sm == 90 else [])]
    names = [*_COLUMNS, *list(instructions(sm).values())[: 3 if sm == 90 else 1]]
    head = f"| {' | '.join(names)} |\n{'|---' * len(names)}|"
    title = f"What the compiled kernels need on sm_{sm}: registers, stack, shared memory, products."
    return "\n".join([title, "", *notes, "", head, *_lines(rows)]) + "\n"


def results(sm: int) -> Path:
    """The file of a GPU's rows."""
    return Path(__file__).parent / "results" / f"sm{sm}_resources.md"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sm", type=int, nargs="+", default=list(GPUS), choices=list(GPUS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--missing", action="store_true", help="only jobs without a row")
    options = parser.parse_args(arguments)
    for sm in options.sm:
        _write(sm, options.processes, options.missing)


def _write(sm: int, processes: int, missing: bool) -> None:
    version, jobs, path = installed_version(), jobs_of(sm), results(sm)
    rows = read_table(path.read_text()) if path.exists() else {}
    if missing:
        jobs = [job for job in jobs if (version, str(job)) not in rows]
    else:
        rows = {key: row for key, row in rows.items() if key[0] != version}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for n, (job, row) in enumerate(zip(jobs, pool.map(compile_job, jobs)), 1):
            rows[version, str(job)] = row
            path.write_text(write_table(rows, sm))
            found = f"sm_{sm} [{n}/{len(jobs)}] {job}: {row.resources}"
            print(found, file=sys.stderr, flush=True)


_COLUMNS = (
    "triton", "kernel", "head_dim", "flags", "type", "tile", "warps", "stages", "registers",
    "stack, B", "spills", "shared, B",
)  # fmt: skip
_NOTE = f"""\
Printed by `make resources` and held by `tests/test_compile_gate.py`: offline compilation, no GPU.
Default configurations of the launches, groups of {GROUP} query heads, tiles as queries x keys.
float32 keeps its bits on ordinary multiply-adds and has no products; it may spill. Half precision
spills only where `KNOWN_SPILLS` of `benchmarks/resources.py` says so."""
_NOTE_90 = """\
Only `hopper_*` and `repair_forward` copy blocks by TMA (UTMALDG) and give roles of warps registers
of their own (USETMAXREG); launched with 4 warps, they start the others themselves, and the table's
registers are those of a thread before it has a role."""


def _jobs(dims: tuple[int, int], flags: str, element: str = "bf16") -> list[Job]:
    """Forward and backward; the kernels by keys ask one half in trees and documents alike."""
    kernels: Iterable[KernelName] = (*_problem(dims, flags, element).keys_kernels, "dq", "forward")
    return [
        Job(kernel, dims, flags, element)
        for kernel in kernels
        if not (kernel in BY_KEYS and flags == "forest")
    ]


def _hopper_jobs(*kernels: HopperName, sizes: Sequence[int], flags: str = "causal") -> list[Job]:
    return [Job(kernel, (size, size), flags) for kernel in kernels for size in sizes]


def _compile(job: Job) -> Resources:
    problem, element = job.problem, job.element
    match job.kernel:
        case "hopper_forward" | "repair_forward":
            confined = job.kernel == "repair_forward"
            return compile_hopper_forward(problem, element, confined=confined)
        case "hopper_backward":
            return compile_hopper_backward(problem, element)
        case "shares_cast":
            return compile_shares_cast(problem, element)
        case "repair_dkdv":
            return compile_backward_repair("dkdv", problem, element)
        case "repair_dq":
            return compile_backward_repair("dq", problem, element)
        case portable:
            return compile_kernel(portable, problem, element, sm=job.sm)


def _problem(dims: tuple[int, int], flags: str, element: str, fused: bool = False) -> Problem:
    plain = {"halves": "either", "has_softcap": False, "has_sinks": False, "fused": fused}
    itemsize = 4 if element == "fp32" else 2
    return Problem(*dims, GROUP, itemsize, **(plain | FLAGS[flags]))


def _lines(rows: Mapping[tuple[str, str], Measured]) -> list[str]:
    lines = []
    for (version, job), row in sorted(rows.items(), key=lambda item: _order(item[0])):
        kernel, size, flags, element = job.split(" ")
        chosen, found = row.configuration, row.resources
        counts = [getattr(found, count) for count in instructions(90)]
        if not any(counts[1:]):
            counts = counts[:1]
        cells = (
            version, kernel, size, flags, element, f"{chosen.BLOCK_M}x{chosen.BLOCK_N}",
            chosen.num_warps, chosen.stages, found.registers, found.stack, found.spills,
            found.shared_memory, *counts,
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _order(key: tuple[str, str]) -> tuple[Any, ...]:
    version, job = key
    kernel, size, flags, element = job.split(" ")
    return tuple(map(int, version.split("."))), element, int(size.split("/")[0]), flags, kernel


if __name__ == "__main__":
    main()
