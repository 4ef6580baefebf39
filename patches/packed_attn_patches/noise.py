"""NEFTune on packs: a document's noise has the scale that it has alone.

NEFTune (Jain et al., "NEFTune: Noisy Embeddings Improve Instruction Finetuning", 2023) adds
uniform noise of at most alpha / sqrt(L x d) to embeddings in training, L the tokens of the row.
Trainer puts it on the embeddings as a forward hook when a run begins, and takes it off by its key
when it ends. A packed forward puts another in its place, under the same key, that takes the length
of each token's own document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.neftune import neftune_post_forward_hook

from packed_attn.layout import DocumentLayout


@dataclass
class DocumentNoise:
    """Forward hook of embeddings, in place of NEFTune's; without expectations it is that.

    Attributes:
        ids: what a packed forward embeds next.
        lengths: int64, as many: the tokens of each one's document.
        inside: whether that forward is one of those on documents batched by length, in which an
            inner model's batches have no boundaries.
    """

    ids: Tensor | None = None
    lengths: Tensor | None = None
    inside: bool = False

    def expect(self, ids: Tensor | None, lengths: Tensor | None) -> None:
        """The next call embeds `ids`, of documents of these lengths; None: no packed forward."""
        self.ids, self.lengths = ids, lengths

    @torch.compiler.disable(reason="NEFTune's own hook breaks the graph too")
    def __call__(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.lengths is None or not module.training:
            return neftune_post_forward_hook(module, args, output)
        if not args or not _is_same(args[0], self.ids):
            raise RuntimeError(
                f"packed-attn: {type(module).__name__} embeds other tokens than the packed forward "
                "was given, so that NEFTune's noise cannot be scaled by their documents: set "
                "neftune_noise_alpha=None"
            )
        bound = module.neftune_noise_alpha / torch.sqrt(self.lengths * output.shape[-1])
        noise = torch.zeros_like(output).uniform_(-1, 1)
        return output + noise * bound.view(*output.shape[:-1], 1).to(output.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {"ids": None, "lengths": None, "inside": False}


def noises_of(model: Any) -> list[DocumentNoise]:
    """The hooks by which a model in training gets noise; empty where it gets none."""
    if not model.training:
        return []
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:
        return []
    if getattr(embeddings, "neftune_noise_alpha", None) is None:
        return []
    return _replaced(embeddings)


def tell(model: nn.Module, ids: Tensor | None, layout: DocumentLayout | None) -> None:
    """What a forward of the model embeds, or that it is not packed.

    Raises:
        NotImplementedError: the documents share tokens.
    """
    noises = noises_of(model)
    if noises:
        _tell(noises, ids, layout)


@torch.compiler.disable(reason="NEFTune's own hook breaks the graph too")
def _tell(noises: list[DocumentNoise], ids: Tensor | None, layout: DocumentLayout | None) -> None:
    if layout is not None and layout.is_forest:
        raise NotImplementedError(
            "the batch shares prefixes and NEFTune is on: a shared token would get one noise for "
            "all its documents, where each has its own alone; set neftune_noise_alpha=None, or "
            "leave share_prefixes out"
        )
    for noise in noises:
        if not noise.inside:
            noise.expect(ids, None if layout is None else layout.lengths_alone)


@contextmanager
def told(noises: list[DocumentNoise], ids: Tensor | None, lengths: Tensor | None) -> Iterator[None]:
    """A forward inside embeds `ids`, of documents of `lengths`; what follows is not packed."""
    for noise in noises:
        noise.expect(ids, lengths)
        noise.inside = True
    try:
        yield
    finally:
        for noise in noises:
            noise.expect(None, None)
            noise.inside = False


def put_back_noise(model: nn.Module) -> None:
    """NEFTune's own hook where another stands in its place."""
    for module in model.modules():
        for key, hook in module._forward_hooks.items():
            if isinstance(hook, DocumentNoise):
                module._forward_hooks[key] = neftune_post_forward_hook


@torch.compiler.disable(reason="puts a hook in place of another")
def _replaced(embeddings: nn.Module) -> list[DocumentNoise]:
    hooks: dict[int, Callable[..., Any]] = embeddings._forward_hooks
    for key, hook in hooks.items():
        if hook is neftune_post_forward_hook:
            hooks[key] = DocumentNoise()
    return [hook for hook in hooks.values() if isinstance(hook, DocumentNoise)]


def _is_same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether both are views of all the same numbers; holding one keeps its place from others."""
    if a is None or b is None:
        return a is b
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()
