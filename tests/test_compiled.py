"""Machine code that is kept on disk: no change of a source leaves it stale."""

from __future__ import annotations

import ast
import inspect
from types import ModuleType
from typing import Any

import pytest
from numba.core.dispatcher import Dispatcher

from packed_attn.packing import compiled, forest, trees, tries


def passes(module: ModuleType) -> dict[str, Any]:
    return {name: f for name, f in vars(module).items() if isinstance(f, Dispatcher)}


def imported(module: ModuleType) -> set[str]:
    """What a module takes from other files of the package."""
    nodes = ast.walk(ast.parse(inspect.getsource(module)))
    imports = [n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]
    own = [n for n in imports if "packed_attn" in ast.unparse(n)]
    return {alias.asname or alias.name for n in own for alias in n.names}


@pytest.mark.parametrize("module", [compiled, tries, trees])
def test_passes_read_their_own_file_alone(module: ModuleType) -> None:
    assert passes(module)
    for name, function in passes(module).items():
        assert not imported(module) & set(function.py_func.__code__.co_names), name


def test_the_files_agree_on_columns() -> None:
    for name in ("PARENT", "LIST", "LENGTH", "START"):
        assert getattr(tries, name) == getattr(trees, name) == getattr(forest, name)
