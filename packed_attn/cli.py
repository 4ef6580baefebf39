"""The packed-attn command: demo and audit."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXIT_LEAKS = 1
EXIT_REFUSED = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0 good, 1 a leak, 2 refused or bad input."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        print(f"packed-attn: {error}", file=sys.stderr)
        return EXIT_REFUSED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="packed-attn", description="Exact document packing for LLM fine-tuning."
    )
    commands = parser.add_subparsers(title="commands", required=True)

    demo = commands.add_parser("demo", help="train on your own standard library, four ways")
    demo.add_argument("--output", type=Path, default=Path("demo-output"), help="folder to write")
    demo.add_argument("--seconds", type=float, default=15.0, help="seconds for each row")
    demo.set_defaults(run=_demo)

    audit = commands.add_parser(
        "audit",
        help="prove that a model keeps packed documents apart, or name the module that leaks",
    )
    audit.add_argument("model", help="model id, folder, or a config.json (random weights)")
    audit.add_argument("--unpatched", action="store_true", help="audit the stock model")
    audit.add_argument("--backend", default="auto", help="attention backend of the patched model")
    audit.add_argument("--convention", help="which boundaries the batch carries")
    audit.add_argument("--dtype", default="float32", help="float32, bfloat16, float16 or float64")
    audit.add_argument("--json", action="store_true", help="print JSON")
    audit.set_defaults(run=_audit)
    return parser


def _demo(args: argparse.Namespace) -> int:
    from packed_attn import demo

    return demo.run(args.output, seconds_per_row=args.seconds)


def _audit(args: argparse.Namespace) -> int:
    from packed_attn.audit import audit
    from packed_attn.patching import patch_model

    model = _load(args.model, args.dtype)
    if not args.unpatched:
        patch_model(model, backend=args.backend)
    report = audit(model, convention=args.convention)
    print(json.dumps(report.to_dict(), indent=2) if args.json else report)
    return 0 if report.isolated else EXIT_LEAKS


def _load(name: str, dtype: str) -> Any:
    """A causal LM with its weights, or with random ones where only a config is given.

    Remote code is never run: such a model is loaded by its user and audited from Python.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch_dtype = getattr(torch, dtype, None)
    if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating torch dtype, got {dtype!r}")
    path = Path(name)
    only_config = path.suffix == ".json" or (
        path.is_dir() and not any(path.glob("*.safetensors")) and not any(path.glob("*.bin"))
    )
    if not only_config:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch_dtype)
    config = AutoConfig.from_pretrained(name)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch_dtype)


if __name__ == "__main__":
    sys.exit(main())
