"""packed-attn pack: files of documents to shards of packs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Describes the command to the parser."""
    parser = commands.add_parser(
        "pack", help="tokenise and pack files of any size into Parquet shards with a manifest"
    )
    parser.add_argument(
        "inputs", nargs="+", type=Path, help=".jsonl or .parquet files, folders, saved data sets"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder, new or empty")
    parser.add_argument("--capacity", type=int, required=True, help="tokens a row holds")
    parser.add_argument("--tokenizer", help="name or folder; not needed for input_ids")
    parser.add_argument("--strategy", default="bfd", help="as in pack_lengths (default: bfd)")
    parser.add_argument(
        "--overflow", default="split", help="documents over capacity: split, truncate, drop, error"
    )
    parser.add_argument("--seed", type=int, help="shuffle the packs; longest first without")
    parser.add_argument(
        "--learnable-only", action="store_true", help="leave out documents without a label"
    )
    parser.add_argument(
        "--share-prefixes",
        action="store_true",
        help="documents that begin alike share those tokens in a pack (for PackedCollator)",
    )
    parser.add_argument("--min-shared", type=int, help="tokens that sharing must save (16)")
    parser.add_argument("--max-loss", type=float, help="share of the tokens that may be lost")
    parser.add_argument(
        "--multiple", type=int, default=1, help="packs to a multiple of this: processes x batch"
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="count records that cannot be read, leave them out"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes; the bytes stay the same")
    parser.add_argument("--engine", default="local", help="local, or ray (extra ray)")
    parser.add_argument("--resume", action="store_true", help="continue a run that did not end")
    parser.add_argument("--shard-tokens", type=int, help="room for tokens in a shard")
    parser.add_argument("--part-bytes", type=int, help="bytes of input tokenised at a time")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Packs; what is wrong with the input is an error of one line."""
    from packed_attn.offline import pack_files, report_of

    sizes = {name: getattr(args, name) for name in ("shard_tokens", "part_bytes", "min_shared")}
    manifest = pack_files(
        args.inputs,
        args.output,
        args.capacity,
        tokenizer=args.tokenizer,
        strategy=args.strategy,
        overflow=args.overflow,
        seed=args.seed,
        learnable_only=args.learnable_only,
        share_prefixes=args.share_prefixes,
        max_loss=args.max_loss,
        multiple=args.multiple,
        skip_bad=args.skip_bad,
        workers=args.workers,
        engine=args.engine,
        resume=args.resume,
        progress=True,
        **{name: size for name, size in sizes.items() if size is not None},
    )
    print(report_of(manifest))
    print(f"{len(manifest['shards'])} shards in {args.output}")
    return 0
