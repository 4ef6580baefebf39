"""The prefixes that documents of a source share: found in their tokens, or named by its columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packed_attn.packing.forest import NOTHING, ForestPlan, bits, plan_flat, plan_prompts
from packed_attn.packing.sources import IGNORED_LABEL, LABEL_COLUMNS, MASK_COLUMNS, Source

# Tokens that sharing a prefix must save: every piece costs edge tiles of its own.
MIN_SHARED = 16


class SharedPrefixes:
    """Plans the forest of a source's documents, for `pack_lengths(share=)`.

    Documents share tokens as far as their labels (or masks) agree too, so that a token is learned
    by all documents that share it or by none.

    Args:
        source: the documents.
        min_shared: tokens that sharing a prefix must save.
        prompt_ids, prompt_lengths: int64 `[num_documents]`, as in `plan_prompts`; None finds what
            documents share in their tokens.

    Raises (from a call):
        ValueError: documents with one prompt id that begin with other tokens or labels.
    """

    def __init__(
        self,
        source: Source,
        min_shared: int = MIN_SHARED,
        prompt_ids: NDArray[np.int64] | None = None,
        prompt_lengths: NDArray[np.int64] | None = None,
    ) -> None:
        require_shareable(source.columns)
        self._source, self._min_shared = source, min_shared
        self._prompts = prompt_ids, prompt_lengths
        self._latest: tuple[NDArray[np.int64], ForestPlan] | None = None

    def __call__(self, lengths: NDArray[np.int64]) -> ForestPlan:
        """The forest of the first `lengths` tokens of each document, made once for all epochs."""
        if self._latest is None or not np.array_equal(self._latest[0], lengths):
            self._latest = lengths, self._plan(lengths)
        return self._latest[1]

    def _plan(self, lengths: NDArray[np.int64]) -> ForestPlan:
        tokens, second, starts = flat_columns(self._source)
        ids, prompts = self._prompts
        if ids is None or prompts is None:
            return plan_flat(tokens, starts, lengths, self._min_shared, second)
        plan = plan_prompts(lengths, ids, prompts, min_shared=self._min_shared)
        _check_prompts(plan, tokens, second, starts)
        return plan


def require_shareable(names: Iterable[str]) -> None:
    """Refuses columns of which documents that share tokens could have unlike values.

    Raises:
        ValueError: a column that is neither tokens nor labels.
    """
    for name in names:
        if name not in ("input_ids", *LABEL_COLUMNS):
            raise ValueError(
                f"documents that share prefixes must agree in all columns, and {name!r} is not "
                "compared: remove the column, or do not share"
            )


def flat_columns(
    source: Source,
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
    """Tokens of all documents, what must agree beside them (or nothing), and where each begins."""
    columns = source.columns
    tokens, starts = columns["input_ids"].flat()
    names = ["labels"] if "labels" in columns else [n for n in MASK_COLUMNS if n in columns]
    parts = [columns[name].flat() for name in names]
    if not all(np.array_equal(starts, begins) for _, begins in parts):
        tokens, starts = columns["input_ids"].flat(end_to_end=True)
        parts = [columns[name].flat(end_to_end=True) for name in names]
    second = agreeing(dict(zip(names, (values for values, _ in parts))))
    return bits(tokens), second, starts + source.starts


def agreeing(columns: dict[str, NDArray[Any]]) -> NDArray[np.int32]:
    """What must agree where tokens are shared: labels, else whether the masks keep a token."""
    if "labels" in columns:
        return bits(columns["labels"])
    masks = [columns[name] != 0 for name in MASK_COLUMNS if name in columns]
    return bits(np.logical_and.reduce(masks)) if masks else NOTHING


def learned_labels(
    columns: dict[str, NDArray[Any]], integer: type[np.signedinteger] = np.int64
) -> NDArray[np.signedinteger]:
    """The label of each token, -100 where a mask hides it: `integer`, or wider as the ids are."""
    given = columns.get("labels", columns["input_ids"])
    kind = np.promote_types(given.dtype, integer)  # of uint64 a float
    labels = given.astype(kind if kind.kind == "i" else np.int64)
    if "labels" in columns:
        return labels
    kept = agreeing(columns)
    if kept.size:
        labels[kept == 0] = IGNORED_LABEL
    return labels


def _check_prompts(
    plan: ForestPlan,
    tokens: NDArray[np.int32],
    second: NDArray[np.int32],
    starts: NDArray[np.int64],
) -> None:
    """Compares the beginning of each document with the piece that stands for it."""
    from packed_attn.packing import tries

    lists = np.flatnonzero(plan.ends >= 0)
    end = plan.ends[lists]
    prompt = np.where(plan.parents[end] < 0, end, plan.parents[end])
    others = np.arange(plan.ends.size)
    others[lists] = plan.lists[prompt]
    shared = np.zeros_like(others)
    shared[lists] = np.where(others[lists] == lists, 0, plan.lengths[prompt])
    at = tries.first_difference(tokens, second, starts, others, shared)
    if at >= 0:
        raise ValueError(
            f"prompt_ids must be of documents that begin with the same {shared[at]} tokens and "
            f"labels, but documents {others[at]} and {at} differ there"
        )
