"""The packed-attn command: what it prints and how it exits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from packed_attn.cli import main
from tests.models import tiny_config, tiny_model


@pytest.fixture
def config(tmp_path: Path) -> str:
    tiny_config("llama").save_pretrained(tmp_path)
    return str(tmp_path / "config.json")


def test_audit_of_a_config(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", config]) == 0
    assert "LlamaForCausalLM, given packed batch: isolated" in capsys.readouterr().out


def test_audit_of_a_folder_with_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    assert main(["audit", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["model"], report["isolated"]) == ("Qwen3ForCausalLM", True)


def test_a_leak_is_an_exit_status(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", config, "--unpatched"]) == 1
    out = capsys.readouterr().out
    assert "first leaking module: model.layers.0.self_attn (LlamaAttention)" in out


def test_refusals_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = AutoConfig.for_model("xlnet", n_layer=1, n_head=2, d_model=32, d_inner=32)
    config.save_pretrained(tmp_path)
    assert main(["audit", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("packed-attn: patch_model refuses XLNetLMHeadModel")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dtype", "int8"], "dtype must be a floating torch dtype"),
        (["--backend", "fast"], "backend must be 'auto' or one of"),
        (["--convention", "rows"], "convention must be one of"),
    ],
)
def test_bad_arguments(
    config: str, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["audit", config, *arguments]) == 2
    assert words in capsys.readouterr().err
