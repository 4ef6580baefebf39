"""Models under FSDP2 that run on documents batched by length: as many calls on every rank.

Ranks gather a module's parameters together each time that it runs, forward and backward, and so
have to run it as often as each other, while one may have more batches than another. So before a
forward they agree on the largest number, and a rank with fewer runs a batch again, from whose
outputs nothing comes: they are tied to the real ones, with gradients of exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

# What a call by itself may be made of, to be run again on one token.
_TOKENS = (
    "input_ids",
    "inputs_embeds",
    "decoder_input_ids",
    "decoder_inputs_embeds",
    "labels",
)

# In a forward whose calls have been counted, an inner model's are part of them.
_counted: ContextVar[bool] = ContextVar("counted", default=False)

# Of each sharded model, where its parameters lie: after a forward they may be whole until the
# backward, and tell nothing.
_meshes: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


@contextmanager
def counted(model: nn.Module, calls: int) -> Iterator[int]:
    """A forward of `model` in so many calls; gives how many more another rank runs."""
    if _counted.get() or torch.compiler.is_compiling() or not _is_sharded(model):
        yield 0
        return
    token = _counted.set(True)
    try:
        yield int(_largest(model, calls)) - calls
    finally:
        _counted.reset(token)


def as_often(
    model: nn.Module,
    call: Callable[[], Any],
    again: Callable[..., Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """A forward in one call, beside as many calls of one token as other ranks run.

    Args:
        call: the forward.
        again: runs keyword arguments.
        kwargs: those of the forward.
    """
    with counted(model, 1) as missing:
        output = call()
        if not missing:
            return output
        tokens = {n: v[:1, :1] for n, v in kwargs.items() if n in _TOKENS and _is_of_tokens(v)}
        return tied(output, [again(**tokens, use_cache=False) for _ in range(missing)])


def tied(output: Any, others: Iterable[Any]) -> Any:
    """`output`, of which a backward also runs through `others`, whose gradients are 0."""
    tensors = [value for other in others for value in _differentiable(other)]
    if not tensors:
        return output
    if isinstance(output, tuple):
        return tuple(_tied(value, tensors) for value in output)
    for name, value in output.items():
        output[name] = _tied(value, tensors)
    return output


def _tied(value: Any, others: list[Tensor]) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_tied(part, others) for part in value)
    if isinstance(value, Tensor) and value.requires_grad:
        return _Tied.apply(value, *others)
    return value


class _Tied(torch.autograd.Function):
    """The first argument; no number of the others, whatever they hold, comes into it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(*others)
        # Trainer scales a loss in place, which a view would forbid; of logits a copy is too large.
        return value.clone() if value.ndim == 0 else value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], *(torch.zeros_like(other) for other in ctx.saved_tensors)


def _differentiable(output: Any) -> list[Tensor]:
    """Outputs by token: the gradient of a mean over no targets is not 0 but NaN."""
    values = output if isinstance(output, tuple) else output.values()
    return [v for v in values if isinstance(v, Tensor) and v.requires_grad and v.ndim > 1]


def _is_of_tokens(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 1


def refuse_other_shards(model: nn.Module) -> None:
    """Raises a NotImplementedError where ranks share a model in another way than FSDP2's."""
    if _several_ranks() and _is_sharded_otherwise(model):
        raise NotImplementedError(
            f"{type(model).__name__} runs packs on documents batched by length, in more batches on "
            "one rank than on another, while FSDP's first version and ZeRO-3 make ranks wait for "
            "each other at every layer: use FSDP2 (fully_shard; fsdp_version: 2), DDP, or ZeRO up "
            "to stage 2"
        )


def largest_of_ranks(model: nn.Module, number: float) -> float:
    """The largest of the numbers of the ranks that have a part in every forward of a model."""
    if not _several_ranks():
        return number
    from torch.distributed.fsdp import FSDPModule

    together = isinstance(model, FSDPModule) or _is_sharded(model) or _is_sharded_otherwise(model)
    return _largest(model, number) if together else number


def _is_sharded(model: nn.Module) -> bool:
    """Whether parts of it are by FSDP2; its own parameters are gathered once a forward."""
    if not _several_ranks():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(m, FSDPModule) for m in _parts(model))


def _is_sharded_otherwise(model: nn.Module) -> bool:
    """Whether parts of it are by FSDP's first version or by ZeRO-3."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    older = any(isinstance(m, FullyShardedDataParallel) for m in _parts(model))
    return older or any(hasattr(p, "ds_id") for p in model.parameters())


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _parts(model: nn.Module) -> Iterator[nn.Module]:
    return (m for m in model.modules() if m is not model)


def _largest(model: nn.Module, number: float) -> float:
    mesh = _mesh(model)
    device = next(model.parameters()).device if mesh is None else mesh.device_type
    groups = [None] if mesh is None else [mesh.get_group(dim) for dim in range(mesh.ndim)]
    found = torch.tensor(number, device=device)
    for group in groups:
        dist.all_reduce(found, dist.ReduceOp.MAX, group)
    return found.item()


def _mesh(model: nn.Module) -> Any:
    if model not in _meshes:
        found = (getattr(p, "device_mesh", None) for p in model.parameters())
        mesh = next((mesh for mesh in found if mesh is not None), None)
        if mesh is None:
            return None
        _meshes[model] = mesh
    return _meshes[model]
