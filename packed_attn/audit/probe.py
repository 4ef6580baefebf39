"""The gradient check by itself: one forward, a few backwards, on a live model and batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from packed_attn.audit.conventions import CONVENTIONS, AuditBatch
from packed_attn.audit.gradients import gradients_by_document, largest, reached
from packed_attn.audit.modes import as_it_is, mode
from packed_attn.audit.subject import LENGTHS, Subject, replaced, takes_targets
from packed_attn.audit.trace import Trace, first_parting
from packed_attn.host_values import is_padding
from packed_attn.layout import DocumentLayout

# Documents of a live batch whose outputs are differentiated: each costs a backward.
PROBED = 3


class OneDocument(ValueError):
    """A batch without a second document that the first could reach."""


@dataclass(frozen=True)
class Leak:
    """One document's outputs depend on another document.

    Attributes:
        document: index in the batch of the document whose outputs do.
        gradient: the largest gradient in another document's embeddings, relative to the largest
            of a document in its own.
        module: path of the first module whose inputs for a document were clean and whose outputs
            were not; None where no single one could be told.
        module_class: its class.
    """

    document: int
    gradient: float
    module: str | None
    module_class: str | None

    def __str__(self) -> str:
        where = "" if self.module is None else f"; first in {self.module} ({self.module_class})"
        return (
            f"the outputs of document {self.document} have a gradient of {self.gradient:.1e} in "
            f"another document's embeddings, relative to the largest in its own{where}"
        )


def leaks_between_documents(
    model: nn.Module,
    batch: Mapping[str, Any] | None = None,
    *,
    convention: str | None = None,
    lengths: Sequence[int] = LENGTHS,
    seed: int = 0,
) -> Leak | None:
    """The worst dependence of one document on another, or None where there is none.

    A dependence without a gradient (detached statistics, ranks, state kept from call to call) is
    not seen here: `audit` compares outputs too.

    Costs one forward and a backward a document (at most `PROBED` of a given batch); modules are
    watched, in more forwards, only where something leaks. Parameters get no gradient and the model
    is left as it was.

    Args:
        model: any model that `audit` takes.
        batch: a live packed batch, as the model gets it in training: the model runs on it in its
            own mode, with random tokens in place of its input_ids (tokens that the config names,
            such as padding and images, stay). None makes a small batch and runs it in evaluation
            mode.
        convention: of the small batch; as in `audit`.
        lengths, seed: of the small batch.

    Raises:
        ValueError: as `audit`; or a batch without input_ids or boundaries.
        OneDocument: a ValueError too: a batch without two documents, on any of the ranks where they
            hold the model together (FSDP, ZeRO-3).
    """
    if batch is not None:
        subject, live = _live(model, batch, seed)
        with as_it_is(subject.model), subject.hooked():
            return _worst(subject, live)
    subject = Subject(model, lengths, seed)
    if convention is None:
        convention = "packed batch" if subject.patched else "position_ids"
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {list(CONVENTIONS)}, got {convention!r}")
    with mode(subject.model, training=False, checkpointing=False), subject.hooked():
        return _worst(subject, subject.batch(subject.documents, CONVENTIONS[convention]))


def _worst(subject: Subject, batch: AuditBatch) -> Leak | None:
    from packed_attn_patches.shards import largest_of_ranks

    # The last pool of a forest stands for all that is on no other's path, shared prefixes too.
    which = range(len(batch.places) - 1) if batch.layout.is_forest else None
    found = gradients_by_document(subject, batch, which, backwards=len(batch.places))
    scale = reached(subject, [own for own, _ in found])
    figures = [largest(others) / scale for _, others in found]
    index = max(range(len(figures)), key=figures.__getitem__)
    if largest_of_ranks(subject.model, figures[index]) == 0:
        return None
    path, kind = _named(_first_module(subject, batch, index))
    if figures[index] == 0:
        return None  # another rank has the leak, and could not have looked for it alone
    return Leak(batch.places[index], figures[index], path, kind)


def _first_module(subject: Subject, batch: AuditBatch, index: int) -> str | None:
    """Where document `index` first takes up other tokens in all other documents."""
    clean = _trace(subject, batch)
    a, b = batch.spans[index]
    inside = torch.zeros(batch.rows * batch.tokens, dtype=torch.bool)
    inside[a:b] = True
    names = [n for n in ("input_ids", "decoder_input_ids") if n in batch.kwargs]
    changed = {name: _others_replaced(subject, batch.kwargs[name], index) for name in names}
    kwargs = {**batch.kwargs, **changed}
    return first_parting(clean, _trace(subject, replace(batch, kwargs=kwargs)), inside)


def _others_replaced(subject: Subject, ids: Tensor, index: int) -> Tensor:
    """Token ids with others in all documents but one."""
    tokens = ids.flatten().clone()
    for other, pool in enumerate(subject.pools):
        if other != index:
            places = torch.isin(tokens, pool)
            tokens[places] = replaced(tokens[places], pool, subject.seed + 1)
    return tokens.view_as(ids)


def _trace(subject: Subject, batch: AuditBatch) -> Trace:
    with Trace(subject.model, batch.rows, batch.tokens) as trace:
        subject.run(batch.kwargs)
    return trace


def _named(name: str | None) -> tuple[str | None, str | None]:
    if name is None:
        return None, None
    path, _, kind = name.rpartition(" (")
    return path, kind.rstrip(")")


def _live(model: nn.Module, batch: Mapping[str, Any], seed: int) -> tuple[Subject, AuditBatch]:
    """A given batch with tokens by which its documents can be told."""
    if batch.get("input_ids") is None:
        raise ValueError(f"the batch needs input_ids, it has {sorted(batch)}")
    given = [batch, _target(batch)] if takes_targets(model) else [batch]
    layouts = [_layout(stream) for stream in given]
    if layouts[0].is_share:
        raise ValueError(
            "the batch is a share of a pack (context_parallel), whose documents are in pieces on "
            "several ranks: give the whole batch to a model on one process"
        )
    real = [_real(layout) for layout in layouts]
    if layouts[0].is_forest:
        probed = [_probed_leaves(layouts[0], real[0])]
    else:
        chosen = _spread(range(len(real[0])))
        probed = [[documents[i] for i in chosen] for documents in real]
    number = _number(model, len(probed[0]))
    probed = [[*documents[: number - 1], documents[-1]] for documents in probed]
    subject = Subject(model, [layouts[-1].lengths[d] for d in probed[-1]], seed)
    kwargs = {k: v for k, v in batch.items() if k not in ("labels", "shift_labels")}
    streams = []
    for stream, layout, places in zip(given, layouts, probed):
        ids = _substituted(subject, stream["input_ids"], layout, places)
        rows, tokens = ids.shape
        streams.append(AuditBatch({"input_ids": ids}, layout, rows, tokens, tuple(places)))
    source, *targets = streams
    kwargs["input_ids"] = source.kwargs["input_ids"]
    if targets:
        kwargs["decoder_input_ids"] = targets[0].kwargs["input_ids"]
    return subject, replace(source, kwargs=kwargs, target=targets[0] if targets else None)


def _number(model: nn.Module, documents: int) -> int:
    """How many of a batch's documents are probed: as many as of the batches of other ranks, where
    these have a part in every forward and backward."""
    from packed_attn_patches.shards import largest_of_ranks

    number = -int(largest_of_ranks(model, -documents))
    if number < 2:
        raise OneDocument(
            f"the batch needs two documents to tell apart, it has {documents}"
            + ("" if documents < 2 else ", and that of another rank, which runs with it, has fewer")
        )
    return number


def _target(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's stream of a batch, under the names of any other."""
    target = {k.removeprefix("decoder_"): v for k, v in batch.items() if k.startswith("decoder_")}
    if target.get("input_ids") is None:
        target["input_ids"] = batch["labels"]
    return target


def _real(layout: DocumentLayout) -> list[int]:
    """The documents with tokens that are not padding."""
    return [d for d, n in enumerate(layout.lengths) if n and not is_padding(layout, d)]


def _spread(documents: Sequence[int]) -> list[int]:
    """At most PROBED of them, the first and the last included."""
    step = max(1, (len(documents) - 1) // (PROBED - 1))
    return [*documents[:-1:step][: PROBED - 1], *documents[-1:]]


def _probed_leaves(layout: DocumentLayout, real: Sequence[int]) -> list[int]:
    """Documents that nothing continues, each of another tree, and one more that is not probed.

    Paths of different trees have nothing in common, so each has a pool of its own.
    """
    parents = [layout.parent(d) for d in range(layout.num_documents)]
    leaves = [d for d in real if d not in parents]
    of_tree = {layout.path(d)[0]: d for d in reversed(leaves)}
    probed = sorted(of_tree.values())[: PROBED - 1]
    rest = [d for d in leaves if d not in probed]
    return [*probed, rest[-1]] if rest else probed


def _substituted(
    subject: Subject, ids: Tensor, layout: DocumentLayout, probed: Sequence[int]
) -> Tensor:
    """`ids` with each probed document in tokens of its own pool, and all others in the last.

    What a document continues is its own.
    """
    tokens = ids.flatten().clone()
    plain = torch.isin(tokens, torch.cat(subject.pools).to(tokens.device))
    last = len(probed) - 1 if layout.is_forest else len(probed)
    pool_of = {p: subject.pools[i] for i, d in enumerate(probed[:last]) for p in layout.path(d)}
    generator = torch.Generator().manual_seed(subject.seed)
    for d, (start, length) in enumerate(zip(layout.starts, layout.lengths)):
        pool = pool_of.get(d, subject.pools[-1])
        drawn = pool[torch.randint(len(pool), (length,), generator=generator).to(pool.device)]
        part = slice(start, start + length)
        # Labels that are no tokens (-100) may stand where a decoder takes tokens.
        open_places = plain[part] | (tokens[part] < 0)
        tokens[part] = torch.where(open_places, drawn.to(tokens.device), tokens[part])
    return tokens.view_as(ids)


def _layout(batch: Mapping[str, Any]) -> DocumentLayout:
    """The documents of a live batch, read as a patched model reads them."""
    from packed_attn_patches.boundaries import BatchShape, packed_layout

    shape = BatchShape.of(batch)
    layout = None if shape is None else packed_layout(shape, batch)
    if layout is None:
        raise ValueError(
            f"the batch tells no documents apart, it has {sorted(batch)}: give layout, "
            "cu_seq_lens_q, seq_idx, a segment mask or position_ids that restart"
        )
    return layout.to("cpu")
