"""What machine and what versions figures come from."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from packed_attn import __version__


def machine_facts(*packages: str) -> dict[str, str]:
    """Processor, GPU, system, the versions of the named packages and the date, as text."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "packed-attn": __version__,
        **{name: _version(name) for name in packages},
        "date": datetime.date.today().isoformat(),
    }


# Dense matrix products in half precision, FLOP/s, from NVIDIA's data sheets.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that a GPU can reach in half precision; None where nobody has said."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    gpu = torch.cuda.get_device_name(device)
    return next((peak for name, peak in PEAK_FLOPS.items() if name in gpu), None)


def gpu_facts() -> dict[str, str]:
    """Driver, clocks, power limit and CUDA of the first GPU, as text; empty without one."""
    if not torch.cuda.is_available():
        return {}
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        printed = subprocess.run(query, check=True, capture_output=True, text=True).stdout
        values = [value.strip() for value in printed.strip().split(",")]
    except (OSError, subprocess.CalledProcessError) as error:
        values = [f"nvidia-smi: {error}"] * len(fields)
    return dict(zip(fields, values)) | {
        "cuda": torch.version.cuda or "none",
        "cudnn": str(torch.backends.cudnn.version()),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
