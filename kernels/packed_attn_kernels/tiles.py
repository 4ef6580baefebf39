"""The list of tiles: which rows each program of a kernel takes, made on the device once per mask.

A tile of BLOCK rows may hold rows of several documents, so short documents share one. A document of
two tiles or more begins a tile of its own: the tile before it then has no row that makes it walk
the long document too. Tiles are listed by their work, the heavy ones first, over all documents:
what is left for the last programs to finish is small (longest processing time first; Graham,
"Bounds on multiprocessing timing anomalies", 1969).

    documents of 3, 2, 9, 2 rows, BLOCK 4     a a a b | b | c c c c | c c c c | c d d

Everything is read from the intervals alone. A document begins where nothing that a later row sees
is seen by an earlier one, which is true of chunks too; a tree of a forest is one document. Shapes
depend on the number of rows and BLOCK alone, nothing is read by the host, and no operator here
waits for the device, so a CUDA graph may hold it while boundaries change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from packed_attn_kernels.bookkeeping import runs_on, tile_lists
from packed_attn_kernels.configurations import KEY_BLOCK, Problem, capacity, tile_rows
from packed_attn_kernels.rules import FAR


@dataclass(frozen=True, eq=False)
class Tiles:
    """The lists of one mask for kernels whose tiles have these many rows.

    forward, dq: int32 `[capacity, 2]`, (first, stop) rows of q; keys: the same of k and v. Unused
    entries are empty and come last. blocks: int32 `[4, blocks of keys]`, see `key_blocks`.
    rows: (forward, keys, dq) rows of a tile.
    """

    forward: Tensor
    keys: Tensor
    dq: Tensor
    blocks: Tensor
    rows: tuple[int, int, int]


def plan_tiles(
    key_start: Tensor, key_stop: Tensor, query_start: Tensor, query_stop: Tensor, problem: Problem
) -> Tiles:
    """The lists that the kernels of `problem` read; vectors as in `interval_attention`."""
    rows = tile_rows(problem)
    if runs_on(key_start.device):
        return Tiles(*tile_lists(key_start, key_stop, query_start, query_stop, rows), rows)
    forward = tile_list(key_start, key_stop, rows[0])
    dq = forward if rows[2] == rows[0] else tile_list(key_start, key_stop, rows[2])
    keys = tile_list(query_start, query_stop, rows[1])
    return Tiles(forward, keys, dq, key_blocks(query_start, query_stop), rows)


def tile_list(start: Tensor, stop: Tensor, block: int) -> Tensor:
    """int32 `[capacity, 2]`: (first, stop) rows of each tile, by falling work; then empty ones.

    The specification of the kernel in `bookkeeping.py`, and what runs where that does not.

    Args:
        start, stop: int32 `[rows]`, the interval of each row.
        block: most rows of a tile.
    """
    rows = start.numel()
    if rows == 0:
        return start.new_zeros(0, 2)
    begins = _tile_begins(start, stop, block)
    wanted = torch.arange(1, capacity(rows, block) + 2, device=start.device)
    # The first row of the n-th tile, or `rows` past the last tile.
    first = torch.searchsorted(begins.cumsum(0), wanted)
    tiles = torch.stack([first[:-1], first[1:]], dim=1)
    order = _work(start, stop, tiles, block).argsort(descending=True, stable=True)
    return tiles[order].to(torch.int32)


def key_blocks(query_start: Tensor, query_stop: Tensor) -> Tensor:
    """int32 `[4, blocks]`: which queries see keys of each block of KEY_BLOCK keys.

    Queries before [0] and from [1] on see no key of the block; those from [2] to before [3] see all
    of them, and none do where that is empty, as in a block that goes on past the last key. A tile
    of a forest walks the blocks that may be seen and masks those that are not full, so that
    siblings cost it nothing. The specification of the kernel in `bookkeeping.py`.

    Args:
        query_start, query_stop: int32 `[keys]`, the interval of queries that see each key.
    """
    missing = -query_start.numel() % KEY_BLOCK
    start = F.pad(query_start, (0, missing), value=FAR.value).view(-1, KEY_BLOCK)
    stop = F.pad(query_stop, (0, missing)).view(-1, KEY_BLOCK)
    if start.numel() == 0:
        return query_start.new_zeros(4, 0)
    seen = start < stop
    first = torch.where(seen, start, FAR.value).amin(1)
    last = torch.where(seen, stop, 0).amax(1)
    return torch.stack([first, last, start.amax(1), stop.amin(1)])


def _tile_begins(start: Tensor, stop: Tensor, block: int) -> Tensor:
    """bool `[rows]`: whether a tile begins at each row."""
    rows = start.numel()
    row = torch.arange(rows, device=start.device)
    reached = torch.cummax(stop, 0).values
    begins = torch.ones_like(row, dtype=torch.bool)
    begins[1:] = start[1:] >= reached[:-1]
    documents = begins.cumsum(0)
    last = (row + 2 * block - 1).clamp(max=rows - 1)
    long = begins & (row + 2 * block <= rows) & (documents[last] == documents)
    section = torch.cummax(torch.where(long, row, 0), 0).values
    return (row - section) % block == 0


def _work(start: Tensor, stop: Tensor, tiles: Tensor, block: int) -> Tensor:
    """int64 `[tiles]`: length of each tile's hull; -1 for empty tiles, 0 where nothing is seen."""
    row = tiles[:, :1] + torch.arange(block, device=start.device)
    at = row.clamp(max=start.numel() - 1)
    live = (row < tiles[:, 1:]) & (stop[at] > start[at])
    hull_stop = torch.where(live, stop[at], 0).amax(1)
    hull_start = torch.where(live, start[at], hull_stop[:, None]).amin(1)
    return torch.where(tiles[:, 0] < tiles[:, 1], (hull_stop - hull_start).long(), -1)
