"""Values across ranks: both ways between dcp_native and stock torch, resharded, replicated."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from common import assert_equal, gather_all, like, mesh_of, shard, sizes, value
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import dcp_native as dcp


def state(mesh, size):
    return {
        "model": {
            "even": shard(value("even", (8 * size, 6)), mesh, Shard(0)),
            "uneven": shard(value("uneven", (4 * size - 1, 5)), mesh, Shard(0)),
            "cols": shard(value("cols", (4, 9)), mesh, Shard(1)),
            "one": shard(value("one", (1, 3)), mesh, Shard(0)),
            "repl": shard(value("repl", (5, 5)), mesh, Replicate()),
            "bf16": shard(value("bf16", (300, 1100), torch.bfloat16), mesh, Shard(0)),
            "plain": value("plain", (11,), torch.bfloat16),
            "big": value("big", (1 << 19,), torch.float32),
        },
        "list": [value("list.0", (3, 3)), 5, {"deep": value("deep", ())}],
        "step": 17,
        "text": "adam",
        "none": None,
    }


def case_ours_loads_in_ours_and_in_torch(ctx):
    sd = state(mesh_of(ctx.size), ctx.size)
    dcp.save(sd, checkpoint_id=ctx.dir)
    assert dcp.last_report()["path"] == "native"
    ctx.barrier()
    for loader in (dcp, torch_dcp):
        target = like(sd)
        loader.load(target, checkpoint_id=ctx.dir)
        assert_equal(target, sd, loader.__name__)


def case_torchs_loads_in_ours(ctx):
    sd = state(mesh_of(ctx.size), ctx.size)
    torch_dcp.save(sd, storage_writer=torch_dcp.FileSystemWriter(ctx.dir, thread_count=2))
    ctx.barrier()
    target = like(sd)
    dcp.load(target, checkpoint_id=ctx.dir)
    assert dcp.last_report()["path"] == "native"
    assert_equal(target, sd)


def case_metadata_equals_torchs(ctx):
    sd = state(mesh_of(ctx.size), ctx.size)
    ours = dcp.save(sd, checkpoint_id=ctx.dir / "ours")
    theirs = torch_dcp.save(sd, checkpoint_id=ctx.dir / "theirs")
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.planner_data == theirs.planner_data
    assert set(ours.storage_data) == set(theirs.storage_data)
    assert ours.version == theirs.version


def case_reshards_between_placements(ctx):
    mesh = mesh_of(ctx.size)
    full = value("w", (13, 10))
    for index, (before, after) in enumerate(
        [
            (Shard(0), Shard(1)),
            (Shard(1), Shard(0)),
            (Shard(0), Replicate()),
            (Replicate(), Shard(1)),
        ]
    ):
        path = ctx.dir / str(index)
        dcp.save({"w": shard(full, mesh, before)}, checkpoint_id=path)
        target = {"w": shard(torch.zeros_like(full), mesh, after)}
        dcp.load(target, checkpoint_id=path)
        assert_equal(target["w"].full_tensor(), full, f"{before} -> {after}")


@sizes(4)
def case_two_dimensional_meshes(ctx):
    mesh = mesh_of(2, 2)
    full = value("w", (9, 7))
    placements = [
        (Shard(0), Shard(1)),
        (Shard(0), Shard(0)),
        (Replicate(), Shard(0)),
        (Shard(1), Replicate()),
        (_StridedShard(0, split_factor=2), Shard(0)),
    ]
    for index, before in enumerate(placements):
        path = ctx.dir / str(index)
        sd = {"w": shard(full, mesh, *before)}
        dcp.save(sd, checkpoint_id=path)
        for after in placements[:4]:
            target = {"w": shard(torch.zeros_like(full), mesh, *after)}
            dcp.load(target, checkpoint_id=path)
            assert_equal(target["w"].full_tensor(), full, f"{before} -> {after}")
        back = {"w": shard(torch.zeros_like(full), mesh, *placements[0])}
        torch_dcp.load(back, checkpoint_id=path)
        assert_equal(back["w"].full_tensor(), full, f"{before} in torch")


@sizes(4)
def case_a_mesh_of_some_ranks(ctx):
    from torch.distributed.device_mesh import DeviceMesh

    mesh = DeviceMesh("cpu", [0, 1])
    full = value("w", (6, 2))
    if ctx.rank < 2:
        local = full.chunk(2)[ctx.rank].clone()
    else:
        local = torch.empty(0, 2)
    whole = {"run_check": False, "shape": full.shape, "stride": full.stride()}
    sd = {"w": DTensor.from_local(local, mesh, [Shard(0)], **whole), "all": value("a", (4,))}
    dcp.save(sd, checkpoint_id=ctx.dir)
    blank = {
        "w": DTensor.from_local(torch.zeros_like(local), mesh, [Shard(0)], **whole),
        "all": torch.zeros(4),
    }
    dcp.load(blank, checkpoint_id=ctx.dir)
    if ctx.rank < 2:
        assert_equal(blank["w"].to_local(), local)
    assert_equal(blank["all"], sd["all"])


def case_replicas_are_written_once_and_balanced(ctx):
    """[dedup-bytes]"""
    sd = {f"r{i}": value(f"r{i}", (1 << 14,)) for i in range(4 * ctx.size)}
    dcp.save(sd, checkpoint_id=ctx.dir)
    kept = gather_all(dcp.last_report()["kept_items"])
    assert kept == [4] * ctx.size, kept
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    dcp.save(sd, checkpoint_id=ctx.dir / "lowest", planner=planner)
    kept = gather_all(dcp.last_report()["kept_items"])
    assert kept == [4 * ctx.size] + [0] * (ctx.size - 1), kept


def case_the_plan_is_reused_and_changes_are_noticed(ctx):
    mesh = mesh_of(ctx.size)
    group = dist.new_group()
    sd = {"w": shard(value("w", (8, 4)), mesh, Shard(0)), "step": 1}

    def save(index):
        dcp.save(sd, checkpoint_id=ctx.dir / str(index), process_group=group)
        target = like(sd)
        torch_dcp.load(target, checkpoint_id=ctx.dir / str(index), process_group=group)
        assert_equal(target, sd, f"save {index}")
        return dcp.last_report()["fast"]

    assert not save(0)
    sd["w"] = shard(value("w2", (8, 4)), mesh, Shard(0))
    sd["step"] = 2
    assert save(1), "equal structure reuses the plan"
    sd["w"] = shard(value("w2", (8, 4), torch.float64), mesh, Shard(0))
    assert not save(2), "another dtype"
    sd["w"] = shard(value("w2", (8, 4), torch.float64), mesh, Shard(1))
    assert not save(3), "another placement"
    sd["new"] = 3
    assert not save(4), "another key"
    assert save(5)
    if ctx.rank == ctx.size - 1:
        sd["mine"] = value("mine", (3,))
    dcp.save(sd, checkpoint_id=ctx.dir / "6", process_group=group)
    assert not dcp.last_report()["fast"], "a key on one rank only"


def case_saves_on_top_of_a_checkpoint(ctx):
    """[overwrite-order]"""
    mesh = mesh_of(ctx.size)
    for step in range(3):
        sd = {"w": shard(value(f"w{step}", (16, 4)), mesh, Shard(0)), "step": step}
        dcp.save(sd, checkpoint_id=ctx.dir)
        target = like(sd)
        torch_dcp.load(target, checkpoint_id=ctx.dir)
        assert_equal(target, sd, f"step {step}")
    ctx.barrier()
    data = [n for n in os.listdir(ctx.dir) if n.endswith(".distcp")]
    assert len(data) == ctx.size, data
    assert not [n for n in os.listdir(ctx.dir) if "claim" in n]


def case_writer_options_keep_their_meaning(ctx):
    sd = {f"t{i}": shard(value(f"t{i}", (64, 8)), mesh_of(ctx.size), Shard(0)) for i in range(5)}
    writer = dcp.FileSystemWriter(ctx.dir / "threads", thread_count=3)
    dcp.save(sd, storage_writer=writer)
    ctx.barrier()
    names = sorted(os.listdir(ctx.dir / "threads"))
    assert len([n for n in names if n.endswith(".distcp")]) == 3 * ctx.size, names
    writer = dcp.FileSystemWriter(ctx.dir / "single", single_file_per_rank=False)
    dcp.save(sd, storage_writer=writer)
    ctx.barrier()
    names = sorted(os.listdir(ctx.dir / "single"))
    assert len([n for n in names if n.endswith(".distcp")]) == 5 * ctx.size, names
    for path in ("threads", "single"):
        target = like(sd)
        torch_dcp.load(target, checkpoint_id=ctx.dir / path)
        assert_equal(target, sd, path)


def case_without_collectives_each_rank_has_its_own(ctx):
    sd = {"mine": value(f"rank{ctx.rank}", (7,)), "rank": ctx.rank}
    dcp.save(sd, checkpoint_id=ctx.dir, use_collectives=False)
    ctx.barrier()
    assert sorted(n for n in os.listdir(ctx.dir) if n.endswith(".metadata")) == [
        f"__{r}.metadata" for r in range(ctx.size)
    ]
    for loader in (dcp, torch_dcp):
        target = {"mine": torch.zeros(7), "rank": None}
        loader.load(target, checkpoint_id=ctx.dir)
        assert_equal(target, sd, loader.__name__)


def case_sharded_tensors(ctx):
    """The pre-DTensor class: two local shards on each rank, loaded as one DTensor and back."""
    from torch.distributed._shard.sharded_tensor import Shard as LocalShard
    from torch.distributed._shard.sharded_tensor import init_from_local_shards

    full = value("st", (4 * ctx.size, 3))

    def sharded(source):
        shards = [
            LocalShard.from_tensor_and_offsets(
                source[start : start + 2].clone(), [start, 0], ctx.rank
            )
            for start in (4 * ctx.rank, 4 * ctx.rank + 2)
        ]
        return init_from_local_shards(shards, *full.shape)

    for index, saver in enumerate((dcp, torch_dcp)):
        path = ctx.dir / str(index)
        saver.save({"st": sharded(full)}, checkpoint_id=path)
        target = {"st": sharded(torch.zeros_like(full))}
        dcp.load(target, checkpoint_id=path)
        for local in target["st"].local_shards():
            start = local.metadata.shard_offsets[0]
            assert_equal(local.tensor, full[start : start + 2])
        again = {"st": shard(torch.zeros_like(full), mesh_of(ctx.size), Shard(1))}
        dcp.load(again, checkpoint_id=path)
        assert_equal(again["st"].full_tensor(), full)
        stock = {"st": sharded(torch.zeros_like(full))}
        torch_dcp.load(stock, checkpoint_id=path)
        assert_equal(stock["st"].local_shards()[0].tensor, full[4 * ctx.rank : 4 * ctx.rank + 2])


def case_a_subgroup_saves_by_itself(ctx):
    group = dist.new_group([1])
    if ctx.rank == 1:
        sd = {"w": value("sub", (5,))}
        dcp.save(sd, checkpoint_id=ctx.dir, process_group=group)
        target = like(sd)
        dcp.load(target, checkpoint_id=ctx.dir, process_group=group)
        assert_equal(target, sd)


def case_another_coordinator(ctx):
    from torch.distributed.checkpoint.state_dict_saver import _save_state_dict as torch_save

    from dcp_native.state_dict_loader import _load_state_dict
    from dcp_native.state_dict_saver import _save_state_dict

    sd = {"w": shard(value("w", (8, 4)), mesh_of(ctx.size), Shard(0)), "step": 4}
    last = ctx.size - 1
    ours = _save_state_dict(sd, dcp.FileSystemWriter(ctx.dir / "o"), coordinator_rank=last)
    theirs = torch_save(sd, torch_dcp.FileSystemWriter(ctx.dir / "t"), coordinator_rank=last)
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert (dcp.last_report()["is_coordinator"]) == (ctx.rank == last)
    target = like(sd)
    _load_state_dict(target, dcp.FileSystemReader(ctx.dir / "o"), coordinator_rank=last)
    assert_equal(target, sd)


def case_partial_is_refused_with_torchs_text(ctx):
    mesh = mesh_of(ctx.size)
    sd = {"w": DTensor.from_local(torch.ones(3), mesh, [Partial()])}
    texts = []
    for module in (torch_dcp, dcp):
        try:
            module.save(sd, checkpoint_id=ctx.dir)
        except module.CheckpointException as error:
            texts.append({r: (type(e), str(e)) for r, (e, _) in error.failures.items()})
    assert len(texts) == 2 and texts[0] == texts[1], texts
