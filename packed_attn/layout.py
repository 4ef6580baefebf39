"""The one type that everything shares: where the documents of a packed batch begin, end and look.

A *document* is one example's tokens, the unit of isolation; a *pack* is documents end to end. A
`DocumentLayout` says how a stream of `total_tokens` tokens divides into documents. `visibility`
turns it into the one mask rule that every kernel follows:

    query i sees key j   iff   key_start[i] <= j < key_stop[i]
                         and   query_start[j] <= i < query_stop[j]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from packed_attn.derived import count_up, map_tensors, own_facts, prefix_key, sent
from packed_attn.host_values import (
    check_padding_stands_alone,
    host_padding,
    host_parents,
    host_prefix,
    whole_numbers,
)
from packed_attn.lasting import lasting
from packed_attn.runs import integer_rows, starts_of_counts, starts_of_runs
from packed_attn.trees import Forest, ForestTensors
from packed_attn.visibility import (
    Visibility,
    build_visibility,
    check_window,
    is_whole,
    prefix_tensor,
)

INT32_MAX = 2**31 - 1

# Masks and prefixes that a layout keeps: more kinds than a model has, and a bound where every
# call brings a new one.
KEPT_MASKS = 16


class DocumentLayout:
    """How `total_tokens` packed tokens divide into documents.

    Build one with `from_lengths`, `from_cu_seqlens`, `from_position_ids`, `from_document_ids` or
    `from_attention_mask`; the constructor itself checks nothing. A batch `[B, T]` of packed rows
    is one stream of `B * T` tokens in which documents end at row ends.

    Attributes:
        cu_seqlens: int32 `[num_documents + 1]`, starts at 0, never decreases (equal neighbours are
            an empty document), ends at `total_tokens`.
        total_tokens: tokens in the stream.
        parents: int32 `[num_documents]` or None. -1 is a root; `parents[d] = p` means that
            document d continues p's tokens (a shared prompt packed once, its answers after it).
            Documents stand in depth-first order. None is a forest of roots.
        padding: bool `[num_documents]` or None. Padding sees nothing and is seen by nobody.

    The picture for lengths (2, 3), causal, rows are queries:

        A A . . .      A1 sees A1
        A A . . .      A2 sees A1 A2
        . . B . .      B1 sees B1
        . . B B .
        . . B B B
    """

    cu_seqlens: Tensor
    total_tokens: int
    parents: Tensor | None
    padding: Tensor | None
    _derived: dict[Any, Any]  # each made once: the only mutable part

    def __init__(
        self,
        cu_seqlens: Tensor,
        total_tokens: int,
        parents: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> None:
        # No dataclass: FSDP builds those anew for every layer, with all that they hold.
        put = object.__setattr__  # which torch.compile follows, as it does not vars(self)
        put(self, "cu_seqlens", cu_seqlens)
        put(self, "total_tokens", total_tokens)
        put(self, "parents", parents)
        put(self, "padding", padding)
        put(self, "_derived", {})

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a layout is not changed: {name} is as it was made")

    @staticmethod
    def from_lengths(
        lengths: Sequence[int] | Tensor,
        *,
        parents: Sequence[int] | Tensor | None = None,
        padding: Sequence[bool] | Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> DocumentLayout:
        """Documents of the given lengths, end to end.

        Args:
            lengths: tokens of each document; 0 is an empty document.
            parents: for a forest, the document that each one continues, -1 for a root.
            padding: which documents are padding.
            device: where the tensors live; the CPU by default, or the device of `lengths`.

        Raises:
            ValueError: a negative or non-integer length, more than 2^31 - 1 tokens, parents that
                are not a depth-first forest, or padding that has a parent or a child.
        """
        if isinstance(lengths, Tensor):
            device = lengths.device if device is None else device
            if lengths.dtype.is_floating_point or lengths.dtype == torch.bool:
                raise ValueError(f"lengths must be integers, got {lengths.dtype}")
        host = tuple(whole_numbers(lengths, "lengths"))
        if min(host, default=0) < 0:
            d = next(d for d, n in enumerate(host) if n < 0)
            raise ValueError(f"lengths must not be negative, but lengths[{d}] is {host[d]}")
        total = sum(host)
        if total > INT32_MAX:
            raise ValueError(
                f"a layout holds at most {INT32_MAX} tokens, but lengths add to {total}"
            )
        # numpy, once a batch in the collator: some ten times faster than torch at this size.
        cu_seqlens = np.zeros(len(host) + 1, np.int32)
        np.cumsum(host, dtype=np.int32, out=cu_seqlens[1:])
        links = host_parents(parents, len(host))
        flags = host_padding(padding, len(host))
        layout = lasting(
            lambda: DocumentLayout(
                torch.from_numpy(cu_seqlens),
                total,
                None if links is None else torch.tensor(links, dtype=torch.int32),
                None if flags is None else torch.from_numpy(np.array(flags, bool)),
            )
        )
        layout._derived["lengths"] = host
        if links is not None:
            layout._derived["forest"] = Forest.build(host, links)
            check_padding_stands_alone(links, flags)
        return layout.to(device) if device is not None else layout

    @staticmethod
    def from_cu_seqlens(
        cu_seqlens: Tensor | Sequence[int],
        *,
        total_tokens: int | None = None,
        parents: Sequence[int] | Tensor | None = None,
        padding: Sequence[bool] | Tensor | None = None,
    ) -> DocumentLayout:
        """Documents between consecutive entries of `cu_seqlens`, as in flash-attn's varlen calls.

        Args:
            cu_seqlens: int32 or int64 `[num_documents + 1]`.
            total_tokens: checked against the last entry when given.
            parents, padding: as in `from_lengths`.

        Raises:
            ValueError: not 1-D, not integers, not starting at 0, decreasing, or not ending at
                `total_tokens`.
        """
        cu = torch.as_tensor(cu_seqlens)
        if cu.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"cu_seqlens must be int32 or int64, got {cu.dtype}")
        if cu.ndim != 1 or cu.numel() == 0:
            raise ValueError(
                f"cu_seqlens must have shape [num_documents + 1], got {list(cu.shape)}"
            )
        host = cu.tolist()
        if host[0] != 0:
            raise ValueError(f"cu_seqlens must start at 0, got {host[0]}")
        for d in range(len(host) - 1):
            if host[d + 1] < host[d]:
                raise ValueError(
                    "cu_seqlens must not decrease, "
                    f"but cu_seqlens[{d}] is {host[d]} and cu_seqlens[{d + 1}] is {host[d + 1]}"
                )
        if total_tokens is not None and host[-1] != total_tokens:
            raise ValueError(
                f"cu_seqlens must end at the number of tokens {total_tokens}, "
                f"but it ends at {host[-1]}"
            )
        lengths = [stop - start for start, stop in pairwise(host)]
        return DocumentLayout.from_lengths(
            lengths, parents=parents, padding=padding, device=cu.device
        )

    @staticmethod
    def from_position_ids(position_ids: Tensor) -> DocumentLayout:
        """Documents begin where positions restart at 0, and at every row's start.

        Args:
            position_ids: integer `[T]` or `[B, T]`; every document counts 0, 1, 2, ...

        Raises:
            ValueError: a negative position, or a document that does not count up from 0: a jump
                could be a boundary or not, and a guess could leak.
        """
        starts = starts_of_counts(integer_rows(position_ids, "position_ids"))
        return _from_starts(starts.flatten(), None)

    @staticmethod
    def from_document_ids(document_ids: Tensor) -> DocumentLayout:
        """Documents are runs of equal ids (mamba's `seq_idx`); negative ids are padding.

        Args:
            document_ids: integer `[T]` or `[B, T]`.

        Raises:
            ValueError: an id that comes back in a row after another one: its tokens would be one
                document in two places.
        """
        return _from_runs(integer_rows(document_ids, "document_ids"), "document_ids")

    @staticmethod
    def from_attention_mask(attention_mask: Tensor) -> DocumentLayout:
        """Documents are runs of equal non-zero values; zeros are padding.

        Serves the 0/1 mask of a padded batch (one document a row) and integer segment masks
        (1, 1, 2, 2, 2, 0) alike.

        Args:
            attention_mask: bool or integer `[T]` or `[B, T]`.

        Raises:
            ValueError: a negative value, or a value that comes back after another one.
        """
        is_bool = attention_mask.dtype == torch.bool
        rows = integer_rows(attention_mask.long() if is_bool else attention_mask, "attention_mask")
        if (rows < 0).any():
            raise ValueError(f"attention_mask must not be negative, got {int(rows.min())}")
        return _from_runs(torch.where(rows == 0, -1, rows), "attention_mask")

    @property
    def num_documents(self) -> int:
        """Documents in the layout, empty ones and padding counted."""
        return self.cu_seqlens.numel() - 1

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.cu_seqlens.device

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document, on the host. Free from the collator, else read once."""
        if "lengths" not in self._derived:
            cu = self.cu_seqlens.tolist()
            self._derived["lengths"] = tuple(stop - start for start, stop in pairwise(cu))
        return self._derived["lengths"]

    @property
    def starts(self) -> tuple[int, ...]:
        """First token of each document, on the host."""
        if "starts" not in self._derived:
            starts, at = [], 0
            for n in self.lengths:
                starts.append(at)
                at += n
            self._derived["starts"] = tuple(starts)
        return self._derived["starts"]

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths, default=0)

    @property
    def longest_path(self) -> int:
        """Tokens of the longest document with all that it continues."""
        offsets = self._forest().path_offset if self.is_forest else (0,) * self.num_documents
        return max((offset + n for offset, n in zip(offsets, self.lengths)), default=0)

    @property
    def is_forest(self) -> bool:
        """Whether some document continues another."""
        return self.parents is not None

    @property
    def is_share(self) -> bool:
        """Whether it is one rank's share of a pack (`context_parallel`): pieces of documents."""
        return False

    @property
    def document_ids(self) -> Tensor:
        """int32 `[total_tokens]`: the document of each token (mamba's `seq_idx`)."""
        return self._once("document_ids", self._document_ids)

    @property
    def position_ids(self) -> Tensor:
        """int64 `[total_tokens]`: the place of each token in its document, from 0.

        In a forest a child counts on from its parent's last token.
        """
        return self._once("position_ids", self._position_ids)

    @property
    def lengths_alone(self) -> Tensor:
        """int64 `[total_tokens]`: of each token, the tokens of its document as it would be alone;
        in a forest, with what it continues and without what continues it."""
        return self._once("lengths_alone", self._lengths_alone)

    @property
    def document_starts(self) -> Tensor:
        """bool `[total_tokens]`: whether a token is the first of its document."""
        return self._once("document_starts", self._document_starts)

    @property
    def document_ends(self) -> Tensor:
        """bool `[total_tokens]`: whether a token is the last of its document."""
        return self._once("document_ends", self._document_ends)

    @property
    def padding_tokens(self) -> Tensor | None:
        """bool `[total_tokens]`, or None where nothing is padding."""
        if self.padding is None:
            return None
        padding = self.padding
        return self._once("padding_tokens", lambda: self.per_token(padding))

    @property
    def padding_flags(self) -> Tensor:
        """`padding_tokens`, bool `[total_tokens]`, of a layout without padding too: a compiler that
        found it in one batch and not in the next would compile anew."""
        return self._once("padding_flags", self._padding_flags)

    def path(self, document: int) -> tuple[int, ...]:
        """The documents on the way from the root to `document`, which is the last."""
        return self._forest().path(document) if self.is_forest else (document,)

    def parent(self, document: int) -> int:
        """The document that `document` continues, -1 for a root; read on the host."""
        return self._forest().parents[document] if self.is_forest else -1

    def per_token(self, per_document: Tensor) -> Tensor:
        """`[num_documents]` spread over the tokens: `[total_tokens]`; entries past are not read."""
        if self.num_documents == 0:
            return per_document.new_zeros(self.total_tokens)
        if self._is_known_on_host() and not per_document.dtype.is_floating_point:
            # In the collator, once a batch: many times faster than one look-up a token.
            known = per_document.numpy()[: self.num_documents]
            return torch.from_numpy(np.repeat(known, self.lengths))
        return per_document[self.document_ids.long()]

    def visibility(
        self,
        causal: bool = True,
        window_size: tuple[int, int] = (-1, -1),
        *,
        chunk_size: int | None = None,
        prefix_lengths: Sequence[int] | Tensor | None = None,
        key_layout: DocumentLayout | None = None,
    ) -> Visibility:
        """The mask as intervals, made once per kind and shared by all layers.

        Args:
            causal: a query sees no later position.
            window_size: (left, right) positions a query sees besides its own, inclusive; -1 is
                unlimited (flash-attn's meaning).
            chunk_size: a query sees only its own chunk of its document (llama4).
            prefix_lengths: `[num_documents]`; the first tokens of each document that every token
                of that document sees (prefix-LM).
            key_layout: cross attention: document d's queries see document d's keys, bottom-right
                aligned. None means self attention.

        Raises:
            ValueError: a window below -1, a chunk below 1, or layouts that do not match.
            NotImplementedError: prefixes or cross attention of a forest.
        """
        # No document is longer than INT32_MAX, and position + INT32_MAX cannot overflow.
        left, right = (min(side, INT32_MAX) for side in check_window(window_size))
        if chunk_size is not None:
            if not is_whole(chunk_size) or chunk_size < 1:
                raise ValueError(f"chunk_size must be an integer of at least 1, got {chunk_size!r}")
            chunk_size = min(chunk_size, INT32_MAX)
        if causal:
            right = 0
        prefix = host_prefix(prefix_lengths)

        def make() -> Visibility:
            return build_visibility(self, key_layout, left, right, chunk_size, prefix)

        if torch.compiler.is_compiling() and (key_layout is not None or prefix is not None):
            return make()  # a compiler looks up neither a layout nor a caller's tensor
        # The key keeps key_layout itself alive, so an id is never reused while it is cached.
        key = ("visibility", left, right, chunk_size, key_layout, prefix_key(prefix))
        return self._one_of_few(key, make)

    def prefix(self, prefix_lengths: Sequence[int] | Tensor | None) -> Tensor | None:
        """`prefix_lengths` as int64 `[num_documents]` on the layout's device, made once; or None.

        Raises:
            ValueError: not one integer of at least 0 for each document.
        """
        prefix = host_prefix(prefix_lengths)
        if prefix is None:
            return None
        if torch.compiler.is_compiling():
            return prefix_tensor(prefix, self)
        return self._one_of_few(("prefix", prefix_key(prefix)), lambda: prefix_tensor(prefix, self))

    def prepare(self, kinds: Iterable[Mapping[str, Any]] = ({},)) -> DocumentLayout:
        """Makes what layers read, once: before a compiled region, or in the collator.

        A region compiled after it reads tensors alone, whose shapes depend on the numbers of
        tokens and of documents: other boundaries compile nothing new. What is made moves with
        `to`, `pin_memory` and pickling.

        Args:
            kinds: the masks of the model's layers, as keyword arguments of `visibility`.

        Returns:
            the layout itself.
        """
        _ = self.document_ids, self.position_ids, self.padding_flags
        for kind in kinds:
            self.visibility(**kind)
            self.prefix(kind.get("prefix_lengths"))
        return self

    def traced(self) -> DocumentLayout:
        """The same documents as a compiler should see them: always with `padding`, and nothing that
        is known on the host, so that other boundaries compile nothing new. A forest is itself.

        Reads `padding_flags` where they are made (`PackedCollator`, `prepare`), and then no tensor
        but those of one entry a token and `cu_seqlens`.
        """
        if self.is_forest:
            return self
        if self.total_tokens and "padding_flags" in self._derived:
            # An empty document takes a neighbour's flag, and has no token that could tell.
            begin = self.cu_seqlens[:-1].long().clamp(max=self.total_tokens - 1)
            padding = self._derived["padding_flags"][begin]
        elif self.padding is not None:
            padding = self.padding
        else:
            padding = torch.zeros_like(self.cu_seqlens[:-1], dtype=torch.bool)
        return DocumentLayout(self.cu_seqlens, self.total_tokens, None, padding)

    def to(
        self, device: torch.device | str | int | None, non_blocking: bool = False, **_: Any
    ) -> DocumentLayout:
        """The same layout on `device`: itself when it is there, one shared copy otherwise.

        None is where it is, as with tensors: accelerate's hook of an offloaded model says so.
        """
        if device is None:
            return self
        # "cuda" means the current one, and "cpu:0" the CPU: ask where a tensor would land.
        device = torch.empty(0, device=device).device
        if device == self.device:
            return self
        return self._once(("to", device), lambda: self._moved(device, non_blocking))

    def pin_memory(self) -> DocumentLayout:
        """A copy in page-locked memory, for asynchronous transfers (DataLoader calls this)."""
        return self._mapped(lambda t: t.pin_memory())

    def __getstate__(self) -> dict[str, Any]:
        # What a collator's worker has prepared arrives with the batch; copies elsewhere do not.
        return {
            "cu_seqlens": self.cu_seqlens,
            "total_tokens": self.total_tokens,
            "parents": self.parents,
            "padding": self.padding,
            "_derived": dict(own_facts(self._derived, DocumentLayout)),
        }

    def __repr__(self) -> str:
        kinds = [
            f"{self.num_documents} documents",
            f"{self.total_tokens} tokens",
            *(["forest"] if self.is_forest else []),
            *(["padding"] if self.padding is not None else []),
            str(self.device),
        ]
        return f"DocumentLayout({', '.join(kinds)})"

    def _once(self, key: Any, make: Any) -> Any:
        if key in self._derived:
            return self._derived[key]
        made = lasting(make)
        # A compiler that sees the layout change compiles anew for other numbers of documents. It
        # makes this once in a graph all the same: equal computations are one.
        if not torch.compiler.is_compiling():
            self._derived[key] = made
        return made

    def _one_of_few(self, key: tuple[Any, ...], make: Any) -> Any:
        """`_once` for what callers make keys of: the oldest of its kind makes room."""
        if key not in self._derived and not torch.compiler.is_compiling():
            kept = [k for k in self._derived if isinstance(k, tuple) and k[0] == key[0]]
            if len(kept) >= KEPT_MASKS:
                del self._derived[kept[0]]
        return self._once(key, make)

    def _is_known_on_host(self) -> bool:
        """Whether the layout lives on the CPU and its lengths have been read; a compiler that read
        them would compile anew for every batch."""
        if torch.compiler.is_compiling():
            return False
        return self.device.type == "cpu" and "lengths" in self._derived

    def _padding_flags(self) -> Tensor:
        flags = self.padding_tokens
        if flags is not None:
            return flags
        if self.device.type == "cpu":
            # numpy asks the system for zeros, where torch writes them.
            return torch.from_numpy(np.zeros(self.total_tokens, dtype=bool))
        return torch.zeros(self.total_tokens, dtype=torch.bool, device=self.device)

    def _document_ids(self) -> Tensor:
        if self._is_known_on_host():
            number = np.arange(self.num_documents, dtype=np.int32)
            return torch.from_numpy(np.repeat(number, self.lengths))
        token = torch.arange(self.total_tokens, dtype=torch.int32, device=self.device)
        # The number of documents that have begun by this token; empty documents drop out.
        return torch.searchsorted(self.cu_seqlens, token, right=True, out_int32=True) - 1

    def _position_ids(self) -> Tensor:
        if self._is_known_on_host() and not self.is_forest:
            return torch.from_numpy(count_up(self.lengths, self.total_tokens))
        token = torch.arange(self.total_tokens, device=self.device)
        place = token - self.per_token(self.cu_seqlens.long())
        if self.is_forest:
            place = place + self.per_token(self.forest_tensors().path_offset)
        return place

    def _lengths_alone(self) -> Tensor:
        lengths = self.cu_seqlens.long().diff()
        if self.is_forest:
            lengths = lengths + self.forest_tensors().path_offset
        return self.per_token(lengths)

    def _document_starts(self) -> Tensor:
        ids = self.document_ids
        starts = torch.ones_like(ids, dtype=torch.bool)
        starts[1:] = ids[1:] != ids[:-1]
        return starts

    def _document_ends(self) -> Tensor:
        # The token before a document's first; the stream's last token ends its last document.
        return self.document_starts.roll(-1)

    def _forest(self) -> Forest:
        links = [] if self.parents is None else self.parents
        return self._once(
            "forest", lambda: Forest.build(self.lengths, whole_numbers(links, "parents"))
        )

    def forest_tensors(self) -> ForestTensors:
        """Per-document vectors of a forest, on the layout's device."""
        forest = self._forest()
        return self._once(
            "forest_tensors",
            lambda: ForestTensors(
                sent(torch.tensor(forest.path_offset, dtype=torch.int64), self.device),
                sent(torch.tensor(forest.subtree_stop, dtype=torch.int64), self.device),
                forest.depth,
            ),
        )

    def _mapped(self, function: Any) -> DocumentLayout:
        copy = DocumentLayout(
            function(self.cu_seqlens),
            self.total_tokens,
            None if self.parents is None else function(self.parents),
            None if self.padding is None else function(self.padding),
        )
        for key, value in own_facts(self._derived, DocumentLayout):
            copy._derived[key] = map_tensors(value, function)
        return copy

    def _moved(self, device: torch.device, non_blocking: bool) -> DocumentLayout:
        copy = self._mapped(lambda t: sent(t, device, non_blocking))
        copy._derived[("to", self.device)] = self
        return copy


def _from_starts(starts: Tensor, padding: Tensor | None) -> DocumentLayout:
    """Documents begin where `starts` (bool, flat) is true; `padding` (bool, flat) marks tokens."""
    first = starts.nonzero().flatten()
    cu = torch.cat([first, first.new_tensor([starts.numel()])])
    pad = None
    if padding is not None and bool(padding.any()):
        pad = padding[first]
    return DocumentLayout.from_lengths(cu.diff(), padding=pad, device=starts.device)


def _from_runs(rows: Tensor, name: str) -> DocumentLayout:
    """Documents are runs of equal values of `rows` `[B, T]`; negative ones are padding."""
    return _from_starts(starts_of_runs(rows, name).flatten(), (rows < 0).flatten())
