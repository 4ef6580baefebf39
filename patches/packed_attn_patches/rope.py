"""Rotary embeddings whose frequencies depend on how long the input is: `dynamic` and `longrope`.

Up to a length that their config names, all inputs have the same frequencies; beyond it `longrope`
takes its second set and `dynamic` (NTK) a base that grows with the length. transformers reads the
length off the largest position of a batch, so in a pack the longest document would decide for all,
and `dynamic` remembers the longest input of the forwards before. Here every document gets the
frequencies of its own length, from the embedding's own forward: once for each length that counts,
on all positions, of which the documents of that length are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from packed_attn.layout import DocumentLayout
from packed_attn_patches.forwards import ModuleForward

# Cosines and sines, or one tensor of complex numbers.
Output = Tensor | tuple[Tensor, ...]


def ropes_of(model: nn.Module) -> tuple[nn.Module, ...]:
    """The embeddings of `model` that ask for the length of their input."""
    return tuple(module for module in model.modules() if _limits(module))


def longest_alike(ropes: Iterable[nn.Module]) -> int | None:
    """How many tokens a document may have before its length changes frequencies; None is any."""
    return min((n for rope in ropes for n in _limits(rope).values()), default=None)


def reason_against_ropes(model: nn.Module) -> str | None:
    """Why documents cannot have frequencies of their own in this model, as its predicate."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    inside = {id(m) for layer in layers for m in layer.modules()}
    if any(id(rope) in inside for rope in ropes_of(model) if _grows(rope)):
        return (
            "has layers with a dynamic RoPE of their own, which remembers the longest input: "
            "recomputed for checkpointing, a document would get another one's frequencies; load it "
            "with another rope_type"
        )
    return None


def refuse_long_forest(model: nn.Module, layout: DocumentLayout) -> None:
    """A shared prefix has one set of frequencies, while what goes on from it differs in length."""
    limit = longest_alike(ropes_of(model)) if layout.is_forest else None
    if limit is not None and layout.longest_path > limit:
        raise NotImplementedError(
            f"the RoPE of {type(model).__name__} has other frequencies for documents of more than "
            f"{limit} tokens, but a shared prefix of this pack is continued to "
            f"{layout.longest_path}: it takes plain packs, and forests (parents) up to {limit}"
        )


@dataclass
class Watch:
    """Whether a model's forward is packed: position ids without a layout have lost it then.

    Attributes:
        keeps: the model makes several axes of its position ids, and loses the layout; so it is kept
            here while the forward goes on. Nothing of such a model that is computed again for
            checkpointing asks for it.
    """

    packed: bool = False
    keeps: bool = False
    layout: DocumentLayout | None = None

    @staticmethod
    def of(model: nn.Module) -> Watch | None:
        """That of a model with such embeddings."""
        ropes = ropes_of(model)
        return Watch(keeps=any(hasattr(r, "mrope_section") for r in ropes)) if ropes else None

    def begin(self, layout: DocumentLayout | None) -> None:
        """A forward begins, of a pack or (None) of anything else."""
        self.packed = layout is not None
        if self.keeps:
            self.layout = layout


def marked(position_ids: Tensor, rows: int, layout: DocumentLayout) -> Tensor:
    """`position_ids` `[1 or rows, tokens]` that tell a `RopeForward` the documents.

    The layout travels as on the mask of a packed forward: on the tensor.
    """
    if position_ids.ndim != 2:
        raise NotImplementedError(
            f"position_ids of shape {list(position_ids.shape)} beside a RoPE whose frequencies "
            "depend on the length of the input: leave them out"
        )
    carrier = position_ids.expand(rows, -1).view(rows, -1)
    carrier.packed_attn_layout = layout  # type: ignore[attr-defined]
    return carrier


class RopeForward(ModuleForward):
    """The forward of such an embedding; set as the instance's `forward`.

    Args:
        module: the embedding whose class's forward does the work.
        watch: shared with the hook that knows whether a forward is packed. In one that is not,
            position ids get what they always got.
    """

    def __init__(self, module: nn.Module, watch: Watch) -> None:
        super().__init__(module)
        self.watch = watch

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Output:
        named = {} if layer_type is None else {"layer_type": layer_type}
        layout = getattr(position_ids, "packed_attn_layout", self.watch.layout)
        limit = _limits(self.module).get(layer_type)
        if limit is None or (layout is None and not self.watch.packed):
            return self.function(self.module, x, position_ids, **named)
        if layout is None:
            raise RuntimeError(
                f"packed-attn: {type(self.module).__name__} ran in a packed forward with position "
                "ids that have lost the layout: this model does not pass them on as they are"
            )
        lengths = layout.lengths_alone.view(position_ids.shape[-2:])
        if _grows(self.module):
            return self._grown(x, position_ids, lengths, limit, named)
        short = self._as_if(limit, x, position_ids.clamp(max=limit - 1), named)
        return _chosen(lengths > limit, self._as_if(limit + 1, x, position_ids, named), short)

    @torch.compiler.disable(reason="a dynamic RoPE reads lengths, as it does in transformers")
    def _grown(
        self, x: Tensor, position_ids: Tensor, lengths: Tensor, limit: int, named: dict[str, str]
    ) -> Output:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise NotImplementedError(
                f"{type(self.module).__name__} has a dynamic RoPE, which reads lengths on the "
                "host: it cannot be captured in a CUDA graph"
            )
        out = None
        for length in [limit, *lengths[lengths > limit].unique().tolist()]:
            with fresh([self.module]):
                own = self._as_if(length, x, position_ids.clamp(max=length - 1), named)
            out = own if out is None else _chosen(lengths == length, own, out)
        assert out is not None
        return out

    def _as_if(self, length: int, x: Tensor, position_ids: Tensor, named: dict[str, str]) -> Output:
        """What `position_ids` get in an input of so many tokens."""
        # One token more says so: a rank of context parallelism may hold a document's beginning.
        last = position_ids.new_full((*position_ids.shape[:-1], 1), length - 1)
        out = self.function(self.module, x, torch.cat([position_ids, last], -1), **named)
        return tuple(t[..., :-1, :] for t in out) if isinstance(out, tuple) else out[..., :-1, :]


@contextmanager
def fresh(ropes: Iterable[nn.Module]) -> Iterator[None]:
    """Frequencies as before the first forward, and afterwards those that were there."""
    growing = [rope for rope in ropes if _grows(rope)]
    before = [(dict(vars(rope)), dict(rope._buffers)) for rope in growing]
    for rope in growing:
        for name in list(rope._buffers):
            original = getattr(rope, name.replace("inv_freq", "original_inv_freq"), None)
            if original is not None:
                rope._buffers[name] = original
        for name in vars(rope):
            if name.endswith("max_seq_len_cached"):
                setattr(rope, name, rope.original_max_seq_len)
    try:
        yield
    finally:
        for rope, (values, buffers) in zip(growing, before):
            vars(rope).clear()
            vars(rope).update(values)
            rope._buffers.clear()
            rope._buffers.update(buffers)


def _limits(module: Any) -> dict[str | None, int]:
    """Tokens up to which all inputs have the same frequencies, by type of layer (None: of all)."""
    limits: dict[str | None, int] = {}
    for layer_type, kind in _kinds(module).items():
        if kind == "longrope":
            parameters = module.config.rope_parameters
            parameters = parameters if layer_type is None else parameters[layer_type]
            limits[layer_type] = int(parameters["original_max_position_embeddings"])
        elif _is_dynamic(kind):
            limits[layer_type] = int(module.original_max_seq_len)
    return limits


def _grows(module: nn.Module) -> bool:
    """Whether frequencies depend on the very length, and on inputs before."""
    return any(map(_is_dynamic, _kinds(module).values()))


def _kinds(module: nn.Module) -> dict[str | None, Any]:
    """transformers' name for the frequencies, by type of layer (None: of all)."""
    kinds: Any = getattr(module, "rope_type", None)
    return kinds if isinstance(kinds, dict) else {None: kinds}


def _is_dynamic(kind: Any) -> bool:
    return isinstance(kind, str) and "dynamic" in kind


def _chosen(mask: Tensor, one: Output, other: Output) -> Output:
    """Per token, of one or several tensors `[rows, tokens, width]`."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return torch.where(mask[..., None], one, other)  # type: ignore[arg-type]
    return tuple(torch.where(mask[..., None], a, b) for a, b in zip(one, other))
