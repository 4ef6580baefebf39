"""The training page's configuration of DeepSpeed, launched: two processes train as one does."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.launched import trained

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_zero3_trains_as_one_process(tmp_path: Path) -> None:
    """Losses, norms of gradients, and a clean watch."""
    page = (ROOT / "docs/training.md").read_text()
    (block,) = re.findall(r"```yaml\n# zero3.yaml\n(.*?)```", page, re.DOTALL)
    configuration = tmp_path / "zero3.yaml"
    configuration.write_text(block)
    launch(configuration, tmp_path)
    want = trained(tmp_path, 1)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["model"] == "DeepSpeedEngine"
        assert found["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
        assert found["isolation/largest_gradient"] == [0.0, 0.0]


def launch(configuration: Path, folder: Path) -> None:
    """`accelerate launch` on this machine's CPU, in float32."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    options = ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", str(port)]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(configuration), *options, str(ROOT / "tests/launched.py"), str(folder)]
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "patches"))
    environment = {**os.environ, "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
