"""Conversations to text and tokens by a tokenizer's chat template, and which tokens are learned."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
Message = dict[str, Any]


def assistant_mask(
    tokenizer: Any, messages: Sequence[Message], options: Mapping[str, Any]
) -> tuple[NDArray[np.int32], NDArray[np.int8]]:
    """A conversation's tokens, and 1 where the assistant speaks.

    A template that marks its answers with `{% generation %}` says so itself. With any other, an
    answer is what the template adds to the conversation before it, asked to be answered
    (`add_generation_prompt`), when the answer is there; that is exact if it only adds, which is
    checked at every turn.

    Args:
        tokenizer: with a chat template.
        messages: with `role` and `content`.
        options: for the template (`tools`, ...).

    Returns:
        input_ids, int32 `[tokens]`, and the mask, int8 `[tokens]`.

    Raises:
        ValueError: no chat template, no turn of the assistant, or a template that rewrites earlier
            turns.
    """
    require_template(tokenizer)
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(sorted({str(message["role"]) for message in messages}))
        raise ValueError(
            f"a conversation must have a turn of the assistant, but its roles: {roles}"
        )
    template = tokenizer.get_chat_template(tools=options.get("tools"))
    if GENERATION_BLOCK.search(template):
        return _by_blocks(tokenizer, messages, options)
    text = render(tokenizer, messages, options)
    spans = _answers(tokenizer, messages, text, options)
    ids, stops = tokens_and_starts(tokenizer, text, special=False)
    mask = np.zeros(ids.size, np.int8)
    for first, stop in spans:
        # A token is an answer's if its last character is.
        mask[(stops > first) & (stops <= stop)] = 1
    return ids, mask


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    options: Mapping[str, Any],
    *,
    generation: bool = False,
) -> str:
    """The text of a conversation; with `generation`, up to where an answer would begin."""
    require_template(tokenizer)
    how = {"tokenize": False, "add_generation_prompt": generation}
    return _applied(tokenizer, messages, options, how)


def tokens_and_starts(
    tokenizer: Any, text: str, *, special: bool, need_starts: bool = True
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """A text's tokens and the character at which each of them stops, 0 for tokens that are added.

    Args:
        special: whether the tokenizer adds its special tokens (a chat template writes its own).
        need_starts: without them, any tokenizer will do.

    Raises:
        ValueError: places are needed from a tokenizer that cannot tell them, or a text that is none
            to the tokenizer.
    """
    if need_starts and not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer must be a fast one to say which tokens are learned, got "
            f"{type(tokenizer).__name__}"
        )
    try:
        encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=need_starts)
    except TypeError as error:  # half of a surrogate pair, which JSON can spell, is no text
        raise ValueError(f"the tokenizer refuses the text: {error}") from error
    ids = np.array(encoded["input_ids"], np.int32)
    if not need_starts:
        return ids, np.zeros(0, np.int64)
    return ids, np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)[:, 1]


def require_template(tokenizer: Any) -> None:
    """Refuses a tokenizer without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path} has no chat template, which conversations need: "
            "give that of a chat model, or set tokenizer.chat_template and save it"
        )


def _applied(
    tokenizer: Any,
    messages: Sequence[Message],
    options: Mapping[str, Any],
    how: Mapping[str, Any],
) -> Any:
    """What the chat template makes of a conversation.

    Raises:
        ValueError: whatever the template raises: jinja's errors, TypeErrors of options.
    """
    try:
        return tokenizer.apply_chat_template(list(messages), **how, **options)
    except Exception as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from error


def _by_blocks(
    tokenizer: Any, messages: Sequence[Message], options: Mapping[str, Any]
) -> tuple[NDArray[np.int32], NDArray[np.int8]]:
    how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    encoded = _applied(tokenizer, messages, options, how)
    mask = np.array(encoded["assistant_masks"], np.int8)
    if not mask.any():
        raise ValueError("the chat template's {% generation %} block holds no token of the answers")
    return np.array(encoded["input_ids"], np.int32), mask


def _answers(
    tokenizer: Any, messages: Sequence[Message], text: str, options: Mapping[str, Any]
) -> list[tuple[int, int]]:
    """Where the assistant's turns begin and stop in the text, in characters."""
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:turn], options, generation=True)
        after = render(tokenizer, messages[: turn + 1], options)
        if not (after.startswith(before) and text.startswith(after)):
            raise ValueError(
                f"the chat template rewrites the conversation around turn {turn + 1}, so the answer"
                " has no exact place: use a template with {% generation %} blocks around answers"
            )
        spans.append((len(before), len(after)))
    return spans
