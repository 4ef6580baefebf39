"""The README's Python runs as it stands, in order, given a model, a data set and Trainer's args."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import Trainer, TrainingArguments

from tests.models import tiny_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def run_blocks(page: str, folder: Path) -> dict[str, Any]:
    """The names that a page's Python leaves behind."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, Any] = {
        "model": tiny_model("llama"),
        "dataset": datasets.Dataset.from_dict({"input_ids": [[5, 6, 7, 8], [9, 10], [11] * 30]}),
        "Trainer": Trainer,
        "args": TrainingArguments(
            output_dir=str(folder), report_to=[], max_steps=1, save_strategy="no", use_cpu=True
        ),
    }
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names


def test_training_page_runs(tmp_path: Path) -> None:
    names = run_blocks("docs/training.md", tmp_path)
    assert names["sft_arguments"]["padding_free"]
    assert names["rows"]["seq_lengths"][:] == [[4, 2, 30]]
    assert names["policy"] is names["model"]


def test_accelerate_reads_the_configurations(tmp_path: Path) -> None:
    """The files of the training page, as `accelerate launch --config_file` reads them."""
    from accelerate.commands.config.config_args import load_config_from_file

    page = (ROOT / "docs/training.md").read_text()
    blocks = re.findall(r"```yaml\n# (\S+)\n(.*?)```", page, re.DOTALL)
    assert [name for name, _ in blocks] == ["fsdp2.yaml", "zero3.yaml"]
    read: dict[str, Any] = {}
    for name, block in blocks:
        (tmp_path / name).write_text(block)
        read[name] = load_config_from_file(str(tmp_path / name))
    assert read["fsdp2.yaml"].distributed_type == "FSDP"
    assert known_to_launch(read["fsdp2.yaml"].fsdp_config)
    assert read["zero3.yaml"].distributed_type == "DEEPSPEED"
    assert known_to_launch(read["zero3.yaml"].deepspeed_config)


def known_to_launch(settings: dict[str, Any]) -> bool:
    """Whether each setting is an argument of `accelerate launch`: others are passed over."""
    from accelerate.commands.launch import launch_command_parser

    known = {action.dest for action in launch_command_parser()._actions}
    return bool(settings) and set(settings) <= known


def test_python_blocks_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_blocks("README.md", tmp_path)
    assert names["out"].shape == (43, 8, 64)
    assert "LlamaForCausalLM, given packed batch: isolated" in capsys.readouterr().out


def test_makefile_has_the_commands_that_the_readme_names() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    targets = set(re.findall(r"^make (\w[\w-]*)", README, re.MULTILINE))
    assert {"demo", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_benchmarks_start_in_one_way() -> None:
    """As modules from the root, and those that a page or a docstring names are there."""
    pages = [ROOT / name for name in ("README.md", "CHANGELOG.md", "Makefile")]
    pages += [*(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.*")]
    text = "\n".join(page.read_text() for page in pages)
    assert not re.findall(r"python3? \S*benchmarks/\S*", text)
    named = set(re.findall(r"-m benchmarks\.(\w+)", text))
    assert {"bench_cpu", "bench_attention", "sweep_models"} <= named
    assert [name for name in named if not (ROOT / "benchmarks" / f"{name}.py").exists()] == []
