"""Passes over every document that find shared prefixes and split trees, compiled by numba.

Imported when first needed, as `compiled` is.
"""

from __future__ import annotations

import numpy as np

from packed_attn.packing.compiled import compiled

# Columns of a trie's nodes, int32 `[num_nodes, 4]`: the node above, the first list that goes
# through the node, the tokens up to its end, and how many lists end in it.
PARENT, LIST, DEPTH, ENDS = range(4)
HASH = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio
BLOCK = 16  # tokens compared without a branch between them


@compiled
def insert_lists(tokens, second, starts, lengths, leaf_of, nodes, table):
    """Puts lists into a trie with compressed edges: how many nodes it has.

    Reads no token behind a list's last shared one and the block that it is in. numpy makes what is
    written: it asks the system for large pages.

    Args:
        tokens: integers, list i at `starts[i] : starts[i] + lengths[i]`.
        second: values that must agree as well to be shared, but for those of first tokens; empty
            for none.
        leaf_of: int32 `[num_lists]`, written: the node in which each list ends, -1 if empty.
        nodes: int32 `[2 * num_lists + 1, 4]`, written; node 0 is the empty prefix.
        table: int32, -1, a power of two of more than twice as many: a node by what is above it and
            its first token.
    """
    nodes[0, PARENT], nodes[0, LIST], nodes[0, DEPTH], nodes[0, ENDS] = -1, -1, 0, 0
    used, last = 1, table.size - 1
    for i in range(lengths.size):
        base, length, node, at = starts[i], lengths[i], 0, 0
        while at < length:
            slot = _slot(node, tokens[base + at]) & last
            child = table[slot]
            while child >= 0:
                other = starts[nodes[child, LIST]]
                if nodes[child, PARENT] == node and _agree(
                    tokens, second, base + at, other + at, at
                ):
                    break
                slot = (slot + 1) & last
                child = table[slot]
            if child < 0:  # nobody goes on like this list: what is left of it is a new leaf
                nodes[used, PARENT], nodes[used, LIST], nodes[used, DEPTH] = node, i, length
                nodes[used, ENDS] = 0
                table[slot] = used
                node, at = used, length
                used += 1
                break
            other = starts[nodes[child, LIST]]
            stop, first = min(length, nodes[child, DEPTH]), at + 1
            # No function around both: one that is not inlined counts references to its arrays.
            at = _same_until(tokens, base, other, first, stop)
            if second.size:
                at = _same_until(second, base, other, first, at)
            if at < nodes[child, DEPTH]:  # the prefix ends inside the edge: a node between
                nodes[used, PARENT], nodes[used, LIST] = node, nodes[child, LIST]
                nodes[used, DEPTH], nodes[used, ENDS] = at, 0
                nodes[child, PARENT] = used
                table[slot] = used
                slot = _slot(used, tokens[other + at]) & last
                while table[slot] >= 0:
                    slot = (slot + 1) & last
                table[slot] = child
                child = used
                used += 1
            node = child
        leaf_of[i] = node if length else -1
        if length:
            nodes[node, ENDS] += 1
    return used


@compiled
def _slot(node, token):
    mixed = (np.uint64(node) * HASH ^ np.uint64(token)) * HASH
    return np.int64(mixed >> np.uint64(32))


@compiled
def _agree(tokens, second, a, b, place):
    """Whether two tokens are the same; no label counts for a first one."""
    if tokens[a] != tokens[b]:
        return False
    return place == 0 or second.size == 0 or second[a] == second[b]


@compiled
def _same_until(values, a, b, at, stop):
    """The first place from `at` on where what begins at a and b differs before `stop`, or that."""
    while at + BLOCK <= stop:
        # A view's index is known not to be negative, without which this is no vector loop.
        x, y = values[a + at : a + at + BLOCK], values[b + at : b + at + BLOCK]
        difference = x[0] ^ y[0]
        for k in range(1, BLOCK):
            difference |= x[k] ^ y[k]
        if difference:
            break
        at += BLOCK
    while at < stop and values[a + at] == values[b + at]:
        at += 1
    return at


# Of each node, int32 `[num_nodes, 4]`: how many lists end in it and below, and later its document;
# the node whose document those below it go on from, and the tokens up to that one's end; documents
# in it and below, and later the next one's number.
WEIGHT, ABOVE, BEFORE, PLACE = range(4)
DOCUMENT = WEIGHT


@compiled
def emit_documents(nodes, leaf_of, min_shared, ends):
    """The trie's documents, depth-first, without prefixes that save less than `min_shared`.

    Branches stand in the order of the first list of each.

    Args:
        ends: int64 `[num_lists]`, written: the document in which each list ends, -1 if empty.

    Returns:
        int64 `[num_documents, 4]`: length, parent, list, start.
    """
    order = _by_list(nodes, leaf_of)
    facts = np.empty((nodes.shape[0], 4), np.int32)
    _weigh(nodes, order, min_shared, facts)
    documents = np.empty((facts[0, PLACE], 4), np.int64)
    facts[0, PLACE] = 0
    for node in order[1:]:
        parent = nodes[node, PARENT]
        place, above, before = facts[parent, PLACE], facts[parent, ABOVE], facts[parent, BEFORE]
        facts[parent, PLACE] += facts[node, PLACE]
        facts[node, PLACE] = place
        if nodes[node, ENDS] > 0 or facts[node, ABOVE] == node:
            documents[place, 0] = nodes[node, DEPTH] - before
            documents[place, 1] = facts[above, DOCUMENT] if above >= 0 else -1
            documents[place, 2], documents[place, 3] = nodes[node, LIST], before
            facts[node, DOCUMENT] = place
            facts[node, PLACE] = place + 1
    for i in range(leaf_of.size):
        ends[i] = facts[leaf_of[i], DOCUMENT] if leaf_of[i] >= 0 else -1
    return documents


@compiled
def _by_list(nodes, leaf_of):
    """Every node behind the one above it, by the first list and then by depth: int32
    `[num_nodes]`. Neighbours here are neighbours in `nodes`, unlike those in depth-first order."""
    order = np.zeros(nodes.shape[0], np.int32)
    used = 1
    for i in range(leaf_of.size):
        node, begin = leaf_of[i], used
        while node > 0 and nodes[node, LIST] == i:
            order[used] = node
            node = nodes[node, PARENT]
            used += 1
        if used > begin + 1:
            order[begin:used] = order[begin:used][::-1].copy()
    return order


@compiled
def _weigh(nodes, order, min_shared, facts):
    """Writes which nodes are documents, and how many are in each and below."""
    facts[:, WEIGHT] = nodes[:, ENDS]
    for node in order[:0:-1]:
        facts[nodes[node, PARENT], WEIGHT] += facts[node, WEIGHT]
    facts[0, ABOVE], facts[0, BEFORE], facts[0, PLACE] = -1, 0, 0
    for node in order[1:]:
        parent, depth, ended = nodes[node, PARENT], nodes[node, DEPTH], nodes[node, ENDS]
        above, before, weight = facts[parent, ABOVE], facts[parent, BEFORE], facts[node, WEIGHT]
        shares = np.int64(depth - before) * (weight - 1) >= min_shared
        is_document = ended > 0 or (shares and weight > ended)
        if is_document and shares:
            above, before = node, depth
        facts[node, ABOVE], facts[node, BEFORE], facts[node, PLACE] = above, before, is_document
    for node in order[:0:-1]:
        facts[nodes[node, PARENT], PLACE] += facts[node, PLACE]


@compiled
def number_groups(ids, counted, numbers):
    """Numbers groups in the order of their first member: how many there are.

    Args:
        ids: int64 `[num_documents]`; a negative one is a group of its own.
        counted: bool `[num_documents]`; others are in no group, number -1.
        numbers: int64 `[num_documents]`, written.
    """
    slots = 4
    while slots < 2 * ids.size:
        slots *= 2
    table = np.full(slots, -1, np.int64)  # the first member of a group by its id
    groups = 0
    for i in range(ids.size):
        numbers[i] = -1
        if not counted[i]:
            continue
        if ids[i] >= 0:
            slot = _slot(0, ids[i]) & (slots - 1)
            while table[slot] >= 0 and ids[table[slot]] != ids[i]:
                slot = (slot + 1) & (slots - 1)
            if table[slot] >= 0:
                numbers[i] = numbers[table[slot]]
                continue
            table[slot] = i
        numbers[i] = groups
        groups += 1
    return groups


@compiled
def shortest_prompts(numbers, prompts, groups):
    """How many members each group has, and the shortest of their prompts, int64 `[groups]`."""
    counts = np.zeros(groups, np.int64)
    shortest = np.zeros(groups, np.int64)
    for i in range(numbers.size):
        group = numbers[i]
        if group >= 0:
            if counts[group] == 0 or prompts[i] < shortest[group]:
                shortest[group] = prompts[i]
            counts[group] += 1
    return counts, shortest


@compiled
def emit_groups(numbers, lengths, prompts, counts, min_shared, ends):
    """`emit_documents` of groups that share one prompt each.

    Args:
        numbers: int64 `[num_documents]`, each document's group, -1 for none.
        prompts, counts: int64 `[num_groups]`: tokens that its members share, and members.
        ends: int64 `[num_documents]`, written as in `ForestPlan`.
    """
    begins = np.zeros(counts.size + 1, np.int64)
    begins[1:] = np.cumsum(counts)
    members, at = np.empty(begins[-1], np.int64), begins[:-1].copy()
    for i in range(numbers.size):
        ends[i] = -1
        if numbers[i] >= 0:
            members[at[numbers[i]]] = i
            at[numbers[i]] += 1
    documents = np.empty((begins[-1] + counts.size, 4), np.int64)
    used = 0
    for group in range(counts.size):
        prompt, above = prompts[group], -1
        if prompt * (counts[group] - 1) < min_shared:
            prompt = 0
        if prompt:
            above = used
            documents[used] = (prompt, -1, members[begins[group]], 0)
            used += 1
        for k in range(begins[group], begins[group + 1]):
            i = members[k]
            if lengths[i] == prompt:
                ends[i] = above
                continue
            documents[used] = (lengths[i] - prompt, above, i, prompt)
            ends[i] = used
            used += 1
    return documents[:used].copy()


@compiled
def first_difference(tokens, second, starts, others, lengths):
    """The first list whose first `lengths[i]` tokens are not those of list `others[i]`, or -1."""
    for i in range(lengths.size):
        a, b, n = starts[i], starts[others[i]], lengths[i]
        same = _same_until(tokens, a, b, 0, n)
        if second.size:  # no label counts for a first token
            same = _same_until(second, a, b, 1, same)
        if same < n:
            return i
    return -1


@compiled
def split_trees(lengths, parents, bounds, capacity, rank):
    """`split_tree` of every tree over capacity; the others stay as they are.

    Args:
        lengths, parents, rank: int64 `[num_documents]`, of all trees, depth-first.
        bounds: int64 `[num_trees + 1]`: tree t is documents `bounds[t] : bounds[t + 1]`.

    Returns:
        copied and parents, int64 `[num_copies]`.
    """
    copied, above = np.empty(2 * lengths.size, np.int64), np.empty(2 * lengths.size, np.int64)
    used = 0
    for tree in range(bounds.size - 1):
        first, stop = bounds[tree], bounds[tree + 1]
        if lengths[first:stop].sum() <= capacity:
            documents, links = np.arange(stop - first), parents[first:stop] - first
        else:
            documents, links = split_tree(
                lengths[first:stop], parents[first:stop] - first, capacity, rank[first:stop]
            )
        if used + documents.size > copied.size:
            copied = np.append(copied, np.empty(copied.size + documents.size, np.int64))
            above = np.append(above, np.empty(copied.size - above.size, np.int64))
        for k in range(documents.size):
            copied[used + k] = documents[k] + first
            above[used + k] = links[k] + used if links[k] >= 0 else -1
        used += documents.size
    return copied[:used].copy(), above[:used].copy()


@compiled
def split_tree(lengths, parents, capacity, rank):
    """One tree as several of at most `capacity` tokens, their common prefixes repeated in each.

    From the leaves up, what hangs below a document is distributed over copies of it, by
    first-fit-decreasing into what its own path leaves of the capacity.

    Args:
        lengths, parents: int64 `[num_documents]`, depth-first from the root; no path is longer
            than the capacity.
        rank: int64 `[num_documents]`, which of equally large branches is placed first.

    Returns:
        copied and parents, int64 `[num_copies]`: the document that each copy is of, and the copy
        that it continues (-1 for a root), depth-first.
    """
    room = np.empty(lengths.size, np.int64)  # what the path before a document leaves
    branches = np.zeros(lengths.size + 1, np.int64)
    has_child = np.zeros(lengths.size, np.bool_)
    room[0] = capacity
    for d in range(1, lengths.size):
        room[d] = room[parents[d]] - lengths[parents[d]]
        has_child[parents[d]] = True
    most = 0
    for d in range(lengths.size - 1, -1, -1):  # copies that a document can have: its leaves
        branches[d] += not has_child[d]
        most += branches[d]
        if d:
            branches[parents[d]] += branches[d]
    document, size = np.empty(most, np.int64), np.empty(most, np.int64)
    first, after = np.full(most, -1, np.int64), np.full(most, -1, np.int64)
    waiting = np.full(lengths.size, -1, np.int64)  # of each document: copies below it, chained
    used, roots = 0, 0
    for d in range(lengths.size - 1, -1, -1):
        copies = used
        if waiting[d] < 0:  # a leaf
            document[used], size[used] = d, lengths[d]
            used += 1
        else:
            below = _chain(waiting[d], after)
            sizes = size[below]
            bins, number = first_fit(sizes, rank[document[below]], room[d] - lengths[d])
            used += number
            document[copies:used] = d
            size[copies:used] = lengths[d]
            for k in range(below.size - 1, -1, -1):
                copy = copies + bins[k]
                size[copy] += sizes[k]
                after[below[k]] = first[copy]
                first[copy] = below[k]
        for copy in range(used - 1, copies - 1, -1):
            if d:
                after[copy] = waiting[parents[d]]
                waiting[parents[d]] = copy
        roots = copies
    return _copies(document, first, after, roots, used)


@compiled
def _chain(head, after):
    number, at = 0, head
    while at >= 0:
        number += 1
        at = after[at]
    members, at = np.empty(number, np.int64), head
    for k in range(number):
        members[k] = at
        at = after[at]
    return members


@compiled
def _copies(document, first, after, roots, stop):
    """Copies depth-first from those of the root, `roots : stop`."""
    copied, parents = np.empty(stop, np.int64), np.empty(stop, np.int64)
    stack = np.empty((stop, 2), np.int64)  # (copy, the place of the copy that it continues)
    used = 0
    for root in range(roots, stop):
        stack[0, 0], stack[0, 1] = root, -1
        depth = 1
        while depth:
            depth -= 1
            copy = stack[depth, 0]
            copied[used], parents[used] = document[copy], stack[depth, 1]
            # The first branch comes off the stack first.
            branch, begin = first[copy], depth
            while branch >= 0:
                stack[depth, 0], stack[depth, 1] = branch, used
                depth += 1
                branch = after[branch]
            if depth > begin + 1:
                stack[begin:depth] = stack[begin:depth][::-1].copy()
            used += 1
    return copied, parents


@compiled
def first_fit(sizes, rank, capacity):
    """First-fit-decreasing: the bin of each item, int64 `[num_items]`, and how many bins.

    A tournament tree over the bins' rooms finds the first with enough.
    """
    bins = np.zeros(sizes.size, np.int64)
    if sizes.sum() <= capacity:
        return bins, 1
    order = np.argsort(rank - (sizes << 32))  # sizes and ranks have less than 32 bits
    leaves = 1
    while leaves < sizes.size:
        leaves *= 2
    room = np.full(2 * leaves, capacity, np.int64)
    number = 0
    for item in order:
        at = 1
        while at < leaves:
            at *= 2
            if room[at] < sizes[item]:
                at += 1
        bins[item] = at - leaves
        number = max(number, at - leaves + 1)
        room[at] -= sizes[item]
        while at > 1:
            at //= 2
            room[at] = max(room[2 * at], room[2 * at + 1])
    return bins, number
