"""Planners and writers of the program's own on several ranks, torch beside us."""

from __future__ import annotations

import dataclasses
import pickle
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from common import assert_equal, gather_all, like, mesh_of, raises_everywhere, shard, value
from recorders import (
    DEFAULT_HOOKS,
    NATIVE_WRITERS,
    PLANNERS,
    WRITERS,
    Calls,
    Casting,
    Extra,
    NoDedup,
    Recording,
    all_pairs,
    with_calls,
)
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.tensor import Replicate, Shard

import dcp_native as dcp
from dcp_native import AsyncCheckpointerType

CACHES = [name for name in vars(SavePlanner) if name.startswith("_cached_")]
RANK_0_ONLY = ("create_global_plan", "_create_global_plan", "_dedup_save_plans")
IN_WRITE = ("finish_plan", "resolve_data", "lookup_object", "transform_object")


def forget() -> None:
    for name in CACHES:
        getattr(SavePlanner, name).clear()


def state(rank: int) -> dict[str, Any]:
    mesh = mesh_of(dist.get_world_size())
    return {
        "sharded": shard(value("sharded", (9, 4)), mesh, Shard(0)),
        "replicated": shard(value("replicated", (5, 4)), mesh, Replicate()),
        "plain": value("plain", (33, 7)),
        "opt": {"step": 3, "m": [value("m", (8,)), "text"]},
        f"own{rank}": value(f"own{rank}", (4,)),
    }


def run(module: Any, how: str, sd: Any, writer: Any, planner: Any, **options: Any) -> Any:
    if how == "sync":
        return module.save(sd, storage_writer=writer, planner=planner, **options)
    kind = AsyncCheckpointerType.THREAD if how == "thread" else AsyncCheckpointerType.PROCESS
    return module.async_save(
        sd, storage_writer=writer, planner=planner, async_checkpointer_type=kind, **options
    ).result(60)


def description(metadata: Any) -> Any:
    return (
        metadata.state_dict_metadata,
        metadata.planner_data,
        {(i.fqn, i.offset, i.index) for i in metadata.storage_data},
        metadata.version,
        getattr(metadata, "extra", None),
    )


def loaded(module: Any, path: Any, sd: Any, independent: bool = False) -> Any:
    target = like(sd)
    planner = module.DefaultLoadPlanner(allow_partial_load=True)
    module.load(target, checkpoint_id=path, planner=planner)
    return target


PAIRS = [
    row
    for row in all_pairs(
        [p for p in PLANNERS if p not in ("bare", "unflattened", "lowest", "sharded")],
        ("stock", "threads", "recording"),
        ("sync", "thread", "process"),
        ("together", "independent"),
    )
    if not (row[1] not in NATIVE_WRITERS and row[2] == "process")
]


def case_pairs_of_roles_save_what_torch_saves(ctx):
    for number, (planner, writer, how, group) in enumerate(PAIRS):
        options = {"use_collectives": False} if group == "independent" else {}
        sd = state(ctx.rank)
        paths = [ctx.dir / f"{number}{module}" for module in "to"]
        seen = []
        for module, path, way in ((torch_dcp, paths[0], "sync"), (dcp, paths[1], how)):
            forget()
            role = PLANNERS[planner]()
            metadata = run(module, way, sd, WRITERS[writer](path), role, **options)
            seen.append((description(metadata), getattr(role, "calls", Calls())))
            ctx.barrier()
        row = (ctx.rank, planner, writer, how, group)
        if group == "together" and planner in ("none", "stock"):
            assert seen[0][0][0] == seen[1][0][0], row
        else:
            assert seen[0][0] == seen[1][0], row
        theirs, ours = seen[0][1], seen[1][1]
        assert (
            ours.sorted() == theirs.sorted() if writer == "threads" else ours.made == theirs.made
        ), row
        report = dcp.last_report()
        assert report["path"] == ("native" if writer in NATIVE_WRITERS else "torch"), row
        want = loaded(torch_dcp, paths[0], sd)
        for module in (torch_dcp, dcp):
            assert_equal(loaded(module, paths[1], sd), want, str(row))


def failing(hook: str, rank: int, ctx: Any) -> Any:
    planner = with_calls(Recording())
    if ctx.rank != rank:
        return planner

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ValueError(f"no {hook} on rank {rank}")

    if hook == "set_up_planner":
        planner.set_up_planner = lambda state_dict, storage_meta=None, is_coordinator=False: fail()
    else:
        setattr(planner, hook, fail)
    return planner


def case_a_hook_that_fails_on_one_rank_fails_the_save_on_all(ctx):
    path = ctx.dir / "c"
    sd = state(ctx.rank)
    dcp.save(sd, checkpoint_id=path)
    ctx.barrier()
    before = sorted(p.name for p in path.iterdir())
    ctx.barrier()
    for how in ("sync", "thread", "process"):
        for hook in DEFAULT_HOOKS:
            rank = 0 if hook in RANK_0_ONLY else ctx.size - 1
            step = "write" if hook in IN_WRITE else "plan"
            with raises_everywhere(step, rank, ValueError, f"no {hook} on rank {rank}"):
                run(dcp, how, sd, dcp.FileSystemWriter(path), failing(hook, rank, ctx))
            ctx.barrier()
            assert sorted(p.name for p in path.iterdir()) == before, (how, hook)
            ctx.barrier()
    assert_equal(loaded(dcp, path, sd), sd)
    dcp.save(sd, checkpoint_id=path, planner=Casting())
    assert_equal(loaded(dcp, path, sd), sd)


def case_the_steps_of_failures_are_torchs(ctx):
    for hook in DEFAULT_HOOKS:
        rank = 0 if hook in RANK_0_ONLY else ctx.size - 1
        step = "write" if hook in IN_WRITE else "plan"
        with raises_everywhere(step, rank, ValueError, f"no {hook}"):
            torch_dcp.save(
                state(ctx.rank), checkpoint_id=ctx.dir / hook, planner=failing(hook, rank, ctx)
            )


def case_an_interrupt_in_a_hook_is_raw_there_and_a_failure_elsewhere(ctx):
    planner = with_calls(Recording())
    last = ctx.size - 1

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    if ctx.rank == last:
        planner.finish_plan = interrupted
    try:
        dcp.save(state(ctx.rank), checkpoint_id=ctx.dir / "c", planner=planner)
    except KeyboardInterrupt:
        assert ctx.rank == last
    except dcp.CheckpointException as error:
        assert ctx.rank != last and set(error.failures) == {last}
    else:
        raise AssertionError("it was saved")
    dcp.save(state(ctx.rank), checkpoint_id=ctx.dir / "c")


def case_a_plan_that_can_not_be_sent_fails_on_all_ranks(ctx):
    class Unpicklable(dcp.DefaultSavePlanner):
        def create_local_plan(self):
            plan = super().create_local_plan()
            if dist.get_rank() != 0:
                plan = dataclasses.replace(plan, planner_data={"f": lambda: None})
            return plan

    try:
        dcp.save(state(ctx.rank), checkpoint_id=ctx.dir / "c", planner=Unpicklable())
    except dcp.CheckpointException as error:
        assert set(error.failures) == set(range(1, ctx.size)), error.failures
    else:
        raise AssertionError("it was saved")
    gather_all("still in step")


def case_one_rank_with_a_planner_of_its_own_is_enough(ctx):
    for who in (0, ctx.size - 1):
        path = ctx.dir / str(who)
        sd = state(ctx.rank)
        planner = (
            Extra() if ctx.rank == who else (None if ctx.rank % 2 else dcp.DefaultSavePlanner())
        )
        dcp.save(sd, checkpoint_id=path, planner=planner)
        assert dcp.last_report()["planned_outside"]
        assert dcp.last_report()["planner"].startswith("python" if ctx.rank == who else "torch")
        ctx.barrier()
        metadata = pickle.loads((path / ".metadata").read_bytes())
        assert getattr(metadata, "extra", None) == ({"ranks": ctx.size} if who == 0 else None)
        for module in (torch_dcp, dcp):
            assert_equal(loaded(module, path, sd), sd)
        dcp.save(sd, checkpoint_id=path)
        assert not dcp.last_report()["planned_outside"]
        assert_equal(loaded(dcp, path, sd), sd)


def case_what_every_rank_writes_loads_as_in_torch(ctx):
    """Duplicates that differ: torch takes the last rank's."""
    sd = {"w": torch.full((6, 4), float(ctx.rank)), "rank": ctx.rank}
    for module, name in ((torch_dcp, "t"), (dcp, "o")):
        module.save(sd, checkpoint_id=ctx.dir / name, planner=NoDedup())
        ctx.barrier()
        for reader in (torch_dcp, dcp):
            target = {"w": torch.zeros(6, 4), "rank": None}
            reader.load(target, checkpoint_id=ctx.dir / name)
            assert target["rank"] == ctx.size - 1 and target["w"].eq(ctx.size - 1).all(), name
    assert dcp.verify(ctx.dir / "o")


def case_the_coordinator_of_the_private_function_decides(ctx):
    last = ctx.size - 1
    planner = with_calls(Recording())
    writer = dcp.FileSystemWriter(ctx.dir / "c")
    from dcp_native.state_dict_saver import _save_state_dict

    sd = state(ctx.rank)
    metadata = _save_state_dict(sd, writer, None, last, False, planner)
    assert ("create_global_plan" in [c[0] for c in planner.calls.made]) == (ctx.rank == last)
    assert (metadata is getattr(planner, "metadata", None)) == (ctx.rank == last)
    ctx.barrier()
    assert_equal(loaded(dcp, ctx.dir / "c", sd), sd)


def case_plan_caches_are_filled_as_torch_fills_them(ctx):
    seen = []
    for module in (torch_dcp, dcp):
        forget()
        planner = with_calls(Recording(enable_plan_caching=True))
        key = planner._cached_plans_key
        for i in range(3):
            sd = state(ctx.rank)
            if i == 2:
                sd["more"] = value("more", (5,))
            metadata = module.save(
                sd, checkpoint_id=ctx.dir / f"{module.__name__}{i}", planner=planner
            )
        held = {name: sorted(getattr(SavePlanner, name)) for name in CACHES}
        final = SavePlanner._cached_final_save_plan[key]
        seen.append(
            (held, [i.index for i in final.items], description(metadata), planner.calls.made)
        )
    assert seen[0] == seen[1]
    ctx.barrier()
    assert_equal(loaded(dcp, ctx.dir / "dcp_native2", sd), sd)


class OwnWriter(torch_dcp.FileSystemWriter):
    """Not torch's own."""


def mixed(ctx: Any, who: int, path: Any) -> Any:
    return (OwnWriter if ctx.rank == who else dcp.FileSystemWriter)(path)


def case_one_rank_with_a_writer_of_its_own_sends_all_to_torch(ctx):
    sd = state(ctx.rank)
    for who in (0, ctx.size - 1):
        for how in ("sync", "thread"):
            for planner in (None, Recording):
                path = ctx.dir / f"{who}{how}{planner}"
                role = planner and with_calls(planner(enable_plan_caching=True))
                forget()
                run(dcp, how, sd, mixed(ctx, who, path), role)
                report = dcp.last_report()
                assert report["path"] == "torch", report
                assert ("another rank" in report["writer"]) == (ctx.rank != who), report
                if role is not None:
                    made = [name for name, *_ in role.calls.made]
                    assert made.count("set_up_planner") == made.count("create_local_plan") == 1
                ctx.barrier()
                assert not [p for p in path.iterdir() if "claim" in p.name]
                for module in (torch_dcp, dcp):
                    assert_equal(loaded(module, path, sd), sd)
        dcp.save(sd, checkpoint_id=path)
        assert dcp.last_report()["path"] == "native"
        assert_equal(loaded(dcp, path, sd), sd)


def case_one_rank_with_a_writer_of_its_own_saves_alone(ctx):
    sd = {"w": value(f"w{ctx.rank}", (9, 4)), "step": ctx.rank}
    for who in (0, ctx.size - 1):
        path = ctx.dir / str(who)
        dcp.save(sd, storage_writer=mixed(ctx, who, path), use_collectives=False)
        ctx.barrier()
        for module in (torch_dcp, dcp):
            assert_equal(loaded(module, path, sd), sd)
        writer = mixed(ctx, who, path)
        if ctx.rank == who:
            writer.write_data = lambda *unused: 1 // 0
        try:
            with raises_everywhere("write", who, ZeroDivisionError):
                dcp.save(sd, storage_writer=writer, use_collectives=False)
        except ZeroDivisionError:
            assert ctx.rank == who
        gather_all("still in step")


def case_what_fails_before_a_mixed_save_is_told_on_all(ctx):
    class Fails:
        def state_dict(self):
            raise KeyError("no state")

        def load_state_dict(self, state_dict):
            raise AssertionError

    for who in (0, ctx.size - 1):
        for failing in (0, ctx.size - 1):
            for how in ("sync", "thread"):
                sd = {"w": value("w", (4,)), "s": Fails() if ctx.rank == failing else 1}
                try:
                    with raises_everywhere("plan", failing, KeyError, "no state"):
                        run(dcp, how, sd, mixed(ctx, who, ctx.dir / "c"), None)
                except KeyError:
                    assert ctx.rank == failing
    assert not (ctx.dir / "c" / ".metadata").exists()


def case_ranks_of_different_roles_warm_up_nothing(ctx):
    sd = state(ctx.rank)
    mine = ctx.rank == ctx.size - 1
    dcp.warm_up(sd, planner=Extra() if mine else None)
    dcp.warm_up(sd, storage_writer=mixed(ctx, 0, ctx.dir / "w"))
    dcp.warm_up(sd)
    dcp.save(sd, checkpoint_id=ctx.dir / "c")
    assert_equal(loaded(dcp, ctx.dir / "c", sd), sd)


def case_a_planner_of_one_ranks_own_and_a_base_are_the_same_call(ctx):
    sd = state(ctx.rank)
    dcp.save(sd, checkpoint_id=ctx.dir / "base")
    ctx.barrier()
    planner = Extra() if ctx.rank == ctx.size - 1 else None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the ranks of this save were called differently")
        dcp.save(sd, checkpoint_id=ctx.dir / "c", planner=planner, base=ctx.dir / "base")
    assert not dcp.last_report()["incremental"]
    ctx.barrier()
    assert_equal(loaded(dcp, ctx.dir / "c", sd), sd)
