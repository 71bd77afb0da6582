"""Read once across ranks: replicas and reshards through shared memory, and what ends it early."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from common import assert_equal, gather_all, like, mesh_of, raises_everywhere, shard, sizes, value
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import Replicate, Shard

import dcp_native as dcp

MIB = 1 << 20


def replicas() -> dict:
    """As under DDP: every rank holds all of it; 10 MiB that can be shared, and small things."""
    return {
        "model": {
            "large": value("large", (1100, 2048)),
            "turned": value("turned", (700, 500)).t(),
            "half": value("half", (256, 257), torch.bfloat16),
            "small": value("small", (33,)),
        },
        "step": 3,
    }


def load(state: dict, path: Path, **settings) -> dict:
    before = dcp.config()
    dcp.configure(**settings)
    try:
        dcp.load(state, checkpoint_id=path)
    finally:
        dcp.configure(read_once=before.read_once, verify=before.verify)
    return dcp.last_report()


def own_segments() -> list[str]:
    return [n for n in os.listdir("/dev/shm") if n.startswith("dcp_native-") and
            n.split("-")[3] == str(os.getpid())]  # fmt: skip


def case_replicas_are_read_by_one_rank(ctx):
    saved = replicas()
    dcp.save(saved, checkpoint_id=ctx.dir)
    ctx.barrier()
    target = like(saved)
    report = load(target, ctx.dir)
    assert_equal(target, saved)
    assert report["share_reason"] == ""
    assert report["unverified_bytes"] == 0
    reports = gather_all(report)
    once = sum(t.numel() * t.element_size() for t in (saved["model"]["large"],
               saved["model"]["turned"], saved["model"]["half"]))  # fmt: skip
    assert sum(r["shared_bytes"] for r in reports) == once * (ctx.size - 1), reports
    assert sum(r["read_bytes"] for r in reports) < once * 1.05, reports
    assert not own_segments()


def case_replicas_are_broadcast_over_a_group(ctx):
    saved = replicas()
    dcp.save(saved, checkpoint_id=ctx.dir)
    ctx.barrier()
    target = like(saved)
    report = load(target, ctx.dir, read_once="group")
    assert_equal(target, saved)
    assert report["unverified_bytes"] == 0
    reports = gather_all(report)
    once = sum(t.numel() * t.element_size() for t in (saved["model"]["large"],
               saved["model"]["turned"], saved["model"]["half"]))  # fmt: skip
    assert sum(r["shared_bytes"] for r in reports) == once * (ctx.size - 1), reports
    assert sum(r["read_bytes"] for r in reports) < once * 1.05, reports
    assert all(r["read_bytes"] < once / ctx.size + 5 * MIB for r in reports), reports


def case_a_group_reads_together_only_what_all_ranks_want(ctx):
    saved = replicas()
    dcp.save(saved, checkpoint_id=ctx.dir)
    ctx.barrier()
    target = like(saved)
    if ctx.rank == 0:
        del target["model"]["large"]
    report = load(target, ctx.dir, read_once="group")
    for name, tensor in target["model"].items():
        assert torch.equal(tensor, saved["model"][name]), name
    assert sum(r["shared_bytes"] for r in gather_all(report)) > 0


def case_a_group_of_ranks_that_do_not_all_ask_for_it_loads_too(ctx):
    saved = replicas()
    dcp.save(saved, checkpoint_id=ctx.dir)
    ctx.barrier()
    target = like(saved)
    load(target, ctx.dir, read_once="group" if ctx.rank == 0 else "host")
    assert_equal(target, saved)


def case_off_gives_the_same(ctx):
    saved = replicas()
    dcp.save(saved, checkpoint_id=ctx.dir)
    ctx.barrier()
    target = like(saved)
    report = load(target, ctx.dir, read_once="off")
    assert_equal(target, saved)
    assert report["shared_bytes"] == 0
    assert report["share_reason"] == "read_once is off"
    assert sum(r["read_bytes"] for r in gather_all(report)) > ctx.size * 10 * MIB


def case_ranks_with_other_settings_load_too(ctx):
    saved = replicas()
    dcp.save(saved, checkpoint_id=ctx.dir)
    ctx.barrier()
    for settings in ({"read_once": "off"}, {"verify": "strict"}, {"verify": False}):
        target = like(saved)
        report = load(target, ctx.dir, **(settings if ctx.rank == 1 else {}))
        assert_equal(target, saved)
        assert ctx.rank != 1 or report["shared_bytes"] == 0


@sizes(2)
def case_resharding_reads_every_byte_once(ctx):
    mesh = mesh_of(ctx.size)
    full = value("w", (2048, 1024))
    dcp.save({"w": shard(full, mesh, Shard(0))}, checkpoint_id=ctx.dir)
    ctx.barrier()
    for placement in (Shard(1), Replicate()):
        target = {"w": shard(torch.zeros_like(full), mesh, placement)}
        report = load(target, ctx.dir)
        assert_equal(target, {"w": shard(full, mesh, placement)})
        reports = gather_all(report)
        assert sum(r["read_bytes"] for r in reports) < full.numel() * 4 * 1.1, reports
        assert all(r["unverified_bytes"] == 0 for r in reports)
        assert all(r["shared_bytes"] > 0 for r in reports)


def case_shards_that_nobody_else_wants_are_read_apart(ctx):
    mesh = mesh_of(ctx.size)
    saved = {"w": shard(value("w", (1024 * ctx.size, 1024)), mesh, Shard(0))}
    dcp.save(saved, checkpoint_id=ctx.dir)
    ctx.barrier()
    target = like(saved)
    report = load(target, ctx.dir)
    assert_equal(target, saved)
    assert report["shared_bytes"] == 0
    assert report["share_reason"] != ""
    assert not own_segments()


def case_damage_is_blamed_on_the_rank_that_read_it(ctx):
    damage_is_blamed(ctx, "host")


def case_damage_is_blamed_on_the_rank_that_broadcasts_it(ctx):
    damage_is_blamed(ctx, "group")


def damage_is_blamed(ctx, read_once: str) -> None:
    saved = replicas()
    dcp.save(saved, checkpoint_id=ctx.dir)
    ctx.barrier()
    if ctx.rank == 0:
        file = max(ctx.dir.glob("*.distcp"), key=lambda p: p.stat().st_size)
        with open(file, "r+b") as f:
            f.seek(file.stat().st_size // 2)
            byte = f.read(1)
            f.seek(-1, os.SEEK_CUR)
            f.write(bytes([byte[0] ^ 0x40]))
    ctx.barrier()
    try:
        load(like(saved), ctx.dir, read_once=read_once)
    except CheckpointException as error:
        assert len(error.failures) == 1, error.failures
        (rank, (cause, _)) = next(iter(error.failures.items()))
        assert cause.dcp_code == "CHECKSUM" and "model." in str(cause), repr(cause)
        assert len(set(gather_all(rank))) == 1
    else:
        raise AssertionError("no CheckpointException")
    assert not own_segments()


def case_a_rank_that_can_not_open_a_file_is_named_alone(ctx):
    saved = replicas()
    dcp.save(saved, checkpoint_id=ctx.dir)
    ctx.barrier()
    if ctx.rank == 0:
        for file in ctx.dir.glob("*.distcp"):
            file.unlink()
    ctx.barrier()
    try:
        load(like(saved), ctx.dir)
    except CheckpointException as error:
        causes = {getattr(cause, "dcp_code", None) for cause, _ in error.failures.values()}
        assert causes == {"NOENT"}, error.failures
    else:
        raise AssertionError("no CheckpointException")
    assert not own_segments()


def case_a_rank_that_is_interrupted_before_it_reads_is_not_waited_for(ctx):
    saved = replicas()
    dcp.save(saved, checkpoint_id=ctx.dir)
    ctx.barrier()
    native, calls = dcp._load._native.Load, []

    class Interrupted:
        def __init__(self, *args, **kwargs):
            self.load = native(*args, **kwargs)

        def __getattr__(self, name):
            return getattr(self.load, name)

        def read(self, receiver):
            calls.append(receiver)
            raise ValueError("before reading")

    if ctx.rank == 1:
        dcp._load._native.Load = Interrupted
    try:
        for read_once in ("host", "group"):
            with raises_everywhere("read", 1, ValueError):
                load(like(saved), ctx.dir, read_once=read_once)
    finally:
        dcp._load._native.Load = native
    assert len(calls) == (2 if ctx.rank == 1 else 0)
    target = like(saved)
    load(target, ctx.dir, read_once="group")
    assert_equal(target, saved)
    assert not own_segments()


def case_a_rank_that_fails_before_it_reads_is_not_waited_for(ctx):
    saved = replicas()
    dcp.save(saved, checkpoint_id=ctx.dir)
    ctx.barrier()
    target = like(saved)
    if ctx.rank == 1:
        target["model"]["large"] = torch.zeros(3, 3)
    with raises_everywhere("plan", 1, ValueError):
        load(target, ctx.dir)
    assert not own_segments()
