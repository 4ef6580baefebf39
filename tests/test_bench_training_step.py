"""The training-step benchmark runs end to end, and times nothing that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_isolation, bench_training_step


def test_toy_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "steps.json"
    names = list(bench_training_step.MODELS)
    assert bench_training_step.main(["--toy", "--model", *names, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["steps"]
    assert [row["model"] for row in rows] == names
    for row in rows:
        assert row["capacity"] == 128
        assert row["over_stock"] > 0
        assert row["over_contaminated"] > 0
    assert capsys.readouterr().out.count("real tokens/s") == len(names)


@pytest.mark.parametrize(
    ("name", "parameters"), [("llama3-8b-layers", 0.889e9), ("qwen3-0.6b", 0.596e9)]
)
def test_sizes_are_those_of_the_released_models(name: str, parameters: float) -> None:
    with torch.device("meta"):
        model = bench_training_step.MODELS[name](8192, False)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.01)
    assert next(model.parameters()).dtype == torch.bfloat16


def test_a_wrong_loss_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock attention blind to boundaries."""

    def blind(documents: Any) -> dict[str, Any]:
        batch = bench_training_step._packed(documents)
        return {name: batch[name] for name in ("input_ids", "labels")}

    monkeypatch.setattr(bench_training_step, "_stock", blind)
    with pytest.raises(RuntimeError, match="losses differ, so nothing is timed"):
        bench_training_step.measure(128, 1, "cpu")


def test_toy_run_of_the_isolation_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "isolation.json"
    assert bench_isolation.main(["--toy", "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())["probes"]
    assert row["overhead"] == pytest.approx(
        row["probe_over_step"] / 500 + row["hook_microseconds"] / row["step_milliseconds"] / 1e3
    )
    assert "a probe takes" in capsys.readouterr().out
