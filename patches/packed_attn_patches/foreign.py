"""Code in a model that is not the one its type was proven with: found, so that it can be audited.

A class that a user derived, a layer put in another's place, a hook or a forward on an instance may
do anything to tokens, but most do nothing that mixes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

_MODELS = "transformers.models."

# fmt: off
# Packages whose code in a model takes each token by itself, or is refused by name elsewhere.
_KNOWN = frozenset({
    "accelerate", "bitsandbytes", "deepspeed", "liger_kernel", "packed_attn", "packed_attn_patches",
    "peft", "torch", "transformers", "trl",
})
# fmt: on
# Of torch's own: in a container or a head that the user built, they mix what they are given.
_MIXERS = (
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.modules.batchnorm._NormBase,
)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def is_foreign(model: nn.Module) -> bool:
    """Whether the model's class is not transformers' nor derived from one: nothing is known of it.

    Code that came with a checkpoint is, whatever it derives from.
    """
    modules = [cls.__module__ for cls in type(model).__mro__]
    known = any(name.startswith(_MODELS) for name in modules)
    return not known or any(name.startswith("transformers_modules") for name in modules)


def foreign_parts(model: nn.Module) -> tuple[str, ...]:
    """What is in the model beside the code of its type, each by path and origin."""
    return tuple(_parts(model))


def _parts(model: nn.Module) -> Iterator[str]:
    owners: dict[str, set[str]] = {}
    modules = dict(model.named_modules())
    for path, module in modules.items():
        outside = path.rpartition(".")[0]
        outer = owners.get(outside, set())
        own = _packages(type(module))
        owners[path] = own if isinstance(module, PreTrainedModel) else outer
        name = path or "the model"
        # Classes that torch derives for fully_shard stand before the model's own.
        classes = [c for c in type(module).__mro__ if issubclass(c, nn.Module)]
        cls = next((c for c in classes if _root(c) != "torch"), None)
        if cls is not None and (_root(cls) not in _KNOWN or (own and not own & owners[path])):
            yield f"{name} ({cls.__module__}.{cls.__qualname__})"
        elif isinstance(module, _MIXERS) and _is_users(modules[outside]):
            yield f"{name} ({type(module).__module__}.{type(module).__qualname__})"
        for function in _forwards(module):
            if _root(function) not in _KNOWN | {_root(type(module))}:
                yield f"{function.__module__}.{_name(function)} on {name}"


def _is_users(outside: nn.Module) -> bool:
    """Whether a user chooses what is in it: layers of a type put theirs in layers of their own."""
    return isinstance(outside, PreTrainedModel) or _root(type(outside)) == "torch"


def _packages(cls: type) -> set[str]:
    """The packages of model types that a class and those before it are of."""
    modules = [c.__module__ for c in cls.__mro__ if c.__module__.startswith(_MODELS)]
    return {name.split(".")[2] for name in modules}


def _forwards(module: nn.Module) -> Iterator[Any]:
    """Functions, or classes of what is called, that run as this module's forward or beside it; its
    class may have got one of another's."""
    found = [type(module).forward, vars(module).get("forward"), vars(module).get("_old_forward")]
    found += [hook for name in _HOOKS for hook in vars(module).get(name, {}).values()]
    for called in found:
        while isinstance(called, MethodType | partial):
            called = called.__func__ if isinstance(called, MethodType) else called.func
        if called is not None:
            yield called if hasattr(called, "__qualname__") else type(called)


def _root(code: Any) -> str:
    return (code.__module__ or "").partition(".")[0]


def _name(function: Any) -> str:
    return function.__qualname__.replace(".<locals>", "")
