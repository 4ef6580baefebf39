"""The planner's passes over every document, compiled by numba; imported when first needed.

Compiled code is cached beside this file, or in numba's cache folder where that is not writable, so
a process after the first pays for loading it alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

WORD = 64  # bits of a bitset's word


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function in machine code, kept on disk where numba finds a folder to keep it in.

    It may read nothing of another file of the package, neither functions nor constants: numba makes
    kept code anew when the function's own file has changed, and would go on with it, over a pip
    upgrade too, when another has.
    """
    try:
        return njit(cache=True)(function)
    except RuntimeError:  # "no locator available": a read-only installation without a home folder
        return njit(function)


@compiled
def count_lengths(lengths, longest):
    """How many documents have each length: int64 `[longest + 1]`."""
    counts = np.zeros(longest + 1, np.int64)
    for length in lengths:
        counts[length] += 1
    return counts


@compiled
def sort_descending(lengths, counts, order):
    """Writes the stable order from longest to shortest into `order`, `[num_documents]`."""
    place = np.empty(counts.size, np.int64)
    before = 0
    for length in range(counts.size - 1, -1, -1):
        place[length] = before
        before += counts[length]
    for document in range(lengths.size):
        length = lengths[document]
        order[place[length]] = document
        place[length] += 1


@compiled
def place_groups(sizes, counts, capacity, most):
    """`best_fit.place_groups` with the rooms in a bitset of two levels: the same placements."""
    words = np.zeros(capacity // WORD + 1, np.uint64)  # bit r: some pack has room r
    summary = np.zeros(words.size // WORD + 1, np.uint64)  # bit w: words[w] is not 0
    top = np.full(capacity + 1, -1, np.int64)  # room -> the last group with that room
    below = np.empty(1024, np.int64)  # group -> the group under it with the same room
    groups = np.empty((1024, 3), np.int64)  # first pack, packs, documents held
    placements = np.empty((1024, 4), np.int64)
    num_groups, num_placements, opened = 0, 0, 0
    for i in range(sizes.size):
        size, left = sizes[i], counts[i]
        while left > 0:
            room = _smallest_room(words, summary, size)
            group = -1 if room < 0 else top[room]
            if group < 0:  # no open pack has room: new ones, as many as it takes
                room, first, available, held = capacity, opened, left, 0
            else:
                first, available, held = groups[group]
            each = min(room // size, most - held)
            packs = left // each
            if packs == 0:
                packs, each = 1, left
            packs = min(packs, available)
            if group < 0:
                opened += packs
            elif packs < available:
                groups[group, 0] += packs
                groups[group, 1] -= packs
            else:
                top[room] = below[group]
                if top[room] < 0:
                    _remove(words, summary, room)
            left -= packs * each
            if num_placements == len(placements):
                placements = _doubled(placements)
            placements[num_placements] = (first, packs, each, held)
            num_placements += 1
            room -= each * size
            held += each
            if room > 0 and held < most:
                if num_groups == len(groups):
                    groups = _doubled(groups)
                    longer = np.empty(2 * below.size, np.int64)
                    longer[: below.size] = below
                    below = longer
                groups[num_groups] = (first, packs, held)
                below[num_groups] = top[room]
                if top[room] < 0:
                    _add(words, summary, room)
                top[room] = num_groups
                num_groups += 1
    return placements[:num_placements].copy()


@compiled
def scatter(lengths, longest_first, placements, offsets, order, placed):
    """Carries the documents, longest first, to where their placements put them.

    Writes `offsets`, int64 `[num_packs + 1]` and zeros, then `order` and the lengths `placed`,
    int64 `[num_documents]`. numpy makes these arrays: it asks the system for large pages.
    """
    for i in range(len(placements)):
        first, packs, each, _ = placements[i]
        for pack in range(first, first + packs):
            offsets[pack + 1] += each
    for pack in range(offsets.size - 1):
        offsets[pack + 1] += offsets[pack]
    document = 0
    for i in range(len(placements)):
        first, packs, each, held = placements[i]
        length = lengths[longest_first[document]]
        for pack in range(first, first + packs):
            at = offsets[pack] + held
            for k in range(each):
                order[at + k] = longest_first[document + k]
                placed[at + k] = length
            document += each


@compiled
def next_fit(lengths, documents, capacity, most):
    """Whether each item opens a pack because the one before it has no room: bool `[num_items]`."""
    opens = np.zeros(lengths.size, np.bool_)
    room, held = 0, most
    for i in range(lengths.size):
        if lengths[i] > room or documents[i] > most - held:
            opens[i] = True
            room, held = capacity, 0
        room -= lengths[i]
        held += documents[i]
    return opens


@compiled
def number_tokens(lengths, position_ids, document_ids):
    """Writes each token's place in its document and its document's number, `[sum(lengths)]`."""
    at = 0
    for document in range(lengths.size):
        length = lengths[document]
        places, numbers = position_ids[at : at + length], document_ids[at : at + length]
        for place in range(length):
            places[place] = place
            numbers[place] = document
        at += length


@compiled
def count_up(lengths, positions):
    """Writes 0, 1, 2, ... for each document into `positions`, int64 `[sum(lengths)]`."""
    at = 0
    for length in lengths:
        # A view's index is known not to be negative, without which this is no vector loop.
        document = positions[at : at + length]
        for position in range(length):
            document[position] = position
        at += length


@compiled
def _smallest_room(words, summary, at_least):
    """The smallest room of at least `at_least` that some pack has, or -1."""
    word = at_least // WORD
    bits = words[word] >> np.uint64(at_least % WORD)
    if bits:
        return at_least + _lowest_bit(bits)
    word += 1
    level = word // WORD
    if level >= summary.size:
        return -1
    bits = summary[level] >> np.uint64(word % WORD)
    if bits:
        word += _lowest_bit(bits)
        return word * WORD + _lowest_bit(words[word])
    for later in range(level + 1, summary.size):
        if summary[later]:
            word = later * WORD + _lowest_bit(summary[later])
            return word * WORD + _lowest_bit(words[word])
    return -1


@compiled
def _add(words, summary, room):
    word = room // WORD
    words[word] |= np.uint64(1) << np.uint64(room % WORD)
    summary[word // WORD] |= np.uint64(1) << np.uint64(word % WORD)


@compiled
def _remove(words, summary, room):
    word = room // WORD
    words[word] &= ~(np.uint64(1) << np.uint64(room % WORD))
    if words[word] == 0:
        summary[word // WORD] &= ~(np.uint64(1) << np.uint64(word % WORD))


@compiled
def _lowest_bit(bits):
    """The place of the lowest bit of a word that is not 0, by halving."""
    place = 0
    for half in (32, 16, 8, 4, 2, 1):
        if bits & ((np.uint64(1) << np.uint64(half)) - np.uint64(1)) == 0:
            place += half
            bits >>= np.uint64(half)
    return place


@compiled
def _doubled(rows):
    """The same rows in an array with room for as many more."""
    longer = np.empty((2 * len(rows), rows.shape[1]), np.int64)
    longer[: len(rows)] = rows
    return longer


@compiled
def knapsack(sizes, values, capacity):
    """The most valuable pattern of each size up to capacity, items unlimited.

    Args:
        sizes: int64 `[num_items]`, ascending, at least 1.
        values: float64 `[num_items]`.

    Returns:
        best, float64 `[capacity + 1]`; and chosen, int64 `[capacity + 1]`: the item that a best
        pattern of that size takes first, -1 where it is that of one token less.
    """
    best = np.zeros(capacity + 1)
    chosen = np.full(capacity + 1, -1, np.int64)
    for room in range(1, capacity + 1):
        best[room] = best[room - 1]
        for item in range(sizes.size):
            if sizes[item] > room:
                break
            value = best[room - sizes[item]] + values[item]
            if value > best[room] + 1e-12:
                best[room] = value
                chosen[room] = item
    return best, chosen
