"""Passes over the trees of a forest, compiled by numba: split where too large, laid out in packs.

Imported when first needed, as `compiled` is. numpy makes what they write for every document: it
asks the system for large pages.
"""

from __future__ import annotations

import numpy as np

from packed_attn.packing.compiled import compiled

PARENT, LIST, LENGTH, START = range(4)  # columns of documents, as in `ForestPlan`
# Columns of the parts of one tree that is split, int64: the document that a part is a copy of;
# tokens and pieces of the part and of all that hangs on it; the part that it hangs on; its place
# among the documents, and that of the next piece that hangs on it.
OF, SIZE, PIECES, ON, PLACE, NEXT = range(6)
# Columns of the parts that wait for what they hang on, int64: the part, and what sorts it.
PART, KEY = range(2)
SORTED_HERE = 15  # parts: argsort too sorts so few by insertion, but takes longer to be called


@compiled
def measure_trees(documents, firsts, tokens):
    """Where trees begin and how large they are.

    Args:
        documents: int64 `[num_documents, 4]`, as in `ForestPlan`.
        firsts: int64 `[num_trees + 1]`, written: tree t is documents `firsts[t] : firsts[t + 1]`.
        tokens: int64 `[num_trees]`, written.
    """
    tree = -1
    for d in range(len(documents)):
        if documents[d, PARENT] < 0:
            tree += 1
            firsts[tree], tokens[tree] = d, 0
        tokens[tree] += documents[d, LENGTH]
    firsts[-1] = len(documents)


@compiled
def chain_lists(ends, heads, after):
    """Chains the lists that end in each document, in their order: how many end somewhere.

    Args:
        ends: int64 `[num_lists]`, the document in which each ends; -1 for none.
        heads: int64 `[num_documents]`, -1; written: the first list that ends in each document.
        after: int64 `[num_lists]`, written: the next one that ends in the same document, or -1.
    """
    count = 0
    for i in range(ends.size - 1, -1, -1):
        if ends[i] >= 0:
            after[i] = heads[ends[i]]
            heads[ends[i]] = i
            count += 1
    return count


@compiled
def split_trees(
    documents, firsts, tokens, heads, rank, capacity, copies, copied_heads, copied_rank
):
    """Splits trees over capacity, their common prefixes repeated in each part; others stay.

    Args:
        documents: int64 `[num_documents, 4]`, as in `ForestPlan`; no path is over capacity.
        firsts, tokens, heads: as `measure_trees` and `chain_lists` write them.
        rank: int64 `[num_documents]`, which of equally large branches is placed first.
        copies, copied_heads, copied_rank: int64 `[any, 4]`, `[any]`, `[any]`: room for the result;
            where it is too small, more is made.

    Returns:
        documents, heads and rank of a forest without such trees. Of several copies of a document,
        the first one is where its lists end.
    """
    largest = 0
    for tree in range(tokens.size):
        if tokens[tree] > capacity:
            largest = max(largest, firsts[tree + 1] - firsts[tree])
    parts, waiting = np.empty((2 * largest, 6), np.int64), np.zeros(largest, np.int64)
    branches, room = np.empty((largest, 2), np.int64), np.empty(4 * largest, np.int64)
    used = 0
    for tree in range(tokens.size):
        begin, stop = firsts[tree], firsts[tree + 1]
        number, whole = stop - begin, tokens[tree] <= capacity
        if not whole:
            parts, number = _distribute(
                documents, begin, stop, capacity, rank, parts, waiting, branches, room
            )
        if used + number > len(copies):
            more = len(copies) + number
            copies = np.concatenate((copies, np.empty((more, 4), np.int64)))
            copied_heads = np.append(copied_heads, np.empty(more, np.int64))
            copied_rank = np.append(copied_rank, np.empty(more, np.int64))
        if whole:
            for d in range(begin, stop):
                at = used + d - begin
                copies[at, PARENT] = documents[d, PARENT] + used - begin if d > begin else -1
                copies[at, LIST], copies[at, LENGTH] = documents[d, LIST], documents[d, LENGTH]
                copies[at, START] = documents[d, START]
                copied_heads[at], copied_rank[at] = heads[d], rank[d]
        else:
            _depth_first(
                documents, parts, number, used, heads, rank, copies, copied_heads, copied_rank
            )
        used += number
    return copies[:used], copied_heads[:used], copied_rank[:used]


@compiled
def _distribute(documents, begin, stop, capacity, rank, parts, waiting, branches, room):
    """The parts of a tree, and how many: what hangs on a part comes before it.

    From the leaves up, what hangs below a document is distributed over copies of it, by
    first-fit-decreasing into what its own path leaves of the capacity.

    Args:
        documents: int64 `[num_documents, 4]`, of which `begin : stop` are the tree.
        parts: int64 `[any, 6]`, room for the parts; where it is too small, more is made.
        waiting: int64 `[stop - begin]`, 0 before and after: parts that wait for each document.
        branches: int64 `[stop - begin, 2]`, scratch: those that wait, from the end. Documents come
            from the last to the first, so those of the next one are the foremost.
        room: int64 `[4 * (stop - begin)]`, scratch.
    """
    used, top = 0, len(branches)
    for d in range(stop - 1, begin - 1, -1):
        count, length = waiting[d - begin], documents[d, LENGTH]
        waiting[d - begin] = 0
        if used + count >= len(parts):
            parts = np.concatenate((parts, np.empty_like(parts)))
        left = capacity - length
        if d > begin:
            left -= documents[d, START]
        bins = _first_fit(branches, top, count, parts, left, rank, room)
        last = used + bins - 1  # the part for the first bin: what comes later stands before
        for part in range(used, last + 1):
            parts[part, OF], parts[part, SIZE] = d, length
            parts[part, PIECES], parts[part, ON] = 1, -1
        for k in range(top, top + count):
            branch = branches[k, PART]
            part = last - parts[branch, ON]
            parts[branch, ON] = part
            parts[part, SIZE] += parts[branch, SIZE]
            parts[part, PIECES] += parts[branch, PIECES]
        top += count - bins
        for k in range(bins):
            branches[top + k, PART] = last - k
        if d > begin:
            waiting[documents[d, PARENT] - begin] += bins
        used = last + 1
    return parts, used


@compiled
def _first_fit(branches, top, count, parts, capacity, rank, room):
    """First-fit-decreasing of `count` branches from `top` on: how many bins.

    Writes the bin of each as what it hangs on. A tournament tree over the bins' rooms finds the
    first with enough.
    """
    total = 0
    for k in range(top, top + count):
        total += parts[branches[k, PART], SIZE]
        parts[branches[k, PART], ON] = 0
    if total <= capacity:
        return 1
    _sort(branches, top, top + count, parts, rank)
    leaves = 1  # as many as bins at least, of which two neighbours hold more than the capacity
    while leaves < count and (leaves - 1) * capacity < 2 * total:
        leaves *= 2
    for k in range(2 * leaves):
        room[k] = capacity
    bins = 0
    for k in range(top, top + count):
        part = branches[k, PART]
        size, at = parts[part, SIZE], 1
        while at < leaves:
            at *= 2
            if room[at] < size:
                at += 1
        parts[part, ON] = at - leaves
        bins = max(bins, at - leaves + 1)
        room[at] -= size
        while at > 1:
            at //= 2
            room[at] = max(room[2 * at], room[2 * at + 1])
    return bins


@compiled
def _sort(branches, first, stop, parts, rank):
    """The branches `first : stop` from the largest to the smallest, equal ones by rank."""
    few = stop - first <= SORTED_HERE
    for k in range(first, stop):
        part, at = branches[k, PART], k
        # Sizes and ranks have less than 32 bits.
        key = rank[parts[part, OF]] - (parts[part, SIZE] << 32)
        while few and at > first and branches[at - 1, KEY] > key:
            branches[at, PART], branches[at, KEY] = branches[at - 1, PART], branches[at - 1, KEY]
            at -= 1
        branches[at, PART], branches[at, KEY] = part, key
    if not few:
        order = np.argsort(branches[first:stop, KEY].copy())
        branches[first:stop] = branches[first:stop][order]


@compiled
def _depth_first(documents, parts, number, used, heads, rank, copies, copied_heads, copied_rank):
    """Writes the parts of a tree as documents from `used` on.

    What a part hangs on comes behind it, so from the last on each place is known before it is
    taken.
    """
    root = used
    for part in range(number - 1, -1, -1):
        d, on = parts[part, OF], parts[part, ON]
        if on < 0:
            place, above = root, -1
            root += parts[part, PIECES]
        else:
            place, above = parts[on, NEXT], parts[on, PLACE]
            parts[on, NEXT] += parts[part, PIECES]
        parts[part, PLACE], parts[part, NEXT] = place, place + 1
        copies[place, PARENT], copies[place, LIST] = above, documents[d, LIST]
        copies[place, LENGTH], copies[place, START] = documents[d, LENGTH], documents[d, START]
        copied_rank[place] = rank[d]
        copied_heads[place] = -1
    first = used + number
    for part in range(number):  # copies of a document are neighbours here
        first = min(first, parts[part, PLACE])
        d = parts[part, OF]
        if part + 1 == number or parts[part + 1, OF] != d:
            copied_heads[first] = heads[d]
            first = used + number


@compiled
def lay_out(order, packs, firsts, documents, heads, after, pieces, lists, bounds):
    """Writes what packs hold.

    Args:
        order: int64 `[num_trees]`, trees in the order of the packs.
        packs: int64 `[num_packs + 1]`: pack p holds the trees `order[packs[p] : packs[p + 1]]`.
        firsts, documents, heads, after: as the other passes leave them.
        pieces: int64 `[4, num_documents]`, written: of each piece the list that it is read from,
            where it begins there, its tokens, and the piece that it continues, counted from the
            first of its pack; -1 for a root.
        lists: int64 `[3, num_ending_lists]`, written: lists in the order of the pieces that they
            end in, that piece, counted likewise, and their tokens.
        bounds: int64 `[2, num_packs + 1]`, written: the pieces and the lists of each pack.
    """
    # Trees stand anywhere in memory. Loops that do little else wait for many of them at once.
    source = np.empty(len(documents), np.int64)
    at = 0
    for pack in range(packs.size - 1):
        bounds[0, pack] = begin = at
        for k in range(packs[pack], packs[pack + 1]):
            first, stop = firsts[order[k]], firsts[order[k] + 1]
            moved = at - begin - first
            for d in range(first, stop):
                source[at], pieces[3, at] = d, moved
                at += 1
    bounds[0, -1] = at
    for at in range(source.size):
        d = source[at]
        source[at] = heads[d]
        pieces[0, at], pieces[1, at] = documents[d, LIST], documents[d, START]
        pieces[2, at] = documents[d, LENGTH]
        parent = documents[d, PARENT]
        pieces[3, at] = pieces[3, at] + parent if parent >= 0 else -1
    ended = 0
    for pack in range(packs.size - 1):
        bounds[1, pack], begin = ended, bounds[0, pack]
        for at in range(begin, bounds[0, pack + 1]):
            i = source[at]
            while i >= 0:
                before = pieces[1, at] if pieces[3, at] >= 0 else 0
                lists[0, ended], lists[1, ended] = i, at - begin
                lists[2, ended] = before + pieces[2, at]
                i = after[i]
                ended += 1
    bounds[1, -1] = ended
