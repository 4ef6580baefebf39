"""The attention benchmark end to end at toy size, and that it refuses to time what is wrong."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from benchmarks import bench_attention
from benchmarks.attention_report import WRONG, Report
from benchmarks.candidates import Timer
from benchmarks.exact_head import faults, last_head, wanted
from benchmarks.peers import DETERMINISTIC, FUSED, MOST_DOCUMENTS, OURS, Peer, peers
from benchmarks.regimes import (
    REGIMES,
    benchmark_cases,
    chosen_cases,
    real_cases,
    speed_cases,
    toy,
)
from benchmarks.timing import host_microseconds, paired_milliseconds
from benchmarks.warm import warm
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
    reference = run("reference", case, inputs, "cpu")
    seen = case.layout().visibility(case.causal, case.window_size, chunk_size=case.chunk_size)
    group = case.num_heads // case.num_kv_heads
    got = last_head(case, inputs, seen, torch.float64)
    for name, want, heads in (
        ("out", reference.out, group),
        ("dq", reference.grads["q"], group),
        ("dk", reference.grads["k"], 1),
        ("dv", reference.grads["v"], 1),
    ):
        torch.testing.assert_close(got[name].float(), want[:, -heads:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("wrong", [0, 1, 2, 3])
def test_a_wrong_result_is_found(wrong: int) -> None:
    case = BY_NAME["mixed"]
    inputs = case.inputs()
    right = run("reference", case, inputs, "cpu")
    got = [right.out, right.grads["q"], right.grads["k"], right.grads["v"]]
    want = wanted(case, inputs, case.layout().visibility())
    assert not faults(case, tuple(got), want)
    got[wrong] = got[wrong].clone()
    got[wrong][40, -1, 3] += 0.01
    found = faults(case, tuple(got), want)
    assert ("out", "dq", "dk", "dv")[wrong] in found[0]
    got[wrong][40, -1, 3] = torch.nan
    assert faults(case, tuple(got), want)


@pytest.mark.parametrize("name", TOYS)
def test_toy_run_of_a_case(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = Report(tmp_path / "report.json", True)
    found = bench_attention.bench_case(TOYS[name], "cpu", 2, report)
    rows = {row.candidate: row for row in found}
    others = {"reference", "sdpa per document", "dense, contaminated"}
    assert {OURS, DETERMINISTIC, FUSED} | others <= rows.keys()
    for row in rows.values():
        assert (row.forward is None) == (row.backward is None) == bool(row.refused)
        assert not any(reason.startswith(WRONG) for reason in row.refused)
        assert row.forward is None or row.eager == ("no CUDA",)
        assert row.host_us is None or row.host_us[0] > 0
        assert row.peak_bytes is None
    assert rows["reference"].forward is not None
    assert not rows["dense, contaminated"].exact
    printed = capsys.readouterr().out
    assert f"### {name}: {sum(TOYS[name].lengths)} tokens" in printed
    assert printed.count("\n| ") == 1 + sum(row.forward is not None for row in found)
    assert report.done == {name}


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
    assert report["rows"][0].keys() >= {"case", "candidate", "forward", "backward", "host_us"}
    assert report["running"] is None
    assert report["ceilings"]["product_tflops"] > 0
    assert report["ceilings"]["copy_tb_s"] > 0
    assert torch.__version__.startswith(report["machine"]["torch"])


def test_a_run_goes_on_without_what_ended_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A candidate that kills the process is named in the file before it runs."""
    path = tmp_path / "attention.json"
    words = ["--case", "64x512", "--toy", "--rounds", "2", "--json", str(path)]

    def deadly(case, inputs, device):
        def die(q, k, v):
            raise KeyboardInterrupt

        return peers(case, inputs, device) | {"cpu": Peer(die)}

    monkeypatch.setattr(bench_attention, "peers", deadly)
    with pytest.raises(KeyboardInterrupt):
        bench_attention.main(words)
    assert json.loads(path.read_text())["running"] == ["llama3_8b/64x512", "cpu"]
    assert bench_attention.main([*words, "--resume"]) == 0
    told = json.loads(path.read_text())
    refused = {row["candidate"]: row["refused"] for row in told["rows"] if row["refused"]}
    assert refused["cpu"] == ["ended a run at llama3_8b/64x512"]
    number = len(told["rows"])
    assert bench_attention.main([*words, "--resume"]) == 0
    assert len(json.loads(path.read_text())["rows"]) == number


def test_a_case_that_ends_a_run_while_it_is_timed_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "attention.json"
    Report(path, True).run("llama3_8b/64x512", None)
    report = Report.read(path)
    report.give_up_running()
    assert report.done == {"llama3_8b/64x512"}
    assert report.without == {}


def test_a_wrong_candidate_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A leak in ours is refused with its error, and the exit status says so."""

    def leaking(case, inputs, device):
        found = peers(case, inputs, device)
        return {OURS: Peer(found["dense, contaminated"].function), "broken": Peer(_broken)}

    monkeypatch.setattr(bench_attention, "peers", leaking)
    case = TOYS["llama3_8b/1000x32"]
    report = Report(tmp_path / "report.json", True)
    ours, broken = bench_attention.bench_case(case, "cpu", 2, report)
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


def test_slow_candidates_take_fewer_turns() -> None:
    calls: list[str] = []
    candidates = {name: lambda _, name=name: calls.append(name) for name in "ab"}
    times = paired_milliseconds(candidates, "cpu", runs={"a": 1, "b": 3}, warmup=1)
    assert {name: len(values) for name, values in times.items()} == {"a": 1, "b": 3}
    assert calls.count("a") == 2
    assert paired_milliseconds({}, "cpu") == {}


def test_host_time_is_that_of_a_call() -> None:
    assert 2000 <= host_microseconds(lambda: time.sleep(0.002), "cpu", calls=3) < 200_000


class _Graph:
    """A CUDA graph for a machine without CUDA: it counts, and a replay fills what is to be made."""

    captured, replayed, pools = 0, 0, set()
    makes = ()

    def capture_begin(self, pool: object) -> None:
        _Graph.pools.add(pool)

    def capture_end(self) -> None:
        _Graph.captured += 1

    def replay(self) -> None:
        _Graph.replayed += 1
        for x in _Graph.makes:
            x.detach().zero_()
        _Graph.makes = ()


class _Event:
    """A CUDA event that measures wall time."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.at - self.at)


class _Made(torch.autograd.Function):
    """What a graph makes anew, forward and backward."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        out = torch.zeros_like(q)
        _Graph.makes = (out,)
        return out

    @staticmethod
    def backward(ctx, *grads):
        _Graph.makes = tuple(torch.zeros_like(x) for x in ctx.saved_tensors)
        return _Graph.makes


def test_calls_are_captured_once_for_each_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be captured is timed eagerly, and its row says why."""
    fakes = {
        "Stream": object,
        "stream": lambda stream: nullcontext(),
        "graph_pool_handle": lambda: "one pool",
        "CUDAGraph": _Graph,
        "Event": _Event,
        "synchronize": lambda: None,
        "current_device": lambda: 0,
        "default_generators": (torch.Generator(),),
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 1000,
        "max_memory_allocated": lambda: 5000,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    case = TOYS["llama3_8b/1000x32"]
    rotating = [case.inputs(seed) for seed in range(3)]
    calls = {"good": 0, "bad": 0}

    def good(q, k, v):
        calls["good"] += 1
        return _Made.apply(q, k, v)

    def bad(q, k, v):
        calls["bad"] += 1
        if calls["bad"] == 3:
            raise RuntimeError("waits for the device")
        time.sleep(0.002)  # over ten replays that do nothing
        return q * k.sum() * v.sum()

    timer = Timer(rotating, "cuda")
    candidates = {"good": timer.prepared(good), "bad": timer.prepared(bad)}
    assert _Graph.captured == 2 * len(rotating) + 1
    assert _Graph.pools == {"one pool"}
    elsewhere = timer.prepared(lambda q, k, v: q * k.sum() * v.sum())
    assert elsewhere.eager == ("RuntimeError: the graph does not hold all that the call ran",)
    ran = calls["good"]
    found = timer.measure(candidates, 6, "good")
    assert found["good"].eager == ()
    assert found["bad"].eager == ("RuntimeError: waits for the device",)
    assert found["good"].forward.rounds == 6
    assert found["bad"].forward.rounds == 3
    assert _Graph.replayed > 6 * 40
    assert found["good"].peak_bytes == 4000
    # The host's time and the memory alone are Python's.
    assert calls["good"] - ran == 2 * 20 + 1


def test_kernels_are_compiled_beforehand_in_other_processes() -> None:
    """A candidate that takes no part has nothing to compile; others run there."""
    cases = [TOYS["llama3_8b/1000x32"], TOYS["llama3_8b/forest"]]
    assert warm(cases, "cpu", without=("flash4",), limit=120) == 4
    assert warm(cases, "cpu", without=("flash4",), limit=0) == 0


def test_cases_of_the_speed_table_begin_with_the_regimes() -> None:
    names = [case.name for case in speed_cases()]
    assert tuple(names[: len(REGIMES)]) == REGIMES
    assert len(names) == len(set(names))


def test_many_documents_are_not_launched_one_by_one() -> None:
    case = BY_NAME["llama3_8b/1000x32"].first(MOST_DOCUMENTS + 1)
    found = peers(case.shortened(32), case.shortened(32).inputs(), "cpu")
    assert found["sdpa per document"].reasons == (
        f"launches for each of {MOST_DOCUMENTS + 1} documents",
    )


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
