"""The script of `make gpu-test`: what it runs exists, failures show, a missing tool is said."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_test
from tests.cases import BY_NAME


def test_what_it_runs_exists() -> None:
    root = Path(__file__).parent.parent
    assert all((root / file).exists() for file in (*gpu_test.FILES, *gpu_test.MODELS))
    assert set(gpu_test.SANITIZED) <= BY_NAME.keys()

    text = "".join((root / file).read_text() for file in gpu_test.FILES)
    assert all(word in text for word in gpu_test.ON_GPU.replace("not ", "").split(" and "))


@pytest.mark.parametrize("status", [0, 3])
def test_a_step_keeps_status_and_last_lines(status: int) -> None:
    code = f"print('first'); print('..F  [ 50%]'); print('last'); raise SystemExit({status})"
    step = gpu_test.run_step("name", [sys.executable, "-c", code], kept_lines=1)
    assert (step.status, step.tail) == (status, ["last"])


def test_a_step_ends_at_its_limit_with_all_that_it_started() -> None:
    code = "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    step = gpu_test.run_step("name", [sys.executable, "-c", code], limit=2.0)
    assert step.status == -signal.SIGKILL
    assert step.tail == ["begun"]
    assert step.seconds < 30


def test_a_missing_sanitizer_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    steps = [gpu_test.run_sanitizer(tool) for tool in gpu_test.TOOLS]
    assert [(step.name, step.status) for step in steps] == [("memcheck", None), ("racecheck", None)]
    assert "compute-sanitizer is neither" in steps[0].tail[0]


def test_the_sanitizer_runs_the_short_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "$@"\nexit 9\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    memcheck, racecheck = (gpu_test.run_sanitizer(tool) for tool in gpu_test.TOOLS)
    assert (memcheck.status, racecheck.status) == (9, 9)
    assert memcheck.tail[0].startswith("--tool=memcheck --error-exitcode=9")
    assert racecheck.tail[0].startswith("--tool=racecheck")
    assert "triton and (mixed or bf16_long" in memcheck.tail[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make gpu-test runs it")
def test_needs_a_gpu() -> None:
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        gpu_test.main([])
