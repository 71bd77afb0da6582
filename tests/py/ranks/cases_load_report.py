"""What ranks are told of a load: damage that one of them meets, filters that differ, typos."""

from __future__ import annotations

import os

import torch
import torch.distributed.checkpoint as torch_dcp
from common import assert_equal, full, gather_all, like, mesh_of, raises_everywhere, shard, value
from torch.distributed.tensor import Shard

import dcp_native as dcp

ROWS = 64


class CustomPlanner(dcp.DefaultLoadPlanner):
    """Sends a load through torch's own implementation."""


def state(ctx):
    mesh = mesh_of(ctx.size)
    return {
        **{f"small{i}": shard(value(f"s{i}", (ROWS, 4)), mesh, Shard(0)) for i in range(3)},
        "large": shard(value("large", (4096, 512)), mesh, Shard(0)),
        "step": 3,
    }


def damage(ctx, fqn, owner):
    """Flips a bit in the payload of `owner`'s shard of `fqn`; returns its file's name and range."""
    metadata = torch_dcp.FileSystemReader(ctx.dir).read_metadata()
    ((info),) = [
        info
        for index, info in metadata.storage_data.items()
        if index.fqn == fqn and info.relative_path.startswith(f"__{owner}_")
    ]
    if ctx.rank == 0:
        with open(ctx.dir / info.relative_path, "r+b") as file:
            file.seek(info.offset + info.length // 2)
            (byte,) = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 32]))
    ctx.barrier()
    return info


def case_damage_that_one_rank_meets_is_raised_on_all_of_them(ctx):
    saved = state(ctx)
    dcp.save(saved, checkpoint_id=ctx.dir)
    info = damage(ctx, "large", 1)
    target = like(saved)
    try:
        dcp.load(target, checkpoint_id=ctx.dir)
    except dcp.LoadException as error:
        caught = error
    else:
        raise AssertionError("no LoadException")
    assert caught.args[0] == "read" and set(caught.failures) == {1}
    cause = caught.failures[1][0]
    assert isinstance(cause, dcp.NativeError) and cause.dcp_code == "CHECKSUM"
    at = int(str(cause).split("at byte ")[1].split(":")[0])
    assert "large in " in str(cause) and info.relative_path in str(cause)
    assert info.offset <= at < info.offset + info.length
    report = dcp.last_report()
    assert report["failed"] and "large in " in report["error"]
    names = {key: report[key] for key in ("filled", "partly", "untouched")}
    assert sorted(name for listed in names.values() for name in listed) == sorted(saved)
    assert tuple(names["filled"]) == caught.filled and tuple(names["partly"]) == caught.partly
    if ctx.rank == 1:
        assert names["partly"] == ["large"] and "step" in names["untouched"]
    else:
        assert not names["partly"] and names["untouched"] == ["step"] and target["step"] is None
    for name in names["filled"]:
        assert_equal(target[name], saved[name])
    said = f"rank {ctx.rank}: of the state dict's tensors and objects {len(caught.filled)} were"
    assert said in str(caught) and "do not train on them" in str(caught)
    ctx.barrier()
    dcp.load(target, checkpoint_id=ctx.dir, keys=["small*", "step"])
    assert not dcp.last_report()["failed"]


def case_verification_is_a_setting_of_each_call(ctx):
    saved = state(ctx)
    dcp.save(saved, checkpoint_id=ctx.dir)
    damage(ctx, "large", 0)
    dcp.load(like(saved), checkpoint_id=ctx.dir, verify=False)
    report = dcp.last_report()
    assert report["verified_bytes"] == 0 and report["verify"] is False
    with_check = [None] * ctx.size
    try:
        dcp.load(like(saved), checkpoint_id=ctx.dir, verify="strict")
    except dcp.CheckpointException as error:
        with_check[ctx.rank] = set(error.failures)
    assert with_check[ctx.rank] == {0}


def case_ranks_may_select_different_keys(ctx):
    saved = state(ctx)
    dcp.save(saved, checkpoint_id=ctx.dir)
    for planner in (None, CustomPlanner()):
        target = like(saved)
        keys = ["small0", "step"] if ctx.rank == 0 else ["small1"]
        dcp.load(target, checkpoint_id=ctx.dir, keys=keys, planner=planner)
        for name in saved:
            want = saved if name in keys else like(saved)
            assert_equal(target[name], want[name], name)
        assert dcp.last_report()["skipped_count"] == len(saved) - len(keys)
        dcp.load(target, checkpoint_id=ctx.dir, keys="large" if ctx.rank else [], planner=planner)
        assert_equal(target["large"], (saved if ctx.rank else like(saved))["large"])


def case_a_key_that_selects_nothing_on_one_rank_is_told_on_all(ctx):
    saved = state(ctx)
    dcp.save(saved, checkpoint_id=ctx.dir)
    for planner in (None, CustomPlanner()):
        target = like(saved)
        keys = ["small0", "lagre"] if ctx.rank == 1 else None
        with raises_everywhere("plan", 1, ValueError, "'lagre' selects nothing"):
            dcp.load(target, checkpoint_id=ctx.dir, keys=keys, planner=planner)
        assert dcp.last_report()["failed"]
        assert_equal(target, like(saved))


def case_keys_of_a_wrong_type_on_one_rank_are_told_on_all(ctx):
    saved = state(ctx)
    dcp.save(saved, checkpoint_id=ctx.dir)
    if ctx.rank == 0:
        try:
            dcp.load(like(saved), checkpoint_id=ctx.dir, keys=7)
        except TypeError as error:
            assert "keys must be" in str(error)
        else:
            raise AssertionError("no TypeError")
    else:
        with raises_everywhere("plan", 0, TypeError, "keys must be"):
            dcp.load(like(saved), checkpoint_id=ctx.dir)
    assert dcp.last_report()["failed"]


def case_resharded_and_missing_names_are_those_of_each_rank(ctx):
    saved = state(ctx)
    dcp.save(saved, checkpoint_id=ctx.dir)
    mesh = mesh_of(ctx.size)
    target = like(saved)
    target["small1"] = shard(torch.zeros(ROWS, 4), mesh, Shard(1))
    if ctx.rank == 1:
        target["only here"] = torch.zeros(2)
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(target, checkpoint_id=ctx.dir, planner=planner)
    report = dcp.last_report()
    assert report["resharded"] == ["small1"]
    assert report["missing"] == (["only here"] if ctx.rank == 1 else [])
    assert torch.equal(full(target["small1"]), full(saved["small1"]))
    wanted = gather_all(report["wanted_bytes"])
    assert len(set(wanted)) == 1 and report["unverified_bytes"] == 0
