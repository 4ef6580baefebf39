"""Passes over every document that find shared prefixes and split trees, compiled by numba.

Imported when first needed, as `compiled` is.
"""

from __future__ import annotations

import numpy as np

from packed_attn.packing.compiled import compiled

# Columns of a trie's nodes: int32 `[num_nodes, 8]`, so that a node is half a cache line.
PARENT, LIST, DEPTH, FIRST, LAST, NEXT, BEFORE, ENDS = range(8)
DOCUMENT = BEFORE  # once the trie is whole, nobody asks for the neighbour before
HASH = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio


@compiled
def insert_lists(tokens, second, starts, lengths, leaf_of):
    """Puts lists into a trie with compressed edges; reads no token behind a list's last shared one.

    Args:
        tokens: integers, list i at `starts[i] : starts[i] + lengths[i]`.
        second: values that must agree as well to be shared, but for those of first tokens; empty
            for none.
        leaf_of: int64 `[num_lists]`, written: the node in which each list ends, -1 if empty.

    Returns:
        nodes, int32 `[num_nodes, 8]`: node 0 is the empty prefix. Children stand in the order of
        the first list of each.
    """
    nodes = np.full((2 * lengths.size + 1, 8), -1, np.int32)
    nodes[0, DEPTH] = 0
    nodes[:, ENDS] = 0
    slots = 4
    while slots < 4 * lengths.size:
        slots *= 2
    table = np.full(slots, -1, np.int32)  # a node by its parent and its first token
    used = 1
    for i in range(lengths.size):
        base, length, node, at = starts[i], lengths[i], 0, 0
        while at < length:
            slot = _slot(node, tokens[base + at], slots)
            while table[slot] >= 0:
                child = table[slot]
                other = starts[nodes[child, LIST]]
                if nodes[child, PARENT] == node and _agree(
                    tokens, second, base + at, other + at, at
                ):
                    break
                slot = (slot + 1) & (slots - 1)
            child = table[slot]
            if child < 0:  # nobody goes on like this list: what is left of it is a new leaf
                nodes[used, PARENT], nodes[used, LIST], nodes[used, DEPTH] = node, i, length
                last = nodes[node, LAST]
                nodes[used, BEFORE] = last
                if last < 0:
                    nodes[node, FIRST] = used
                else:
                    nodes[last, NEXT] = used
                nodes[node, LAST] = used
                table[slot] = used
                node, at = used, length
                used += 1
                break
            other = starts[nodes[child, LIST]]
            stop = min(length, nodes[child, DEPTH])
            at += 1
            while at < stop and _agree(tokens, second, base + at, other + at, at):
                at += 1
            if at < nodes[child, DEPTH]:  # the prefix ends inside the edge: a node between
                _put_between(nodes, used, child, at)
                table[slot] = used
                slot = _slot(used, tokens[other + at], slots)
                while table[slot] >= 0:
                    slot = (slot + 1) & (slots - 1)
                table[slot] = child
                child = used
                used += 1
            node = child
        leaf_of[i] = node if length else -1
        if length:
            nodes[node, ENDS] += 1
    return nodes[:used]


@compiled
def _slot(node, token, slots):
    mixed = (np.uint64(node) * HASH ^ np.uint64(token)) * HASH
    return np.int64(mixed >> np.uint64(32)) & (slots - 1)


@compiled
def _agree(tokens, second, a, b, place):
    """Whether two tokens are the same; no label counts for a first one."""
    if tokens[a] != tokens[b]:
        return False
    return place == 0 or second.size == 0 or second[a] == second[b]


@compiled
def _put_between(nodes, new, child, depth):
    """Node `new` takes the place of `child`, which hangs below it from `depth` on."""
    above, before, after = nodes[child, PARENT], nodes[child, BEFORE], nodes[child, NEXT]
    nodes[new, PARENT], nodes[new, LIST], nodes[new, DEPTH] = above, nodes[child, LIST], depth
    nodes[new, BEFORE], nodes[new, NEXT] = before, after
    nodes[new, FIRST], nodes[new, LAST] = child, child
    if before < 0:
        nodes[above, FIRST] = new
    else:
        nodes[before, NEXT] = new
    if after < 0:
        nodes[above, LAST] = new
    else:
        nodes[after, BEFORE] = new
    nodes[child, PARENT], nodes[child, BEFORE], nodes[child, NEXT] = new, -1, -1


@compiled
def emit_documents(nodes, min_shared):
    """The trie's documents, depth-first, without prefixes that save less than `min_shared`.

    Returns:
        int64 `[num_documents, 4]`: length, parent, list, start. `nodes[:, DOCUMENT]` is written:
        the document in which lists end that end in the node.
    """
    order = _preorder(nodes)
    weight = nodes[:, ENDS].astype(np.int64)
    for i in range(order.size - 1, 0, -1):
        weight[nodes[order[i], PARENT]] += weight[order[i]]
    documents = np.empty((nodes.shape[0], 4), np.int64)
    above = np.full(nodes.shape[0], -1, np.int64)  # the document that children go on from
    depth = np.zeros(nodes.shape[0], np.int64)  # tokens up to that document's end
    used = 0
    for i in range(1, order.size):
        node = order[i]
        parent = nodes[node, PARENT]
        above[node], depth[node] = above[parent], depth[parent]
        length = nodes[node, DEPTH] - depth[parent]
        shares = length * (weight[node] - 1) >= min_shared
        if nodes[node, ENDS] or (shares and nodes[node, FIRST] >= 0):
            documents[used, 0], documents[used, 1] = length, above[parent]
            documents[used, 2], documents[used, 3] = nodes[node, LIST], depth[parent]
            nodes[node, DOCUMENT] = used
            if shares:
                above[node], depth[node] = used, nodes[node, DEPTH]
            used += 1
    return documents[:used].copy()


@compiled
def _preorder(nodes):
    """Every node, parents first, depth-first."""
    order = np.empty(nodes.shape[0], np.int64)
    node = 0
    for i in range(order.size):
        order[i] = node
        if nodes[node, FIRST] >= 0:
            node = nodes[node, FIRST]
        else:
            while node > 0 and nodes[node, NEXT] < 0:
                node = nodes[node, PARENT]
            node = nodes[node, NEXT]
    return order


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
            slot = _slot(0, ids[i], slots)
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
        a, b = starts[i], starts[others[i]]
        for k in range(lengths[i]):
            if not _agree(tokens, second, a + k, b + k, k):
                return i
    return -1


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
        below = _chain(waiting[d], after)
        sizes = size[below]
        if sizes.sum() <= room[d] - lengths[d]:
            bins, number = np.zeros(below.size, np.int64), 1
        else:
            bins, number = first_fit(sizes, rank[document[below]], room[d] - lengths[d])
        copies = used
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
            stack[begin:depth] = stack[begin:depth][::-1].copy()
            used += 1
    return copied, parents


@compiled
def first_fit(sizes, rank, capacity):
    """First-fit-decreasing: the bin of each item, int64 `[num_items]`, and how many bins.

    A tournament tree over the bins' rooms finds the first with enough.
    """
    by_rank = np.argsort(rank, kind="mergesort")
    order = by_rank[np.argsort(-sizes[by_rank], kind="mergesort")]
    leaves = 1
    while leaves < sizes.size:
        leaves *= 2
    room = np.full(2 * leaves, capacity, np.int64)
    bins, number = np.empty(sizes.size, np.int64), 0
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
