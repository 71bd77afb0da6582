"""async_save: nothing aliases, order is kept, failures reach every rank's future."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import time
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from cases_failures import Unpicklable
from common import assert_equal, files_can_not_grow, like, mesh_of, raises_everywhere, shard, value
from torch.distributed.tensor import Shard

import dcp_native as dcp
from dcp_native import _uploads
from dcp_native._save import NativeSave

THREAD, PROCESS = dcp.AsyncCheckpointerType.THREAD, dcp.AsyncCheckpointerType.PROCESS


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
    for step, mode in enumerate((THREAD, THREAD, PROCESS, PROCESS)):
        sd, want = state(ctx, f"s{step}"), state(ctx, f"s{step}")
        future = dcp.async_save(sd, checkpoint_id=ctx.dir / str(step), async_checkpointer_type=mode)
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

        def interrupted(save, original=original, **options):
            original(save, **options)
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


class Interrupted:
    """A native save of which one step raises KeyboardInterrupt once it is done."""

    def __init__(self, native, step):
        self.native, self.step = native, step

    def __getattr__(self, name):
        step = getattr(self.native, name)
        if name != self.step:
            return step

        def call(*args):
            step(*args)
            raise KeyboardInterrupt

        return call


def case_an_interrupt_before_ranks_have_met_or_behind_a_planner_reaches_the_others(ctx):
    class Planner(dcp.DefaultSavePlanner):
        """No hook of its own."""

    before = state(ctx, "before")
    dcp.save(before, checkpoint_id=ctx.dir)
    ctx.barrier()
    original = NativeSave.agree
    for step, planner, base in (
        ("agree", None, None),
        ("agree", None, ctx.dir),
        ("settle", Planner(), None),
    ):
        group = dist.new_group()  # its ranks have not met

        def interrupted(save, step=step):
            save._native = native = Interrupted(save._native, step)
            if save._planning is not None:
                save._planning._native = native.native
            try:
                original(save)
            finally:
                save._native = native.native

        NativeSave.agree = interrupted if ctx.rank == 1 else original
        future = None
        try:
            future = dcp.async_save(
                state(ctx, "x"), checkpoint_id=ctx.dir / "c", planner=planner, base=base,
                process_group=group,
            )  # fmt: skip
        except KeyboardInterrupt:
            assert ctx.rank == 1
        finally:
            NativeSave.agree = original
        if future is not None:
            with contextlib.suppress(dcp.CheckpointException):
                future.result(timeout=20)
                raise AssertionError("it was saved")
        _uploads.wait_for_uploads()
        total = torch.ones(1)
        dist.all_reduce(total)
        dist.all_reduce(total, group=group)  # nothing of ours is left in the way
        assert total.item() == ctx.size**2, step
        dcp.async_save(before, checkpoint_id=ctx.dir, process_group=group).result(timeout=60)


def writers_of_this_process():
    """Process ids of the writer processes that this one has started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text()
            except OSError:
                continue
            name, rest = fields[fields.index("(") + 1 :].rsplit(")", 1)
            if name == "dcp_writer" and int(rest.split()[1]) == os.getpid():
                found.append(int(entry.name))
    return found


def slow(ctx, mode=THREAD, **more):
    """A save that takes a second on every rank."""
    before = dcp.configure(write_limit_bytes_s=16 << 20)
    sd = {"w": shard(value("slow", (ctx.size << 10, 6 << 10)), mesh_of(ctx.size), Shard(0))}
    try:
        return dcp.async_save(sd, checkpoint_id=ctx.dir, async_checkpointer_type=mode, **more)
    finally:
        dcp.configure(**vars(before))


def case_a_writer_process_that_dies_fails_the_save_everywhere_and_is_replaced(ctx):
    before = state(ctx, "before")
    dcp.async_save(before, checkpoint_id=ctx.dir, async_checkpointer_type=PROCESS).result(60)
    ctx.barrier()
    future = slow(ctx, PROCESS)
    if ctx.rank == 1:
        (pid,) = writers_of_this_process()
        os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    with raises_everywhere("write", 1, RuntimeError, "writer process"):
        future.result(timeout=60)
    assert time.monotonic() - killed < 10
    target = like(before)
    dcp.load(target, checkpoint_id=ctx.dir)
    assert_equal(target, before)
    after = state(ctx, "after")
    dcp.async_save(after, checkpoint_id=ctx.dir, async_checkpointer_type=PROCESS).result(60)
    dcp.load(target, checkpoint_id=ctx.dir)
    assert_equal(target, after)
    assert len(writers_of_this_process()) == 1


def case_a_cancelled_save_fails_on_every_rank(ctx):
    """[async-future]"""
    before = state(ctx, "before")
    dcp.save(before, checkpoint_id=ctx.dir)
    for mode in (THREAD, PROCESS):
        ctx.barrier()
        future = slow(ctx, mode)
        if ctx.rank == 1:
            assert future.cancel()
        with raises_everywhere("write", 1, RuntimeError, "cancelled"):
            future.result(timeout=60)
    target = like(before)
    dcp.load(target, checkpoint_id=ctx.dir)
    assert_equal(target, before)


def case_ranks_leave_out_a_save_together(ctx):
    """[async-in-flight]"""
    before = dcp.configure(async_overlap="skip")
    try:
        first = slow(ctx)
        second = dcp.async_save(state(ctx, "x"), checkpoint_id=ctx.dir / "other")
        assert second.result(timeout=60) is None
        first.result(timeout=60)
        ctx.barrier()
        assert not (ctx.dir / "other" / ".metadata").exists()
        dcp.configure(async_overlap="fail")
        first = slow(ctx)
        second = dcp.async_save(state(ctx, "x"), checkpoint_id=ctx.dir / "other")
        try:
            second.result(timeout=60)
            raise AssertionError("not refused")
        except dcp.CheckpointException as error:
            assert "in flight" in str(error)
        first.result(timeout=60)
    finally:
        dcp.configure(**vars(before))


def case_a_rank_without_memory_streams_and_the_others_stage(ctx):
    dcp.trim()  # what is there already is used
    before = dcp.configure(arena_cap_bytes=4096 if ctx.rank == 1 else 0)
    try:
        sd, want = state(ctx, "x"), state(ctx, "x")
        future = dcp.async_save(sd, checkpoint_id=ctx.dir)
        assert future.report["staging"] == ("streamed" if ctx.rank == 1 else "arena")
        scribble(sd)
        future.result(timeout=60)
    finally:
        dcp.configure(**vars(before))
    target = like(want)
    dcp.load(target, checkpoint_id=ctx.dir)
    assert_equal(target, want)


def case_two_saves_are_in_flight_with_two_arenas(ctx):
    before = dcp.configure(arenas=2, write_limit_bytes_s=16 << 20)
    try:
        futures = [
            dcp.async_save(
                {
                    "w": shard(
                        value(f"n{i}", (ctx.size << 10, 6 << 10)), mesh_of(ctx.size), Shard(0)
                    )
                },
                checkpoint_id=ctx.dir / str(i),
            )
            for i in range(3)
        ]
        assert not futures[2].done()
        for future in futures:
            future.result(timeout=60)
    finally:
        dcp.configure(**vars(before))
    for i in range(3):
        want = {"w": shard(value(f"n{i}", (ctx.size << 10, 6 << 10)), mesh_of(ctx.size), Shard(0))}
        target = like(want)
        dcp.load(target, checkpoint_id=ctx.dir / str(i))
        assert_equal(target, want)


def case_warm_up_makes_nothing_but_memory(ctx):
    sd = state(ctx, "x")
    for mode in (THREAD, PROCESS):
        dcp.warm_up(sd, async_checkpointer_type=mode)
    dcp.async_save(sd, checkpoint_id=ctx.dir).result(timeout=60)
    assert not (Path.cwd() / ".metadata").exists()
    target = like(sd)
    dcp.load(target, checkpoint_id=ctx.dir)
    assert_equal(target, state(ctx, "x"))


def case_without_collectives_every_rank_commits_its_own_and_hears_of_the_others(ctx):
    sd = {"mine": value(f"r{ctx.rank}", (100, 7)), "rank": ctx.rank}
    dcp.async_save(sd, checkpoint_id=ctx.dir, use_collectives=False).result(timeout=60)
    assert (ctx.dir / f"__{ctx.rank}.metadata").exists()
    ctx.barrier()
    big = {"mine": value(f"r{ctx.rank}", (1 << 16,)), "rank": ctx.rank}
    with files_can_not_grow(ctx.rank == 1):
        future = dcp.async_save(big, checkpoint_id=ctx.dir, use_collectives=False)
        try:
            future.result(timeout=60)
            raise AssertionError("no failure")
        except dcp.CheckpointException as error:
            assert ctx.rank != 1 and set(error.failures) == {1}, error
        except OSError:
            assert ctx.rank == 1


class Raises:
    """A Stateful that fails."""

    def state_dict(self):
        raise ValueError("no state today")

    def load_state_dict(self, state_dict):
        raise AssertionError("never loaded")


def case_without_collectives_a_rank_that_breaks_off_is_heard_over_the_store(ctx):
    sd = {"mine": value(f"r{ctx.rank}", (100, 7)), "app": Raises() if ctx.rank == 1 else 1}
    try:
        dcp.async_save(sd, checkpoint_id=ctx.dir, use_collectives=False).result(timeout=20)
        raise AssertionError("no failure")
    except dcp.CheckpointException as error:
        assert ctx.rank != 1 and set(error.failures) == {1}, error
    except ValueError:
        assert ctx.rank == 1
    # The ranks still count alike, and no collective of ours is left over.
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == ctx.size
    if ctx.rank == 0:  # a save of its own is not counted
        dcp.async_save(
            {"x": 1}, checkpoint_id=ctx.dir / "alone", use_collectives=False, no_dist=True
        ).result(timeout=20)
    sd["app"] = 2
    path = ctx.dir / f"node{ctx.rank}"  # a disk of its own
    dcp.async_save(sd, checkpoint_id=path, use_collectives=False).result(timeout=20)
    assert (path / f"__{ctx.rank}.metadata").exists()
