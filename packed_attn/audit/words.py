"""What the verdicts of an audit are called in a matrix: a word, a letter, and what it means."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Word:
    """A verdict in print.

    Attributes:
        word: for a cell with room.
        letter: for a cell without.
        meaning: one sentence for the legend.
    """

    word: str
    letter: str
    meaning: str


WORDS: dict[str, Word] = {
    "isolated": Word(
        "exact", "E", "Every check holds: logits as alone, no bit of a neighbour, gradient 0."
    ),
    "isolated up to rounding": Word(
        "rounding",
        "r",
        "Exact but for the rounding of products that group tokens by content (experts); "
        "gradient 0.",
    ),
    "refused": Word("refused", "R", "It raises and says why: no result, no leak."),
    "not offered": Word("n/a", "–", "The architecture has no gradient checkpointing."),
    "leaks only NaN and Inf": Word(
        "NaN only", "N", "Exact on finite numbers; a NaN or Inf in one document spreads to others."
    ),
    "leaks": Word("leaks", "L", "Documents see each other, silently."),
    "error": Word("error", "!", "It fails with an exception that states no rule."),
}
# The convention's heading, and what the batch carries.
COLUMNS: dict[str, tuple[str, str]] = {
    "packed batch": ("collator", "everything that PackedCollator emits"),
    "position_ids, no cache": ("positions", "position_ids, use_cache=False"),
    "position_ids": ("+ cache", "position_ids, use_cache at its default"),
    "position_ids and a mask of ones": ("+ ones", "position_ids and an attention_mask of ones"),
    "cu_seq_lens": (
        "cu_seq_lens",
        "position_ids and the flash arguments, use_cache=False",
    ),
    "cu_seq_lens and seq_idx": (
        "seq_idx",
        "the flash arguments and seq_idx, as TRL emits",
    ),
    "segment mask": ("segments", "an integer attention_mask, 1 1 2 2 2"),
    "two rows": ("two rows", "position_ids of two packed rows, use_cache=False"),
    "padded tail": ("tail", "position_ids, and a mask that hides padding behind each row"),
    "train mode": ("train", "position_ids in train mode, dropout set to 0"),
    "checkpointing": ("checkpoint", "position_ids in train mode with gradient checkpointing"),
    "no boundaries": ("nothing", "no boundaries at all"),
}
