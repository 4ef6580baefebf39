"""Compiles the device against the torch that is installed, without importing it."""

from __future__ import annotations

import importlib.util
import subprocess
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
NAME = "packed_attn_fake_gpu"
LIBRARIES = ("c10", "torch_cpu", "torch", "torch_python")


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def built() -> Path:
    """The library, made anew where a source or torch is newer."""
    torch = torch_folder()
    folder = HERE.parents[1] / "build" / "fake_gpu"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{NAME}.so"
    sources = sorted(HERE.glob("*.cpp"))
    newest = max(path.stat().st_mtime for path in (*sources, torch / "version.py"))
    if library.exists() and library.stat().st_mtime > newest:
        return library
    command = ["c++", "-shared", "-fPIC", "-std=c++20", "-O1", "-w", "-DUSE_C10D_GLOO"]
    command += [f"-DTORCH_EXTENSION_NAME={NAME}", f"-isystem{sysconfig.get_paths()['include']}"]
    for include in ("include", "include/torch/csrc/api/include"):
        command.append(f"-isystem{torch / include}")
    command += [*map(str, sources), f"-L{torch / 'lib'}", *(f"-l{name}" for name in LIBRARIES)]
    subprocess.run([*command, "-o", str(library)], check=True)
    return library
