"""Runs the demo from end to end: corpus, the table's rows, the planted secret, the files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packed_attn.demo.settings import Settings

# Imports and the checks around training take about this long on two cores; the rest is training.
SECONDS_BESIDE_TRAINING = 8.0
# Versions that the report names.
PACKAGES = ("torch", "transformers", "triton", "datasets", "tokenizers", "numpy")
NEEDED = ("transformers", "accelerate", "datasets", "tokenizers", "tqdm", "matplotlib")


def run(
    output: Path = Path("demo-output"),
    seconds_per_row: float = 15.0,
    *,
    seconds_for_secret: float = 30.0,
    markdown: bool = False,
) -> int:
    """Trains on this machine's standard library in four ways and prints the comparison.

    Every row, and the secret, runs in a child process of its own, one after another. Writes
    `table.md`, `results.json`, `secret.png` and the tokenized documents.

    Args:
        output: folder to write, made where it is missing.
        seconds_per_row: seconds for each row; about 8 of them are imports and checks.
        seconds_for_secret: seconds for the planted secret, likewise.
        markdown: print the table as Markdown.

    Returns:
        0; or 1 when a token of the packed-attn row saw another document.

    Raises:
        ImportError: a package of the extras `hf` and `plot` is missing.
        RuntimeError: a child process failed.
    """
    _check_installed()
    from packed_attn.demo.corpus import prepare_corpus
    from packed_attn.demo.plot import plot_secret
    from packed_attn.demo.report import Report
    from packed_attn.demo.rows import ROWS, RowResult
    from packed_attn.demo.secret import SecretResult
    from packed_attn.demo.settings import Settings
    from packed_attn.facts import machine_facts

    begun = time.perf_counter()
    settings = Settings(
        output.resolve(),
        train_seconds=max(1.0, seconds_per_row - SECONDS_BESIDE_TRAINING),
        secret_seconds=max(1.0, (seconds_for_secret - SECONDS_BESIDE_TRAINING) / 2),
    )
    settings.output.mkdir(parents=True, exist_ok=True)
    settings.save()
    report = Report(settings, machine_facts(*PACKAGES), prepare_corpus(settings))
    print(report.introduction())
    for name in ROWS:
        report.rows.append(RowResult(**run_child(settings, "rows", name)))
    print(report.comparison(markdown=markdown))
    report.secret = SecretResult(**run_child(settings, "secret"))
    plot_secret(report.secret, settings.output / "secret.png")
    report.seconds = time.perf_counter() - begun
    report.save()
    print(report.ending())
    return 1 if report.rows[-1].leaked_tokens else 0


def run_child(settings: Settings, module: str, *arguments: str) -> dict[str, Any]:
    """Runs `packed_attn.demo.MODULE` in a process of its own and reads the JSON that it wrote.

    The child finds packages where this process does, and writes progress to the same stderr.

    Raises:
        RuntimeError: the child failed; its own message is on stderr.
    """
    written = settings.output / ("-".join([module, *arguments]) + ".json")
    written.unlink(missing_ok=True)
    command = [sys.executable, "-m", f"packed_attn.demo.{module}", *arguments]
    environment = {
        # Threads that spin while they wait made training 2-3 times slower on a busy machine.
        "OMP_WAIT_POLICY": "PASSIVE",
        **os.environ,
        # On several GPUs Trainer would split batches, packs too, among them.
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(
        [*command, "--output", str(settings.output)],
        env=environment,
        stdout=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}")
    return json.loads(written.read_text())


def _check_installed() -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"the demo needs {', '.join(missing)}, which is not installed: "
            "pip install packed-attn[hf,plot]"
        )
