"""Passes over every document that find shared prefixes, compiled by numba.

Imported when first needed, as `compiled` is.
"""

from __future__ import annotations

import numpy as np

from packed_attn.packing.compiled import compiled

# Columns of a trie's nodes, int32 `[num_nodes, 4]`: the node above, the first list that goes
# through the node, the tokens up to its end, and how many lists end in it.
PARENT, LIST, DEPTH, ENDS = range(4)
# Columns of documents, as in `ForestPlan`: PARENT, LIST, and
LENGTH, START = 2, 3
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
def weigh(nodes, leaf_of, min_shared, order, facts):
    """How many documents a trie has without prefixes that save less than `min_shared`.

    Args:
        nodes, leaf_of: as `insert_lists` writes them.
        order: int32 `[num_nodes]`, 0; written: every node behind the one above it, by the first
            list and then by depth, so that neighbours are neighbours in `nodes`.
        facts: int32 `[num_nodes, 4]`, written.
    """
    _by_list(nodes, leaf_of, order)
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
    return facts[0, PLACE]


@compiled
def emit_documents(nodes, leaf_of, order, facts, documents, ends):
    """Writes the trie's documents, depth-first, branches in the order of the first list of each.

    Args:
        order, facts: as `weigh` writes them; facts is changed.
        documents: int64 `[num_documents, 4]`, written as in `ForestPlan`.
        ends: int64 `[num_lists]`, written: the document in which each list ends, -1 if empty.
    """
    facts[0, PLACE] = 0
    for node in order[1:]:
        parent = nodes[node, PARENT]
        place, above, before = facts[parent, PLACE], facts[parent, ABOVE], facts[parent, BEFORE]
        facts[parent, PLACE] += facts[node, PLACE]
        facts[node, PLACE] = place
        if nodes[node, ENDS] > 0 or facts[node, ABOVE] == node:
            documents[place, PARENT] = facts[above, DOCUMENT] if above >= 0 else -1
            documents[place, LIST] = nodes[node, LIST]
            documents[place, LENGTH], documents[place, START] = nodes[node, DEPTH] - before, before
            facts[node, DOCUMENT] = place
            facts[node, PLACE] = place + 1
    for i in range(leaf_of.size):
        ends[i] = facts[leaf_of[i], DOCUMENT] if leaf_of[i] >= 0 else -1


@compiled
def _by_list(nodes, leaf_of, order):
    used = 1
    for i in range(leaf_of.size):
        node, begin = leaf_of[i], used
        while node > 0 and nodes[node, LIST] == i:
            order[used] = node
            node = nodes[node, PARENT]
            used += 1
        if used > begin + 1:
            order[begin:used] = order[begin:used][::-1].copy()


@compiled
def number_groups(ids, counted, numbers, table):
    """Numbers groups in the order of their first member: how many there are.

    Args:
        ids: int64 `[num_documents]`; a negative one is a group of its own.
        counted: bool `[num_documents]`; others are in no group, number -1.
        numbers: int64 `[num_documents]`, written.
        table: int32, -1, a power of two of more than as many: a group's first member by its id.
    """
    groups, last = 0, table.size - 1
    for i in range(ids.size):
        numbers[i] = -1
        if not counted[i]:
            continue
        if ids[i] >= 0:
            slot = _slot(0, ids[i]) & last
            while table[slot] >= 0 and ids[table[slot]] != ids[i]:
                slot = (slot + 1) & last
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
def emit_groups(numbers, lengths, prompts, counts, min_shared, members, documents, ends):
    """`emit_documents` of groups that share one prompt each: how many documents.

    Args:
        numbers: int64 `[num_lists]`, each list's group, -1 for none.
        prompts, counts: int64 `[num_groups]`: tokens that its members share, and members.
        members: int64 `[all members, 2]`, scratch.
        documents: int64 `[all members and groups of several, 4]`, written.
        ends: int64 `[num_lists]`, written as in `ForestPlan`.
    """
    stops = np.cumsum(counts) - counts  # of the members so far
    for i in range(numbers.size):
        ends[i] = -1
        if numbers[i] >= 0:
            at = stops[numbers[i]]
            members[at, 0], members[at, 1] = i, lengths[i]
            stops[numbers[i]] = at + 1
    used = 0
    for group in range(counts.size):
        prompt, above = prompts[group], -1
        begin, stop = stops[group] - counts[group], stops[group]
        if prompt * (counts[group] - 1) < min_shared:
            prompt = 0
        if prompt:
            above = used
            documents[used, PARENT], documents[used, LIST] = -1, members[begin, 0]
            documents[used, LENGTH], documents[used, START] = prompt, 0
            used += 1
        for k in range(begin, stop):
            i, length = members[k]
            if length == prompt:
                ends[i] = above
                continue
            documents[used, PARENT], documents[used, LIST] = above, i
            documents[used, LENGTH], documents[used, START] = length - prompt, prompt
            ends[i] = used
            used += 1
    return used


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
