"""The attention benchmark end to end at toy size, and that it refuses to time what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench_attention
from benchmarks.exact_head import faults, last_head
from benchmarks.peers import OURS, Peer, peers
from benchmarks.regimes import benchmark_cases, chosen_cases, real_cases, toy
from benchmarks.timing import paired_milliseconds
from packed_attn.facts import gpu_facts
from tests.cases import BY_NAME
from tests.oracle import run

TOYS = {
    case.name: toy(case)
    for case in chosen_cases(
        benchmark_cases(), ["gemma2_9b_local", "llama3_8b/forest", "llama3_8b/1000x32"]
    )
}


@pytest.mark.parametrize(
    "name",
    [
        "mixed",
        "softcap_window",
        "sinks",
        "forest_nested",
        "padding_between",
        "head_dim_72",
        "chunk",
    ],
)
def test_one_head_written_out_agrees_with_the_specification(name: str) -> None:
    case = BY_NAME[name]
    inputs = case.inputs()
    wanted = run("reference", case, inputs, "cpu")
    seen = case.layout().visibility(case.causal, case.window_size, chunk_size=case.chunk_size)
    group = case.num_heads // case.num_kv_heads
    got = last_head(case, inputs, seen, torch.float64)
    for name, want, heads in (
        ("out", wanted.out, group),
        ("dq", wanted.grads["q"], group),
        ("dk", wanted.grads["k"], 1),
        ("dv", wanted.grads["v"], 1),
    ):
        torch.testing.assert_close(got[name].float(), want[:, -heads:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("wrong", [0, 1, 2, 3])
def test_a_wrong_result_is_found(wrong: int) -> None:
    case = BY_NAME["mixed"]
    inputs = case.inputs()
    right = run("reference", case, inputs, "cpu")
    got = [right.out, right.grads["q"], right.grads["k"], right.grads["v"]]
    seen = case.layout().visibility()
    assert not faults(case, inputs, tuple(got), seen)
    got[wrong] = got[wrong].clone()
    got[wrong][40, -1, 3] += 0.01
    found = faults(case, inputs, tuple(got), seen)
    assert ("out", "dq", "dk", "dv")[wrong] in found[0]
    got[wrong][40, -1, 3] = torch.nan
    assert faults(case, inputs, tuple(got), seen)


@pytest.mark.parametrize("name", TOYS)
def test_toy_run_of_a_case(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row.candidate: row for row in bench_attention.bench_case(TOYS[name], "cpu", 2)}
    assert {OURS, "reference", "sdpa per document", "dense, contaminated"} <= rows.keys()
    for row in rows.values():
        assert (row.forward is None) == (row.backward is None) == bool(row.refused)
        assert not any(reason.startswith(bench_attention.WRONG) for reason in row.refused)
    assert rows["reference"].forward is not None
    assert not rows["dense, contaminated"].exact
    assert capsys.readouterr().out.count(f"| {name} |") == len(rows)


def test_command_writes_what_it_ran_and_what_it_left_out(tmp_path: Path) -> None:
    path = tmp_path / "attention.json"
    words = ["--case", "llama3_8b/64x512", "length_one", "--toy", "--rounds", "2"]
    assert bench_attention.main([*words, "--seconds", "-1", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["left_out"] == ["llama3_8b/64x512", "llama3_8b/length_one"]
    assert bench_attention.main([*words[:2], *words[3:], "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["toy"] is True
    assert report["left_out"] == []
    assert report["cases"][0]["name"] == "llama3_8b/64x512"
    assert report["rows"][0].keys() >= {"case", "candidate", "forward", "backward", "refused"}
    assert report["machine"]["torch"] == torch.__version__


def test_a_wrong_candidate_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A leak in ours is refused with its error, and the exit status says so."""

    def leaking(case, inputs, device):
        found = peers(case, inputs, device)
        return {OURS: Peer(found["dense, contaminated"].function), "broken": Peer(_broken)}

    monkeypatch.setattr(bench_attention, "peers", leaking)
    case = TOYS["llama3_8b/1000x32"]
    ours, broken = bench_attention.bench_case(case, "cpu", 2)
    assert ours.forward is None
    assert "wrong, so not timed: largest error of out" in ours.refused[0]
    assert broken.refused == ("raised RuntimeError: no such kernel",)
    words = ["--case", "llama3_8b/1000x32", "--toy", "--rounds", "2"]
    assert bench_attention.main([*words, "--json", str(tmp_path / "wrong.json")]) == 1


def test_rounds_rotate_and_candidates_take_turns() -> None:
    calls: list[tuple[str, int]] = []

    def candidate(name: str):
        return lambda round_: calls.append((name, round_))

    times = paired_milliseconds({n: candidate(n) for n in "ab"}, "cpu", runs=3, warmup=1)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert [name for name, _ in calls] == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert [round_ for _, round_ in calls] == [-1, -1, 0, 0, 1, 1, 2, 2]


def test_real_lengths_fill_the_pack(tmp_path: Path) -> None:
    (tmp_path / "gsm8k_train.jsonl").write_text('{"question": "abcd", "answer": "é12"}\n' * 40000)
    (tmp_path / "alpaca_en_demo.json").write_text('[{"instruction": "%s"}]' % ("x" * 200_000))
    gsm8k, alpaca = real_cases(str(tmp_path))
    assert gsm8k.lengths[:3] == (2, 2, 2)
    assert sum(gsm8k.lengths) == 32768
    assert alpaca.lengths == (32768,)
    assert real_cases(None) == ()


def test_facts_of_the_gpu_are_text() -> None:
    facts = gpu_facts()
    assert bool(facts) == torch.cuda.is_available()
    assert all(isinstance(value, str) for value in facts.values())


def _broken(q, k, v):
    raise RuntimeError("no such kernel\nand a traceback")
