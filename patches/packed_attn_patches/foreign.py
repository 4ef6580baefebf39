"""Code in a model that is not the one its type was proven with: found, so that it can be audited.

A class that a user derived, a layer put in another's place, a hook or a forward on an instance may
do anything to tokens, but most do nothing that mixes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
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
# Packages that put layers in the place of a model's linear ones when a trainer prepares it.
_CONVERTERS = frozenset({"torchao", "transformer_engine"})
# Audits show what mixes documents, wherever it came from.
_watched: ContextVar[bool] = ContextVar("watched", default=True)
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
    return tuple(part.text for part in _parts(model))


@dataclass
class CodeWatch:
    """Sees that a patched model gets no other code than it had when it was patched.

    Looks at the first packed forward, the second, the fourth and so on: soon after whatever sets a
    run up, and at no cost. What comes and goes may be there later: hooks, by which users look at
    what layers make, and kernels of the hub, which a model exchanges when its mode changes. So may
    layers that moved into another (adapters, wrappers).
    """

    origins: frozenset[str]
    forwards: int = 0

    @staticmethod
    def of(module: nn.Module) -> CodeWatch:
        return CodeWatch(frozenset(part.origin for part in _parts(module)))

    def see(self, module: nn.Module) -> None:
        """Raises a RuntimeError for code that came into the module since the patch."""
        if not _watched.get():
            return
        following = self.forwards + 1
        if following & self.forwards == 0:
            for part in _parts(module):
                self._check(part, module)
        self.forwards = following

    def _check(self, part: _Part, module: nn.Module) -> None:
        converted = part.origin.partition(".")[0] in _CONVERTERS
        if converted or part.passes or part.origin in self.origins:
            return
        raise RuntimeError(
            f"{part.text} came into {type(module).__name__} after patch_model, and nothing shows "
            "that it keeps documents apart: call patch_model(model) once more, which audits it (in "
            "a Trainer that puts it there, in on_train_begin of a callback)"
        )


@contextmanager
def unwatched() -> Iterator[None]:
    """Forwards inside are those of an audit."""
    token = _watched.set(False)
    try:
        yield
    finally:
        _watched.reset(token)


@dataclass(frozen=True)
class _Part:
    """Code that is not of the model's type: a module's class, or what runs on one.

    Attributes:
        text: where it is, and its origin.
        origin: the qualified name of the class or function.
        passes: it comes and goes while a model is used.
    """

    text: str
    origin: str
    passes: bool = False


def _parts(model: nn.Module) -> Iterator[_Part]:
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
            yield _of_class(name, cls)
        elif isinstance(module, _MIXERS) and _is_users(modules[outside]):
            yield _of_class(name, type(module))
        for function, passes in _functions(module):
            if _root(function) not in _KNOWN | {_root(type(module))}:
                origin = f"{function.__module__}.{_name(function)}"
                yield _Part(f"{origin} on {name}", origin, passes)


def _of_class(name: str, cls: type) -> _Part:
    origin = f"{cls.__module__}.{cls.__qualname__}"
    return _Part(f"{name} ({origin})", origin)


def _is_users(outside: nn.Module) -> bool:
    """Whether a user chooses what is in it: layers of a type put theirs in layers of their own."""
    return isinstance(outside, PreTrainedModel) or _root(type(outside)) == "torch"


def _packages(cls: type) -> set[str]:
    """The packages of model types that a class and those before it are of."""
    modules = [c.__module__ for c in cls.__mro__ if c.__module__.startswith(_MODELS)]
    return {name.split(".")[2] for name in modules}


def _functions(module: nn.Module) -> Iterator[tuple[Any, bool]]:
    """Functions, or classes of what is called, that run as this module's forward or, as hooks,
    beside it, and whether they come and go; its class may have got a forward of another's."""
    own = [vars(module).get(name) for name in ("forward", "_old_forward")]
    hooks = [hook for name in _HOOKS for hook in vars(module).get(name, {}).values()]
    from_hub = hasattr(type(module), "kernel_layer_name")  # see transformers' use_kernels
    found = [(type(module).forward, False), *((called, from_hub) for called in own)]
    for called, passes in [*found, *((hook, True) for hook in hooks)]:
        while isinstance(called, MethodType | partial):
            called = called.__func__ if isinstance(called, MethodType) else called.func
        if called is not None:
            yield (called if hasattr(called, "__qualname__") else type(called)), passes


def _root(code: Any) -> str:
    return (code.__module__ or "").partition(".")[0]


def _name(function: Any) -> str:
    return function.__qualname__.replace(".<locals>", "")
