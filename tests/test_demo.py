"""The demo's parts on a handful of library files: documents, model, rows, secret, table."""

from __future__ import annotations

import ast
import json
import math
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the demo needs the hf extra")
pytest.importorskip("matplotlib", reason="the demo needs the plot extra")

from packed_attn.demo import corpus, measure, runner, secret
from packed_attn.demo.batches import concatenate, pad_documents, token_owners
from packed_attn.demo.model import build_model
from packed_attn.demo.plot import plot_secret
from packed_attn.demo.rows import ROWS, RowResult, probe_row
from packed_attn.demo.settings import Settings
from packed_attn.demo.table import render_ratios, render_table

SOURCE = '''
@decorated
def area(width, height):
    """The area.

    In square metres.
    """
    # a comment stays
    return width * height

def silent(x):
    return x

def one_line(x): "Shares a line."; return x

class Box:
    async def open(self):
        "Opens it."
        await self.lid()
'''


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A run on the library's first files, small enough for a test."""
    chosen = Settings(
        tmp_path_factory.mktemp("demo"),
        train_seconds=1.0,
        capacity=512,
        vocab_size=512,
        heldout_documents=4,
        max_files=24,
    )
    chosen.save()
    corpus.prepare_corpus(chosen)
    return chosen


def test_docstring_is_the_completion_and_not_in_the_prompt(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(SOURCE)
    area, opened = corpus.extract_examples([file])
    assert area.completion == "The area.\n\nIn square metres."
    assert area.prompt.startswith("@decorated\ndef area(width, height):\n    # a comment stays")
    assert area.prompt.endswith("return width * height")
    assert opened.completion == "Opens it."
    assert opened.prompt == "async def open(self):\n    await self.lid()"


def test_form_feeds_do_not_shift_lines(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("import os\n\x0c\n" + SOURCE)
    prompts = [example.prompt for example in corpus.extract_examples([file])]
    assert [p.splitlines()[0] for p in prompts] == ["@decorated", "async def open(self):"]


def test_files_that_do_not_parse_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"\xff\xfe not utf-8")
    (tmp_path / "b.py").write_text("def broken(:")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "c.py").write_text(SOURCE)
    files = corpus.stdlib_files(tmp_path)
    assert [file.name for file in files] == ["a.py", "b.py"]
    assert list(corpus.extract_examples(files)) == []


def test_library_functions_lose_their_docstring() -> None:
    examples = list(corpus.extract_examples([Path(ast.__file__)]))
    names = {example.prompt.split("(")[0] for example in examples}
    assert {"def parse", "def literal_eval", "def walk", "def get_docstring"} <= names
    for example in examples:
        assert example.completion not in example.prompt


def test_labels_are_the_completion_alone(settings: Settings) -> None:
    from datasets import Dataset
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(settings.output / "tokenizer.json"))
    documents = Dataset.load_from_disk(str(settings.train_folder)).to_list()
    for document in documents:
        ids, labels = document["input_ids"], document["labels"]
        prompt_tokens = labels.count(corpus.IGNORED_LABEL)
        assert labels == [corpus.IGNORED_LABEL] * prompt_tokens + ids[prompt_tokens:]
        assert ids[0] == tokenizer.token_to_id("<code>")
        assert ids[prompt_tokens - 1] == tokenizer.token_to_id("<doc>")
        assert ids[-1] == tokenizer.token_to_id("<end>")


def test_tokenizer_gives_any_text_back(settings: Settings) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(settings.output / "tokenizer.json"))
    text = "def f(x):\n\treturn 'naïve 日本語 🙂'  # \x00"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_model_is_small_grouped_and_repeatable() -> None:
    chosen = Settings(Path())
    models = [
        build_model(vocab_size=chosen.vocab_size, capacity=chosen.capacity, seed=chosen.seed)
        for _ in range(2)
    ]
    assert 1e6 <= sum(p.numel() for p in models[0].parameters()) <= 3e6
    assert 2 * (models[0].config.num_key_value_heads or 0) == models[0].config.num_attention_heads
    for first, second in zip(*(model.parameters() for model in models)):
        assert torch.equal(first, second)


def test_packed_row_in_a_process_of_its_own_is_exact(settings: Settings) -> None:
    result = RowResult(**runner.run_child(settings, "rows", "packed"))
    assert result.steps >= 1
    assert result.tokens_per_second > 0
    assert result.peak_mib >= 0
    assert 0 < result.loss < 1.5 * math.log(settings.vocab_size)
    assert result.gradient_error <= 1e-6
    assert result.leaked_tokens == 0
    assert result.probe_tokens > 0


@pytest.mark.parametrize(("name", "leaks"), [("padded", False), ("stock", False), ("naive", True)])
def test_the_probe_tells_which_rows_leak(settings: Settings, name: str, leaks: bool) -> None:
    gradient_error, leaked_tokens, probe_tokens = probe_row(
        ROWS[name], settings, torch.device("cpu")
    )
    assert (gradient_error > 1e-2) == leaks
    # The first document of a naive pack has nothing before it to see.
    assert 0 < leaked_tokens < probe_tokens if leaks else leaked_tokens == 0


def test_owners_name_each_token_and_leave_padding_out() -> None:
    documents = [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7], "labels": [7]}]
    padded = pad_documents(documents)
    assert token_owners(documents, padded).tolist() == [[0, 0], [1, -1]]
    pack = {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "seq_lengths": [2, 1]}
    assert token_owners([pack], concatenate([pack])).tolist() == [[0, 0, 1]]


def test_gradient_of_a_padded_batch_equals_the_documents_alone() -> None:
    model = build_model(vocab_size=32, capacity=64, seed=1, hidden_size=32, num_layers=1)
    documents = [
        {"input_ids": list(range(4, 4 + n)), "labels": [-100, *range(5, 4 + n)]} for n in (3, 9)
    ]
    tokens = measure.count_completion_tokens(documents)
    together = measure.gradient(model, pad_documents(documents), tokens)
    alone = measure.gradient_alone(model, documents)
    assert tokens == 2 + 8
    assert measure.relative_error(together, alone) < 1e-6


def test_the_secret_stands_in_both_documents() -> None:
    pack = secret.secret_pack(random.Random(0), pairs=3)
    pair = 2 * (secret.KEY_LENGTH + 1)
    assert pack["seq_lengths"] == [secret.KEY_LENGTH + 1] * 6
    keys = set()
    for begin in range(0, 3 * pair, pair):
        ids, labels = (pack[name][begin : begin + pair] for name in ("input_ids", "labels"))
        first, second = ids[: pair // 2], ids[pair // 2 :]
        assert (first[0], second[0]) == (secret.FIRST, secret.SECOND)
        assert first[1:] == second[1:]
        assert labels == [-100] * (secret.KEY_LENGTH + 2) + second[1:]
        keys.add(tuple(first[1:]))
    assert len(keys) == 3
    assert pytest.approx(math.log(26)) == secret.FLOOR


def test_only_a_leak_learns_the_secret(tmp_path: Path) -> None:
    settings = Settings(tmp_path, secret_steps=120, secret_seconds=60.0)
    result = secret.train_both(settings)
    assert result.naive_final < 0.7 * secret.FLOOR
    assert result.packed_final > 0.98 * secret.FLOOR
    plot_secret(result, tmp_path / "secret.png")
    assert (tmp_path / "secret.png").read_bytes().startswith(b"\x89PNG")


def test_table_lines_up_and_gives_ratios() -> None:
    results = [_result("padded", 1_000), _result("packed", 12_500)]
    text = render_table(results).splitlines()
    assert len({len(line) for line in text}) == 1
    assert "12,500" in text[-1]
    markdown = render_table(results, markdown=True).splitlines()
    assert markdown[1].count("|") == markdown[-1].count("|") == 7
    assert "12.5x of padded (batch 8)" in render_ratios(results)


def test_a_failing_child_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="rows nonsense ended with status 2"):
        runner.run_child(Settings(tmp_path), "rows", "nonsense")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runner, "NEEDED", ("torch", "no_such_package"))
    with pytest.raises(ImportError, match=r"no_such_package.*packed-attn\[hf,plot\]"):
        runner.run(tmp_path / "out")


def test_settings_survive_the_way_to_a_child(tmp_path: Path) -> None:
    settings = Settings(tmp_path, capacity=99)
    settings.save()
    assert Settings.load(tmp_path) == settings
    assert json.loads((tmp_path / "settings.json").read_text())["capacity"] == 99


def _result(row: str, real_tokens: int) -> RowResult:
    return RowResult(
        row=row,
        title=ROWS[row].title,
        device="cpu",
        threads=2,
        steps=3,
        real_tokens=real_tokens,
        seconds=1.0,
        peak_mib=12.3,
        loss=5.0,
        gradient_error=1e-7,
        leaked_tokens=0,
        probe_tokens=10,
    )
