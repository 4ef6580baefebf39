"""An interpreter of the Gluon that the Hopper kernels are written in, for machines without a GPU.

Triton interprets its own language alone. `language.py` and `hopper.py` give Gluon's words, and
`machine.py` runs warps with roles under schedules that a seed makes. It shows wrong results,
deadlocks and most races; not what a compiler does wrong, which the compile gate and a GPU are for.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from tests.gluon import hopper, language
from tests.gluon.machine import Machine, Program


class Kernel:
    """What `gluon.jit` makes of a function: called by others, or launched on a grid."""

    seed = 0

    def __init__(self, body: Callable[..., Any]) -> None:
        self.body = body
        self.__name__ = body.__name__

    def __call__(self, *arguments: Any) -> Any:
        return self.body(*arguments)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(num_warps: int, enable_fp_fusion: bool, **arguments: Any) -> None:
            machine = Machine(Kernel.seed)
            taken = {name: _argument(x) for name, x in arguments.items()}
            for ids in torch.cartesian_prod(*map(torch.arange, grid)).view(-1, len(grid)).tolist():
                machine.start("first role", Program(tuple(ids), grid), lambda: self.body(**taken))
            machine.run()

        return launch


def _argument(x: Any) -> Any:
    """As a kernel sees it; floats are those of float32."""
    if isinstance(x, Tensor):
        return language.Pointer.to(x)
    if hasattr(x, "block_shape"):
        return hopper.Descriptor(x)
    return language.value(x, torch.float32) if isinstance(x, float) else x


def jit(body: Callable[..., Any] | None = None, **options: Any) -> Any:
    return Kernel if body is None else Kernel(body)


def _module(name: str, source: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(source if isinstance(source, dict) else vars(source))
    return module


@contextmanager
def interpreted(*names: str, edits: Sequence[tuple[str, str]] = ()) -> Iterator[None]:
    """Imports of these modules, in order, give interpreted ones.

    Each edit is a piece of source that one of them has once, and what stands there instead.
    """
    edited = 0
    package = "triton.experimental.gluon"
    words = {"jit": jit, "language": language, "constexpr_function": lambda function: function}
    gluon = _module(package, words)
    core = {"builtin": lambda function: function, "_unwrap_if_constexpr": lambda x: x}
    stands = {
        "triton.experimental": _module("triton.experimental", {"gluon": gluon}),
        package: gluon,
        f"{package}.language": language,
        f"{package}.language._core": _module("_core", core),
        f"{package}.language.nvidia.hopper": hopper,
    }
    before = {name: sys.modules.get(name) for name in (*stands, *names)}
    try:
        for name in names:
            sys.modules.update(stands)
            spec = importlib.util.find_spec(name)
            assert spec is not None
            assert spec.origin is not None
            source = Path(spec.origin).read_text()
            for old, new in edits:
                assert source.count(old) <= 1, f"{old!r} stands there more than once"
                edited += source.count(old)
                source = source.replace(old, new)
            module = importlib.util.module_from_spec(spec)
            exec(compile(source, spec.origin, "exec"), module.__dict__)
            _prepare(module)
            for stand in stands:
                _put_back(stand, before[stand])
            sys.modules[name] = module
        assert edited == len(edits), f"{edited} of {len(edits)} edits were made"
        yield
    finally:
        for name in names:
            _put_back(name, before[name])


def _prepare(module: ModuleType) -> None:
    """Constants of Triton's as numbers, and what reaches below the language by its words."""
    for name, x in vars(module).items():
        if isinstance(x, tl.constexpr):
            setattr(module, name, x.value)
    for name, word in (("_add", hopper.async_add), ("_view", language.view)):
        if hasattr(module, name):
            setattr(module, name, word)


def _put_back(name: str, module: ModuleType | None) -> None:
    if module is None:
        sys.modules.pop(name, None)
    else:
        sys.modules[name] = module
