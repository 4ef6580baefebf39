"""The offline packer under kill -9: tokens lost, tokens duplicated, shards written again.

    PACKED_ATTN_DATA=... python benchmarks/bench_offline.py [--runs N] [--json PATH]

Each run packs documents of gsm8k (prompts and completions, tokenised by a tokenizer trained on
them) into a dozen shards, is killed at a random moment of its life, at times twice, and continued
with --resume. Its documents are then counted one by one against those of a run that nobody killed,
and all its files compared to the byte. Half of the runs have one worker, half have two, whose
processes are left to notice the death of their parent by themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

# One thread a process: before numpy and Arrow start theirs.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from kills import Case, killed_runs, summary
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from packed_attn.facts import machine_facts

DOCUMENTS = 400
CAPACITY = 512
RESULTS = Path(__file__).parent / "results" / "offline_kills.json"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the figures go")
    options = parser.parse_args(arguments)
    if "PACKED_ATTN_DATA" not in os.environ:
        sys.exit("bench_offline: set PACKED_ATTN_DATA to the folder that holds gsm8k_train.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        results = _measure(Path(folder), options.runs)
    content = {"machine": machine_facts("pyarrow", "tokenizers", "transformers"), **results}
    options.json.write_text(json.dumps(content, indent=2) + "\n")


def _measure(folder: Path, runs: int) -> dict[str, object]:
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


if __name__ == "__main__":
    main()
