"""Context parallelism for packs: one pack over several devices, exact.

Every rank holds some of a pack's tokens and computes the model on them; attention alone needs the
others. Two ways, both differentiable:

    heads   all-to-all (Jacobs et al., "DeepSpeed Ulysses", 2023): every rank gets all tokens of
            some heads, runs ordinary packed attention and sends the tokens back. Serves every mask.
    keys    keys and values are gathered, queries stay where they are (Dubey et al., "The Llama 3
            Herd of Models", 2024, section 3.3.2). Serves any number of heads.

Tokens are dealt in blocks of equal size, dear blocks and cheap ones together: a token costs as many
keys as it sees, so that every rank has the same number of tokens and nearly the same work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from packed_attn.collator import IGNORE_INDEX
from packed_attn.derived import sent
from packed_attn.layout import DocumentLayout

Method = Literal["auto", "heads", "keys"]
# Two blocks a rank are what a causal triangle needs; more would gather keys more often.
BLOCKS_PER_RANK = 2


def context_parallel(
    batch: Mapping[str, Any], group: Any, *, method: Method = "auto"
) -> dict[str, Any]:
    """This rank's share of one packed batch that every rank of `group` holds whole.

    The model's loss on the share, with the `num_items_in_batch` that comes with it, is this rank's
    summand: the losses of all ranks add up to the loss of the whole batch, and so do gradients.
    (DDP and FSDP average gradients over ranks: multiply the loss by the ranks of the group.)

        mesh = init_device_mesh("cuda", (dp, cp), mesh_dim_names=("dp", "cp"))
        loss = model(**context_parallel(batch, mesh["cp"])).loss

    Args:
        batch: from `PackedCollator`, one row whose length is a multiple of twice the ranks
            (`pad_to_multiple_of`).
        group: a process group, or a one-dimensional `DeviceMesh` such as `mesh["cp"]`.
        method: "heads" exchanges heads for tokens, "keys" gathers keys and values, "auto" takes
            heads where their number allows it.

    Returns:
        `input_ids`, `labels`, `shift_labels`, `position_ids` `[1, T / ranks]`, other columns per
        token likewise, the `layout` of the share, and `num_items_in_batch`, the targets of the
        whole batch.

    Raises:
        ValueError: no layout, more than one row, a length that does not divide, an unknown method.
        NotImplementedError: a forest, documents that count alike, two streams. A model that takes
            whole documents only refuses its share.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be 'auto', 'heads' or 'keys', got {method!r}")
    whole = _checked_layout(batch)
    _refuse_other_losses(batch)
    group = group.get_group() if hasattr(group, "get_group") else group
    _check_divides(whole, group)
    layout = ShardedLayout.of(whole, group, method)
    share = {name: value for name, value in batch.items() if name not in _WHOLE_ONLY}
    if share.get("labels") is not None:
        labels = share["labels"]
        shifted = torch.full_like(labels, IGNORE_INDEX)
        shifted[:, :-1] = labels[:, 1:]
        share["shift_labels"] = shifted.masked_fill(whole.document_ends.view(1, -1), IGNORE_INDEX)
        share["num_items_in_batch"] = (share["shift_labels"] != IGNORE_INDEX).sum()
    for name, value in share.items():
        if isinstance(value, Tensor) and value.shape[:2] == (1, whole.total_tokens):
            share[name] = value.index_select(1, layout.rows.to(value.device))
    share["position_ids"] = layout.position_ids[None]
    return {**share, "layout": layout}


# What describes the whole row; the share's layout says it all.
_WHOLE_ONLY = (
    "layout",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "seq_idx",
)


class ShardedLayout(DocumentLayout):
    """The documents of one rank's tokens: pieces of the whole pack's documents.

    Attributes:
        whole: the pack's own layout.
        rows: int64 `[total_tokens]`: the tokens of the pack that this rank holds, in order.
        group: the ranks that share the pack.
        method: see `context_parallel`.
    """

    whole: DocumentLayout
    rows: Tensor
    group: Any
    method: Method

    def __init__(
        self,
        pieces: DocumentLayout,
        whole: DocumentLayout,
        rows: Tensor,
        group: Any,
        method: Method,
    ) -> None:
        super().__init__(pieces.cu_seqlens, pieces.total_tokens, padding=pieces.padding)
        put = object.__setattr__
        put(self, "whole", whole)
        put(self, "rows", rows)
        put(self, "group", group)
        put(self, "method", method)

    @staticmethod
    def of(whole: DocumentLayout, group: Any, method: Method) -> ShardedLayout:
        """The share of this process."""
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        rows = _dealt(whole, ranks)[rank].to(whole.device)
        return ShardedLayout(_Pieces.of(whole, rows).layout, whole, rows, group, method)

    @property
    def is_share(self) -> bool:
        """Whether it is one rank's share of a pack."""
        return True

    @property
    def stream_order(self) -> Tensor:
        """int64 `[whole.total_tokens]`: of each token of the pack, its place among all ranks'."""
        return self._once("stream_order", self._stream_order)

    @property
    def pieces(self) -> _Pieces:
        """This rank's pieces of documents, and the keys that each one sees."""
        return self._once("pieces", lambda: _Pieces.of(self.whole, self.rows))

    def _stream_order(self) -> Tensor:
        dealt = torch.cat(_dealt(self.whole, dist.get_world_size(self.group)))
        order = torch.empty_like(dealt)
        order[dealt] = torch.arange(dealt.numel())
        return order.to(self.device)

    def _position_ids(self) -> Tensor:
        return self.whole.position_ids[self.rows]

    def _lengths_alone(self) -> Tensor:
        return self.whole.lengths_alone[self.rows]

    def _document_starts(self) -> Tensor:
        return self.whole.document_starts[self.rows]

    def _document_ends(self) -> Tensor:
        return self.whole.document_ends[self.rows]

    def _moved(self, device: torch.device, non_blocking: bool) -> ShardedLayout:
        padding = None if self.padding is None else sent(self.padding, device, non_blocking)
        cu_seqlens = sent(self.cu_seqlens, device, non_blocking)
        pieces = DocumentLayout(cu_seqlens, self.total_tokens, padding=padding)
        whole = self.whole.to(device, non_blocking)
        rows = sent(self.rows, device, non_blocking)
        copy = ShardedLayout(pieces, whole, rows, self.group, self.method)
        copy._derived["lengths"] = self.lengths
        copy._derived[("to", self.device)] = self
        return copy

    def pin_memory(self) -> ShardedLayout:
        raise NotImplementedError("a sharded layout is made on the training process, not pinned")

    def attention(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Any:
        """`packed_attn.attention` of the whole pack, from and to this rank's tokens."""
        for name in ("key_layout", "dropout_p"):
            if options.get(name):
                raise NotImplementedError(f"context parallelism has no {name}")
        if options.get("key_indices") is not None:
            raise NotImplementedError("context parallelism has no key_indices")
        ranks = dist.get_world_size(self.group)
        divides = q.shape[1] % ranks == 0 and (k.shape[1] % ranks == 0 or ranks % k.shape[1] == 0)
        if self.method == "heads" and not divides:
            raise ValueError(
                f"method 'heads' needs heads that {ranks} ranks can share, but there are "
                f"{q.shape[1]} heads of q and {k.shape[1]} of k: use method='keys'"
            )
        by_heads = divides if self.method == "auto" else self.method == "heads"
        exchange = _attention_by_heads if by_heads else _attention_by_keys
        return exchange(q, k, v, self, options)


def _attention_by_heads(
    q: Tensor, k: Tensor, v: Tensor, layout: ShardedLayout, options: dict[str, Any]
) -> Any:
    from packed_attn.attention import attention

    ranks, rank = dist.get_world_size(layout.group), dist.get_rank(layout.group)
    if k.shape[1] % ranks:
        # Fewer heads than ranks: several ranks compute with one head's keys and values.
        k, v = (x.repeat_interleave(ranks // x.shape[1], dim=1) for x in (k, v))
    options = dict(options)
    for name in ("sinks", "alibi_slopes", "bias"):
        if options.get(name) is not None:
            options[name] = options[name].chunk(ranks)[rank]
    q, k, v = (_tokens_for_heads(x, layout) for x in (q, k, v))
    result = attention(q, k, v, layout.whole, **options)
    if not options.get("return_lse"):
        return _heads_for_tokens(result, layout)
    out, lse = result
    return _heads_for_tokens(out, layout), _heads_for_tokens(lse.t()[..., None], layout)[..., 0].t()


def _tokens_for_heads(x: Tensor, layout: ShardedLayout) -> Tensor:
    """`[own tokens, heads, dim]` -> `[all tokens in order, heads / ranks, dim]`."""
    ranks = dist.get_world_size(layout.group)
    tokens, heads, dim = x.shape
    by_rank = x.view(tokens, ranks, heads // ranks, dim).transpose(0, 1).contiguous()
    received = _AllToAll.apply(by_rank, layout.group)
    return received.flatten(0, 1).index_select(0, layout.stream_order)


def _heads_for_tokens(x: Tensor, layout: ShardedLayout) -> Tensor:
    """`[all tokens in order, heads / ranks, dim]` -> `[own tokens, heads, dim]`."""
    ranks = dist.get_world_size(layout.group)
    back = torch.empty_like(layout.stream_order)
    back[layout.stream_order] = torch.arange(back.numel(), device=back.device)
    by_rank = x.index_select(0, back).unflatten(0, (ranks, -1)).contiguous()
    return _AllToAll.apply(by_rank, layout.group).transpose(0, 1).flatten(1, 2)


def _attention_by_keys(
    q: Tensor, k: Tensor, v: Tensor, layout: ShardedLayout, options: dict[str, Any]
) -> Any:
    """A causal piece of a document is cross attention to the document's tokens up to its end."""
    from packed_attn.attention import attention

    _require_causal_prefixes(options)
    k, v = (_AllGather.apply(x.contiguous(), layout.group) for x in (k, v))
    pieces = layout.pieces
    keys = layout.stream_order[pieces.keys]
    return attention(
        q,
        k.index_select(0, keys),
        v.index_select(0, keys),
        pieces.layout,
        **{**options, "key_layout": pieces.key_layout},
    )


def _require_causal_prefixes(options: dict[str, Any]) -> None:
    if not options.get("causal", True):
        raise NotImplementedError(
            "method 'keys' serves causal masks; use method='heads' for bidirectional ones"
        )
    if options.get("prefix_lengths") is not None:
        raise NotImplementedError("method 'keys' has no prefix_lengths; use method='heads'")


@dataclass(frozen=True, eq=False)
class _Pieces:
    """One rank's pieces of documents.

    Attributes:
        layout: the pieces, end to end.
        key_layout: for each piece, its document's tokens up to the piece's end.
        keys: int64, the tokens of the pack that key_layout's tokens are.
    """

    layout: DocumentLayout
    key_layout: DocumentLayout
    keys: Tensor

    @staticmethod
    def of(whole: DocumentLayout, rows: Tensor) -> _Pieces:
        document = whole.document_ids[rows].long()
        begins = torch.ones_like(rows, dtype=torch.bool)
        begins[1:] = (rows[1:] != rows[:-1] + 1) | (document[1:] != document[:-1])
        first = begins.nonzero().flatten()
        lengths = torch.cat([first, first.new_tensor([rows.numel()])]).diff()
        padding = None if whole.padding is None else whole.padding[document[first]]
        starts = whole.cu_seqlens[:-1].long()[document[first]]
        stops = rows[first] + lengths
        key_lengths = stops - starts
        offset = key_lengths.cumsum(0) - key_lengths
        place = torch.arange(int(key_lengths.sum()), device=rows.device)
        keys = place + torch.repeat_interleave(starts - offset, key_lengths)
        layout = DocumentLayout.from_lengths(lengths, padding=padding)
        return _Pieces(layout, DocumentLayout.from_lengths(key_lengths, padding=padding), keys)


def _dealt(whole: DocumentLayout, ranks: int) -> list[Tensor]:
    """The tokens of every rank, int64, sorted, on the CPU: blocks of one size in snake order of
    their cost."""
    blocks = torch.arange(whole.total_tokens).view(ranks * BLOCKS_PER_RANK, -1)
    cost = (whole.to("cpu").position_ids + 1).view_as(blocks).sum(1)
    order = torch.argsort(cost, descending=True, stable=True).view(BLOCKS_PER_RANK, ranks)
    order[1::2] = order[1::2].flip(1)
    return [blocks[order[:, rank].sort().values].flatten() for rank in range(ranks)]


def _checked_layout(batch: Mapping[str, Any]) -> DocumentLayout:
    layout = batch.get("layout")
    if not isinstance(layout, DocumentLayout) or isinstance(layout, ShardedLayout):
        raise ValueError("batch must carry the layout of the whole pack, as PackedCollator's does")
    if layout.is_forest:
        raise NotImplementedError("context parallelism has no forests (parents)")
    rows = batch["input_ids"].shape[0]
    if rows != 1:
        raise ValueError(f"batch must have one row, got {rows}")
    return layout


def _refuse_other_losses(batch: Mapping[str, Any]) -> None:
    """A rank's summand is of a mean over tokens, each predicted by the one before."""
    counts = batch.get("shift_labels")
    if isinstance(counts, Tensor) and counts.ndim == 3:
        raise NotImplementedError(
            "context parallelism has no mean over documents, which several ranks would hold in "
            "pieces: use PackedCollator(loss_weighting='token')"
        )
    if batch.get("decoder_layout") is not None:
        raise NotImplementedError("context parallelism has no encoder-decoders (decoder_layout)")


def _check_divides(whole: DocumentLayout, group: Any) -> None:
    ranks = dist.get_world_size(group)
    if whole.total_tokens % (BLOCKS_PER_RANK * ranks):
        raise ValueError(
            f"the pack's tokens must be a multiple of {BLOCKS_PER_RANK * ranks} for {ranks} ranks, "
            f"but it has {whole.total_tokens}: use "
            f"PackedCollator(pad_to_multiple_of={BLOCKS_PER_RANK * ranks})"
        )


class _AllToAll(torch.autograd.Function):
    """Part i of dimension 0 to rank i; its own inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        out = torch.empty_like(grad)
        dist.all_to_all_single(out, grad, group=ctx.group)
        return out, None


class _AllGather(torch.autograd.Function):
    """All ranks' tokens one after another; gradients are summed where they came from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        ranks = dist.get_world_size(group)
        out = x.new_empty(ranks * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ranks = dist.get_world_size(ctx.group)
        grad = grads[0].contiguous()
        out = grad.new_empty(grad.shape[0] // ranks, *grad.shape[1:])
        dist.reduce_scatter_tensor(out, grad, group=ctx.group)
        return out, None
