"""The README's Python runs as it stands, in order, given a model, a data set and Trainer's args."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import pytest
from transformers import Trainer, TrainingArguments

from tests.models import tiny_model

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_python_blocks_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    names = {
        "model": tiny_model("llama"),
        "dataset": datasets.Dataset.from_dict({"input_ids": [[5, 6, 7, 8], [9, 10], [11] * 30]}),
        "Trainer": Trainer,
        "args": TrainingArguments(
            output_dir=str(tmp_path), report_to=[], max_steps=1, save_strategy="no", use_cpu=True
        ),
    }
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["out"].shape == (43, 8, 64)
    assert "LlamaForCausalLM, given packed batch: isolated" in capsys.readouterr().out


def test_makefile_has_the_commands_that_the_readme_names() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    targets = set(re.findall(r"^make (\w[\w-]*)", README, re.MULTILINE))
    assert {"demo", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
