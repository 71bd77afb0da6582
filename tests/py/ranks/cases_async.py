"""async_save: nothing aliases, order is kept, failures reach every rank's future."""

from __future__ import annotations

import pickle
from concurrent.futures import Future

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from cases_failures import Unpicklable
from common import assert_equal, files_can_not_grow, like, mesh_of, raises_everywhere, shard, value
from torch.distributed.tensor import Shard

import dcp_native as dcp
from dcp_native import _uploads
from dcp_native._save import NativeSave


def state(ctx, name):
    mesh = mesh_of(ctx.size)
    return {
        "w": shard(value(name, (1 << 10, 256)), mesh, Shard(0)),
        "t": value(name + "t", (37, 11)).t(),
        "objects": {"step": name, "tensor": [1, 2]},
    }


def scribble(sd):
    with torch.no_grad():
        for tensor in (sd["w"].to_local(), sd["t"]):
            tensor.fill_(-1)
    sd["objects"]["step"] = "scribbled"


def case_the_caller_may_scribble_after_the_call(ctx):
    for step in range(3):
        sd, want = state(ctx, f"s{step}"), state(ctx, f"s{step}")
        future = dcp.async_save(sd, checkpoint_id=ctx.dir / str(step))
        scribble(sd)
        assert isinstance(future, Future)
        metadata = future.result(timeout=60)
        assert isinstance(metadata, torch_dcp.Metadata)
        for module in (dcp, torch_dcp):
            target = like(want)
            module.load(target, checkpoint_id=ctx.dir / str(step))
            assert_equal(target, want, module.__name__)


def case_saves_in_a_row_commit_in_order(ctx):
    """[async-in-flight]"""
    futures = [dcp.async_save(state(ctx, f"s{step}"), checkpoint_id=ctx.dir) for step in range(4)]
    for future in futures:
        future.result(timeout=60)
    want = state(ctx, "s3")
    target = like(want)
    dcp.load(target, checkpoint_id=ctx.dir)
    assert_equal(target, want)


def case_the_trainer_may_communicate_meanwhile(ctx):
    """[async-order]"""
    future = dcp.async_save(state(ctx, "x"), checkpoint_id=ctx.dir)
    for _ in range(50):
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == ctx.size
    future.result(timeout=60)


def case_planning_errors_are_on_the_future_of_every_rank(ctx):
    sd = state(ctx, "x")
    sd["bad"] = Unpicklable() if ctx.rank == 1 else 1
    future = dcp.async_save(sd, checkpoint_id=ctx.dir)
    with raises_everywhere("plan", 1, pickle.PicklingError):
        future.result(timeout=60)


def case_write_errors_are_on_the_future_of_every_rank(ctx):
    before = state(ctx, "before")
    dcp.save(before, checkpoint_id=ctx.dir)
    ctx.barrier()
    with files_can_not_grow(ctx.rank == 1):
        future = dcp.async_save(state(ctx, "x"), checkpoint_id=ctx.dir)
        with raises_everywhere("write", 1, OSError, "__1_"):
            future.result(timeout=60)
    ctx.barrier()
    target = like(before)
    dcp.load(target, checkpoint_id=ctx.dir)
    assert_equal(target, before)
    dcp.async_save(before, checkpoint_id=ctx.dir).result(timeout=60)


def case_an_interrupt_behind_the_last_collective_reaches_the_others_over_the_store(ctx):
    before = state(ctx, "before")
    dcp.save(before, checkpoint_id=ctx.dir)
    ctx.barrier()
    for step in ("agree", "compare", "stage"):
        original = getattr(NativeSave, step)

        def interrupted(save, original=original):
            original(save)
            raise KeyboardInterrupt

        setattr(NativeSave, step, interrupted if ctx.rank == 1 else original)
        try:
            future = dcp.async_save(state(ctx, "x"), checkpoint_id=ctx.dir)
        except KeyboardInterrupt:
            assert ctx.rank == 1
            future = None
        finally:
            setattr(NativeSave, step, original)
        assert (future is None) == (ctx.rank == 1), step
        total = torch.ones(1)
        dist.all_reduce(total)  # the trainer's next collective meets nothing of ours
        assert total.item() == ctx.size
        if future is not None:
            with raises_everywhere("write", 1, KeyboardInterrupt):
                future.result(timeout=20)
        _uploads.wait_for_uploads()
        ctx.barrier()
        target = like(before)
        dcp.load(target, checkpoint_id=ctx.dir)
        assert_equal(target, before, step)
    dcp.async_save(before, checkpoint_id=ctx.dir).result(timeout=60)
