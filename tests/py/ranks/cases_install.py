"""install() with roles of the program's own: ours hands over to torch's code, and that returns.

Torch's functions call each other by names that now lead to ours.
"""

from __future__ import annotations

import contextlib
import itertools
import os

import torch
import torch.distributed.checkpoint as torch_dcp
import torch.distributed.checkpoint._async_process_executor as daemon
from common import assert_equal, like, mesh_of, shard, sizes, value
from torch.distributed.tensor import Shard

import dcp_native as dcp

WHO_SAVED = "who-saved"


class Writer(torch_dcp.FileSystemWriter):
    """Counts; and says in a file whose ``save`` the process has that it runs in."""

    calls = 0

    def write_data(self, plan, planner):
        type(self).calls += 1
        return super().write_data(plan, planner)

    def finish(self, metadata, results):
        super().finish(metadata, results)
        who = f"{os.getpid()} {torch_dcp.save.__module__}"
        (self.path / WHO_SAVED).write_text(who)


class Reader(torch_dcp.FileSystemReader):
    calls = 0

    def read_data(self, plan, planner):
        type(self).calls += 1
        return super().read_data(plan, planner)


class Saves(torch_dcp.DefaultSavePlanner):
    calls = 0

    def finish_plan(self, new_plan):
        type(self).calls += 1
        return super().finish_plan(new_plan)


class Loads(torch_dcp.DefaultLoadPlanner):
    calls = 0

    def commit_tensor(self, read_item, tensor):
        type(self).calls += 1
        return super().commit_tensor(read_item, tensor)


class Stager(torch_dcp.staging.BlockingAsyncStager):
    calls = 0

    def __init__(self):
        torch_dcp.staging.BlockingAsyncStager.__init__(self, False, False)

    def stage(self, state_dict):
        type(self).calls += 1
        return super().stage(state_dict)


@contextlib.contextmanager
def installed():
    dcp.install()
    try:
        assert torch_dcp.save is dcp.save and torch_dcp.load is dcp.load
        yield
    finally:
        dcp.uninstall()
        assert torch_dcp.save is not dcp.save


@contextlib.contextmanager
def calls(*roles):
    """Each role's hook is called in here, where there is a role."""
    before = [type(role).calls for role in roles if role is not None]
    yield
    after = [type(role).calls for role in roles if role is not None]
    assert all(b < a for b, a in zip(before, after, strict=True)), (roles, before, after)


def state(ctx, name):
    return {
        "m": {"w": shard(value(name, (12, 4)), mesh_of(ctx.size), Shard(0))},
        "replicated": value(name, (5,)),
        "step": name,
    }


def load_back(ctx, path, want):
    """By every combination of readers and planners, under install()."""
    for reader, planner in itertools.product((None, Reader(path)), (None, Loads())):
        target = like(want)
        with calls(reader, planner):
            torch_dcp.load(
                target,
                storage_reader=reader or torch_dcp.FileSystemReader(path),
                planner=planner,
            )
        assert_equal(target, want)


def case_saves_and_loads_with_any_roles(ctx):
    with installed():
        for i, (writer, planner) in enumerate(itertools.product((False, True), repeat=2)):
            path = ctx.dir / f"sync-{i}"
            writer = Writer(path) if writer else None
            planner = Saves() if planner else None
            want = state(ctx, f"s{i}")
            with calls(writer, planner):
                if writer is None:
                    torch_dcp.save(want, checkpoint_id=path, planner=planner)
                else:
                    torch_dcp.save(want, storage_writer=writer, planner=planner)
            ctx.barrier()
            load_back(ctx, path, want)


def case_background_saves_with_any_roles(ctx):
    with installed():
        for i, (writer, planner, stager) in enumerate(itertools.product((False, True), repeat=3)):
            path = ctx.dir / f"async-{i}"
            writer = Writer(path) if writer else torch_dcp.FileSystemWriter(path)
            planner, stager = Saves() if planner else None, Stager() if stager else None
            want = state(ctx, f"a{i}")
            seen = [role for role in (writer, planner, stager) if hasattr(role, "calls")]
            with calls(*seen):
                future = torch_dcp.async_save(
                    want, storage_writer=writer, planner=planner, async_stager=stager
                )
                metadata = future.result(60)
            assert sorted(metadata.state_dict_metadata) == ["m.w", "replicated", "step"]
            ctx.barrier()
            load_back(ctx, path, want)


@sizes(2)
def case_torchs_daemon_saves_and_may_have_us_installed_itself(ctx):
    """A writer of the program's own goes to torch's daemon, which imports dcp_native for it."""
    os.environ["DCP_NATIVE_INSTALL"] = "1"
    try:
        with installed():
            for name in ("first", "second"):
                want = state(ctx, name)
                torch_dcp.async_save(
                    want,
                    storage_writer=Writer(ctx.dir, overwrite=True),
                    async_checkpointer_type=dcp.AsyncCheckpointerType.PROCESS,
                ).result(120)
                ctx.barrier()
                load_back(ctx, ctx.dir, want)
                ctx.barrier()
            process = daemon._CHECKPOINT_PROCESS._save_process.pid
            pid, module = (ctx.dir / WHO_SAVED).read_text().split()
            assert int(pid) != os.getpid() and (ctx.rank != 0 or int(pid) == process)
            assert module == "dcp_native.state_dict_saver"
    finally:
        del os.environ["DCP_NATIVE_INSTALL"]


def case_checkpointer_with_any_roles(ctx):
    with installed():
        for i, (writer, reader) in enumerate(((Writer, Reader), (None, None))):
            path = ctx.dir / str(i)
            made = torch_dcp._checkpointer._Checkpointer(
                (writer or torch_dcp.FileSystemWriter)(path, overwrite=True),
                (reader or torch_dcp.FileSystemReader)(path),
                save_planner=Saves(),
                load_planner=Loads(),
                coordinator_rank=ctx.size - 1,
            )
            for step, save in enumerate((made.save, made.async_save)):
                want = state(ctx, f"c{i}-{step}")
                saved = save(want)
                if step == 1:
                    saved.result(60)
                target = like(want)
                made.load(target)
                assert_equal(target, want)
                ctx.barrier()


def case_deprecated_and_private_functions(ctx):
    want = state(ctx, "d")
    with installed():
        for i, roles in enumerate(((Writer, Reader), (None, None))):
            path = ctx.dir / str(i)
            writer = (roles[0] or torch_dcp.FileSystemWriter)(path)
            reader = (roles[1] or torch_dcp.FileSystemReader)(path)
            torch_dcp.save_state_dict(want, writer, coordinator_rank=ctx.size - 1)
            target = like(want)
            torch_dcp.load_state_dict(target, reader)
            assert_equal(target, want)
            keys = torch_dcp.state_dict_loader._load_state_dict_from_keys(
                "replicated", storage_reader=reader
            )
            assert torch.equal(keys["replicated"], want["replicated"])
