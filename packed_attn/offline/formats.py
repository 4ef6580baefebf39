"""What a record's columns mean, told as TRL's SFTTrainer tells it, and its tokens.

    input_ids               tokens already, with labels and masks if it has them
    prompt + completion     text or messages; the loss is on the completion (`completion_mask`)
    messages                a conversation; the loss is on the assistant's turns (`assistant_masks`)
    conversations           the same, of `from` and `value`, renamed as TRL does
    text                    text

Text gets the end-of-sequence token behind it, unless it ends with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from packed_attn.offline.chat import assistant_mask, render, tokens_and_starts
from packed_attn.packing.documents import DocumentReader
from packed_attn.packing.sources import WRITTEN_COLUMNS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Format = Literal["input_ids", "prompt_completion", "messages", "text"]
Columns = dict[str, NDArray[Any]]
KEPT = ("input_ids", "labels", "completion_mask", "assistant_masks", "attention_mask")


def detect_format(record: Any) -> Format:
    """What kind of documents a data set holds, by its first record.

    Raises:
        ValueError: a record that is no mapping, or whose columns are none of the known ones.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"a record must be an object with columns, got {type(record).__name__}")
    if record.get("input_ids") is not None:
        return "input_ids"
    if "prompt" in record and "completion" in record:
        return "prompt_completion"
    if "messages" in record or "conversations" in record:
        return "messages"
    if "text" in record:
        return "text"
    raise ValueError(
        f"the columns {', '.join(map(str, record)) or '(none)'} are none of TRL's: 'messages' (or "
        "'conversations'), 'prompt' with 'completion', 'text', or 'input_ids'; rename or join the "
        "columns first, such as instruction and input to prompt, output to completion"
    )


class Tokenize:
    """Records to columns of tokens.

    Args:
        kind: what the records are.
        tokenizer: for every kind but `input_ids`.
        names: columns that records of `input_ids` must have; None for those of the first one.
    """

    def __init__(
        self,
        kind: Format,
        tokenizer: PreTrainedTokenizerBase | None,
        names: tuple[str, ...] | None = None,
    ) -> None:
        if kind not in get_args(Format):
            raise ValueError(f"format must be one of {get_args(Format)}, got {kind!r}")
        if kind != "input_ids" and tokenizer is None:
            raise ValueError(
                f"tokenizer must be given for documents of {kind.replace('_', ' and ')}: "
                "only input_ids are tokens already"
            )
        self._kind = kind
        self._tokenizer: Any = tokenizer
        self._reader = DocumentReader(names)

    @property
    def names(self) -> tuple[str, ...] | None:
        """Columns that records of `input_ids` must have, once one was read."""
        return self._reader.names

    def __call__(self, record: Any) -> tuple[Columns, int]:
        """`input_ids` and what goes with it, `[tokens]` each, and how much padding was left out.

        Raises:
            ValueError: a record of another format, or one that cannot be tokenised; the reason.
        """
        kind = detect_format(record)
        if kind != self._kind:
            raise ValueError(
                f"must have the format of the first record, {self._kind}, but is {kind}"
            )
        if kind == "input_ids":
            names = (*KEPT, *WRITTEN_COLUMNS)  # the reader refuses those of packs
            kept = {name: record[name] for name in names if record.get(name) is not None}
            return self._reader.read("the record", kept)
        make = {"text": self._text, "messages": self._messages}.get(kind, self._prompt_completion)
        return make(record), 0

    def _text(self, record: Mapping[str, Any]) -> Columns:
        text = self._ended(_string(record, "text"))
        ids, _ = tokens_and_starts(self._tokenizer, text, special=True, need_starts=False)
        return {"input_ids": ids}

    def _prompt_completion(self, record: Mapping[str, Any]) -> Columns:
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            boundary, text, special = len(prompt), prompt + self._ended(completion), True
        else:
            before = _messages(record, "prompt")
            after = _messages(record, "completion")
            options = _template_options(record)
            start = render(self._tokenizer, before, options, generation=True)
            text = render(self._tokenizer, [*before, *after], options)
            if not text.startswith(start):
                raise ValueError(
                    "the chat template writes the prompt otherwise when a completion follows it, "
                    "so the completion has no exact beginning"
                )
            boundary, special = len(start), False
        ids, stops = tokens_and_starts(self._tokenizer, text, special=special)
        # A token that holds both the prompt's end and the completion's beginning is learned.
        return {"input_ids": ids, "completion_mask": (stops > boundary).astype(np.int8)}

    def _messages(self, record: Mapping[str, Any]) -> Columns:
        name = "messages" if "messages" in record else "conversations"
        messages = _messages(record, name)
        ids, mask = assistant_mask(self._tokenizer, messages, _template_options(record))
        return {"input_ids": ids, "assistant_masks": mask}

    def _ended(self, text: str) -> str:
        end = getattr(self._tokenizer, "eos_token", None)
        return text if end is None or text.endswith(end) else text + end


def _string(record: Mapping[str, Any], name: str) -> str:
    if not isinstance(record[name], str):
        raise ValueError(f"{name} must be text, got {type(record[name]).__name__}")
    return record[name]


def _messages(record: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The messages of a column, of `role` and `content`."""
    messages = record[name]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name} must be a list of messages, got {messages!r:.60}")
    renamed = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise ValueError(
                f"{name} must hold messages with role and content, got {message!r:.60}"
            )
        # Parquet gives every message every key: those that this one lacks are null.
        message = {key: value for key, value in message.items() if value is not None}
        for old, new in (("from", "role"), ("value", "content")):
            if old in message:
                message[new] = message.pop(old)
        if "role" not in message:
            raise ValueError(f"{name} must hold messages with a role, got {message!r:.60}")
        renamed.append(message)
    return renamed


def _template_options(record: Mapping[str, Any]) -> dict[str, Any]:
    tools = record.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    more = record.get("chat_template_kwargs") or {}
    if not isinstance(more, Mapping):
        raise ValueError(f"chat_template_kwargs must be an object of options, got {more!r:.60}")
    return {"tools": tools or None, **more}
