"""The packed-attn command: what it prints and how it exits."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from packed_attn_patches.tiny import tiny_config as any_tiny_config

from packed_attn.audit.conventions import TELLING
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


def test_audit_on_another_device(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The meta device stands in: it takes the model, which then has no weights to run with."""
    assert main(["audit", config, "--device", "meta"]) == 2
    assert "on the meta device" in capsys.readouterr().err


def test_a_leak_is_an_exit_status(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", config, "--unpatched"]) == 1
    out = capsys.readouterr().out
    assert "first leaking module: model.layers.0.self_attn (LlamaAttention)" in out


def test_audit_at_other_lengths(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", config, "--lengths", "3", "70", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["isolated"]
    assert main(["audit", config, "--lengths", "3"]) == 2
    assert "an audit needs two documents of a token or more, got (3,)" in capsys.readouterr().err
    assert main(["audit", config, "--matrix", "--lengths", "3", "70"]) == 2
    assert "leave out --lengths" in capsys.readouterr().err


def test_refusals_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    any_tiny_config("xlstm").save_pretrained(tmp_path)
    assert main(["audit", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("packed-attn: patch_model refuses xLSTMForCausalLM")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dtype", "int8"], "dtype must be a floating torch dtype"),
        (["--device", "nowhere"], "cannot load"),
        (["--backend", "fast"], "backend must be 'auto' or one of"),
        (["--convention", "rows"], "convention must be one of"),
    ],
)
def test_bad_arguments(
    config: str, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["audit", config, *arguments]) == 2
    assert words in capsys.readouterr().err


class _Cells(HTMLParser):
    """The verdicts of a page's cells, and whether it asks for anything from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.classes: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "td" and (values.get("class") or "").startswith(("stock ", "patched ")):
            self.classes.append(values["class"] or "")
        self.outside += [v or "" for k, v in attrs if k in ("src", "href")]


def test_a_matrix_as_table_page_markdown_and_json(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, text, data = tmp_path / "page.html", tmp_path / "page.md", tmp_path / "page.json"
    files = ["--html", str(page), "--markdown", str(text), "--json", str(data)]
    assert main(["audit", config, *files]) == 0
    assert "stock: leaks" in capsys.readouterr().out
    cells = _Cells()
    cells.feed(page.read_text())
    assert cells.classes.count("patched v-isolated") == len(TELLING)
    assert "stock v-leaks" in cells.classes
    assert cells.outside == []
    assert "L → E" in text.read_text()
    row = json.loads(data.read_text())["rows"][0]
    assert {cell["verdict"] for cell in row["patched"].values()} == {"isolated"}


@pytest.mark.slow
def test_the_page_in_a_browser(config: str, tmp_path: Path) -> None:
    """The filter leaves no row for a word that no row has."""
    browser = shutil.which("chromium") or shutil.which("chrome")
    if browser is None:
        pytest.skip("no chromium on this machine")
    page = tmp_path / "page.html"
    main(["audit", config, "--html", str(page)])
    for word, shown in (("llama", "1 of 1 models"), ("nothing-has-this", "0 of 1 models")):
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        done = subprocess.run(
            [*command, f"file://{page}#{word}"], capture_output=True, text=True, timeout=120
        )
        assert shown in done.stdout, done.stderr


@pytest.mark.slow
def test_tiny_models_in_children(capsys: pytest.CaptureFixture[str]) -> None:
    """A type that cannot be built is an error cell and not the end."""
    assert main(["audit", "--types", "llama", "no-such-type"]) == 0
    out = capsys.readouterr().out
    assert "patched: 1 exact, 1 error" in out
    assert "could not be built: KeyError" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give a model, or --all, or --types"),
        (["--types", "llama", "--heads", "none"], "heads must be of"),
        (["--types", "llama", "--device", "cuda"], "--device cuda is for one model"),
        (["./no-such-folder/config.json"], "cannot load './no-such-folder/config.json'"),
    ],
)
def test_bad_audits(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main(["audit", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
