"""`packed-attn bench`: the report says what the benchmarks' files say, and names what they lack."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_attention, report, report_plots, suite
from benchmarks.attention_figures import US, Attention
from benchmarks.goals import GOALS, Goal, Reached, reached
from benchmarks.peers import OURS, Peer, peers
from benchmarks.report_tables import memory_table
from packed_attn.cli import main
from packed_attn.commands import bench

ROOT = Path(__file__).parents[1]
WORDS = ("llama3_8b/64x512", "llama3_8b/1000x32", "llama3_8b/log_normal/head_dim_64")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> str:
    """attention.json of a toy run, in which candidates of a CPU stand in for those of a GPU."""
    stand_ins = {OURS: "cpu", "flash3": "reference", "flash2": "sdpa per document"}
    kept = ("sdpa per document", "sdpa padded", "dense, contaminated")

    def on_cpu(case, inputs, device):
        found = peers(case, inputs, device)
        named = {name: found[stand_in] for name, stand_in in stand_ins.items()}
        named["flash4"] = Peer(None, ("flash-attn-4 is not installed",))
        return named | {name: found[name] for name in kept}

    path = tmp_path_factory.mktemp("toy") / "attention.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_attention, "peers", on_cpu)
        arguments = ["--toy", "--rounds", "2", "--case", *WORDS, "--json", str(path)]
        assert bench_attention.main(arguments) == 0
    return path.read_text()


@pytest.fixture
def results(written: str, tmp_path: Path) -> Path:
    folder = tmp_path / "figures"
    folder.mkdir()
    (folder / "attention.json").write_text(written)
    return folder


def table_row(text: str, heading: str, first: str) -> dict[str, str]:
    """The row of the first table below a heading whose first cell is `first`, by column."""
    section = text.split(f"{heading}\n", 1)[1]
    lines = [line for line in section.split("\n#")[0].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return dict(zip(cells[0], next(row for row in cells if row[0] == first)))


def as_on_gpu(folder: Path, **medians: float) -> dict[str, Any]:
    """Makes the toy file look like one of a GPU: graphs, memory, and these medians by candidate."""
    path = folder / "attention.json"
    told = json.loads(path.read_text())
    told["toy"] = False
    told["machine"]["gpu"] = "NVIDIA H200"
    for n, row in enumerate(told["rows"]):
        row["eager"] = []
        if row["forward"] is not None:
            row["peak_bytes"] = (n + 1) * 2**20
            for way in ("forward", "backward"):
                row[way]["median"] = medians.get(row["candidate"], 9.0)
    path.write_text(json.dumps(told))
    return told


def test_ratios_are_those_of_the_file(results: Path, tmp_path: Path) -> None:
    path = report.write_report(results, tmp_path / "out")
    text = path.read_text()
    told = json.loads((results / "attention.json").read_text())
    for way in ("forward", "backward"):
        for name, first in ((WORDS[0], f"b: {WORDS[0]}"), (WORDS[2], WORDS[2])):
            rows = {row["candidate"]: row[way] for row in told["rows"] if row["case"] == name}
            over = {
                other: rows[other]["median"] / rows[OURS]["median"]
                for other in rows
                if rows[other] is not None
            }
            group = "Regimes of packing" if name == WORDS[0] else "Head sizes"
            row = table_row(text, f"#### {group}, {way}", first)
            assert row["FA3"] == f"{over['flash3']:.2f}x eager"
            assert row["FA2"] == f"{over['flash2']:.2f}x eager"
            assert row["contaminated"] == f"{over['dense, contaminated']:.2f}x eager"
            assert row["FA4"] == "–"
            best = min(set(over) - {OURS, "dense, contaminated"}, key=lambda other: over[other])
            assert row["best exact peer"].startswith(f"{over[best]:.2f}x eager ")
            fast, slow = next(c for c in told["cases"] if c["name"] == name)["predicted, ms"][way]
            ratio = slow / fast
            low, high = (float(x) for x in row["predicted"].split(" to "))
            assert high / low == pytest.approx(ratio, rel=0.02)
            assert float(row["TFLOP/s"].removesuffix(" eager")) == pytest.approx(
                low * slow / rows[OURS]["median"], rel=0.02
            )
    assert "flash4: flash-attn-4 is not installed" in text
    assert "these times mean nothing" in text
    for plot in re.findall(r"\]\((\w+\.png)\)", text):
        assert (path.parent / plot).read_bytes().startswith(b"\x89PNG")
    assert {"speed.png", "roofline.png", "host.png"} <= {p.name for p in path.parent.iterdir()}


def test_what_is_missing_is_named(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_plots, "_saved", lambda figure, panels, path, caption: caption)
    told = json.loads((results / "attention.json").read_text())
    told["left_out"] = ["llama3_8b/one_16k_256x64"]
    told["cases"].append({"name": "llama3_8b/log_normal", "lost": "a run ended while it was timed"})
    told["without"] = {"cudnn": "llama3_8b/64x512"}
    del told["ceilings"]
    (results / "attention.json").write_text(json.dumps(told))
    text = report.write_report(results, tmp_path / "out").read_text()
    assert "Not run, since the seconds were over: llama3_8b/one_16k_256x64." in text
    assert "(the run's seconds were over before this case)" in text
    assert "(a run ended while it was timed)" in text
    assert "(the run did not choose this case)" in text
    assert "cudnn ended a run at llama3_8b/64x512" in text
    assert "The card's own ceilings are not in attention.json." in text
    assert "the run measured none" in text
    assert "attention.json holds no peak memory" in text
    for name in ("training_step_gpu", "training_step", "cpu"):
        command = suite.BY_NAME[name].command
        assert f"Not measured: {name}.json is missing, which `{command}` writes." in text
    assert "| packing.json | not in figures/ |" in text


def test_a_folder_without_figures_is_a_report_of_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    text = report.write_report(tmp_path / "figures", tmp_path).read_text()
    assert "attention.json is missing" in text
    assert report.main(["--results", str(tmp_path / "nowhere"), "--output", str(tmp_path)]) == 2


@pytest.mark.parametrize("name", ["attention", "cpu", "training_step"])
@pytest.mark.parametrize("content", ["{", '{"machine": {}}'])
def test_a_file_of_something_else_is_named(
    name: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"{name}.json").write_text(content)
    assert report.main(["--results", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert f"{name}.json is no " in capsys.readouterr().err


@pytest.mark.parametrize(("peer", "holds"), [(2.5, True), (2.49, False)])
def test_goals_hold_from_their_figure_on(peer: float, holds: bool, results: Path) -> None:
    """A peer that is not exact is none."""
    as_on_gpu(results, **{OURS: 1.0, "flash3": peer, "dense, contaminated": 0.5})
    attention = Attention.read(results / "attention.json")
    goal = Goal("c", "forward", "best exact peer", 2.5)
    assert reached(goal, attention) == Reached(f"{peer:.2f}x (flash3)", holds)
    assert goal in GOALS


def test_shares_of_ceilings(results: Path) -> None:
    """Bytes and FLOPs written out: 24 documents of a token, 4:2 heads of 16."""
    told = as_on_gpu(results, **{OURS: 1e-6})
    case = next(case for case in told["cases"] if case["name"] == "llama3_8b/1000x32")
    tokens = case["tokens"]
    assert (case["documents"], tokens) == (24, 24)
    assert case["heads, kv heads, head_dim, value_head_dim"] == [4, 2, 16, 16]
    told["ceilings"]["copy_tb_s"] = 3.0
    attention = Attention(told)
    forward = 2 * tokens * (4 + 2 + 2 + 4) * 16 + 4 * tokens * 4
    backward = forward + 2 * tokens * (4 + 2 + 2 + 4) * 16
    assert attention.moved_bytes("llama3_8b/1000x32", "forward") == forward
    assert attention.moved_bytes("llama3_8b/1000x32", "backward") == backward
    assert attention.flops("llama3_8b/1000x32", "backward") == 10 * tokens * 4 * 32 / 2
    found = reached(Goal("c", "forward", "copy", 0.5), attention)
    speed = forward / 1e-9 / 1e12
    share, own = f"{speed / 4.3:.0%}", f"{speed / 3.0:.0%}"
    assert found == Reached(f"{share} ({speed:.3g} TB/s, {own} of this card's 3)", speed > 2.15)


def test_memory_and_the_readmes_table(results: Path, tmp_path: Path) -> None:
    told = as_on_gpu(results, **{OURS: 2.0, "flash3": 3.0, "flash2": 5.0})
    attention = Attention.read(results / "attention.json")
    assert "(memory.png)" in report_plots.memory(attention, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").exists()
    text = memory_table(attention)
    at = next(n for n, row in enumerate(told["rows"]) if row["candidate"] == OURS)
    heading = "first what must be there at the end."
    assert told["rows"][at]["case"] == WORDS[0]
    assert table_row(text, heading, OURS)[f"b: {WORDS[0]}"] == str(at + 1)
    printed = report.readme(results)
    assert printed.startswith("NVIDIA H200 (torch")
    cells = next(line for line in printed.splitlines() if line.startswith("| 64 documents of 512"))
    assert cells.count("2.50x") == cells.count("1.50x flash3") == 2
    assert "log-normal, 16:4 heads of 256 (the run did not choose this case)" in printed


def test_a_toy_run_is_not_for_the_readme(results: Path) -> None:
    assert report.readme(results) == report.NO_ATTENTION


def test_readme_has_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text()
    block = text.split("<!-- packed-attn bench --readme -->\n")[1].split("\n<!-- end -->")[0]
    assert report.main(["--readme"]) == 0
    assert capsys.readouterr().out == block + "\n"


def test_training_steps_of_the_repository(tmp_path: Path) -> None:
    folder = ROOT / "benchmarks" / "results"
    steps = json.loads((folder / "training_step_gpu.json").read_text())["steps"]
    text = report.write_report(folder, tmp_path).read_text()
    row = table_row(text, "## A training step", steps[0]["model"])
    assert row["padded"] == f"{steps[0]['over_padded']:.2f}x"
    assert row["real tokens/s"] == f"{steps[0]['tokens_per_second']:,.0f}"
    assert row["kernels, host waits"] == f"{steps[0][US]['kernels']}, {steps[0][US]['host_waits']}"
    measured = {step["model"] for step in steps}
    for model in suite.MODELS:
        assert (f"- a step at {model} (the file holds none)" in text) == (model not in measured)


def test_suite_runs_what_it_can_and_names_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        started.append(command[1:])
        return subprocess.CompletedProcess(command, int("benchmarks.bench_forest" in command))

    monkeypatch.setattr(suite.subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(suite, "find_spec", lambda name: None if name == "torchdata" else name)
    assert suite.main(["--results", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "attention cannot run here: no CUDA device" in said
    assert "streaming cannot run here: torchdata is not installed" in said
    assert "forest_cpu ended with status 1" in said
    path = str(tmp_path / "cpu.json")
    assert started[0] == ["-m", "benchmarks.bench_cpu", "--json", path]
    assert len(started) == sum(not known.cuda for known in suite.BENCHES) - 1
    started.clear()
    assert suite.main(["pairs", "attention", "--results", str(tmp_path)]) == 0
    assert [command[1] for command in started] == ["benchmarks.bench_pairs"]
    with pytest.raises(SystemExit):
        suite.main(["nothing"])


def test_every_benchmark_of_the_suite_is_there() -> None:
    for known in suite.BENCHES:
        source = (ROOT / "benchmarks" / f"{known.module}.py").read_text()
        assert "--json" in source or "by_type import" in source


def test_command_starts_modules_of_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[tuple[list[str], Path]] = []

    def run(command: list[str], *, cwd: Path, **_: object) -> subprocess.CompletedProcess[str]:
        started.append((command[2:], cwd))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(bench.subprocess, "run", run)
    monkeypatch.chdir(tmp_path)
    folder = str(tmp_path / "x")
    assert main(["bench", "cpu", "--results", "x"]) == 0
    assert main(["bench", "--report", "--results", "x"]) == 0
    assert main(["bench", "--readme"]) == 0
    output = str(tmp_path / "bench-report")
    assert started == [
        (["benchmarks.suite", "cpu", "--results", folder], ROOT),
        (["benchmarks.report", "--results", folder, "--output", output], ROOT),
        (["benchmarks.report", "--readme"], ROOT),
    ]
    assert main(["bench", "cpu", "--report"]) == 2
    assert main(["bench", "--output", "y"]) == 2
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "packed_attn" / "commands" / "bench.py"))
    assert main(["bench", "--report"]) == 2
    assert "installed without them: clone the repository" in capsys.readouterr().err
    assert len(started) == 3


def test_command_from_another_folder(
    results: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The whole way, in the process that a user starts."""
    as_on_gpu(results)
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--readme", "--results", "figures"]) == 0
    assert capfd.readouterr().out == report.readme(results) + "\n"
