"""Truncation, the other way to bound a row: what it keeps, and how much it throws away."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args

import numpy as np
from numpy.typing import NDArray

from packed_attn.packing.columns import as_dataset, list_columns, require_aligned, table_columns
from packed_attn.packing.report import TruncationReport, log_report

if TYPE_CHECKING:
    import pyarrow as pa

Data = TypeVar("Data")
TruncationMode = Literal["keep_start", "keep_end"]  # TRL's names
COMPLETIONS = ("chosen", "rejected", "completion")
ID_SUFFIXES = ("_ids", "_input_ids")  # TRL's names now, and up to 0.24


def truncate(
    data: Data,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    truncation_mode: TruncationMode = "keep_start",
    on_report: Callable[[TruncationReport], object] = log_report,
) -> Data:
    """Cuts tokenised examples short, by the rules of TRL's guide to reducing memory usage.

    Rows with `input_ids` keep their first `max_length` tokens, and so does every list with one
    value per token (labels, masks).

    Preference rows hold `prompt_ids` with `chosen_ids` and `rejected_ids` (or a `completion_ids`),
    or TRL's older `prompt_input_ids`, ...; completions do not repeat the prompt. In this order:

        max_prompt_length      the prompt keeps its last tokens
        max_completion_length  each completion keeps its first tokens
        max_length             prompt + completion keep their first tokens, completion by completion

    `truncation_mode="keep_end"` makes `max_length` keep the last tokens instead, of `input_ids` and
    of prompt + completion; the other two limits keep the sides above. A prompt that several
    completions share makes room for the longest of them, where TRL would cut it once for each.

    Lists that go with a part (`prompt_attention_mask`, `chosen_labels`, ...: same prefix, one value
    per token) are cut alike. Nothing else changes: no row and no column is dropped.

    Args:
        data: a `datasets.Dataset` or a list of dicts; the same kind comes back, and `data` itself
            stays as it is.
        max_length, max_prompt_length, max_completion_length: limits in tokens, at least 1; None
            is no limit.
        truncation_mode: which side `max_length` keeps.
        on_report: called with the `TruncationReport`. By default it is logged, as a warning when
            tokens were lost: `on_report=reports.append` keeps it, `print` shows it.

    Raises:
        ValueError: a limit below 1, another mode, prompt or completion limits on rows without
            them, rows with neither set of names, or a list of numbers that should go with the
            tokens but has another length (row and column named).
    """
    limits = _Limits(
        _checked_limit("max_length", max_length),
        _checked_limit("max_prompt_length", max_prompt_length),
        _checked_limit("max_completion_length", max_completion_length),
        _checked_mode(truncation_mode),
    )
    if isinstance(data, Sequence) and not isinstance(data, str | bytes):
        cut, report = _truncate_list(data, limits)
    else:
        cut, report = _truncate_dataset(as_dataset(data, "data"), limits)
    on_report(report)
    return cast(Data, cut)


Lengths = dict[str, NDArray[np.int64]]


def truncation_of(
    lengths: NDArray[np.int64], max_length: int
) -> tuple[NDArray[np.int64], TruncationReport]:
    """What `truncate` would make of documents with `input_ids` of these lengths.

    Args:
        lengths: int64 `[num_documents]`.

    Returns:
        the lengths that stay, and the `TruncationReport`.
    """
    limits = _Limits(_checked_limit("max_length", max_length), None, None, "keep_start")
    given = {"input_ids": lengths}
    kept = _keep(given, limits)[1]
    return kept["input_ids"], _account(given, kept, limits)


@dataclass(frozen=True)
class _Limits:
    max_length: int | None
    max_prompt_length: int | None
    max_completion_length: int | None
    truncation_mode: TruncationMode


def _keep(lengths: Lengths, limits: _Limits) -> tuple[Lengths, Lengths]:
    """Which tokens of each part stay: first token and number, int64 `[num_examples]` by part."""
    unlimited = np.iinfo(np.int64).max
    total = limits.max_length or unlimited
    ends = limits.truncation_mode == "keep_end"
    if "prompt" not in lengths:
        kept = {part: np.minimum(length, total) for part, length in lengths.items()}
        return {part: (lengths[part] - kept[part]) * ends for part in lengths}, kept
    prompt = np.minimum(lengths["prompt"], limits.max_prompt_length or unlimited)
    completions = {
        part: np.minimum(length, limits.max_completion_length or unlimited)
        for part, length in lengths.items()
        if part != "prompt"
    }
    starts = {part: np.zeros_like(length) for part, length in completions.items()}
    starts["prompt"] = lengths["prompt"] - prompt
    if not ends:
        prompt = np.minimum(prompt, total)
        kept = {part: np.minimum(n, total - prompt) for part, n in completions.items()}
        return starts, {"prompt": prompt, **kept}
    kept = {part: np.minimum(n, total) for part, n in completions.items()}
    for part in kept:
        starts[part] = completions[part] - kept[part]
    prompt = np.minimum(prompt, total - np.max(list(kept.values()), axis=0))
    starts["prompt"] = lengths["prompt"] - prompt
    return starts, {"prompt": prompt, **kept}


def _find_parts(names: Sequence[str], limits: _Limits) -> dict[str, str]:
    """The column of token ids of each part: `input_ids` alone, or a prompt and its completions."""
    for suffix in ID_SUFFIXES:
        completions = {part: part + suffix for part in COMPLETIONS if part + suffix in names}
        if "prompt" + suffix in names and completions:
            return {"prompt": "prompt" + suffix, **completions}
    if "input_ids" not in names:
        raise ValueError(
            "data must have 'input_ids', or 'prompt_ids' with 'chosen_ids' and 'rejected_ids', but "
            f"its columns are: {', '.join(names) or 'none'}; tokenise it before truncating"
        )
    for argument in ("max_prompt_length", "max_completion_length"):
        if getattr(limits, argument) is not None:
            raise ValueError(
                f"{argument} cuts preference data ('prompt_ids' with 'chosen_ids' and "
                "'rejected_ids'), but data has only 'input_ids'; use max_length"
            )
    return {"input_ids": "input_ids"}


def _part_of(name: str, parts: dict[str, str]) -> str | None:
    """The part whose tokens a column may describe, or None."""
    if "input_ids" in parts:
        return "input_ids"
    return next((part for part in parts if name.startswith(part + "_")), None)


def _truncate_dataset(dataset: Any, limits: _Limits) -> tuple[Any, TruncationReport]:
    parts = _find_parts(dataset.column_names, limits)
    columns = list_columns(dataset)
    missing = [name for name in parts.values() if name not in columns]
    if missing:
        raise ValueError(f"column {missing[0]!r} must be lists of token ids")
    lengths = {part: columns[name].lengths for part, name in parts.items()}
    for part, name in parts.items():
        nulls = np.flatnonzero(lengths[part] < 0)
        if nulls.size:
            raise ValueError(
                f"{name} must be a list in every row, but it is null in row {nulls[0]}"
            )
    of_part = {}
    for name, column in columns.items():
        part = _part_of(name, parts)
        if part and require_aligned(column, lengths[part], parts[part]):
            of_part[name] = part
    report = _account(lengths, _keep(lengths, limits)[1], limits)
    if report.lossless:
        return dataset, report
    arguments = {"parts": parts, "of_part": of_part, "limits": limits}
    cut = dataset.with_format("arrow").map(
        _truncate_table, batched=True, fn_kwargs=arguments, desc="Truncating"
    )
    return cut.with_format(dataset.format["type"], **dataset.format["format_kwargs"]), report


def _truncate_table(
    table: pa.Table, parts: dict[str, str], of_part: dict[str, str], limits: _Limits
) -> pa.Table:
    """One batch of rows with the columns of `of_part` cut."""
    import pyarrow as pa

    columns = table_columns(table)
    starts, kept = _keep({part: columns[name].lengths for part, name in parts.items()}, limits)
    rows = np.arange(table.num_rows)
    for name, part in of_part.items():
        values = columns[name].gather(rows, starts[part], kept[part])
        offsets = np.append(0, np.cumsum(kept[part]))
        if pa.types.is_large_list(table.schema.field(name).type):
            cut = pa.LargeListArray.from_arrays(pa.array(offsets), values)
        else:
            cut = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)
        table = table.set_column(table.column_names.index(name), name, cut)
    return table


def _truncate_list(
    examples: Sequence[Any], limits: _Limits
) -> tuple[list[dict[str, Any]], TruncationReport]:
    for row, example in enumerate(examples):
        if not isinstance(example, Mapping):
            raise ValueError(f"data must hold dicts, but data[{row}] is {type(example).__name__}")
    parts = _find_parts(list(examples[0]), limits) if examples else {}
    lengths = {part: _list_lengths(examples, name) for part, name in parts.items()}
    starts, kept = _keep(lengths, limits)
    result = []
    for row, example in enumerate(examples):
        cut = dict(example)
        for name, value in example.items():
            part = _part_of(name, parts)
            if part and _goes_with_tokens(row, name, value, parts[part], int(lengths[part][row])):
                start = int(starts[part][row])
                cut[name] = value[start : start + int(kept[part][row])]
        result.append(cut)
    return result, _account(lengths, kept, limits)


def _list_lengths(examples: Sequence[Mapping[str, Any]], name: str) -> NDArray[np.int64]:
    lengths = np.empty(len(examples), np.int64)
    for row, example in enumerate(examples):
        if not _is_sized_list(example.get(name)):
            raise ValueError(
                f"{name} must be a list of token ids in every row, but not in row {row}"
            )
        lengths[row] = len(example[name])
    return lengths


def _goes_with_tokens(row: int, name: str, value: Any, ids: str, length: int) -> bool:
    """Whether an entry of an example has one value per token; see `columns.require_aligned`."""
    if not _is_sized_list(value):
        return False
    if len(value) == length:
        return True
    if np.asarray(value[:1]).dtype.kind not in "iufb":
        return False
    raise ValueError(
        f"column {name!r} must have one value for each of {ids}, but in row {row} it has "
        f"{len(value)} values and {ids} has {length}; remove the column if it is not per token"
    )


def _is_sized_list(value: Any) -> bool:
    """A list, tuple, array or tensor of one dimension or more, but not text."""
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__"):
        return False
    return getattr(value, "ndim", 1) > 0


def _account(lengths: Lengths, kept: Lengths, limits: _Limits) -> TruncationReport:
    examples = next((length.size for length in lengths.values()), 0)
    cut = np.zeros(examples, bool)
    emptied = np.zeros(examples, bool)
    for part, length in lengths.items():
        cut |= kept[part] < length
        emptied |= (kept[part] == 0) & (length > 0)
    return TruncationReport(
        examples=examples,
        truncated_examples=int(cut.sum()),
        emptied_examples=int(emptied.sum()),
        tokens={part: int(length.sum()) for part, length in lengths.items()},
        lost_tokens={part: int((lengths[part] - kept[part]).sum()) for part in lengths},
        truncation_mode=limits.truncation_mode,
    )


def _checked_limit(argument: str, limit: Any) -> int | None:
    if limit is None:
        return None
    try:
        whole = operator.index(limit)
    except TypeError:
        whole = None
    if whole is None or isinstance(limit, bool) or whole < 1:
        raise ValueError(f"{argument} must be an integer of at least 1 or None, got {limit!r}")
    return whole


def _checked_mode(mode: Any) -> TruncationMode:
    if mode not in get_args(TruncationMode):
        raise ValueError(f"truncation_mode must be 'keep_start' or 'keep_end', got {mode!r}")
    return mode
