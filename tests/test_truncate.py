"""truncate: TRL's rules for single and preference data, on data sets and on lists of dicts."""

import json
import logging
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packed_attn.packing import truncate

datasets = pytest.importorskip("datasets", reason="data sets need Hugging Face datasets")
datasets.disable_progress_bars()

Dataset = datasets.Dataset
KINDS = [list, Dataset]

limits = st.none() | st.integers(1, 12)


def of_kind(kind, rows):
    return Dataset.from_list(rows) if kind is Dataset else rows


def as_rows(data):
    return data.to_list() if isinstance(data, Dataset) else data


def preference_rows(lengths, prefix="", suffix="_ids"):
    names = [prefix + part + suffix for part in ("prompt", "chosen", "rejected")]
    return [
        {name: list(range(100 * i, 100 * i + n)) for i, (name, n) in enumerate(zip(names, row))}
        for row in lengths
    ]


def keep_end_rules(row, max_length, max_prompt_length, max_completion_length):
    """The last tokens of prompt + completion, with the prompt that the longest completion has."""
    prompt = row["prompt_ids"][-(max_prompt_length or 10**9) :]
    result, prompts = {}, []
    for name in ("chosen_ids", "rejected_ids"):
        completion = row[name][:max_completion_length]
        whole = (prompt + completion)[-(max_length or 10**9) :]
        prompts.append(whole[: max(len(whole) - len(completion), 0)])
        result[name] = whole[len(prompts[-1]) :]
    return {"prompt_ids": min(prompts, key=len), **result}


def trl_rules(row, max_length, max_prompt_length, max_completion_length):
    """The rules one row at a time, as TRL states them: slices, then the whole cut at max_length."""
    prompt = row["prompt_ids"][-(max_prompt_length or 10**9) :]
    result = {"prompt_ids": prompt[:max_length]}
    for name in ("chosen_ids", "rejected_ids"):
        whole = prompt + row[name][:max_completion_length]
        result[name] = whole[:max_length][len(prompt) :]
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_input_ids_keep_their_first_tokens_and_aligned_columns_follow(kind):
    rows = [
        {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4], "flag": [True] * 4, "text": "abcd"},
        {"input_ids": [5], "labels": [-100], "flag": [False], "text": "e"},
    ]
    data = of_kind(kind, rows)
    cut = truncate(data, max_length=3, on_report=lambda report: None)
    assert type(cut) is type(data)
    assert as_rows(cut) == [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "flag": [True] * 3, "text": "abcd"},
        rows[1],
    ]
    assert len(as_rows(data)[0]["input_ids"]) == 4


@pytest.mark.parametrize("kind", KINDS)
@given(
    lengths=st.lists(st.tuples(*[st.integers(0, 15)] * 3), min_size=1, max_size=6),
    max_length=limits,
    max_prompt_length=limits,
    max_completion_length=limits,
    mode=st.sampled_from(["keep_start", "keep_end"]),
)
@settings(max_examples=40, deadline=None)
def test_preference_rows_follow_trl(
    kind, lengths, max_length, max_prompt_length, max_completion_length, mode
):
    rows = preference_rows(lengths)
    reports = []
    cut = truncate(
        of_kind(kind, rows),
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
        truncation_mode=mode,
        on_report=reports.append,
    )
    rules = trl_rules if mode == "keep_start" else keep_end_rules
    expected = [rules(row, max_length, max_prompt_length, max_completion_length) for row in rows]
    assert as_rows(cut) == expected
    report = reports[0]
    assert report.truncation_mode == mode
    for part in ("prompt", "chosen", "rejected"):
        given_tokens = sum(len(row[f"{part}_ids"]) for row in rows)
        kept_tokens = sum(len(row[f"{part}_ids"]) for row in expected)
        assert report.tokens[part] == given_tokens
        assert report.lost_tokens[part] == given_tokens - kept_tokens
    assert report.examples == len(rows)
    assert report.truncated_examples == sum(a != b for a, b in zip(rows, expected))
    assert report.emptied_examples == sum(
        any(a[name] and not b[name] for name in a) for a, b in zip(rows, expected)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", ["_ids", "_input_ids"])
def test_lists_of_a_part_are_cut_with_it(kind, suffix):
    rows = preference_rows([(4, 3, 2)], suffix=suffix)
    rows[0]["prompt_attention_mask"] = [1, 2, 3, 4]
    rows[0]["rejected_labels"] = [7, 8]
    rows[0]["margin"] = 0.5
    data = of_kind(kind, rows)
    cut = as_rows(truncate(data, max_prompt_length=3, max_length=4, on_report=lambda r: None))[0]
    assert cut["prompt" + suffix] == [1, 2, 3]
    assert cut["prompt_attention_mask"] == [2, 3, 4]
    assert cut["chosen" + suffix] == [100]
    assert cut["rejected" + suffix] == [200]
    assert cut["rejected_labels"] == [7]
    assert cut["margin"] == 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_completion_rows(kind):
    rows = [{"prompt_ids": [1, 2, 3], "completion_ids": [4, 5, 6]}]
    cut = truncate(of_kind(kind, rows), max_prompt_length=2, max_completion_length=1)
    assert as_rows(cut) == [{"prompt_ids": [2, 3], "completion_ids": [4]}]


@pytest.mark.parametrize(
    ("mode", "lengths"),
    [
        ("keep_start", [(4, 3, 2), (9, 1, 5), (1, 8, 8)]),
        # One prompt serves both completions: as TRL where they are of one length or nothing is cut.
        ("keep_end", [(4, 3, 3), (9, 5, 5), (1, 8, 8), (2, 1, 4), (3, 7, 9)]),
    ],
)
def test_same_tokens_as_trl_collator(mode, lengths):
    dpo = pytest.importorskip("trl.trainer.dpo_trainer", reason="TRL's collator needs trl")
    rows = preference_rows(lengths)
    options = {"max_length": 6, "truncation_mode": mode}
    theirs = dpo.DataCollatorForPreference(pad_token_id=0, **options)(rows)
    cut = truncate(rows, **options, on_report=lambda report: None)
    ours = dpo.DataCollatorForPreference(pad_token_id=0)(cut)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_keep_end_keeps_the_last_tokens_and_their_labels(kind):
    rows = [
        {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4]},
        {"input_ids": [5], "labels": [-100]},
    ]
    reports = []
    cut = truncate(
        of_kind(kind, rows), max_length=3, truncation_mode="keep_end", on_report=reports.append
    )
    assert as_rows(cut) == [{"input_ids": [2, 3, 4], "labels": [2, 3, 4]}, rows[1]]
    assert reports[0].lost_tokens == {"input_ids": 1}
    assert reports[0].loss == 1 / 5
    assert "1 of 5" in str(reports[0])
    assert "keep_end" in str(reports[0])


def test_arrays_and_tensors_keep_their_kind():
    rows = [{"input_ids": torch.arange(5), "labels": np.arange(5)}]
    cut = truncate(rows, max_length=2, on_report=lambda report: None)
    assert isinstance(cut[0]["input_ids"], torch.Tensor)
    assert isinstance(cut[0]["labels"], np.ndarray)
    assert cut[0]["input_ids"].tolist() == cut[0]["labels"].tolist() == [0, 1]


def test_selected_rows_format_and_features_stay():
    features = datasets.Features(
        {
            "input_ids": datasets.LargeList(datasets.Value("int32")),
            "quality": datasets.ClassLabel(names=["low", "high"]),
        }
    )
    rows = {"input_ids": [[1, 2, 3], [4, 5, 6, 7], [8]], "quality": [0, 1, 0]}
    data = Dataset.from_dict(rows, features=features).select([2, 1]).with_format("numpy")
    cut = truncate(data, max_length=2, on_report=lambda report: None)
    assert cut.features == features
    assert [ids.tolist() for ids in cut["input_ids"]] == [[8], [4, 5]]


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_limit_nothing_changes(kind, caplog):
    rows = [{"input_ids": [1, 2]}]
    with caplog.at_level(logging.INFO, logger="packed_attn.packing"):
        cut = truncate(of_kind(kind, rows))
    assert as_rows(cut) == rows
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_losses_are_logged_as_a_warning(caplog):
    truncate(preference_rows([(5, 3, 0), (1, 1, 1)]), max_length=4)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "truncated 1 of 2 examples (1 emptied, keep_start)" in caplog.text
    assert "prompt 1 of 6, chosen 3 of 4, rejected 0 of 1" in caplog.text


@pytest.mark.parametrize("empty", [[], Dataset.from_dict({"input_ids": []}), Dataset.from_dict({})])
def test_an_empty_set_stays_empty(empty):
    reports = []
    cut = truncate(empty, max_length=2, on_report=reports.append)
    assert len(cut) == 0
    assert reports[0].examples == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "a"}], {}, "data must have 'input_ids', or 'prompt_ids' with 'chosen_ids'"),
        ([{"input_ids": "abc"}], {}, "input_ids"),
        (
            [{"input_ids": [1]}],
            {"max_prompt_length": 3},
            "max_prompt_length cuts preference data ('prompt_ids' with 'chosen_ids'",
        ),
        (
            [{"input_ids": [1], "labels": [1]}, {"input_ids": [1, 2], "labels": [1]}],
            {},
            "column 'labels' must have one value for each of input_ids, but in row",
        ),
        (
            [{"prompt_ids": [1], "chosen_ids": [2], "chosen_mask": [1, 1]}],
            {},
            "column 'chosen_mask' must have one value for each of chosen_ids, but in row 0",
        ),
        ([{"input_ids": [1]}, {"input_ids": None}], {}, "in row 1"),
        ([{"input_ids": [1]}], {"max_length": 0}, "max_length must be an integer of at least 1"),
        ([{"input_ids": [1]}], {"max_length": 2.0}, "or None, got 2.0"),
        (
            [{"input_ids": [1]}],
            {"truncation_mode": "end"},
            "truncation_mode must be 'keep_start' or 'keep_end', got 'end'",
        ),
    ],
)
def test_bad_data_and_limits_are_named(kind, rows, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        truncate(of_kind(kind, rows), **{"max_length": 4, **options})


def test_bad_kinds_are_named():
    with pytest.raises(ValueError, match=r"data must hold dicts, but data\[1\] is list"):
        truncate([{"input_ids": [1]}, [1]], max_length=2)
    with pytest.raises(ValueError, match=r"data must be .* got int"):
        truncate(3, max_length=2)


@pytest.mark.skipif(
    "PACKED_ATTN_DATA" not in os.environ, reason="PACKED_ATTN_DATA names no folder of real data"
)
def test_real_preference_data():
    examples = json.loads(Path(os.environ["PACKED_ATTN_DATA"], "dpo_en_demo.json").read_text())
    rows = [
        {
            "prompt_ids": list(example["conversations"][-1]["value"].encode()),
            "chosen_ids": list(example["chosen"]["value"].encode()),
            "rejected_ids": list(example["rejected"]["value"].encode()),
        }
        for example in examples
    ]
    options = {"max_prompt_length": 64, "max_completion_length": 256, "max_length": 300}
    reports = []
    cut = truncate(Dataset.from_list(rows), **options, on_report=reports.append)
    assert (
        cut.to_list() == truncate(rows, **options) == [trl_rules(row, 300, 64, 256) for row in rows]
    )
    assert not reports[0].lossless
