"""Incremental saves by several ranks: each links what it reuses, one metadata names it all."""

from __future__ import annotations

import os
import shutil
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from common import (
    assert_equal,
    files_can_not_grow,
    gather_all,
    like,
    mesh_of,
    raises_everywhere,
    shard,
    value,
)
from torch.distributed.tensor import Shard

import dcp_native as dcp

COUNT = 20


def setting(links="hard", content_hash=True):
    return dcp.configure(incremental_links=links, content_hash=content_hash)


def state(ctx, changed=(), dim=0):
    mesh = mesh_of(ctx.size)
    sd = {}
    for i in range(COUNT):
        name = f"w{i:02}"
        sd[name] = shard(value(name + "!" * (i in changed), (240, 60)), mesh, Shard(dim))
    sd["replicated"] = value("replicated", (100, 100))
    sd[f"own{ctx.rank}"] = value(f"own{ctx.rank}", (50,))
    sd["step"] = len(changed)
    return sd


def check_loads(ctx, path, want):
    for module in (dcp, torch_dcp):
        target = like(want)
        module.load(target, checkpoint_id=path)
        assert_equal(target, want, module.__name__)
    ctx.barrier()


def remove(ctx, path):
    ctx.barrier()
    if ctx.rank == 0:
        shutil.rmtree(path)
    ctx.barrier()


def case_five_percent_changed_write_five_percent(ctx):
    setting()
    dcp.save(state(ctx), checkpoint_id=ctx.dir / "a")
    full = dcp.last_report()["file_bytes"]
    dcp.save(state(ctx, {3}), checkpoint_id=ctx.dir / "b", base=ctx.dir / "a")
    report = dcp.last_report()
    assert report["incremental"] and report["base_reason"] is None, report
    assert report["linked_files"] == 1 and report["file_bytes"] < 0.1 * full, report
    remove(ctx, ctx.dir / "a")
    check_loads(ctx, ctx.dir / "b", state(ctx, {3}))


def case_a_background_save_is_incremental_too(ctx):
    setting()
    dcp.save(state(ctx), checkpoint_id=ctx.dir)
    for changed in ({3}, {3, 4}):
        future = dcp.async_save(state(ctx, changed), checkpoint_id=ctx.dir, base=ctx.dir)
        future.result(timeout=60)
        assert dcp.last_report()["reused_items"] >= COUNT - 1, dcp.last_report()
        ctx.barrier()
        check_loads(ctx, ctx.dir, state(ctx, changed))


def case_another_placement_reuses_what_is_the_same_in_both(ctx):
    setting()
    dcp.save(state(ctx, dim=1), checkpoint_id=ctx.dir / "a")
    dcp.save(state(ctx), checkpoint_id=ctx.dir / "b", base=ctx.dir / "a")
    report = dcp.last_report()
    assert report["reused_items"] == 0 and "sharding" in report["base_reason"], report
    check_loads(ctx, ctx.dir / "b", state(ctx))


def case_fewer_ranks_take_files_of_more(ctx):
    """The base is of all ranks, the save of all but the last."""
    setting()
    few = dist.new_group(list(range(ctx.size - 1)))
    sd = {f"r{i}": value(f"r{i}", (500, 100)) for i in range(12)}
    dcp.save(sd, checkpoint_id=ctx.dir / "a")
    kept = gather_all(dcp.last_report()["kept_items"])
    assert min(kept) > 0
    if ctx.rank < ctx.size - 1:
        dcp.save(sd, checkpoint_id=ctx.dir / "b", base=ctx.dir / "a", process_group=few)
        report = dcp.last_report()
        # A rank reuses of a file what it now keeps; the half-live rule may leave some of it.
        assert report["reused_items"] > 0 or report["base_reason"], report
    ctx.barrier()
    check_loads(ctx, ctx.dir / "b", sd)


def case_a_base_on_some_ranks_only_is_no_base(ctx):
    setting()
    dcp.save(state(ctx), checkpoint_id=ctx.dir / "a")
    base = ctx.dir / "a" if ctx.rank != 1 else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dcp.save(state(ctx, {1}), checkpoint_id=ctx.dir / "b", base=base)
    assert any("base" in str(w.message) for w in caught)
    report = dcp.last_report()
    assert not report["incremental"] and report["reused_items"] == 0
    assert (report["base_reason"] == "another rank was given no base") == (ctx.rank != 1)
    check_loads(ctx, ctx.dir / "b", state(ctx, {1}))


def case_a_rank_that_breaks_off_leaves_no_link_and_nobody_waiting(ctx):
    from dcp_native._save import NativeSave

    setting()
    dcp.save(state(ctx), checkpoint_id=ctx.dir / "a")
    ctx.barrier()
    names = sorted(os.listdir(ctx.dir / "a"))
    ctx.barrier()  # the next save puts its claim there
    for step in ("compare", "write"):
        original = getattr(NativeSave, step)

        def interrupted(self, step=step):
            raise KeyboardInterrupt(step)

        if ctx.rank == 1:
            setattr(NativeSave, step, interrupted)
            try:
                dcp.save(state(ctx, {1}), checkpoint_id=ctx.dir / "a", base=ctx.dir / "a")
            except KeyboardInterrupt:
                pass
            else:
                raise AssertionError("the interrupt was lost")
            finally:
                setattr(NativeSave, step, original)
        else:
            told_in = "plan" if step == "compare" else "write"
            with raises_everywhere(told_in, 1, KeyboardInterrupt, step):
                dcp.save(state(ctx, {1}), checkpoint_id=ctx.dir / "a", base=ctx.dir / "a")
        ctx.barrier()
        assert sorted(os.listdir(ctx.dir / "a")) == names, os.listdir(ctx.dir / "a")
        ctx.barrier()
    check_loads(ctx, ctx.dir / "a", state(ctx))


def case_writing_fails_on_one_rank_and_all_links_go(ctx):
    setting()
    dcp.save(state(ctx), checkpoint_id=ctx.dir)
    ctx.barrier()
    names = sorted(os.listdir(ctx.dir))
    ctx.barrier()  # the next save puts its claim there
    blame = raises_everywhere("write", 1, OSError, "__1_")
    with files_can_not_grow(ctx.rank == 1), blame:
        dcp.save(state(ctx, {1, 2}), checkpoint_id=ctx.dir, base=ctx.dir)
    ctx.barrier()
    assert sorted(os.listdir(ctx.dir)) == names, os.listdir(ctx.dir)
    ctx.barrier()
    dcp.save(state(ctx, {1, 2}), checkpoint_id=ctx.dir, base=ctx.dir)
    check_loads(ctx, ctx.dir, state(ctx, {1, 2}))


def case_independent_saves_are_incremental_each_for_itself(ctx):
    setting()
    mine = {f"w{i}": value(f"{ctx.rank}-{i}", (300, 50)) for i in range(10)}
    dcp.save(mine, checkpoint_id=ctx.dir / "a", use_collectives=False)
    mine["w3"] = mine["w3"] + 1
    dcp.save(mine, checkpoint_id=ctx.dir / "b", use_collectives=False, base=ctx.dir / "a")
    assert dcp.last_report()["reused_items"] == 9, dcp.last_report()
    ctx.barrier()
    target = like(mine)
    dcp.load(target, checkpoint_id=ctx.dir / "b")
    assert_equal(target, mine)
    assert torch.equal(target["w3"], mine["w3"])


def case_rows_of_divided_replicas_are_compared_as_they_are_written(ctx):
    setting()
    dcp.configure(split_replicated=4096)
    try:
        sd = {
            "dense": value("dense", (4096, 16)),
            "strided": value("strided", (64, 512)).t(),
            "changed": value("changed", (30, 50)),
        }
        dcp.save(sd, checkpoint_id=ctx.dir / "a")
        assert dcp.last_report()["cut_items"] == 3, dcp.last_report()
        sd["changed"] = sd["changed"] + 1
        for path, base in (("b", "a"), ("c", "b")):
            dcp.save(sd, checkpoint_id=ctx.dir / path, base=ctx.dir / base)
            report = dcp.last_report()
            assert report["cut_items"] == 3, report
            assert report["reused_items"] == (2 if path == "b" else 3), report
            check_loads(ctx, ctx.dir / path, sd)
    finally:
        dcp.configure(split_replicated="auto")
