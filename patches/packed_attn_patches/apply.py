"""Putting the attention interface and the layout hook on one model instance, and taking them off."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import transformers
from packaging.version import Version
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from packed_attn_patches.families import refusal
from packed_attn_patches.inputs import LayoutHook
from packed_attn_patches.interface import NAMES

TESTED = (Version("5.17"), Version("5.24"))  # the second is the first version not tested
_RECORD = "_packed_attn_record"


@dataclass(frozen=True)
class PatchRecord:
    """What `unpatch` needs, held by the model itself so that it is copied and pickled with it.

    Attributes:
        backend: as given to `patch_model`.
        configs: (module path, attribute, original config) of every submodule.
    """

    backend: str
    configs: tuple[tuple[str, str, PreTrainedConfig], ...]


def patch(model: nn.Module, backend: str = "auto") -> nn.Module:
    """Makes `model` respect document boundaries; see `packed_attn.patch_model`."""
    record = model.__dict__.get(_RECORD)
    if record is not None and record.backend == backend:
        return model
    if record is not None:
        unpatch(model)
    reason = refusal(model)
    if reason:
        raise NotImplementedError(f"patch_model refuses {type(model).__name__}: {reason}")
    assert isinstance(model, PreTrainedModel)
    _warn_untested()
    record = PatchRecord(backend, _configs(model))
    # Copies are made before anything changes, so a failure leaves the model as it was.
    replaced = _replacements(record)
    for path, name, config in record.configs:
        setattr(model.get_submodule(path), name, replaced[id(config)])
    for module in _hooked(model):
        module.register_forward_pre_hook(LayoutHook(backend), with_kwargs=True)
    model.__dict__[_RECORD] = record
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Puts the original configs back and removes the hooks.

    Raises:
        ValueError: the model is not patched.
    """
    record: PatchRecord | None = model.__dict__.get(_RECORD)
    if record is None:
        raise ValueError(f"{type(model).__name__} is not patched by packed-attn")
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, LayoutHook):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    for path, name, config in record.configs:
        setattr(model.get_submodule(path), name, config)
    del model.__dict__[_RECORD]
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether `patch` holds on this instance."""
    return _RECORD in model.__dict__


def _configs(model: nn.Module) -> tuple[tuple[str, str, PreTrainedConfig], ...]:
    return tuple(
        (path, name, value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, PreTrainedConfig)
    )


def _replacements(record: PatchRecord) -> dict[int, PreTrainedConfig]:
    """One copy of each config: other models built from the same object keep theirs."""
    memo: dict[int, Any] = {}
    copies = {}
    for _, _, config in record.configs:
        if id(config) not in copies:
            copies[id(config)] = copy.deepcopy(config, memo)
    for original, mine in ((c, copies[id(c)]) for _, _, c in record.configs):
        stock = original._attn_implementation
        if stock is not None:
            mine._attn_implementation_internal = NAMES[stock]
    return copies


def _hooked(model: PreTrainedModel) -> list[nn.Module]:
    """The model and the inner models that some heads call past it."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    unique = {id(m): m for m in (model, model.base_model, decoder) if m is not None}
    return list(unique.values())


def _warn_untested() -> None:
    version = Version(transformers.__version__)
    if not TESTED[0] <= version < TESTED[1]:
        warnings.warn(
            f"transformers {version} is outside the tested range "
            f"{TESTED[0]} to {TESTED[1]} (not included): pass verify=True to audit the model",
            RuntimeWarning,
            stacklevel=4,
        )
