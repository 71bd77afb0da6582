"""Metadata that only Python can rebuild, on several ranks: all go the same way, and none waits."""

from __future__ import annotations

import pickle

import torch
import torch.distributed.checkpoint as torch_dcp
from common import assert_equal, value
from torch.distributed.checkpoint.filesystem import _StorageInfo

import dcp_native as dcp


class Extra:
    """What others hang onto Metadata."""


class Info(_StorageInfo):
    """Where the loader needs the data."""


def hang_extra(metadata):
    metadata.mcore_data = Extra()


def own_infos(metadata):
    for key, info in metadata.storage_data.items():
        metadata.storage_data[key] = Info(**vars(info))


def rewrite(file, change):
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


def target():
    return {"w": torch.zeros(8, 3), "n": None}


def state(ctx):
    return {"w": value(f"w{ctx.rank}", (8, 3)), "n": ctx.rank}


def refused(ctx, ranks, name):
    """The load fails on every rank, naming what and on which ranks."""
    dcp.configure(allow_unsafe_objects=False)
    try:
        dcp.load(target(), checkpoint_id=ctx.dir)
    except dcp.CheckpointException as error:
        assert set(error.failures) == ranks, error
        for failure, _ in error.failures.values():
            assert isinstance(failure, pickle.UnpicklingError)
            assert name in str(failure) and "allow_unsafe_objects is off" in str(failure)
    else:
        raise AssertionError("loaded")
    finally:
        dcp.configure(allow_unsafe_objects=True)


def case_a_shared_file_is_stepped_over_or_goes_through_torch(ctx):
    for change, where, name in ((hang_extra, "native", "Extra"), (own_infos, "torch: ", "Info")):
        dcp.save({"w": value("w", (8, 3)), "n": 5}, checkpoint_id=ctx.dir)
        if ctx.rank == 0:
            rewrite(ctx.dir / ".metadata", change)
        ctx.barrier()
        loaded = target()
        dcp.load(loaded, checkpoint_id=ctx.dir)
        assert dcp.last_report()["planner"].startswith(where)
        assert_equal(loaded, {"w": value("w", (8, 3)), "n": 5})
        refused(ctx, set(range(ctx.size)), name)
        ctx.barrier()


def case_one_ranks_own_file_sends_all_ranks_the_same_way(ctx):
    for change, where, name in ((hang_extra, "native", "Extra"), (own_infos, "torch: ", "Info")):
        dcp.save(state(ctx), checkpoint_id=ctx.dir, use_collectives=False)
        ctx.barrier()
        if ctx.rank == 1:
            rewrite(ctx.dir / "__1.metadata", change)
        ctx.barrier()
        loaded = target()
        dcp.load(loaded, checkpoint_id=ctx.dir)
        assert dcp.last_report()["planner"].startswith(where)
        assert_equal(loaded, state(ctx))
        refused(ctx, {1}, name)
        ctx.barrier()


def case_damage_on_one_rank_is_not_hidden_by_another_ranks_fallback(ctx):
    dcp.save(state(ctx), checkpoint_id=ctx.dir, use_collectives=False)
    ctx.barrier()
    if ctx.rank == 1:
        rewrite(ctx.dir / "__1.metadata", own_infos)
    if ctx.rank == 0:
        file = ctx.dir / "__0.metadata"
        file.write_bytes(file.read_bytes()[:100])
    ctx.barrier()
    try:
        dcp.load(target(), checkpoint_id=ctx.dir)
    except torch_dcp.CheckpointException as error:
        assert "damaged" in str(error.failures[0][0]), error
    else:
        raise AssertionError("loaded")
