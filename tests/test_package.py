"""What an import and an install do: light, silent, in one direction, and `kernels` stays free."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "packed_attn": ROOT / "packed_attn",
    "packed_attn_kernels": ROOT / "kernels" / "packed_attn_kernels",
    "packed_attn_patches": ROOT / "patches" / "packed_attn_patches",
}
HEAVY = ("triton", "transformers", "trl", "matplotlib", "numba", "datasets", "tokenizers")

# Where each of our names and `kernels` come from, without importing any of them.
PROBE = """
import importlib.util, json
found = {}
for name in ("packed_attn", "packed_attn_kernels", "packed_attn_patches", "kernels", "patches"):
    spec = importlib.util.find_spec(name)
    found[name] = list(spec.submodule_search_locations) if spec else []
print(json.dumps(found))
"""

# What `import packed_attn` adds to an interpreter that has torch.
IMPORT = """
import contextlib, io, json, sys, torch
before, said = set(sys.modules), io.StringIO()
with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    import packed_attn
new = {name: getattr(sys.modules[name], "__file__", None) for name in set(sys.modules) - before}
print(json.dumps({"new": new, "said": said.getvalue()}))
"""


def _python(code: str, *paths: Path, cwd: Path, bare: bool = False) -> str:
    """What a fresh interpreter prints, with `paths` first on its path; `bare` has no packages."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(
        [sys.executable, *(["-S"] if bare else []), "-c", code],
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build from: a build writes beside the sources."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("packed_attn", "kernels", "patches", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def _installed(source: Path, kind: str, where: Path) -> list[str]:
    """Builds a wheel of the given kind without a network, unpacks it into `where`."""
    code = f"from setuptools.build_meta import build_{kind} as b; print(b({str(where)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, check=True)
    with zipfile.ZipFile(next(where.glob("*.whl"))) as wheel:
        wheel.extractall(where / "site")
        return wheel.namelist()


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The modules that `import packed_attn` loads, name to file, and what it prints."""
    return json.loads(_python(IMPORT, *_parents(), cwd=tmp_path_factory.mktemp("elsewhere")))


def test_import_is_light_and_silent(imported: dict[str, Any]) -> None:
    assert "packed_attn.attention" in imported["new"]
    assert {name.split(".")[0] for name in imported["new"]}.isdisjoint(HEAVY)
    assert imported["said"] == ""


def test_public_names_resolve() -> None:
    import packed_attn

    assert sorted(packed_attn.__all__) == packed_attn.__all__
    assert all(hasattr(packed_attn, name) for name in packed_attn.__all__)
    for name in ("DocumentLayout", "attention", "flash_attn_varlen_func", "Visibility"):
        assert name in packed_attn.__all__


def test_wheel_holds_every_module_and_nothing_else(source: Path, tmp_path: Path) -> None:
    names = _installed(source, "wheel", tmp_path)
    modules = {name for name in names if name.endswith(".py")}
    wanted = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for path in folder.rglob("*.py")
    }
    assert modules == wanted
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == set(FOLDERS)
    found = json.loads(_python(PROBE, tmp_path / "site", cwd=tmp_path))
    for package in FOLDERS:
        assert found[package] == [str(tmp_path / "site" / package)]
    _assert_kernels_is_free(found, tmp_path)


def test_editable_install_gives_the_same_names(source: Path, tmp_path: Path) -> None:
    _installed(source, "editable", tmp_path)
    code = f"import site; site.addsitedir({str(tmp_path / 'site')!r})\n{PROBE}"
    # The tests themselves may run from an editable install, whose finder would answer first.
    found = json.loads(_python(code, cwd=tmp_path, bare=True))
    for package, folder in FOLDERS.items():
        assert found[package] == [str(source / folder.relative_to(ROOT))]
    _assert_kernels_is_free(found, source)


def test_pytest_from_the_root_gives_the_same_names(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("pythonpath") == [ROOT, ROOT / "kernels", ROOT / "patches"]
    found = json.loads(_python(PROBE, *_parents(), cwd=ROOT))
    for package, folder in FOLDERS.items():
        assert found[package] == [str(folder)]


def test_kernels_of_pypi_wins_in_the_root(tmp_path: Path) -> None:
    """Our folder has no __init__.py, so an installed `kernels` wins from the end of the path."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "patches" / "__init__.py").exists()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("OURS = False\n")
    code = "import kernels; print(kernels.OURS, kernels.__file__)"
    assert _python(code, *_parents(), tmp_path, cwd=ROOT) == (
        f"False {tmp_path / 'kernels' / '__init__.py'}\n"
    )


def test_transformers_sees_no_other_kernels_in_the_root(tmp_path: Path) -> None:
    """Transformers looks for the package `kernels`: our folder must not change its answer."""
    pytest.importorskip("transformers", reason="the check is about transformers")
    code = "from transformers.utils import is_kernels_available as f; print(f())"
    assert _python(code, *_parents(), cwd=ROOT) == _python(code, cwd=tmp_path)


def test_kernels_are_a_leaf() -> None:
    """torch and triton, the standard library, and each other."""
    allowed = {"torch", "triton", "packed_attn_kernels", *sys.stdlib_module_names}
    for path in FOLDERS["packed_attn_kernels"].rglob("*.py"):
        assert _imports(path, everywhere=True) <= allowed, path


def test_imports_point_one_way(imported: dict[str, Any]) -> None:
    """No module that `import packed_attn` loads needs the patches or a heavy package for it."""
    forbidden = {*HEAVY, "packed_attn_patches", "packed_attn_kernels"}
    ours = {name: file for name, file in imported["new"].items() if name.startswith("packed_attn")}
    assert ours["packed_attn.attention"] == str(FOLDERS["packed_attn"] / "attention.py")
    for name, file in ours.items():
        assert not _imports(Path(file), everywhere=False) & forbidden, name


def _parents() -> list[Path]:
    return [folder.parent for folder in FOLDERS.values()]


def _assert_kernels_is_free(found: dict[str, list[str]], *ours: Path) -> None:
    for name in ("kernels", "patches"):
        for location in found[name]:
            assert not any(Path(location).is_relative_to(folder) for folder in (ROOT, *ours))


def _imports(path: Path, *, everywhere: bool) -> set[str]:
    """Top-level names that a module imports, inside functions too if `everywhere`."""
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    names: set[str] = set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0] if node.level == 0 else "")
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if everywhere or not (inside or _is_type_checking(node)):
            nodes.extend(ast.iter_child_nodes(node))
    return names - {""}


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
