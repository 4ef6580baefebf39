"""Which columns are tokenised how, and which tokens are learned, for the offline packer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer
from trl.data_utils import is_conversational, maybe_convert_to_chatml

from packed_attn.offline.formats import Tokenize, detect_format
from tests.small_tokenizer import FORGETFUL, MARKED, PLAIN, prose, save_tokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is packed?"},
    {"role": "assistant", "content": "Documents, end to end."},
    {"role": "user", "content": "Up to what?"},
    {"role": "assistant", "content": "A capacity — in tokens 🧩."},
]

THOUGHT = {"role": "assistant", "content": "thinking#said"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat_template=None)


@pytest.fixture
def tokenizer(folder: str) -> Any:
    """Without a chat template: tests set the one that they are about."""
    return AutoTokenizer.from_pretrained(folder)


def tokenize(tokenizer: Any, record: dict[str, Any]) -> dict[str, np.ndarray]:
    return Tokenize(detect_format(record), tokenizer)(record)[0]


def learned(tokenizer: Any, columns: dict[str, np.ndarray], name: str) -> list[str]:
    """The texts of the runs of learned tokens."""
    mask = np.concatenate([[0], columns[name], [0]])
    edges = np.flatnonzero(np.diff(mask))
    ids = columns["input_ids"]
    return [tokenizer.decode(ids[a:b]) for a, b in zip(edges[::2], edges[1::2])]


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"text": "a"}, "text"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"prompt": MESSAGES[:2], "completion": MESSAGES[2:3]}, "prompt_completion"),
        ({"messages": MESSAGES}, "messages"),
        ({"conversations": [{"from": "user", "value": "a"}]}, "messages"),
        ({"input_ids": [1], "text": "a"}, "input_ids"),
        ({"text": "a", "prompt": "b"}, "text"),
    ],
)
def test_detection(record: dict[str, Any], kind: str) -> None:
    assert detect_format(record) == kind


def test_detection_names_columns_that_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="the columns instruction, output are none of TRL's"):
        detect_format({"instruction": "a", "output": "b"})
    with pytest.raises(ValueError, match="a record must be an object with columns, got list"):
        detect_format([1])


def test_text_ends_once(tokenizer: Any) -> None:
    wanted = tokenizer("Packs.</s>")["input_ids"]
    for text in ("Packs.", "Packs.</s>"):
        assert tokenize(tokenizer, {"text": text})["input_ids"].tolist() == wanted
    assert wanted[-1] == tokenizer.eos_token_id


def test_text_begins_as_the_tokenizer_begins(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path, begin=True))
    assert tokenize(tokenizer, {"text": "a"})["input_ids"][0] == tokenizer.bos_token_id
    columns = tokenize(tokenizer, {"prompt": "a ", "completion": "b"})
    assert columns["input_ids"][0] == tokenizer.bos_token_id
    assert columns["completion_mask"][0] == 0
    # A chat template writes its own.
    ids = tokenize(tokenizer, {"messages": MESSAGES})["input_ids"]
    assert tokenizer.bos_token_id not in ids


def test_prompt_and_completion(tokenizer: Any) -> None:
    record = {"prompt": "Question: 2 + 2\n", "completion": "4, of course"}
    columns = tokenize(tokenizer, record)
    before = tokenizer(record["prompt"])["input_ids"]
    after = tokenizer(record["completion"] + "</s>")["input_ids"]
    assert columns["input_ids"].tolist() == before + after
    assert columns["completion_mask"].tolist() == [0] * len(before) + [1] * len(after)


def test_a_token_across_the_boundary_is_learned(tokenizer: Any) -> None:
    record = {"prompt": "the pac", "completion": "ked documents"}
    columns = tokenize(tokenizer, record)
    tokens = tokenizer.convert_ids_to_tokens(columns["input_ids"])
    at = int(np.argmax(columns["completion_mask"]))
    assert tokens[at].endswith(("pack", "packed")), tokens  # the case is what it says
    assert columns["completion_mask"].tolist() == [0] * at + [1] * (len(tokens) - at)


def test_conversational_prompt_and_completion(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN
    record = {"prompt": MESSAGES[:2], "completion": MESSAGES[2:3]}
    columns = tokenize(tokenizer, record)
    whole = tokenizer.apply_chat_template(MESSAGES[:3], tokenize=True, return_dict=True)
    start = tokenizer.apply_chat_template(
        MESSAGES[:2], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert columns["input_ids"].tolist() == whole["input_ids"]
    assert learned(tokenizer, columns, "completion_mask") == ["Documents, end to end.</s>"]
    assert columns["completion_mask"].sum() == len(whole["input_ids"]) - len(start["input_ids"])


@pytest.mark.parametrize("template", [MARKED, PLAIN])
def test_answers_are_learned_and_nothing_else(tokenizer: Any, template: str) -> None:
    """By the template's own marks, and without them: the same tokens."""
    tokenizer.chat_template = template
    columns = tokenize(tokenizer, {"messages": MESSAGES})
    whole = tokenizer.apply_chat_template(MESSAGES, tokenize=True, return_dict=True)
    assert columns["input_ids"].tolist() == whole["input_ids"]
    assert learned(tokenizer, columns, "assistant_masks") == [
        "Documents, end to end.</s>",
        "A capacity — in tokens 🧩.</s>",
    ]


def test_from_and_value_are_renamed_as_trl_renames_them(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN
    given = [{"from": m["role"], "value": m["content"]} for m in MESSAGES]
    ours = tokenize(tokenizer, {"conversations": given})
    renamed = maybe_convert_to_chatml({"conversations": [dict(message) for message in given]})
    assert is_conversational(renamed)
    theirs = tokenize(tokenizer, renamed)
    assert {n: v.tolist() for n, v in ours.items()} == {n: v.tolist() for n, v in theirs.items()}


def test_templates_are_given_tools_and_options(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ tools | length }}{{ mood }}" + PLAIN
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    options = {"mood": "calm"}
    for given in (tools, json.dumps(tools)):
        record = {"messages": MESSAGES[1:3], "tools": given, "chat_template_kwargs": options}
        text = tokenizer.decode(tokenize(tokenizer, record)["input_ids"])
        assert text.startswith("1calm<|user|>What")


def test_null_keys_of_parquet_messages_are_none(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN
    padded = [{**message, "tool_calls": None} for message in MESSAGES]
    assert (
        tokenize(tokenizer, {"messages": padded})["input_ids"].tolist()
        == tokenize(tokenizer, {"messages": MESSAGES})["input_ids"].tolist()
    )


def test_tokens_pass_through(tokenizer: Any) -> None:
    columns, padding = Tokenize("input_ids", None)(
        {"input_ids": [0, 5, 6], "labels": [-100, -100, 6], "attention_mask": [0, 1, 1], "id": "a"}
    )
    assert {name: values.tolist() for name, values in columns.items()} == {
        "input_ids": [5, 6],
        "labels": [-100, 6],
    }
    assert padding == 1


@pytest.mark.parametrize(
    ("template", "record", "words"),
    [
        (None, {"messages": MESSAGES}, "has no chat template, which conversations need"),
        (None, {"prompt": MESSAGES[:2], "completion": MESSAGES[2:3]}, "has no chat template"),
        (FORGETFUL, {"messages": [MESSAGES[1], THOUGHT, *MESSAGES[3:]]},
         "rewrites the conversation around turn 2"),
        (PLAIN, {"messages": MESSAGES[:2]}, "a turn of the assistant, but its roles: system, user"),
        (PLAIN, {"messages": []}, "messages must be a list of messages"),
        (PLAIN, {"messages": "hello"}, "messages must be a list of messages"),
        (PLAIN, {"messages": ["hello"]}, "messages with role and content, got 'hello'"),
        (PLAIN, {"messages": [{"content": "a"}]}, "messages with a role"),
        ("{{ raise_exception('roles must alternate') }}", {"messages": MESSAGES},
         "refuses the conversation: roles must alternate"),
        ("{{ raise_exception('roles must alternate') }}" + MARKED, {"messages": MESSAGES},
         "refuses the conversation: roles must alternate"),
        (PLAIN, {"messages": MESSAGES, "chat_template_kwargs": "a"},
         "chat_template_kwargs must be an object of options, got 'a'"),
        (MARKED, {"messages": MESSAGES, "chat_template_kwargs": {"tokenize": 1}},
         "refuses the conversation: .* multiple values for keyword argument 'tokenize'"),
        (None, {"text": "half of \ud83e a pair"}, "the tokenizer refuses the text"),
        (None, {"input_ids": [1, 2], "seq_lengths": [1, 1]}, "must not have 'seq_lengths': either"),
        (None, {"text": None}, "text must be text, got NoneType"),
        (None, {"text": 3}, "text must be text, got int"),
        (None, {"prompt": "a", "completion": 3}, "prompt must be a list of messages"),
    ],
)  # fmt: skip
def test_bad_records(tokenizer: Any, template: str | None, record: Any, words: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=words):
        tokenize(tokenizer, record)


def test_formats_do_not_mix(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="the format of the first record, text, but is messages"):
        Tokenize("text", tokenizer)({"messages": MESSAGES})
    with pytest.raises(ValueError, match="tokenizer must be given for documents of text"):
        Tokenize("text", None)


def test_the_prose_survives(tokenizer: Any) -> None:
    """Tokens say what the text said, whatever it holds."""
    for text in prose():
        assert tokenizer.decode(tokenize(tokenizer, {"text": text})["input_ids"]) == text + "</s>"


needs_data = pytest.mark.skipif(
    "PACKED_ATTN_DATA" not in os.environ, reason="PACKED_ATTN_DATA names no folder of data sets"
)


@needs_data
def test_real_prompts_and_completions(tokenizer: Any) -> None:
    path = Path(os.environ["PACKED_ATTN_DATA"]) / "gsm8k_train.jsonl"
    for line in path.read_text().splitlines()[:100]:
        record = json.loads(line)
        pair = {"prompt": record["question"] + "\n", "completion": record["answer"]}
        columns = tokenize(tokenizer, pair)
        assert learned(tokenizer, columns, "completion_mask") == [record["answer"] + "</s>"]


@needs_data
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("alpaca_en_demo.json", "the columns instruction, input, output are none of TRL's"),
        ("glaive_toolcall_en_demo.json", "its roles: function_call, gpt, human, observation"),
    ],
)
def test_real_data_of_other_formats(tokenizer: Any, name: str, words: str) -> None:
    """Named for what they are: TRL knows no such columns, and no template such roles."""
    tokenizer.chat_template = PLAIN
    records = json.loads((Path(os.environ["PACKED_ATTN_DATA"]) / name).read_text())
    record = next(
        (r for r in records if "conversations" in r and len(r["conversations"]) > 4), None
    )
    with pytest.raises(ValueError, match=words):
        tokenize(tokenizer, record or records[0])
