"""Attention kernels in Triton under the interval rule. Needs torch and triton, nothing else.

    query i sees key j   iff   key_start[i] <= j < key_stop[i]
                         and   query_start[j] <= i < query_stop[j]

    rules.py             the mask rule and what else every kernel shares
    tiles.py             which rows each program takes, heavy tiles first
    bookkeeping.py       intervals, positions and lists of tiles of a mask in two launches
    forward.py           the forward kernel
    hopper_forward.py    the forward kernel for Hopper, in Gluon
    hopper_walk.py       what its consumers do with a block
    hopper_launch.py     what the kernels for Hopper can run, and the launch of that one
    backward.py          delta, dk and dv
    backward_queries.py  dq
    hopper_backward.py   dk, dv and sums of dq for Hopper, in Gluon; hopper_backward_launch.py
    backward_repair.py   dq from those sums; all again where a result is not finite
    configurations.py    tile sizes, one table for each kind of GPU
    gpu.py               which GPU a tensor is on
    launch.py            grids, strides, workspaces
    ops.py               the operators and `interval_attention`
    compile_gate.py      compiles the kernels without a GPU and reads the machine code

`TRITON_INTERPRET=1`, set before triton is imported, runs the kernels on CPU tensors.
"""

from packed_attn_kernels.configurations import tile_rows
from packed_attn_kernels.ops import faster_backward, interval_attention, tile_problem
from packed_attn_kernels.rules import INTERPRETED
from packed_attn_kernels.tiles import Tiles, plan_tiles, tile_list

__all__ = [
    "INTERPRETED",
    "Tiles",
    "faster_backward",
    "interval_attention",
    "plan_tiles",
    "tile_list",
    "tile_problem",
    "tile_rows",
]
