"""_Checkpointer with a coordinator other than rank 0, and without the others."""

from __future__ import annotations

import torch
import torch.distributed.checkpoint as torch_dcp
from common import assert_equal, like, mesh_of, shard, value
from torch.distributed.tensor import Shard

from dcp_native import _groups
from dcp_native._checkpointer import _Checkpointer


def state(ctx, name):
    return {"w": shard(value(name, (12, 4)), mesh_of(ctx.size), Shard(0)), "step": name}


def case_the_coordinator_may_be_any_rank(ctx):
    made = _Checkpointer(
        torch_dcp.FileSystemWriter(ctx.dir),
        torch_dcp.FileSystemReader(ctx.dir),
        coordinator_rank=ctx.size - 1,
    )
    for name in ("first", "second"):
        made.save(state(ctx, name))
        target = like(state(ctx, name))
        made.load(target)
        assert_equal(target, state(ctx, name))
    group = torch.distributed.group.WORLD
    assert _groups.group_for(group, False, ctx.size - 1).coordinator_rank == ctx.size - 1
    assert list(_groups._groups[group]._cpu) == [ctx.size - 1], "another coordinator was asked"


def case_no_dist_saves_alone(ctx):
    mine = ctx.dir / str(ctx.rank)
    made = _Checkpointer(
        torch_dcp.FileSystemWriter(mine), torch_dcp.FileSystemReader(mine), no_dist=True
    )
    want = {"rank": ctx.rank, "t": value(f"r{ctx.rank}", (5,))}
    if ctx.rank == 0:  # nobody is waited for
        made.save(want)
        target = like(want)
        made.load(target)
        assert_equal(target, want)
        made.async_save(want).result(timeout=60)
