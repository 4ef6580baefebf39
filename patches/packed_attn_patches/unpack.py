"""Exact by construction: run a model on documents batched by length, put the rows back.

For models whose token mixers do not take a layout (recurrences, convolutions, attention code of
their own) and for heads that give one row a document. Documents of like length form right-padded
batches. A causal model's outputs cannot depend on what comes later, so padding reaches no
document; an encoder is told of it by an attention_mask; a model of neither kind gets batches of one
length and no padding. Costs a few smaller forwards instead of one.

A forest runs as its paths: each from a root to where nothing goes on, so what is shared is computed
in each of them, and its outputs are those of the first. Nothing that follows a token changes it in
a causal model, so outputs and gradients are those of the documents alone; no other model is given a
forest.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from packed_attn.buckets import Bucket, on_device, plan_buckets
from packed_attn.collator import IGNORE_INDEX
from packed_attn.derived import sent
from packed_attn.layout import DocumentLayout
from packed_attn_patches import fast_mixers
from packed_attn_patches.adapters import refuse_adapters
from packed_attn_patches.boundaries import CACHE_NAMES, PASTS, documents_alone
from packed_attn_patches.families import (
    HIDES_PADDING_IDS,
    Head,
    Route,
    is_encoder_decoder,
    reason_against_forests,
)
from packed_attn_patches.forwards import EntranceForward
from packed_attn_patches.inputs import FUSED_HEAD, LayoutHook
from packed_attn_patches.noise import noises_of, told
from packed_attn_patches.rope import fresh, longest_alike, ropes_of
from packed_attn_patches.routers import BalancingLoss, asks_for
from packed_attn_patches.shards import as_often, counted, refuse_other_shards, tied

# Tokens in one forward: beyond it a batch is as efficient as it gets, and only memory grows.
CALL_TOKENS = 1 << 16

# Outputs of one row a document, whatever the head.
PER_DOCUMENT = ("pooler_output",)

# Of each layer `[B * T, experts]`: a loss over the whole batch is made of them outside.
ROUTERS = "router_logits"

# A head of text and entities calls its loss over text by a name of its own as well.
LOSSES = ("loss", "mlm_loss")

# Rows of several streams of one document end to end: ProphetNet's predictions further ahead.
_STREAMS = (
    "logits_ngram",
    "last_hidden_state_ngram",
    "hidden_states_ngram",
    "decoder_ngram_hidden_states",
)

# Inputs whose documents are those of another stream.
_OTHER_STREAM = (
    "encoder_hidden_states",
    "encoder_outputs",
    "decoder_input_ids",
    "decoder_inputs_embeds",
)

# What padding holds of arguments that are read there. It has no targets; and of types of tokens, of
# which Gemma 3 and 4 let neighbours of one kind, images, see each other both ways, it is text.
_OF_PADDING = {
    "labels": IGNORE_INDEX,
    "shift_labels": IGNORE_INDEX,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
}

# Each document counts its own positions, sees all of itself and starts without a past.
REPLACED = (
    "attention_mask",
    *CACHE_NAMES,
    "use_cache",
    "num_items_in_batch",
    "return_dict",
    "logits_to_keep",
)


POSITIONS = "position_ids"

# numpy on the lengths of a batch, and its transfer: nothing that a compiler could trace.
_plan_on_the_host: Any = torch.compiler.disable(plan_buckets)
plan_on_device: Any = torch.compiler.disable(on_device)


class UnpackedForward(EntranceForward):
    """A model's forward that runs packed batches document by document, in batches by length.

    Set as the instance's `forward`; picklable, and a deepcopy of the model holds a copy of it.

    Args:
        module: the model whose class's forward does the work, or what has replaced it.
        route: one of the unpacking routes: whether and how batches are padded.
        head: what its outputs are of.
        hook: of this model, which knows how a layout goes down to the layers.
    """

    def __init__(
        self, module: nn.Module, route: Route, head: Head, hook: LayoutHook | None = None
    ) -> None:
        super().__init__(module)
        self.route = route
        self.head = head
        self.hook = hook
        self.ropes = ropes_of(module)
        # Whether its own code has a place for them; an encoder-decoder's packs have others.
        own = inspect.signature(type(module).forward).parameters
        self.takes_positions = POSITIONS in own or is_encoder_decoder(module)

    @property
    def __signature__(self) -> inspect.Signature:
        """Trainer reads the names of a model's columns from here and leaves all others out, so
        position_ids, which tell documents apart, are named by models that count none too."""
        stock = inspect.signature(self.function.__get__(self.module))
        if self.takes_positions or POSITIONS in stock.parameters:
            return stock
        named = inspect.Parameter(POSITIONS, inspect.Parameter.KEYWORD_ONLY, default=None)
        before = [p for p in stock.parameters.values() if p.kind is not p.VAR_KEYWORD]
        after = [p for p in stock.parameters.values() if p.kind is p.VAR_KEYWORD]
        return stock.replace(parameters=[*before, named, *after])

    def pad_token_id(self) -> int | None:
        """What the model's config says that padding is made of, if it can be embedded: some say -1,
        or an id beside a vocabulary that was never enlarged."""
        whole: Any = self.module.config
        config = whole.get_text_config()
        token = getattr(config, "pad_token_id", None)
        embedded = token is not None and 0 <= token < getattr(config, "vocab_size", token + 1)
        return token if embedded else None

    def check_text(self, ids: Tensor | None, layout: DocumentLayout) -> None:
        """Refuses documents of which the model alone would hide tokens for their ids.

        Args:
            ids: of `layout`'s tokens, or None.
        """
        config: Any = self.module.config
        token = self.pad_token_id()
        if config.model_type not in HIDES_PADDING_IDS or ids is None or token is None:
            return
        hidden, padding = ids == token, layout.padding_tokens
        if bool((hidden if padding is None else hidden & ~padding).any()):
            raise NotImplementedError(
                f"{type(self.module).__name__} hides the padding id {token} wherever it is given "
                "no attention_mask, and padded rows need one: leave it out of documents, or mark "
                "it as padding in the layout"
            )

    def pads(self, *layouts: DocumentLayout) -> bool:
        """Whether the model may see documents of unlike lengths in a batch."""
        longest = max(layout.longest_path for layout in layouts)
        limit = longest_alike(self.ropes)
        return self.route is not Route.UNPACK and (limit is None or longest <= limit)

    def entered(self, *args: Any, layout: DocumentLayout | None = None, **kwargs: Any) -> Any:
        if layout is None:
            if not self.takes_positions:
                kwargs.pop(POSITIONS, None)
            return self.once(args, kwargs)
        if kwargs.get(FUSED_HEAD):  # of a forward that was there before the patch: see inputs.py
            return self.function(self.module, *args, layout=layout, **kwargs)
        inner = "packed_attn_backend" in kwargs  # an outer model's mixers are this one's
        if not inner and self.hook is not None and self.hook.mixers_take(self.module, layout):
            kwargs, inner = self.hook.in_stream(self.module, {**kwargs, "layout": layout}), True
            del kwargs["layout"]
        if inner:
            return self.once(args, {**kwargs, "layout": layout}, fast_mixers.packed_forward())
        refuse_adapters(self.module, same_rows=False)
        return self.run(_Unpacked.of(self, layout, kwargs), kwargs)

    def once(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        inside: AbstractContextManager[Any] | None = None,
    ) -> Any:
        """A forward that is one call, made inside a context."""

        def call() -> Any:
            with inside or nullcontext():
                return self.function(self.module, *args, **kwargs)

        if kwargs.get(FUSED_HEAD):
            return call()  # the backbone, which it hands all to, counts
        return as_often(self.module, call, partial(self.function, self.module), kwargs)

    def run(self, batch: Any, kwargs: Mapping[str, Any]) -> Any:
        """The calls of a packed batch, and what they give put together."""
        refuse_other_shards(self.module)
        config: Any = self.module.config
        if getattr(config, "sparse_prediction", False) and kwargs.get("labels") is not None:
            raise NotImplementedError(
                f"{type(self.module).__name__} gives logits of labelled tokens alone, which packs "
                "have no rows for: load it with sparse_prediction=False"
            )
        by_default, asked = getattr(config, "return_dict", True), kwargs.get("return_dict")
        # Rows of a tuple have no names to be put back by.
        names = {} if by_default else {"return_dict": True}
        function, parts, noises = self.function, [], noises_of(self.module)
        routed = asks_for(self.module, kwargs, "router_logits")
        balance = BalancingLoss.of(function, routed and isinstance(batch, _Unpacked))
        if balance is not None:
            function = balance.function
        planned = batch.planned()
        with counted(self.module, len(planned)) as missing, documents_alone():
            smallest = sorted(planned, key=batch.tokens_in)[:1]
            for bucket in [*planned, *smallest * missing]:
                inputs = batch.inputs(bucket)
                lengths = batch.lengths(bucket) if noises else None
                with fresh(self.ropes), told(noises, inputs.get("input_ids"), lengths):
                    parts.append((bucket, function(self.module, **inputs, **names)))
        real, again = parts[: len(planned)], [of_call for _, of_call in parts[len(planned) :]]
        if real and again:  # what is joined is new, and may be written to
            real[0] = real[0][0], tied(real[0][1], again)
        output = batch.joined(real, left_out="" if balance is None else "aux_loss")
        if balance is not None:
            balance.added(self.module, output, batch.layout)
        keep = kwargs.get("logits_to_keep")
        if keep is not None and output.get("logits") is not None:  # places in the rows of the pack
            kept = slice(-keep, None) if isinstance(keep, int) else keep
            output["logits"] = output["logits"][:, kept]
        return output if (by_default if asked is None else asked) else output.to_tuple()


class PackedCalls:
    """One packed forward as calls on batches of documents, whose outputs are put together.

    Subclasses say what the calls are, where an output's rows belong and how many targets a batch
    has.
    """

    num_items: Any

    def planned(self) -> list[Any]:
        """The batch of each call."""
        raise NotImplementedError

    def tokens_in(self, batch: Any) -> int:
        """How many tokens a batch has, padding counted."""
        raise NotImplementedError

    def inputs(self, batch: Any) -> dict[str, Any]:
        """The keyword arguments of a batch's call, made when it runs."""
        raise NotImplementedError

    def put_back(self, name: str, parts: list[tuple[Any, Tensor]]) -> Tensor:
        """Rows of the output `name`, of every batch -> what one forward over all would give."""
        raise NotImplementedError

    def targets(self, batch: Any) -> Tensor:
        """How many targets a batch's mean is over."""
        raise NotImplementedError

    def lengths(self, batch: Any) -> Tensor:
        """int64, of each of a batch's ids: the tokens of its document."""
        raise NotImplementedError

    def joined(self, parts: list[tuple[Any, Any]], left_out: str = "") -> Any:
        """The output of one forward over all documents, in stream order, without `left_out`.

        Tokens of padding get zeros.
        """
        if not parts:
            raise ValueError("a packed forward needs a document that is not padding")
        joined = {}
        for name, value in parts[0][1].items():
            if name in PASTS or name == left_out:
                continue
            if name in LOSSES:
                joined[name] = self._loss([(batch, o[name]) for batch, o in parts])
            elif isinstance(value, Tensor):
                joined[name] = self.put_back(name, [(batch, o[name]) for batch, o in parts])
            elif isinstance(value, tuple) and ("hidden_states" in name or name == ROUTERS):
                joined[name] = tuple(
                    None
                    if of_layer is None  # LUKE's entities, where a batch has none
                    else self.put_back(name, [(batch, o[name][i]) for batch, o in parts])
                    for i, of_layer in enumerate(value)
                )
            elif isinstance(value, tuple):
                raise NotImplementedError(
                    f"the output {name} has no rows per token to put back: do not ask for it in a "
                    "packed forward"
                )
        return type(parts[0][1])(**joined)

    def _loss(self, parts: list[tuple[Any, Tensor]]) -> Tensor:
        """The mean over all targets, from the means of the batches: added up in float32, in the
        dtype of the model's own."""
        first = parts[0][1]
        total, loss = 0, first.new_zeros((), dtype=torch.promote_types(first.dtype, torch.float32))
        for batch, mean in parts:
            targets = self.targets(batch)
            total = total + targets
            # A batch without targets has a mean of NaN, and no part in the sum; that of another may
            # be more than float16 can say.
            loss = loss + torch.where(targets > 0, mean.to(loss.dtype) * targets, 0.0)
        return (loss / (total if self.num_items is None else self.num_items)).to(first.dtype)


def no_rows(name: str, value: Tensor, model: nn.Module) -> NotImplementedError:
    """The refusal of an argument that is not about the tokens of a packed forward."""
    return NotImplementedError(
        f"{name} of shape {list(value.shape)} has no rows per token to unpack: a packed forward of "
        f"{type(model).__name__} takes text only"
    )


@dataclass(frozen=True)
class _Unpacked(PackedCalls):
    """One packed forward: the layout, keyword arguments per token, and all others."""

    forward: UnpackedForward
    layout: DocumentLayout
    rows: int
    tokens: int
    per_token: dict[str, Tensor]
    labels: Tensor | None
    others: dict[str, Any]
    num_items: Any

    @staticmethod
    def of(
        forward: UnpackedForward, layout: DocumentLayout, kwargs: Mapping[str, Any]
    ) -> _Unpacked:
        shaped = kwargs.get("input_ids")
        shaped = kwargs.get("inputs_embeds") if shaped is None else shaped
        if shaped is None:
            raise ValueError("a packed forward needs input_ids or inputs_embeds")
        other = next((name for name in _OTHER_STREAM if kwargs.get(name) is not None), None)
        if other is not None:
            raise NotImplementedError(
                f"{type(forward.module).__name__} by itself cannot tell which documents its "
                f"{other} belong to: call an encoder-decoder with both sides"
            )
        reason = reason_against_forests(forward.module, forward.route)
        if kwargs.get("is_causal") is False:
            reason = "looks both ways, and a shared prefix would see what follows it"
        if layout.is_forest and reason is not None:
            raise NotImplementedError(
                f"{type(forward.module).__name__} {reason}: it takes plain packs, but no forest "
                "(parents)"
            )
        rows, tokens = shaped.shape[:2]
        others: dict[str, Any] = {}
        # Classifiers of encoder-decoders say it themselves, and may not be told a second time.
        takes_it = "use_cache" in forward.__signature__.parameters
        if takes_it or not is_encoder_decoder(forward.module):
            others["use_cache"] = False
        per_token: dict[str, Tensor] = {}
        labels = kwargs.get("labels") if forward.head.per_document else None
        for name, value in kwargs.items():
            if name in REPLACED or (name == "labels" and labels is not None):
                continue
            if name == POSITIONS:
                # Plain positions restart with each document by themselves; rotary ids of several
                # axes are given as they are.
                if value is not None and value.ndim == 3:
                    per_token[name] = value.permute(1, 2, 0).flatten(0, 1)
            elif not isinstance(value, Tensor):
                others[name] = value
            elif value.shape[:2] == (rows, tokens):
                per_token[name] = value.flatten(0, 1)
            else:
                raise no_rows(name, value, forward.module)
        num_items = kwargs.get("num_items_in_batch")
        return _Unpacked(forward, layout, rows, tokens, per_token, labels, others, num_items)

    def planned(self) -> list[Bucket]:
        self.forward.check_text(self.per_token.get("input_ids"), self.layout)
        layout = self.layout.to("cpu")
        plan = _plan_on_the_host(
            layout.cu_seqlens,
            layout.padding,
            pad_lengths=self._may_pad(),
            parents=layout.parents,
            # Gathering ids costs nothing, and a document read in place would be a call of its own.
            view_tokens=CALL_TOKENS,
            call_tokens=1 if self._one_by_one() else CALL_TOKENS,
        )
        return plan_on_device(plan.buckets, self.layout.device)

    def tokens_in(self, batch: Bucket) -> int:
        return batch.batch * batch.length

    def inputs(self, batch: Bucket) -> dict[str, Any]:
        return {**self.others, **self._rows(batch)}

    def _may_pad(self) -> bool:
        """Whether documents of unlike length may share a batch: where padding comes after all that
        is seen, or is hidden. Sequence heads tell it by its ids, and without any pool it."""
        if not self.forward.pads(self.layout):
            return False
        if self.forward.route is Route.UNPACK_CAUSAL:
            return self.others.get("is_causal") is not False
        return "input_ids" in self.per_token or not self.forward.head.per_document

    def _one_by_one(self) -> bool:
        """Sequence heads find a document's last token by its padding and take no batch without."""
        if self.forward.route is Route.UNPACK_SINGLE:
            return True
        return self.forward.head.per_document and self.forward.pad_token_id() is None

    def _rows(self, bucket: Bucket) -> dict[str, Tensor]:
        """Its rows of every argument; what padding holds is a copy of its document's last token,
        except where the model reads it."""
        inputs = {name: self._rows_of(name, bucket) for name in self.per_token}
        if "position_ids" in inputs:
            inputs["position_ids"] = inputs["position_ids"].permute(2, 0, 1)
        if self.labels is not None:
            inputs["labels"] = self.labels.index_select(0, self._documents(bucket))
        if bucket.pads is None:
            return inputs
        if self.forward.route is Route.UNPACK_MASKED:
            inputs["attention_mask"] = real_rows(bucket, self.layout.device)
            if "input_ids" in inputs:
                put(inputs["input_ids"], bucket.pads, self.forward.pad_token_id() or 0)
        return inputs

    def _rows_of(self, name: str, bucket: Bucket) -> Tensor:
        """Its rows of one argument."""
        rows = bucket.rows(self.per_token[name])
        if name in _OF_PADDING:
            put(rows, bucket.pads, _OF_PADDING[name])
        return rows

    def lengths(self, batch: Bucket) -> Tensor:
        return batch.rows(self.layout.lengths_alone)

    def _documents(self, bucket: Bucket) -> Tensor:
        """int64 `[batch]`: which documents its rows are, padding not counted."""
        first = torch.arange(bucket.batch, device=self.layout.device) * bucket.length
        tokens = first + bucket.start if bucket.tokens is None else bucket.tokens[first]
        return _numbers(self.layout)[self.layout.document_ids[tokens].long()]

    def put_back(self, name: str, parts: list[tuple[Bucket, Tensor]]) -> Tensor:
        if name in PER_DOCUMENT or (name == "logits" and self.forward.head.per_document):
            return self._per_document(parts)
        if name == ROUTERS:
            parts = [(b, value.unflatten(0, (b.batch, b.length))) for b, value in parts]
            return in_rows(name, parts, self.layout, self.rows).flatten(0, 1)
        return in_rows(name, parts, self.layout, self.rows)

    def _per_document(self, parts: list[tuple[Bucket, Tensor]]) -> Tensor:
        """Bucket rows `[batch, width]` -> `[num_documents, width]`."""
        order = torch.cat([self._documents(bucket) for bucket, _ in parts])
        return torch.cat([value for _, value in parts]).index_select(0, order.argsort())

    def targets(self, batch: Bucket) -> Tensor:
        if self.labels is not None:
            labels = self.labels.index_select(0, self._documents(batch))
            if labels.is_floating_point():
                return labels.new_full((), labels.shape[0])
            return (labels != IGNORE_INDEX).sum()
        if "shift_labels" in self.per_token:
            return (self._rows_of("shift_labels", batch) != IGNORE_INDEX).sum()
        labels = self._rows_of("labels", batch)
        return ((labels[:, 1:] if self.forward.head.shifts else labels) != IGNORE_INDEX).sum()


@torch.compiler.disable(reason="lengths are read on the host")
def _numbers(layout: DocumentLayout) -> Tensor:
    """int64 `[num_documents]`: each document's number among those with tokens of their own."""
    host = layout.to("cpu")
    lengths, padding = host.cu_seqlens.diff(), host.padding
    real = torch.ones_like(lengths, dtype=torch.bool) if padding is None else ~padding
    if bool((real & (lengths == 0)).any()):
        raise ValueError("a document without tokens has no row in the output of this head")
    return sent(real.long().cumsum(0) - 1, layout.device)


def real_rows(bucket: Bucket, device: torch.device) -> Tensor:
    """The attention_mask of a batch that has padding: int64 `[batch, length]`."""
    mask = torch.ones(bucket.batch, bucket.length, dtype=torch.long, device=device)
    put(mask, bucket.pads, 0)
    return mask


def put(rows: Tensor, places: Tensor | None, value: int) -> None:
    """Writes a number at places of the flattened rows, if there are any; as an index, it would be
    copied from the host and waited for."""
    if places is not None:
        rows.view(-1).index_fill_(0, places, value)


def in_rows(
    name: str, parts: list[tuple[Bucket, Tensor]], layout: DocumentLayout, rows: int
) -> Tensor:
    """Bucket rows `[batch, length, ...]` of the output `name` -> `[rows, tokens, ...]`.

    Of several streams `[batch, streams, length, ...]` or `[batch, streams * length, ...]` likewise.
    """
    shape = (rows, layout.total_tokens // rows)
    if name not in _STREAMS:
        return in_stream(name, parts, layout.total_tokens).unflatten(0, shape)
    flat = parts[0][1].ndim == 3
    apart = [
        (bucket, (value.unflatten(1, (-1, bucket.length)) if flat else value).movedim(1, 2))
        for bucket, value in parts
    ]
    whole = in_stream(name, apart, layout.total_tokens).unflatten(0, shape).movedim(2, 1)
    return whole.flatten(1, 2) if flat else whole


def in_stream(name: str, parts: list[tuple[Bucket, Tensor]], total_tokens: int) -> Tensor:
    """Bucket rows `[batch, length, ...]` of the output `name` -> `[total_tokens, ...]`.

    Tokens of no bucket get zeros.
    """
    first = parts[0][1]
    if first.ndim < 2 or first.shape[:2] != (parts[0][0].batch, parts[0][0].length):
        raise NotImplementedError(
            f"the output {name} of shape {list(first.shape)} has no rows per token to put back: do "
            "not ask for it in a packed forward"
        )
    rows, tokens = [], []
    for bucket, value in parts:
        real, of_tokens = bucket.real(value.device)
        rows.append(value.flatten(0, 1).index_select(0, real))
        tokens.append(of_tokens)
    token = torch.cat(tokens)
    source = token.new_full((total_tokens,), token.numel())
    source[token] = torch.arange(token.numel(), device=token.device)
    zeros = first.new_zeros(1, *first.shape[2:])
    return torch.cat([*rows, zeros]).index_select(0, source)
