"""Token mixers on packed streams: the kernels that they call get the documents' boundaries.

transformers' mixers call their convolution and their recurrence by names of their module. In a
packed forward a mixer's own code runs with other functions under these names (`KERNELS`), which
hand the boundaries on, all of them: boundaries given to a recurrence and not to the convolution
before it would leak. Attention layers of the same model take the layout as everywhere.

Whether a model may do so is decided at its first packed forward on a device: every kernel has to be
there, and each kind of mixer is first proven on a small copy (`mixer_proof.py`). Otherwise, and for
forests and under a compiler, the model runs on documents batched by length (`unpack.py`), where
everything is as exact and nothing needs a kernel.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, partial
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from packed_attn.backends import machine
from packed_attn.derived import sent
from packed_attn.layout import DocumentLayout
from packed_attn_patches.forwards import ModuleForward, with_names
from packed_attn_patches.interface import is_empty_mask
from packed_attn_patches.mixer_proof import circumstances, proven

logger = logging.getLogger("packed_attn.mixers")

# fmt: off
# Types whose attention takes the layout and whose mixers call nothing but what is in `KERNELS`.
FAST_TYPES = frozenset({
    "bailing_hybrid", "bamba", "falcon_h1", "granitemoehybrid", "kimi_linear", "lara_mini", "lfm2",
    "lfm2_moe", "lfm3", "mamba2", "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text",
    "qwen3_next", "zamba2",
})
# fmt: on

# Functions of a mixer's module that look at one token at a time.
_POINTWISE = frozenset({"apply_mask_to_padding_states"})

# In a model's packed forward: every mixer has to be told of the documents.
_in_packed_forward: ContextVar[bool] = ContextVar("in_packed_forward", default=False)


class MixerForward(ModuleForward):
    """A mixer's forward that takes a layout; `mixers_of` takes no mixer that runs something else.

    Args:
        module: the mixer.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        # What the proof found, by what it depends on besides the module: asked at every forward.
        self.proofs: dict[Any, str | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["module"])

    def __call__(self, *args: Any, layout: DocumentLayout | None = None, **kwargs: Any) -> Any:
        if layout is not None:
            if is_empty_mask(kwargs.get("attention_mask")):
                kwargs["attention_mask"] = None
            return with_boundaries(self.function, layout)(self.module, *args, **kwargs)
        if _in_packed_forward.get():
            raise RuntimeError(
                f"packed-attn: {type(self.module).__name__} ran in a packed forward without its "
                "layout: this model does not pass it on to its token mixers"
            )
        return self.function(self.module, *args, **kwargs)

    def failure(self, hidden_size: int, device: torch.device) -> str | None:
        """What the proof of this mixer on a device found; None where it is exact."""
        key = circumstances(self.module, device)
        if key not in self.proofs:
            self.proofs[key] = proven(self.module, hidden_size, device, with_boundaries)
        return self.proofs[key]


@contextmanager
def packed_forward() -> Iterator[None]:
    """Around a model's forward whose mixers take the layout: one that lost it raises.

    It carries nothing: what checkpointing recomputes later has the layout among its arguments.
    """
    token = _in_packed_forward.set(True)
    try:
        yield
    finally:
        _in_packed_forward.reset(token)


def mixers_of(model: nn.Module) -> tuple[nn.Module, ...]:
    """The mixers of a model that may run packed; none where one of them has code that is not
    known, or a forward that something else has put there."""
    config: Any = model.config
    if config.model_type not in FAST_TYPES:
        return ()
    found = tuple(m for m in model.modules() if _names(type(m)))
    known = all(_is_known(type(m)) and _own_forward(m) is None for m in found)
    return found if known else ()


def takes_layout(model: nn.Module, layout: DocumentLayout) -> bool:
    """Whether the mixers of a patched model run this pack by its boundaries."""
    reason = reason_against(model, layout)
    if reason is not None and reason not in _said:
        _said.add(reason)
        logger.info("%s runs on documents batched by length: %s", type(model).__name__, reason)
    return reason is None


# What the log has said: every step would say it again.
_said: set[str] = set()


def reason_against(model: nn.Module, layout: DocumentLayout) -> str | None:
    """Why a patched model does not run this pack by its boundaries, or None where it does.

    Args:
        layout: on the device where the model runs.
    """
    mixers = [m for m in model.modules() if isinstance(_own_forward(m), MixerForward)]
    if not mixers:
        return "it has no token mixers that take a layout"
    if layout.is_forest:
        return "a recurrence cannot go on from another document's end (parents)"
    if getattr(model, "_use_kernels", False):
        return "use_kernels=True puts other forwards in place of its mixers'"
    for name in sorted({name for m in mixers for name in _names(type(m))}):
        missing = KERNELS[name].missing() if name in KERNELS else None
        if missing is not None:
            return missing
    config: Any = model.config
    size = config.get_text_config().hidden_size
    failures = (_own_forward(mixer).failure(size, layout.device) for mixer in mixers)
    return next((failure for failure in failures if failure is not None), None)


def with_boundaries(forward: Callable[..., Any], layout: DocumentLayout) -> Callable[..., Any]:
    """A mixer's `forward` whose kernels get the documents of `layout`."""
    return with_names(
        forward, lambda f: {n: _bound(n, f.__globals__[n], layout) for n in _kernels_in(f)}
    )


def _bound(name: str, stock: Callable[..., Any], layout: DocumentLayout) -> Callable[..., Any]:
    if name in KERNELS:
        return partial(KERNELS[name].run, stock, layout)
    return partial(_refuse_step, name)


def _refuse_step(name: str, *args: Any, **kwargs: Any) -> Any:
    raise RuntimeError(f"packed-attn: {name} goes on from a cache, but a packed forward has none")


def _own_forward(module: nn.Module) -> Any:
    """What was put on an instance in place of its class's forward, inside accelerate's hook."""
    found = vars(module)
    own = found.get("_old_forward" if "_hf_hook" in found else "forward")
    stock = getattr(own, "__func__", None) is type(module).forward
    return None if stock else own


@lru_cache
def _names(cls: type[nn.Module]) -> tuple[str, ...]:
    """Which kernels the class's forward calls; empty for what is no mixer."""
    forward = inspect.unwrap(cls.forward)
    return _kernels_in(forward) if isinstance(forward, FunctionType) else ()


def _kernels_in(forward: FunctionType) -> tuple[str, ...]:
    called = (*KERNELS, *STEPS, *UNBOUNDED)
    return tuple(n for n in forward.__code__.co_names if n in called)


def _is_known(cls: type[nn.Module]) -> bool:
    """Whether all that the class's forward calls of its module is in a table, no other method
    calls a kernel past it, and the forward takes keyword arguments that it does not name."""
    forward = inspect.unwrap(cls.forward)
    names = forward.__globals__
    called = [
        n
        for n in forward.__code__.co_names
        if inspect.isroutine(names.get(n)) and names[n].__module__ == forward.__module__
    ]
    known = {*KERNELS, *STEPS, *_POINTWISE}
    methods = (v for c in cls.__mro__ if c is not nn.Module for v in vars(c).values())
    others = [inspect.unwrap(m) for m in methods if isinstance(m, FunctionType)]
    elsewhere = any(_kernels_in(m) for m in others if m is not forward)
    parameters = inspect.signature(forward).parameters.values()
    takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return known.issuperset(called) and not elsewhere and takes_more


@dataclass(frozen=True)
class Kernel:
    """What runs under one name of a mixer's module.

    Attributes:
        run: (the function that stands there, the layout, its arguments) -> what it returns.
        needs: (package to install, module, name) of what it is made of; None where the function
            that stands there will do.
    """

    run: Callable[..., Any]
    needs: tuple[str, str, str] | None = None

    def missing(self) -> str | None:
        """What has to be installed, or None."""
        if self.needs is None:
            return None
        package, module, name = self.needs
        reasons = machine.package_reasons(module, package, name)
        return f"{reasons[0]}; its {name} would take boundaries" if reasons else None


def _has_convolution() -> bool:
    """Whether causal_conv1d is there."""
    return not machine.package_reasons(_CONVOLUTION[0], "causal_conv1d", _CONVOLUTION[1])


def _convolution(
    stock: Callable[..., Any],
    layout: DocumentLayout,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> Tensor:
    """A causal convolution over `[B, channels, T]` that begins anew with each document.

    causal_conv1d takes the documents' numbers. Any other function gets zeros between documents, as
    many as its window reaches back: what a document alone has before it.
    """
    layout = layout.to(hidden_states.device)
    rows, channels, tokens = hidden_states.shape
    x = hidden_states.transpose(1, 2)
    if _has_convolution() and channels % 8 == 0 and 2 <= weight.shape[-1] <= 4:
        # Its kernel with boundaries reads channels that lie side by side.
        x = x.contiguous().transpose(1, 2)
        seq_idx = layout.document_ids.view(rows, tokens)
        packaged = machine.function(*_CONVOLUTION)
        return packaged(x, weight, bias, seq_idx=seq_idx, activation=activation)
    room = Room.of(layout, gap=weight.shape[-1] - 1)
    wide = room.spread(x.flatten(0, 1)).transpose(1, 2)
    out = stock(wide, weight, bias, activation=activation)
    return room.taken(out.transpose(1, 2)).view(rows, tokens, channels).transpose(1, 2)


def _delta_rule(
    module: str, name: str, stock: Callable[..., Any], layout: DocumentLayout, *args: Any, **kw: Any
) -> Any:
    """flash-linear-attention's kernels: rows end to end as one, and `cu_seqlens`."""
    rows, tokens = args[0].shape[:2]

    def flat(x: Any) -> Any:
        of_tokens = isinstance(x, Tensor) and x.ndim > 2 and x.shape[:2] == (rows, tokens)
        return x.flatten(0, 1)[None] if of_tokens else x

    function = machine.function(module, name)
    kw["cu_seqlens"], kw["cu_seqlens_cpu"] = _cu_seqlens(layout.lengths, args[0].device)
    taken = _parameters(function)
    out, state = function(*map(flat, args), **{n: flat(x) for n, x in kw.items() if n in taken})
    return out[0].unflatten(0, (rows, tokens)), state


def _scan(
    name: str, stock: Callable[..., Any], layout: DocumentLayout, *args: Any, **kw: Any
) -> Any:
    """mamba_ssm's scans: `seq_idx`, and whole chunks for each document.

    In a chunk that two documents share, sums of one run through the rounding of the other.
    """
    if name == _FUSED and not _has_convolution():
        return None  # it has the convolution inside, and mixers go on without it
    rows, tokens = args[0].shape[:2]
    room = Room.of(layout.to(args[0].device), multiple=kw["chunk_size"])

    def spread(x: Any) -> Any:
        of_tokens = isinstance(x, Tensor) and x.ndim > 2 and x.shape[:2] == (rows, tokens)
        return room.spread(x.flatten(0, 1)) if of_tokens else x

    function = machine.function(_SSD, name)
    kw["seq_idx"] = room.seq_idx
    taken = _parameters(function)
    out = function(*map(spread, args), **{n: spread(x) for n, x in kw.items() if n in taken})
    return room.taken(out).unflatten(0, (rows, tokens))


@lru_cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


_CONVOLUTION = ("causal_conv1d", "causal_conv1d_fn")
_SSD = "mamba_ssm.ops.triton.ssd_combined"
_FUSED = "mamba_split_conv1d_scan_combined"
_GATED_DELTA = ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
_KDA = ("fla.ops.kda", "chunk_kda")

# By the names that transformers' modules call them.
KERNELS: dict[str, Kernel] = {
    "causal_conv1d_fn": Kernel(_convolution),
    "torch_chunk_gated_delta_rule": Kernel(
        partial(_delta_rule, *_GATED_DELTA), ("flash-linear-attention", *_GATED_DELTA)
    ),
    "chunk_kimi_delta_attention": Kernel(
        partial(_delta_rule, *_KDA), ("flash-linear-attention", *_KDA)
    ),
    "mamba2_chunk_scan": Kernel(
        partial(_scan, "mamba_chunk_scan_combined"),
        ("mamba_ssm", _SSD, "mamba_chunk_scan_combined"),
    ),
    "mamba2_split_conv1d_scan_combined": Kernel(
        partial(_scan, _FUSED), ("mamba_ssm", _SSD, _FUSED)
    ),
}
# One token after a cache: a packed forward has none.
STEPS = frozenset(
    {
        "causal_conv1d_update",
        "torch_recurrent_gated_delta_rule",
        "recurrent_kimi_delta_attention",
        "mamba2_selective_state_update",
        "mamba_selective_state_update",
    }
)
# No kernel of these takes boundaries.
UNBOUNDED = frozenset({"mamba_inner_fn", "mamba_selective_scan"})


@dataclass(frozen=True)
class Room:
    """A stream with room between its documents, in which every token has a place.

    Attributes:
        places: int64 `[total_tokens]`, where each token stands.
        seq_idx: int32 `[1, width]`, the document of each place.
    """

    places: Tensor
    seq_idx: Tensor

    @staticmethod
    def of(layout: DocumentLayout, *, gap: int = 0, multiple: int = 1) -> Room:
        """At least `gap` places behind each document, which begins at a multiple of `multiple`."""
        return _room(layout.lengths, layout.device, gap, multiple)

    def spread(self, x: Tensor) -> Tensor:
        """`[total_tokens, ...]` -> `[1, width, ...]`, zeros where no token stands."""
        wide = x.new_zeros(self.seq_idx.shape[1], *x.shape[1:])
        return wide.index_copy(0, self.places, x)[None]

    def taken(self, x: Tensor) -> Tensor:
        """`[1, width, ...]` -> `[total_tokens, ...]`."""
        return x[0].index_select(0, self.places)


# Pure functions of the lengths: one serves all layers. What they keep may serve training too.
@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _room(lengths: tuple[int, ...], device: torch.device, gap: int, multiple: int) -> Room:
    n = np.array(lengths, dtype=np.int64)
    wide = -(-(n + gap) // multiple) * multiple
    shift = np.cumsum(wide - n) - (wide - n)
    places = np.arange(n.sum()) + np.repeat(shift, n)
    numbers = np.repeat(np.arange(len(n), dtype=np.int32), wide)[None]
    return Room(sent(torch.from_numpy(places), device), sent(torch.from_numpy(numbers), device))


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _cu_seqlens(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 `[documents + 1]` without empty documents, on the device and on the CPU."""
    cu = np.cumsum([0, *(n for n in lengths if n)], dtype=np.int64)
    return sent(torch.from_numpy(cu), device), torch.from_numpy(cu)
