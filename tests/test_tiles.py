"""The list of tiles: every row once, heavy tiles first, in a shape that no boundary changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in triton")

from packed_attn_kernels.configurations import KEY_BLOCK
from packed_attn_kernels.rules import FAR
from packed_attn_kernels.tiles import capacity, key_blocks, tile_list

from packed_attn import DocumentLayout
from packed_attn.visibility import Visibility
from tests.cases import LOG_NORMAL, ONE_32K, ONE_LONG, SMALL, UNIFORM_32, UNIFORM_512, Case

BLOCKS = (16, 32, 64)


@pytest.mark.parametrize("case", SMALL, ids=[case.name for case in SMALL])
def test_every_row_is_in_one_tile(case: Case) -> None:
    vis = _visibility(case)
    sides = ((vis.key_start, vis.key_stop), (vis.query_start, vis.query_stop))
    for start, stop in sides:
        for block in BLOCKS:
            tiles = tile_list(start, stop, block)
            assert tiles.dtype == torch.int32
            assert list(tiles.shape) == [capacity(start.numel(), block), 2]
            rows = [row for first, last in tiles.tolist() for row in range(first, last)]
            assert sorted(rows) == list(range(start.numel()))
            assert max((last - first for first, last in tiles.tolist()), default=0) <= block


@pytest.mark.parametrize("case", SMALL, ids=[case.name for case in SMALL])
def test_blocks_of_keys_bound_the_queries_that_see_them(case: Case) -> None:
    vis = _visibility(case)
    blocks = key_blocks(vis.query_start, vis.query_stop)
    keys, queries = vis.query_start.numel(), torch.arange(vis.key_start.numel())
    assert list(blocks.shape) == [4, -(-keys // KEY_BLOCK)]
    i = queries[:, None]
    seen = (vis.query_start <= i) & (i < vis.query_stop)
    for n, (first, last, full_first, full_last) in enumerate(blocks.t().tolist()):
        block = seen[:, n * KEY_BLOCK : (n + 1) * KEY_BLOCK]
        some, whole = block.any(1), block.all(1) & (block.shape[1] == KEY_BLOCK)
        seeing = queries[some].tolist()
        assert (first, last) == ((seeing[0], seeing[-1] + 1) if seeing else (FAR.value, 0))
        assert torch.equal(whole, (full_first <= queries) & (queries < full_last))


@pytest.mark.parametrize("lengths", [(64, 64), (32,) * 40, (31,) * 50, (63, 1) * 20, (33,) * 30])
def test_capacity_holds_the_most_tiles(lengths: tuple[int, ...]) -> None:
    """Documents of just over two tiles each begin one, and leave a tile nearly empty."""
    for block in (16, 31, 32):
        vis = DocumentLayout.from_lengths(lengths).visibility()
        tiles = tile_list(vis.key_start, vis.key_stop, block)
        assert int((tiles[:, 1] - tiles[:, 0]).sum()) == sum(lengths)


def test_long_documents_begin_a_tile_and_short_ones_share() -> None:
    vis = DocumentLayout.from_lengths((3, 2, 9, 2)).visibility()
    tiles = tile_list(vis.key_start, vis.key_stop, 4)
    used = sorted((first, last) for first, last in tiles.tolist() if first < last)
    assert used == [(0, 4), (4, 5), (5, 9), (9, 13), (13, 16)]


def test_heavy_tiles_come_first_over_all_documents() -> None:
    """The last tiles of the two long documents, then those before; short and empty ones last."""
    vis = DocumentLayout.from_lengths((64, 8, 8, 96)).visibility()
    tiles = tile_list(vis.key_start, vis.key_stop, 32).tolist()
    assert tiles[:6] == [[144, 176], [32, 64], [112, 144], [0, 32], [80, 112], [64, 80]]
    assert all(first == last for first, last in tiles[6:])


def test_padding_is_no_work() -> None:
    layout = DocumentLayout.from_lengths((64, 16), padding=(True, False))
    vis = layout.visibility()
    assert tile_list(vis.key_start, vis.key_stop, 32)[0].tolist() == [64, 80]


def test_shape_depends_on_rows_alone() -> None:
    shapes = set()
    for lengths in ((4096,), (1,) * 4096, (256,) * 16, (1000, 96, 3000)):
        vis = DocumentLayout.from_lengths(lengths).visibility()
        shapes.add(tile_list(vis.key_start, vis.key_stop, 128).shape)
    assert len(shapes) == 1


def test_nothing_is_read_by_the_host() -> None:
    """A meta tensor has no values: reading one would raise, as it would in a CUDA graph."""
    vector = torch.zeros(300, dtype=torch.int32, device="meta")
    assert tile_list(vector, vector, 64).shape == (capacity(300, 64), 2)


@pytest.mark.parametrize(
    ("lengths", "share", "one_document_a_tile"),
    [
        (ONE_32K, 0.996, 0.996),
        (UNIFORM_512, 0.802, 0.802),
        (UNIFORM_32, 0.129, 0.064),
        (LOG_NORMAL, 0.855, 0.854),
        (ONE_LONG, 0.981, 0.981),
    ],
    ids=["one 32k", "64 x 512", "1000 x 32", "log-normal", "16k + 256 x 64"],
)
def test_share_of_useful_work(
    lengths: tuple[int, ...], share: float, one_document_a_tile: float
) -> None:
    """Visible pairs over pairs that the forward's tiles of 128 x 64 multiply, causal."""
    vis = DocumentLayout.from_lengths(lengths).visibility()
    listed = tile_list(vis.key_start, vis.key_stop, 128)
    assert _useful_share(vis, listed, 128, 64) == pytest.approx(share, abs=5e-4)
    alone, begin = [], 0
    for length in lengths:
        stop = begin + length
        alone += [[first, min(first + 128, stop)] for first in range(begin, stop, 128)]
        begin = stop
    tiles = torch.tensor(alone)
    assert _useful_share(vis, tiles, 128, 64) == pytest.approx(one_document_a_tile, abs=5e-4)


def _useful_share(vis: Visibility, tiles: Tensor, block_m: int, block_n: int) -> float:
    seen = int((vis.key_stop - vis.key_start).sum())
    blocks = 0
    for first, stop in tiles.tolist():
        if first < stop:
            hull = int(vis.key_stop[first:stop].max() - vis.key_start[first:stop].min())
            blocks += -(-hull // block_n)
    return seen / (blocks * block_m * block_n)


def _visibility(case: Case) -> Visibility:
    options: dict[str, Any] = {
        "chunk_size": case.chunk_size,
        "prefix_lengths": case.prefix_lengths,
        "key_layout": case.key_layout(),
    }
    return case.layout().visibility(case.causal, case.window_size, **options)
