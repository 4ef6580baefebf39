"""packed-attn inspect: what is in packed shards, as text, JSON or a picture."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Describes the command to the parser."""
    parser = commands.add_parser("inspect", help="print the report of packed shards, and draw it")
    parser.add_argument("folder", type=Path, help="what packed-attn pack wrote")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print the manifest")
    shown.add_argument(
        "--max-length", type=int, metavar="N", help="compare with truncation to N tokens"
    )
    parser.add_argument("--picture", type=Path, help="image file to draw (extra plot)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the report, for which nothing but the manifest is read, and what else is asked."""
    from packed_attn.offline import read_manifest, report_of

    manifest = read_manifest(args.folder)
    report = report_of(manifest)
    print(json.dumps(manifest, indent=2) if args.json else _text(manifest, report))
    if args.picture is not None or args.max_length is not None:
        from packed_attn.offline.packs import shard_packs
        from packed_attn.packing import compare, draw_packs

        packs = shard_packs(args.folder)
        if args.max_length is not None:
            print(compare(packs, args.max_length))
        if args.picture is not None:
            draw_packs(packs, args.picture, max_length=args.max_length)
    return 0


def _text(manifest: dict[str, Any], report: Any) -> str:
    settings, shards = manifest["settings"], manifest["shards"]
    tokenizer = settings["tokenizer"] or {"name": "none: they were tokens already"}
    lines = [
        str(report),
        f"  shards       {len(shards):,}, {sum(shard['bytes'] for shard in shards):,} bytes",
        f"  from         {', '.join(name for name, _ in settings['inputs'])} ({settings['kind']})",
        f"  tokenizer    {tokenizer['name']}",
        *(f"  unreadable   {place}" for place in manifest["unreadable"]),
    ]
    return "\n".join(lines)
