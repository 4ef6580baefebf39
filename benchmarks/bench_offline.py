"""The offline packer under kill -9, and its memory against the size of what it packs.

    PACKED_ATTN_DATA=... python -m benchmarks.bench_offline [--rows kills,memory] [--json PATH]

kills: tokens lost, tokens duplicated, shards written again. Each run packs documents of gsm8k
(prompts and completions, tokenised by a tokenizer trained on them) into a dozen shards, is killed
at a random moment of its life, at times twice, and continued with --resume. Its documents are then
counted one by one against those of a run that nobody killed, and all its files compared to the
byte. Half of the runs have one worker, half have two, whose processes are left to notice the death
of their parent by themselves.

memory: inputs of three sizes, each four times the one before, packed with one and with two workers.
What counts is memory that the system cannot take back: anonymous pages of all the run's processes,
read from /proc some fifty times a second, and a page that several of them share once; pages of
mapped files are not among them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

# One thread a process: before numpy and Arrow start theirs.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.kills import Case, killed_runs, summary
from packed_attn.facts import machine_facts

DOCUMENTS = 400
CAPACITY = 512
SIZES = (20_000, 80_000, 320_000)  # documents whose memory is measured
MEAN_LENGTH = 100
RESULTS = Path(__file__).parent / "results" / "offline.json"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(MEASURES), help="which, by name")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the figures go")
    options = parser.parse_args(arguments)
    results = json.loads(options.json.read_text()) if options.json.exists() else {}
    for row in options.rows.split(","):
        with tempfile.TemporaryDirectory() as folder:
            results[row] = MEASURES[row](Path(folder), options.runs)
        facts = machine_facts("pyarrow", "tokenizers", "transformers")
        content = {**results, "machine": facts}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


def memory(folder: Path, runs: int) -> list[dict[str, float]]:
    """Peak of anonymous memory by size of the input."""
    figures = []
    for documents in SIZES:
        source = folder / f"{documents}.jsonl"
        tokens = _write_tokens(source, documents)
        for workers in (1, 2):
            peak = _peak_of_packing(source, folder / f"out-{documents}-{workers}", workers)
            figures.append(
                {
                    "documents": documents,
                    "tokens": tokens,
                    "input_megabytes": round(source.stat().st_size / 1e6, 1),
                    "workers": workers,
                    "peak_megabytes": round(peak / 1e6, 1),
                }
            )
            print("memory:", ", ".join(f"{k} {v}" for k, v in figures[-1].items()), flush=True)
    return figures


def _write_tokens(path: Path, documents: int) -> int:
    random = np.random.default_rng(0)
    lengths = np.rint(random.lognormal(np.log(MEAN_LENGTH) - 0.5, 1.0, documents)).astype(int)
    lengths = np.clip(lengths, 1, 2048)
    with open(path, "w") as file:
        for length in lengths:
            file.write(json.dumps({"input_ids": random.integers(0, 50_000, length).tolist()}))
            file.write("\n")
    return int(lengths.sum())


def _peak_of_packing(source: Path, out: Path, workers: int) -> int:
    """Runs the command; the most bytes that its processes held together."""
    given = [str(source), "--capacity", "2048", "-o", str(out), "--workers", str(workers)]
    command = [sys.executable, "-m", "packed_attn.cli", "pack", *given]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _anonymous_bytes(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return peak


def _anonymous_bytes(process: int) -> int:
    """Of a process and all its descendants; one that has just ended counts nothing."""
    try:
        pages = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return 0
    own = next((line for line in pages if line.startswith("Pss_Anon")), "Pss_Anon: 0")
    return 1024 * int(own.split()[1]) + sum(_anonymous_bytes(int(child)) for child in children)


def kills(folder: Path, runs: int) -> dict[str, object]:
    """Killed and continued runs, against one that nobody killed."""
    if "PACKED_ATTN_DATA" not in os.environ:
        sys.exit("bench_offline: set PACKED_ATTN_DATA to the folder that holds gsm8k_train.jsonl")
    arguments = _job(folder)
    by_workers, everything = {}, []
    for workers, share in ((1, runs - runs // 2), (2, runs // 2)):
        case = Case(arguments, folder / f"workers-{workers}")
        made = []
        for run in killed_runs(case, share, workers=workers, seed=workers):
            made.append(run)
            print(f"\rworkers {workers}: {len(made)} of {share}", end="", file=sys.stderr)
        print(file=sys.stderr)
        by_workers[workers] = summary(made)
        everything += made
        print(f"workers {workers}: {by_workers[workers]}")
    return {"documents": DOCUMENTS, "all": summary(everything), "by_workers": by_workers}


def _job(folder: Path) -> dict[str, object]:
    """Documents and a tokenizer in files, and what `pack_files` is asked for."""
    lines = (Path(os.environ["PACKED_ATTN_DATA"]) / "gsm8k_train.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines[:DOCUMENTS]]
    documents = folder / "gsm8k.jsonl"
    with open(documents, "w") as file:
        for record in records:
            pair = {"prompt": record["question"] + "\n", "completion": record["answer"]}
            file.write(json.dumps(pair) + "\n")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((text for r in records for text in r.values()), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.save_pretrained(folder / "tokenizer")
    return {
        "inputs": [documents],
        "capacity": CAPACITY,
        "tokenizer": str(folder / "tokenizer"),
        "part_bytes": 2**15,
        "shard_tokens": 16 * CAPACITY,
    }


MEASURES = {"kills": kills, "memory": memory}


if __name__ == "__main__":
    main()
