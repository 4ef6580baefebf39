"""Settings beside the tiny defaults, a few of each kind; `benchmarks/sweep_settings.py` has all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from packed_attn_patches import interface

from benchmarks.sweep_settings import Report
from tests.settings import Default, Finding, Setting, settings_of, sweep_setting, sweep_settings
from tests.settings_pairs import pairs_of

WINDOWED = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("head", "model_type", "settings"),
    [
        ("causal", "smollm3", [Setting("layers", "layer_types", WINDOWED[::-1])]),
        ("causal", "gemma3_text", [Setting("count", "sliding_window", 4)]),
        ("causal", "glm_moe_dsa", [Setting("count", "q_lora_rank", 0)]),
        # Ignored labels become padding ids, which are hidden: here all that a token sees.
        ("seq2seq", "t5gemma", [Setting("count", "decoder.sliding_window", 1)]),
        # A head of a sequence over a decoder that looks both ways.
        (
            "sequence",
            "gemma3",
            [Setting("flag", "text_config.use_bidirectional_attention", True)],
        ),
    ],
)
def test_exact_in_other_settings(head: str, model_type: str, settings: list[Setting]) -> None:
    found = sweep_settings(head, model_type, settings)
    assert {f.status for f in found} <= {"exact", "rounding"}, found


def test_settings_are_of_every_kind_that_the_code_reads() -> None:
    settings, left_out = settings_of("causal", "gemma3_text")
    known = {(s.kind, s.field, s.shown or str(s.value)) for s in settings}
    assert {
        ("flag", "attention_bias", "True"),
        ("choice", "attn_implementation", "eager"),
        ("layers", "layer_types", str(WINDOWED[::-1])),
        ("rope", "rope_parameters", "dynamic of sliding_attention"),
        ("unset", "attn_logit_softcapping", "5.0"),
        ("none", "sliding_window", "None"),
        ("count", "sliding_window", "4"),
    } <= known
    assert left_out["hidden_size"] == "a width"
    settings, _ = settings_of("causal", "modernbert-decoder")
    assert ("count", "global_attn_every_n_layers") in {(s.kind, s.field) for s in settings}


def test_exact_in_two_settings_at_once() -> None:
    settings, _ = settings_of("causal", "gemma3_text")
    fields = ("num_key_value_heads", "use_bidirectional_attention", "is_causal")
    pairs = pairs_of("causal", "gemma3_text", [s for s in settings if s.field in fields])
    # That which says what a token sees comes first.
    assert pairs[0].field == "use_bidirectional_attention + is_causal"
    assert len(pairs) == 5
    (found,) = sweep_settings("causal", "gemma3_text", pairs[:1])
    assert (found.status, found.value) == ("exact", "True + False")


def test_both_settings_of_a_pair_matter() -> None:
    window = Setting("count", "sliding_window", 4)
    full = Setting("layers", "layer_types", WINDOWED[1:] * 2)
    biased = Setting("flag", "attention_bias", True)
    pairs = pairs_of("causal", "smollm3", [window, full, biased])
    # No layer has a window where all are full.
    assert [p.value for p in pairs] == [(window, biased), (full, biased)]


def test_a_pair_is_of_two_fields_of_one_part() -> None:
    fields = {"sliding_window": 4, "num_key_value_heads": 1}
    one, other = (Setting("count", f"decoder.{n}", v) for n, v in fields.items())
    (decoder,) = Setting.pair(one, other).overrides("t5gemma").values()
    assert {n: getattr(decoder, n) for n in fields} == fields


def test_a_window_that_is_lost_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    default = Default("causal", "smollm3")
    setting = Setting("layers", "layer_types", ["sliding_attention"] * 2)
    monkeypatch.setattr(interface, "_local", lambda *_: (None, None))
    found = sweep_setting(default, setting)
    assert found.status == "wrong"
    assert found.reason.startswith("default cache, tail padding: differs by")


def test_a_way_out_that_a_refusal_names_is_tried() -> None:
    setting = Setting("unset", "attn_logit_softcapping", 5.0)
    refused, found = sweep_settings("causal", "gemma3_text", [setting])
    assert (refused.status, found.status) == ("refused", "exact")


def test_queries_of_no_numbers_are_refused_by_name() -> None:
    (found,) = sweep_settings("causal", "ministral3", [Setting("size", "head_dim", 1)])
    assert found.status == "refused"
    assert "has queries of no numbers" in found.reason


def test_a_report_keeps_other_types_and_kinds(tmp_path: Path) -> None:
    def finding(kind: str, status: str) -> Finding:
        return Finding("causal", "llama", kind, "field", "1", status)

    path = tmp_path / "settings.json"
    both: list[Any] = ["flag", "count"]
    Report(path).add("causal", "llama", both, [finding(k, "wrong") for k in both], {"x": "why"})
    Report(path).add("causal", "llama", ["flag"], [finding("flag", "exact")], {})
    report = Report(path)
    assert report.has("causal", "llama", both)
    assert not report.has("causal", "gpt2", both)
    assert report.content["counts"]["causal"]["llama"] == {
        "flag": {"exact": 1},
        "count": {"wrong": 1},
    }
    assert [f["kind"] for f in report.content["found"]] == ["count"]
    assert "| causal | 1 | 2 | 1 | 0 | 0 | 0 | 0 | 1 |" in report.table()
    assert report.left_out() == "left out (why): x"
