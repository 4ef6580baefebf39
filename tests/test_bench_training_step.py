"""The training-step benchmark runs end to end, and times nothing that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_attn_patches.boundaries import BatchShape, packed_layout

from benchmarks import bench_isolation, bench_training_step, graphed_step
from packed_attn import DocumentLayout, PackedCollator


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


class Rerun:
    """A CUDA graph for a machine without CUDA: a replay runs the call again on the same inputs."""

    def graph(self, call: Callable[[], object]) -> Callable[[], object]:
        call()
        return call


def test_a_graph_takes_other_boundaries() -> None:
    found = bench_training_step.graphed(_step(), 128, 1, "cpu", Rerun)
    assert found["loss_error"] < 1e-6
    assert found["tokens_per_second"] > 0
    assert found["eager_over_graph"] > 0


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        (["cu_seqlens"], "position_ids contradict layout"),
        (["cu_seqlens", "position_ids"], "its losses differ"),
    ],
)
def test_a_graph_that_keeps_boundaries_is_not_timed(
    kept: list[str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the batch that it was captured on: positions no longer fit them, or the loss."""
    first: dict[str, torch.Tensor] = {}
    inputs_of = graphed_step.static_inputs

    def keeping(batch: dict[str, Any], documents: int) -> dict[str, torch.Tensor]:
        inputs = inputs_of(batch, documents)
        for name in kept:
            first.setdefault(name, inputs[name].clone())
        return inputs | first

    monkeypatch.setattr(graphed_step, "static_inputs", keeping)
    found = bench_training_step.graphed(_step(), 128, 1, "cpu", Rerun)
    assert reason in found["reason"]


def test_boundaries_on_the_device_are_not_read() -> None:
    """Where a layout is all that tells the documents: a graph could not be captured."""
    layout = DocumentLayout(torch.tensor([0, 3, 8, 8], dtype=torch.int32), 8)
    shape = BatchShape(1, 8, torch.device("cpu"))
    assert packed_layout(shape, {"layout": layout}) is layout
    assert "lengths" not in layout._derived


def test_a_capture_that_fails_is_a_reason() -> None:
    class Failing:
        def graph(self, call: Callable[[], object]) -> Callable[[], object]:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    found = bench_training_step.graphed(_step(), 128, 1, "cpu", Failing)
    assert found == {"reason": "RuntimeError: operation not permitted when stream is capturing"}


def test_inputs_of_a_graph_have_the_same_shapes_for_every_batch() -> None:
    shapes = []
    for lengths in ((3, 5), (1, 1, 2, 4)):
        documents = [{"input_ids": torch.arange(n)} for n in lengths]
        inputs = graphed_step.static_inputs(
            PackedCollator("documents", pad_to_multiple_of=12)(documents), 6
        )
        shapes.append({name: (x.shape, x.dtype) for name, x in inputs.items()})
        assert inputs["cu_seqlens"][-1] == 12
        assert inputs["padding"].sum() == 1
    assert shapes[0] == shapes[1]
    with pytest.raises(ValueError, match="the graph holds 4 documents, but the batch has 5"):
        graphed_step.static_inputs(PackedCollator("documents", pad_to_multiple_of=12)(documents), 4)


def test_padded_batches_shrink_until_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    step = _step()
    documents = bench_training_step._documents(128)
    run, rows = step.run, []

    def small_memory(batches: list[dict[str, Any]], number: torch.Tensor) -> torch.Tensor:
        rows.append(max(len(batch["input_ids"]) for batch in batches))
        if rows[-1] > 2:
            raise torch.OutOfMemoryError("no memory")
        return run(batches, number)

    monkeypatch.setattr(step, "run", small_memory)
    assert bench_training_step._make_fit(step, documents) == 2
    assert rows == [8, 4, 2]


def _step() -> bench_training_step.Step:
    model = bench_training_step.MODELS["demo"](128, True)
    return bench_training_step.Step(
        model, "cpu", [bench_training_step.packed_pack(128)], patched=True
    )


def test_toy_run_of_the_isolation_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "isolation.json"
    assert bench_isolation.main(["--toy", "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())["probes"]
    assert row["overhead"] == pytest.approx(
        row["probe_over_step"] / 500 + row["hook_microseconds"] / row["step_milliseconds"] / 1e3
    )
    assert "a probe takes" in capsys.readouterr().out
