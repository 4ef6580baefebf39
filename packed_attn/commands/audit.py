"""packed-attn audit: does a model keep packed documents apart?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

EXIT_LEAKS = 1


def add(commands: Any) -> None:
    """Describes the command to the parser."""
    parser = commands.add_parser(
        "audit",
        help="prove that a model keeps packed documents apart, or name the module that leaks",
    )
    parser.add_argument("model", help="model id, folder, or a config.json (random weights)")
    parser.add_argument("--unpatched", action="store_true", help="audit the stock model")
    parser.add_argument("--backend", default="auto", help="attention backend of the patched model")
    parser.add_argument("--convention", help="which boundaries the batch carries")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, float16 or float64")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Audits one model; 1 on a leak."""
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
