"""Planners of the user's own on several ranks: native reads, torch's agreements and failures."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from common import assert_equal, like, mesh_of, raises_everywhere, shard, sizes, value
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed._shard.sharded_tensor.shard import Shard as OldShard
from torch.distributed.checkpoint import optimizer as torch_optimizer
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.tensor import Replicate, Shard

import dcp_native as dcp
from dcp_native import state_dict_loader

ROWS = 640


class Plain(torch_dcp.DefaultLoadPlanner):
    """No hook of its own."""


class Allocates(torch_dcp.DefaultLoadPlanner):
    """Gives out fresh memory and copies from it when it is filled."""

    def resolve_tensor(self, read_item):
        return torch.empty_like(super().resolve_tensor(read_item))

    def commit_tensor(self, read_item, tensor):
        super().resolve_tensor(read_item).copy_(tensor)


class Reverses(torch_dcp.DefaultLoadPlanner):
    """The coordinator decides the order of everybody's items."""

    def create_global_plan(self, global_plan):
        return [LoadPlan(plan.items[::-1], planner_data=i) for i, plan in enumerate(global_plan)]

    def finish_plan(self, new_plan):
        assert new_plan.planner_data == dist.get_rank()
        return super().finish_plan(new_plan)


class OwnReader(torch_dcp.FileSystemReader):
    """Not torch's own."""


def state(ctx, *placements):
    mesh = mesh_of(ctx.size)
    return {
        "large": shard(value("large", (ROWS, 1024)), mesh, *placements),
        "odd": shard(value("odd", (7, 3)), mesh, *placements),
        "plain": value("plain", (5,)),
        "nested": {"m": [value("m", (4,)), {"lr": 0.5}]},
    }


def case_every_planner_reshards_what_either_wrote(ctx):
    for writer in (dcp, torch_dcp):
        path = ctx.dir / writer.__name__
        writer.save(state(ctx, Shard(0)), checkpoint_id=path)
        ctx.barrier()
        for planner in (Plain, Allocates, Reverses):
            for placement in (Shard(0), Shard(1), Replicate()):
                for reader in (torch_dcp.FileSystemReader, dcp.FileSystemReader, OwnReader):
                    want = state(ctx, placement)
                    target = like(want)
                    dcp.load(target, storage_reader=reader(path), planner=planner())
                    assert_equal(target, want, f"{writer} {planner} {placement} {reader}")
                    report = dcp.last_report()
                    assert (report["reader"] == "native") == (reader is not OwnReader)
                    assert report["planner"].startswith("python: ")
                target = like(want)
                reader = dcp.FileSystemReader(path)
                torch_dcp.load(target, storage_reader=reader, planner=planner())
                assert_equal(target, want)


def case_without_the_group_each_rank_loads_alone(ctx):
    saved = {"w": value("w", (9, 4)), "step": 3}
    dcp.save(saved, checkpoint_id=ctx.dir)
    ctx.barrier()
    if ctx.rank == 0:
        target = like(saved)
        dcp.load(target, checkpoint_id=ctx.dir, planner=Allocates(), no_dist=True)
        assert_equal(target, saved)
    ctx.barrier()


def case_ranks_own_metadata_serves_where_there_is_no_other(ctx):
    saved = {"w": value(f"w{ctx.rank}", (9, 4)), "step": ctx.rank}
    dcp.save(saved, checkpoint_id=ctx.dir, use_collectives=False)
    ctx.barrier()
    target = like(saved)
    dcp.load(target, checkpoint_id=ctx.dir, planner=Plain())
    assert_equal(target, saved)
    assert dcp.last_report()["rank_local"] and dcp.last_report()["reader"] == "native"


class Fault(Exception):
    """Of a hook."""


def case_a_hook_that_fails_on_one_rank_fails_the_load_on_all(ctx):
    saved = state(ctx, Shard(0))
    dcp.save(saved, checkpoint_id=ctx.dir)
    steps = {
        "set_up_planner": "plan",
        "create_local_plan": "plan",
        "finish_plan": "read",
        "lookup_tensor": "read",
        "resolve_tensor": "read",
        "commit_tensor": "read",
        "load_bytes": "read",
    }
    for hook, step in steps.items():
        for failing in range(ctx.size):
            planner = torch_dcp.DefaultLoadPlanner()
            if ctx.rank == failing:

                def raises(*unused, hook=hook, **unused_too):
                    raise Fault(hook)

                setattr(planner, hook, raises)
            else:
                planner = Plain()
            with raises_everywhere(step, failing, Fault, hook):
                dcp.load(like(saved), checkpoint_id=ctx.dir, planner=planner)
            assert dcp.last_report()["failed"]
    planner = Plain()
    if ctx.rank == 0:
        planner.create_global_plan = lambda plans: 1 // 0
    with raises_everywhere("plan", 0, ZeroDivisionError):
        dcp.load(like(saved), checkpoint_id=ctx.dir, planner=planner)
    target = like(saved)
    dcp.load(target, checkpoint_id=ctx.dir, planner=Plain())
    assert_equal(target, saved)


def case_damage_that_one_rank_meets_is_told_on_all(ctx):
    saved = {"large": shard(value("large", (ROWS, 1024)), mesh_of(ctx.size), Shard(0))}
    dcp.save(saved, checkpoint_id=ctx.dir)
    ctx.barrier()
    if ctx.rank == 0:
        file = ctx.dir / "__1_0.distcp"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(bytes(data))
    ctx.barrier()
    with raises_everywhere("read", 1, RuntimeError, "large in "):
        dcp.load(like(saved), checkpoint_id=ctx.dir, planner=Plain())
    ctx.barrier()


def case_a_plan_of_what_is_not_there_is_told_on_all(ctx):
    class Wants(torch_dcp.DefaultLoadPlanner):
        def finish_plan(self, new_plan):
            if ctx.rank != 1:
                return new_plan
            item = new_plan.items[0]
            index = dataclasses.replace(item.storage_index, fqn="nobody")
            return LoadPlan([dataclasses.replace(item, storage_index=index)])

    saved = {"w": value("w", (4,))}
    dcp.save(saved, checkpoint_id=ctx.dir)
    with raises_everywhere("read", 1, KeyError, "nobody"):
        dcp.load(like(saved), checkpoint_id=ctx.dir, planner=Wants())


@sizes(2)
def case_sharded_optimizer_state_loads_through_our_reader(ctx):
    """torch's optimizer.py makes ShardedTensors and, on two dims, has a planner of its own."""
    local = value(f"exp{ctx.rank}", (3, 4))
    shards = [OldShard.from_tensor_and_offsets(local, [3 * ctx.rank, 0], ctx.rank)]
    optim = {"state": {"w": {"exp": init_from_local_shards(shards, (3 * ctx.size, 4)), "step": 5}}}
    dcp.save({"optim": optim}, checkpoint_id=ctx.dir)
    ctx.barrier()
    results = {}
    for reader in (torch_dcp.FileSystemReader, dcp.FileSystemReader):
        loaded = torch_optimizer.load_sharded_optimizer_state_dict({}, "optim", reader(ctx.dir))
        (shard_,) = loaded["optim"]["state"]["w"]["exp"].local_shards()
        results[reader] = (shard_.tensor, loaded["optim"]["state"]["w"]["step"])
    mine, theirs = results.values()
    assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[0], local)
    assert mine[1] == theirs[1] == 5
    offsets = {"optim.state.w.exp": (0, 0)}
    target = {"optim.state.w.exp": torch.zeros(3 * ctx.size, 4)}
    state_dict_loader.load_state_dict(
        target, dcp.FileSystemReader(ctx.dir), planner=torch_optimizer._ReaderWithOffset(offsets)
    )
    assert "_ReaderWithOffset" in dcp.last_report()["planner"]
    want = torch.cat([value(f"exp{rank}", (3, 4)) for rank in range(ctx.size)])
    assert torch.equal(target["optim.state.w.exp"], want)


def case_ranks_that_differ_in_roles_load_together(ctx):
    saved = state(ctx, Shard(0))
    dcp.save(saved, checkpoint_id=ctx.dir)
    ctx.barrier()
    for who in range(ctx.size):
        for reader, planner in (
            (dcp.FileSystemReader, Allocates),
            (OwnReader, lambda: None),
            (OwnReader, Plain),
        ):
            mine = ctx.rank == who
            target = like(saved)
            dcp.load(
                target,
                storage_reader=(reader if mine else dcp.FileSystemReader)(ctx.dir),
                planner=planner() if mine else None,
            )
            assert_equal(target, saved, f"{who} {reader} {planner}")
            report = dcp.last_report()
            if not mine:
                assert report["reader"] == "native"
                assert report["planner"].startswith("torch: ") and "another" in report["planner"]
        patched = dcp.DefaultLoadPlanner()
        if ctx.rank == who:
            patched.load_bytes = type(patched).load_bytes.__get__(patched)
            patched.commit_tensor = lambda item, tensor: None
        target = like(saved)
        dcp.load(target, checkpoint_id=ctx.dir, planner=patched)
        assert_equal(target, saved)
    target = like(saved)
    dcp.load(target, checkpoint_id=ctx.dir)
    assert_equal(target, saved)
    assert dcp.last_report()["planner"] == "native"


def case_what_fails_among_ranks_of_different_roles_is_told_on_all(ctx):
    class Stateful:
        def state_dict(self):
            raise Fault("state_dict")

        def load_state_dict(self, state_dict):
            raise AssertionError

    saved = {"w": value("w", (4,))}
    dcp.save(saved, checkpoint_id=ctx.dir)
    ctx.barrier()
    for failing in range(ctx.size):
        for custom in range(ctx.size):
            planner = Plain() if ctx.rank == custom else None
            target = {**like(saved), "s": Stateful() if ctx.rank == failing else 1}
            try:
                with raises_everywhere("plan", failing, Fault):
                    dcp.load(target, checkpoint_id=ctx.dir, planner=planner)
            except Fault:
                assert ctx.rank == failing
            assert dcp.last_report()["failed"]
            with raises_everywhere("plan", failing, ValueError, "verify"):
                verify = "no" if ctx.rank == failing else None
                try:
                    dcp.load(like(saved), checkpoint_id=ctx.dir, planner=planner, verify=verify)
                except ValueError as error:
                    raise dcp.CheckpointException("plan", {failing: (error, [])}) from error
    target = like(saved)
    dcp.load(target, checkpoint_id=ctx.dir)
    assert_equal(target, saved)
