"""The training-step benchmark runs end to end, and times nothing that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_isolation, bench_training_step


def test_toy_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "steps.json"
    assert bench_training_step.main(["--toy", "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())["steps"]
    assert row["capacity"] == 128
    assert row["over_stock"] > 0
    assert "real tokens/s" in capsys.readouterr().out


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
