"""packed-attn audit: does a model keep packed documents apart?"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packed_attn.errors import first_line

if TYPE_CHECKING:
    from packed_attn.audit.matrix import Matrix

EXIT_LEAKS = 1
EXIT_REFUSED = 2
EPILOG = """\
exit status: 0 isolated; 1 a leak; 2 refused, an error, or bad input. With --all and --types a
refusal is a finding like any other, and 2 means that a patched model fails where stock does not.
"""


def add(commands: Any) -> None:
    """Describes the command to the parser."""
    parser = commands.add_parser(
        "audit",
        help="prove that a model keeps packed documents apart, or name the module that leaks",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is audited")
    what.add_argument("model", nargs="?", help="model id, folder, or a config.json (random)")
    what.add_argument("--all", action="store_true", help="every causal LM that transformers has")
    what.add_argument("--types", nargs="+", metavar="TYPE", help="tiny models of these model types")
    what.add_argument(
        "--heads", nargs="+", default=["causal-lm"], metavar="HEAD", help="of --all and --types"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--unpatched", action="store_true", help="audit the stock model")
    how.add_argument("--backend", default="auto", help="attention backend of the patched model")
    how.add_argument(
        "--on-unknown", default="raise", choices=["raise", "unpack"], help="as in patch_model"
    )
    how.add_argument("--convention", help="which boundaries the batch carries")
    how.add_argument(
        "--lengths", nargs="+", type=int, metavar="N", help="tokens of the audit's documents"
    )
    how.add_argument("--matrix", action="store_true", help="every convention, stock beside patched")
    how.add_argument("--dtype", default="float32", help="float32, bfloat16, float16 or float64")
    how.add_argument("--device", default="cpu", help="where one model runs: cpu, cuda, cuda:1, ...")
    how.add_argument("--processes", type=int, default=2, help="of --all and --types")
    out = parser.add_argument_group("output beside the table")
    out.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="JSON, printed or to FILE"
    )
    out.add_argument("--html", type=Path, metavar="PAGE", help="the matrix as a web page")
    out.add_argument("--markdown", type=Path, metavar="FILE", help="the matrix as Markdown")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Audits; 1 on a leak, 2 on a refusal."""
    tiny = args.all or args.types is not None
    if tiny == (args.model is not None):
        raise ValueError("give a model, or --all, or --types")
    if tiny and args.device != "cpu":
        raise ValueError(f"--device {args.device} is for one model: --all and --types use the CPU")
    if not tiny and not (args.matrix or args.html or args.markdown):
        return _one_report(args)
    if args.convention is not None:
        raise ValueError(f"a matrix has every convention: leave out --convention {args.convention}")
    if args.lengths is not None:
        raise ValueError("a matrix has lengths of its own: leave out --lengths")
    matrix = _tiny_matrix(args) if tiny else _matrix(args)
    _write(matrix, args)
    return _status(matrix, refusals_count=not tiny)


def _one_report(args: argparse.Namespace) -> int:
    """The full proof by one convention."""
    from packed_attn.audit import audit
    from packed_attn.audit.subject import LENGTHS

    model = load_model(args.model, args.dtype, args.device)
    if not args.unpatched:
        _patch(args)(model)
    report = audit(model, convention=args.convention, lengths=args.lengths or LENGTHS)
    text = json.dumps(report.to_dict(), indent=2)
    if args.json in (None, "-"):
        print(report if args.json is None else text)
    else:
        print(report)
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    return 0 if report.isolated else EXIT_LEAKS


def _matrix(args: argparse.Namespace) -> Matrix:
    """One model by every convention, in this process."""
    from packed_attn.audit.matrix import audit_models

    model = load_model(args.model, args.dtype, args.device)
    return audit_models([(args.model, model)], patch=None if args.unpatched else _patch(args))


def _tiny_matrix(args: argparse.Namespace) -> Matrix:
    """Tiny random models of model types, each in a child process."""
    from tqdm import tqdm

    from packed_attn.audit.matrix import HEADS, audit_architectures, model_types

    for head in args.heads:
        if head not in HEADS:
            raise ValueError(f"heads must be of {list(HEADS)}, got {head!r}")
    if args.processes < 1:
        raise ValueError(f"processes must be at least 1, got {args.processes}")
    found = [(head, name) for head in args.heads for name in args.types or model_types(head)]

    def progress(rows: Iterable[Any]) -> Iterable[Any]:
        return tqdm(rows, total=len(found), unit="model", smoothing=0)

    return audit_architectures(found, processes=args.processes, progress=progress)


def _write(matrix: Matrix, args: argparse.Namespace) -> None:
    from packed_attn.audit.markdown import to_markdown
    from packed_attn.audit.page import to_html

    command = shlex.join(["packed-attn", *sys.argv[1:]])
    text = json.dumps(matrix.to_dict(), indent=1)
    if args.json == "-":
        print(text)
    else:
        print(_table(matrix))
    files = {args.html: to_html(matrix, command), args.markdown: to_markdown(matrix, command)}
    if args.json not in (None, "-"):
        files[Path(args.json)] = text + "\n"
    for path, content in files.items():
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")


def _table(matrix: Matrix) -> str:
    """Models by conventions in words, or the counts where there are many."""
    from packed_attn.audit.matrix import SIDES
    from packed_attn.audit.words import WORDS

    lines = []
    for convention in matrix.conventions:
        if len(matrix.rows) == 1:
            row = matrix.rows[0]
            cells = [(side, getattr(row, side).get(convention)) for side in SIDES]
            words = [f"{side}: {WORDS[c.verdict].word:8}" for side, c in cells if c is not None]
        else:
            words = [f"{side}: {_counted(matrix.counts(side, convention))}" for side in SIDES]
        lines.append(f"{convention:32} {'  '.join(words)}".rstrip())
    details = {
        f"{row.name}, {side}, {cell.verdict}: {cell.detail}": None
        for row in matrix.rows
        for side in (SIDES if len(matrix.rows) == 1 else SIDES[1:])
        for cell in getattr(row, side).values()
        if cell.detail
    }
    return "\n".join([*lines, *details])


def _counted(counts: dict[str, int]) -> str:
    from packed_attn.audit.words import WORDS

    return ", ".join(f"{count} {WORDS[verdict].word}" for verdict, count in counts.items())


def _status(matrix: Matrix, *, refusals_count: bool) -> int:
    """The exit status: what the patched side says, or the stock side where it stands alone."""
    side = "patched" if any(row.patched for row in matrix.rows) else "stock"
    if any(cell.verdict.startswith("leaks") for cell in matrix.cells(side)):
        return EXIT_LEAKS
    for row in matrix.rows:
        for convention, cell in getattr(row, side).items():
            broken = cell.verdict == "error" and row.stock[convention].verdict != "error"
            if broken or (refusals_count and cell.verdict in ("refused", "error")):
                return EXIT_REFUSED
    return 0


def _patch(args: argparse.Namespace) -> Callable[[Any], Any]:
    from packed_attn.patching import patch_model

    return lambda model: patch_model(model, backend=args.backend, on_unknown=args.on_unknown)


def load_model(name: str, dtype: str, device: str = "cpu") -> Any:
    """A causal LM with its weights, or with random ones where only a config is given.

    Remote code is never run: such a model is loaded by its user and audited from Python.

    Raises:
        ValueError: a model that cannot be loaded, in one line.
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
    model: Any
    try:
        if only_config:
            config = AutoConfig.from_pretrained(name)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch_dtype)
        return model.to(device)
    except Exception as error:  # whatever is wrong with a model or a config is one line here
        said = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"cannot load {name!r}: {said}") from error
