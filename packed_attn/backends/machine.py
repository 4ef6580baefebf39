"""What a backend finds on this machine: the GPU it needs, the package it calls."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Collection
from functools import cache
from importlib import import_module, metadata
from typing import Any, TypeVar

import torch

from packed_attn.request import AttentionRequest

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant(function: _Function) -> _Function:
    """What torch.compiler.assume_constant_result does, without its import of the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def gpu_reasons(request: AttentionRequest, majors: Collection[int] | None = None) -> list[str]:
    """Why q's device will not do.

    Args:
        majors: compute capabilities by their first number; None is 8 (Ampere) and newer.
    """
    if request.q.device.type != "cuda":
        return [f"needs a CUDA device, but q is on {request.q.device}"]
    if torch.version.hip is not None:
        return [f"has not been matched to ROCm ({torch.version.hip})"]
    major, minor = capability(request.q.device)
    if major in majors if majors is not None else major >= 8:
        return []
    needed = "8.0 or newer" if majors is None else " or ".join(f"{m}.x" for m in sorted(majors))
    return [f"needs compute capability {needed}, but {request.q.device} has {major}.{minor}"]


def package_reasons(module: str, package: str, name: str | None = None) -> list[str]:
    """Why `module` cannot be called, or its function `name`; `package` is what one installs.

    The module is imported: a build for another torch fails only then.
    """
    try:
        _loaded(module)
    except ModuleNotFoundError as error:
        # flash-attn 2 and 4 share a namespace: the one may be there without the other.
        if error.name is not None and module.startswith(error.name):
            return [f"{package} is not installed"]
        return [f"{package} does not import: {error}"]
    except Exception as error:  # a build for another torch, or for no GPU, raises anything
        return [f"{package} does not import: {type(error).__name__}: {error}"]
    missing = name is not None and not hasattr(_loaded(module), name)
    return [f"{package} has no {name}"] if missing else []


def function(module: str, name: str) -> Callable[..., Any]:
    """The function `name` of an installed module."""
    _loaded(module)
    # What a compiler took for a constant it cannot look at again; from here it can.
    return getattr(sys.modules[module], name)


# What imports raised: every layer of every step asks, and a module that is not there would be
# looked for anew each time.
_failures: dict[str, Exception] = {}


# A compiler cannot trace an import, a signature or a look at the device; none changes meanwhile.
@constant
def _loaded(module: str) -> Any:
    if module in _failures and module not in sys.modules:
        raise _failures[module]
    try:
        return import_module(module)
    except Exception as error:
        _failures[module] = error.with_traceback(None)
        raise


@constant
def takes(module: str, name: str, parameter: str) -> bool:
    """Whether a function has a parameter, by which its version is known; no if it is not there."""
    found = getattr(_loaded(module), name, None)
    return found is not None and parameter in inspect.signature(found).parameters


@constant
@cache
def version(package: str) -> tuple[int, int] | None:
    """Major and minor version of an installed package; None where it does not say."""
    try:
        found = re.match(r"(\d+)\.(\d+)", metadata.version(package))
    except metadata.PackageNotFoundError:
        return None
    return None if found is None else (int(found[1]), int(found[2]))


@constant
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, such as (9, 0)."""
    return torch.cuda.get_device_capability(device)


@constant
def must_be_deterministic() -> bool:
    """Whether torch.use_deterministic_algorithms(True) is on, and not as a warning only."""
    return (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
    )
