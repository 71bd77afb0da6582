"""A rank that fails in each phase: every rank hears of it, nothing is lost, the next save works."""

from __future__ import annotations

import os
import pickle
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from common import assert_equal, files_can_not_grow, like, mesh_of, raises_everywhere, shard, value
from torch.distributed.tensor import Shard

import dcp_native as dcp


class Unpicklable:
    """Fails when it is serialised."""

    def __reduce__(self):
        raise pickle.PicklingError("cannot pickle this one")


class Raises:
    """A Stateful whose state_dict raises."""

    def state_dict(self):
        raise ZeroDivisionError("state_dict of the application")

    def load_state_dict(self, state_dict):
        raise AssertionError("never loaded")


def good(ctx, name="good"):
    return {"w": shard(value(name, (12, 4)), mesh_of(ctx.size), Shard(0)), "step": name}


def check_loads(ctx, want):
    for module in (dcp, torch_dcp):
        target = like(want)
        module.load(target, checkpoint_id=ctx.dir)
        assert_equal(target, want, module.__name__)
    ctx.barrier()
    assert not [n for n in os.listdir(ctx.dir) if "claim" in n], os.listdir(ctx.dir)
    assert len([n for n in os.listdir(ctx.dir) if n.endswith(".distcp")]) == ctx.size
    ctx.barrier()


def previous_survives(ctx, attempt):
    """Saves, lets `attempt` fail, checks that the first one loads and that the next save works."""
    before = good(ctx, "before")
    dcp.save(before, checkpoint_id=ctx.dir)
    ctx.barrier()
    attempt()
    ctx.barrier()
    check_loads(ctx, before)
    after = good(ctx, "after")
    dcp.save(after, checkpoint_id=ctx.dir)
    check_loads(ctx, after)


def case_state_dict_raises_on_one_rank(ctx):
    """[stateful-failure]"""

    def attempt():
        sd = good(ctx)
        sd["app"] = Raises() if ctx.rank == 1 else {"x": 1}
        start = time.monotonic()
        if ctx.rank == 1:
            try:
                dcp.save(sd, checkpoint_id=ctx.dir)
            except ZeroDivisionError:
                return
            raise AssertionError("the raw exception was lost")
        with raises_everywhere("plan", 1, ZeroDivisionError, "state_dict of the application"):
            dcp.save(sd, checkpoint_id=ctx.dir)
        assert time.monotonic() - start < 10

    previous_survives(ctx, attempt)


def case_state_dict_raises_on_one_rank_of_a_load(ctx):
    """[stateful-failure]"""
    sd = good(ctx)
    dcp.save(sd, checkpoint_id=ctx.dir)
    target, start = like(sd), time.monotonic()
    target["app"] = Raises() if ctx.rank == 1 else {}
    if ctx.rank == 1:
        try:
            dcp.load(target, checkpoint_id=ctx.dir)
        except ZeroDivisionError:
            pass
        else:
            raise AssertionError("the raw exception was lost")
    else:
        with raises_everywhere("plan", 1, ZeroDivisionError, "state_dict of the application"):
            dcp.load(target, checkpoint_id=ctx.dir)
    assert time.monotonic() - start < 10
    check_loads(ctx, sd)


def case_an_interrupt_between_the_steps_leaves_nobody_waiting(ctx):
    """Ctrl-C that arrives in Python, outside of any step of the core."""
    from dcp_native._save import NativeSave

    for step in ("agree", "write", "finish"):

        def attempt(step=step):
            original = getattr(NativeSave, step)

            def interrupted(self):
                raise KeyboardInterrupt(step)

            start = time.monotonic()
            if ctx.rank == 1:
                setattr(NativeSave, step, interrupted)
                try:
                    dcp.save(good(ctx), checkpoint_id=ctx.dir)
                except KeyboardInterrupt:
                    pass
                else:
                    raise AssertionError("the interrupt was lost")
                finally:
                    setattr(NativeSave, step, original)
            else:
                told_in = "plan" if step == "agree" else "write"
                with raises_everywhere(told_in, 1, KeyboardInterrupt, step):
                    dcp.save(good(ctx), checkpoint_id=ctx.dir)
            assert time.monotonic() - start < 10

        previous_survives(ctx, attempt)


def case_serialising_raises_on_one_rank(ctx):
    def attempt():
        sd = good(ctx)
        sd["object"] = Unpicklable() if ctx.rank == 1 else 3
        with raises_everywhere("plan", 1, pickle.PicklingError, "cannot pickle this one"):
            dcp.save(sd, checkpoint_id=ctx.dir)

    previous_survives(ctx, attempt)


def case_planning_raises_on_the_coordinator(ctx):
    """Ranks disagree on the tensor: the global plan does not add up."""

    def attempt():
        sd = good(ctx)
        if ctx.rank == ctx.size - 1:
            sd["w"] = shard(value("w", (12, 4))[:, :3], mesh_of(ctx.size), Shard(0))
        with raises_everywhere("plan", 0, ValueError, "Failed to validate global plan: key:w"):
            dcp.save(sd, checkpoint_id=ctx.dir)

    previous_survives(ctx, attempt)


def case_the_validation_text_is_torchs(ctx):
    texts = []
    for module in (torch_dcp, dcp):
        sd = good(ctx)
        if ctx.rank == ctx.size - 1:
            sd["w"] = shard(value("w", (12, 4))[:, :3], mesh_of(ctx.size), Shard(0))
        try:
            module.save(sd, checkpoint_id=ctx.dir)
        except torch_dcp.CheckpointException as error:
            texts.append({r: str(e) for r, (e, _) in error.failures.items()})
    assert len(texts) == 2 and texts[0] == texts[1], texts


def case_writing_fails_on_one_rank(ctx):
    def attempt():
        sd = {"w": shard(value("w", (1 << 12, 64)), mesh_of(ctx.size), Shard(0))}
        blame = raises_everywhere("write", 1, OSError, "__1_")
        with files_can_not_grow(ctx.rank == 1), blame:
            dcp.save(sd, checkpoint_id=ctx.dir)

    previous_survives(ctx, attempt)


def case_committing_fails_on_the_coordinator(ctx):
    """The data fits, the metadata does not."""

    def attempt():
        sd = {f"key{i:04}" * 4: i for i in range(400)}
        sd["w"] = shard(value("w", (12, 4)), mesh_of(ctx.size), Shard(0))
        planner = dcp.DefaultSavePlanner()
        with files_can_not_grow(ctx.rank == 0, limit_bytes=1 << 10):
            try:
                dcp.save(sd, checkpoint_id=ctx.dir, planner=planner)
            except torch_dcp.CheckpointException as error:
                assert error.args[0] == "write" and 0 in error.failures, error
            else:
                raise AssertionError("it was committed")

    previous_survives(ctx, attempt)


def case_overwrite_false_refuses_everywhere(ctx):
    def attempt():
        writer = dcp.FileSystemWriter(ctx.dir, overwrite=False)
        try:
            dcp.save(good(ctx), storage_writer=writer)
        except torch_dcp.CheckpointException as error:
            for cause, _ in error.failures.values():
                assert isinstance(cause, RuntimeError)
                assert str(cause) == "Checkpoint already exists and self.overwrite=False."
            assert set(error.failures) == set(range(ctx.size))
        else:
            raise AssertionError("it was overwritten")

    previous_survives(ctx, attempt)


def case_missing_key_on_one_rank(ctx):
    sd = good(ctx)
    dcp.save(sd, checkpoint_id=ctx.dir)
    for module in (torch_dcp, dcp):
        target = like(sd)
        if ctx.rank == 1:
            target["extra"] = torch.zeros(2)
        with raises_everywhere(
            "plan", 1, RuntimeError, "Missing key in checkpoint state_dict: extra."
        ):
            module.load(target, checkpoint_id=ctx.dir)


def case_load_of_nothing(ctx):
    for module in (torch_dcp, dcp):
        try:
            module.load({"w": torch.zeros(2)}, checkpoint_id=ctx.dir / "absent")
        except torch_dcp.CheckpointException as error:
            assert error.args[0] == "plan" and set(error.failures) == set(range(ctx.size))
            for rank, (cause, _) in error.failures.items():
                assert isinstance(cause, AssertionError), repr(cause)
                assert str(cause).startswith("metadata is None; global metadata read failed:")
                assert f"__{rank}.metadata" in str(cause)
        else:
            raise AssertionError("loaded nothing")


def case_corruption_is_named_on_every_rank(ctx):
    """[verify]"""
    sd = {"w": shard(value("w", (1 << 12, 64)), mesh_of(ctx.size), Shard(0))}
    dcp.save(sd, checkpoint_id=ctx.dir)
    ctx.barrier()
    if ctx.rank == 0:
        name = ctx.dir / "__1_0.distcp"
        size = os.path.getsize(name)
        with open(name, "r+b") as file:
            file.seek(size // 2)
            byte = file.read(1)
            file.seek(size // 2)
            file.write(bytes([byte[0] ^ 4]))
    ctx.barrier()
    with raises_everywhere("read", 1, dcp.NativeError, "__1_0.distcp"):
        dcp.load(like(sd), checkpoint_id=ctx.dir)
    before = dcp.configure(verify=False)
    try:
        dcp.load(like(sd), checkpoint_id=ctx.dir)
    finally:
        dcp.configure(verify=before.verify)


def case_a_removed_directory_fails_cleanly(ctx):
    import shutil

    dcp.save(good(ctx), checkpoint_id=ctx.dir / "x")
    ctx.barrier()
    if ctx.rank == 0:
        shutil.rmtree(ctx.dir / "x")
    ctx.barrier()
    sd = good(ctx, "again")
    dcp.save(sd, checkpoint_id=ctx.dir / "x")
    target = like(sd)
    dcp.load(target, checkpoint_id=ctx.dir / "x")
    assert_equal(target, sd)


def case_exceptions_that_do_not_pickle_keep_their_text(ctx):
    class Local(Exception):
        """Not importable: it can not be unpickled anywhere."""

    class Fails:
        def __reduce__(self):
            raise Local("only here")

    sd = {"o": Fails() if ctx.rank == 1 else 1}
    try:
        dcp.save(sd, checkpoint_id=ctx.dir)
    except torch_dcp.CheckpointException as error:
        assert "only here" in str(error.failures[1][0])
    else:
        raise AssertionError("saved")


def case_without_collectives_the_others_hear_of_a_failure(ctx):
    """[independent-failure]"""
    sd = {"w": torch.ones(1 << 16)}
    try:
        with files_can_not_grow(ctx.rank == 1):
            dcp.save(sd, checkpoint_id=ctx.dir, use_collectives=False)
    except OSError:
        assert ctx.rank == 1
    except torch_dcp.CheckpointException as error:
        assert ctx.rank != 1 and set(error.failures) == {1}, error
    else:
        raise AssertionError("nobody noticed")


def case_the_group_still_works_afterwards(ctx):
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == ctx.size
