"""Kernels compiled for a GPU that is not there stand in triton's cache, and none is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels are compiled by triton")

from packed_attn_kernels import gpu

from benchmarks import ahead

COMPILES = os.environ.get("TRITON_INTERPRET") != "1"


@pytest.mark.skipif(not COMPILES, reason="triton compiles only where it does not interpret")
def test_a_cache_is_filled(tmp_path: Path) -> None:
    """A process of its own, as triton knows one driver; a kernel that compiles in seconds."""
    command = ["-m", "benchmarks.ahead", str(tmp_path), "--what", "tuning", "--processes", "1"]
    ended = subprocess.run(
        [sys.executable, *command, "--cases", "one_32k/head_dim_256 hopper_forward None"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "1 calls compiled" in ended.stdout
    kernels = {path.stem for path in tmp_path.glob("*/*.cubin")}
    assert {"forward_kernel", "intervals_kernel"} <= kernels
    assert {path.suffix for path in tmp_path.glob("*/*")} == set(ahead.KEPT)
    (facts,) = tmp_path.glob("*/forward_kernel.json")
    assert json.loads(facts.read_text())["target"]["arch"] == 90


@pytest.mark.skipif(not COMPILES, reason="triton compiles only where it does not interpret")
def test_a_wrong_word_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="calls that have no such case in their names"):
        ahead.main([str(tmp_path), "--cases", "no such case", "--processes", "1"])


def test_interpreted_nothing_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ahead, "INTERPRETED", True)
    with pytest.raises(SystemExit):
        ahead.main([str(tmp_path)])
    assert "under TRITON_INTERPRET=1 nothing is compiled" in capsys.readouterr().err


def test_everything_that_waits_for_a_gpu_has_its_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "capability", lambda device: (9, 0))
    monkeypatch.setattr("packed_attn_kernels.hopper_launch.INTERPRETED", False)
    names = [name for name, _ in ahead.jobs(ahead.WHAT)]
    assert len(set(names)) == len(names)
    for part in (
        "tuning llama3_8b/one_32k hopper_forward HopperConfiguration(BLOCK_N=128, stages=2",
        "tuning llama3_8b/one_32k/head_dim_256 hopper_forward None",
        "attention llama3_8b/one_32k, deterministic=True",
        "attention llama3_8b/forest, deterministic=False",
        "conformance mixed, confine_nonfinite=True",
        "conformance llama3_8b/log_normal",
    ):
        assert any(name.startswith(part) for name in names), part
