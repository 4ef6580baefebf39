"""packed-attn verify: are packed shards what was written, to the last boundary?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EXIT_FAULT = 1


def add(commands: Any) -> None:
    """Describes the command to the parser."""
    parser = commands.add_parser(
        "verify", help="hash and count packed shards again, and check every boundary"
    )
    parser.add_argument("folder", type=Path, help="what packed-attn pack wrote")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints every fault; 1 if there is one."""
    from packed_attn.offline import read_manifest, verify

    faults = 0
    for fault in verify(args.folder):
        print(fault)
        faults += 1
    shards = read_manifest(args.folder)["shards"]
    packs, documents, tokens = (
        sum(shard[name] for shard in shards) for name in ("packs", "documents", "tokens")
    )
    print(
        f"{len(shards):,} shards, {packs:,} packs, {documents:,} documents, {tokens:,} tokens: "
        + (f"{faults} faults" if faults else "every hash, count and boundary holds")
    )
    return EXIT_FAULT if faults else 0
