"""Replicated tensors divided by rows over their holders: what is written, and who can read it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
import torch.distributed.checkpoint as torch_dcp
from common import assert_equal, gather_all, like, mesh_of, shard, value
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import Replicate, Shard

import dcp_native as dcp

LARGE_BYTES = 1 << 18
"""Smallest tensor that is cut here; `state` has six."""


@contextlib.contextmanager
def splitting(setting: str | int) -> Iterator[None]:
    before = dcp.configure(split_replicated=setting)
    try:
        yield
    finally:
        dcp.configure(**dataclasses.asdict(before))


def state(size: int) -> dict[str, object]:
    """As under DDP: the same on all ranks, a few tensors larger than all the rest."""
    stacked = value("stacked", (3, 500, 64))
    return {
        "embedding": value("embedding", (1021, 300)),
        "half": value("half", (4099, 77), torch.bfloat16),
        "turned": value("turned", (250, 513)).t(),
        "stacked": stacked,
        "every_second": value("every_second", (2000, 80))[::2, ::2],
        "parameter": torch.nn.Parameter(value("parameter", (100_003,))),
        "mesh": shard(value("mesh", (640, 128)), mesh_of(size), Replicate()),
        "small": {str(i): value(f"small{i}", (8, 8)) for i in range(20)},
        "step": 3,
    }


LARGE = ("embedding", "half", "turned", "stacked", "parameter", "mesh")


def check_chunks(tensor_metadata) -> None:
    """Ranges of one dimension, in order, that are the tensor."""
    size, chunks = tensor_metadata.size, tensor_metadata.chunks
    (dim,) = {d for c in chunks for d in range(len(size)) if c.sizes[d] != size[d]}
    at = 0
    for chunk in chunks:
        assert chunk.offsets[dim] == at and chunk.sizes[dim] > 0
        at += chunk.sizes[dim]
        for d in range(len(size)):
            assert d == dim or (chunk.offsets[d], chunk.sizes[d]) == (0, size[d])
    assert at == size[dim]


def case_only_the_chunks_of_large_tensors_differ(ctx):
    """[split-replicated]"""
    sd = state(ctx.size)
    with splitting("off"):
        whole = dcp.save(sd, checkpoint_id=ctx.dir / "whole")
        assert dcp.last_report()["cut_items"] == 0
    with splitting(LARGE_BYTES):
        cut = dcp.save(sd, checkpoint_id=ctx.dir / "cut")
    assert set(cut.state_dict_metadata) == set(whole.state_dict_metadata)
    assert cut.planner_data == whole.planner_data
    indices = set(whole.storage_data)
    for name, before in whole.state_dict_metadata.items():
        after = cut.state_dict_metadata[name]
        if name in LARGE:
            assert len(after.chunks) == ctx.size
            check_chunks(after)
            indices -= {MetadataIndex(name, before.chunks[0].offsets)}
            indices |= {MetadataIndex(name, c.offsets) for c in after.chunks}
            after = dataclasses.replace(after, chunks=before.chunks)
        assert after == before, name
    assert set(cut.storage_data) == indices
    payloads = gather_all(dcp.last_report()["payload_bytes"])
    assert max(payloads) < 1.05 * sum(payloads) / ctx.size, payloads


def case_the_metadata_is_that_of_a_tensor_sharded_by_rows(ctx):
    full = value("w", (64 * ctx.size, 1024))
    with splitting(LARGE_BYTES):
        ours = dcp.save({"w": full, "step": 1}, checkpoint_id=ctx.dir / "ours")
    sharded = {"w": shard(full, mesh_of(ctx.size), Shard(0)), "step": 1}
    theirs = torch_dcp.save(sharded, checkpoint_id=ctx.dir / "theirs")
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert set(ours.storage_data) == set(theirs.storage_data)
    by_index = {i: i.index for i in theirs.storage_data if i.fqn == "w"}
    assert {i: i.index for i in ours.storage_data if i.fqn == "w"} == by_index
    assert ours.planner_data == theirs.planner_data


def case_everybody_reads_the_parts(ctx):
    sd = state(ctx.size)
    with splitting(LARGE_BYTES):
        for step in range(3):  # a new plan, the plan reused
            dcp.save(sd, checkpoint_id=ctx.dir / "cut")
            assert dcp.last_report()["fast"] == (step > 0)
            assert dcp.last_report()["cut_items"] == len(LARGE)
            ctx.barrier()
            for module in (dcp, torch_dcp):
                target = like(sd)
                module.load(target, checkpoint_id=ctx.dir / "cut")
                assert_equal(target, sd, module.__name__)
    for placement in (Shard(0), Shard(1), Replicate()):
        for module in (dcp, torch_dcp):
            mesh = mesh_of(ctx.size)
            wanted = {k: sd[k] for k in ("embedding", "turned", "stacked")}
            target = {k: shard(torch.zeros_like(t), mesh, placement) for k, t in wanted.items()}
            module.load(target, checkpoint_id=ctx.dir / "cut")
            for k, t in wanted.items():
                assert_equal(target[k].full_tensor(), t, f"{k} as {placement}")
    if ctx.rank == 0:
        dcp_to_torch_save(ctx.dir / "cut", ctx.dir / "one.pt")
        back = torch.load(ctx.dir / "one.pt", weights_only=False)
        want = {k: t.full_tensor() if k == "mesh" else t for k, t in sd.items()}
        assert_equal(back, want)


def case_the_caller_may_scribble_after_an_async_save(ctx):
    sd, want = state(ctx.size), state(ctx.size)
    with splitting(LARGE_BYTES), torch.no_grad():
        for step in range(2):
            future = dcp.async_save(sd, checkpoint_id=ctx.dir / str(step))
            for name in LARGE:
                sd[name].zero_()
            future.result(timeout=60)
            assert dcp.last_report()["cut_items"] == len(LARGE)
            target = like(want)
            torch_dcp.load(target, checkpoint_id=ctx.dir / str(step))
            assert_equal(target, want)
            sd = state(ctx.size)


def case_a_tensor_within_a_ranks_share_stays_whole(ctx):
    """By default: nothing of a few kilobytes is worth a chunk more."""
    sd = state(ctx.size)
    dcp.save(sd, checkpoint_id=ctx.dir)
    assert dcp.last_report()["cut_items"] == 0


def case_one_dominant_tensor_is_divided_by_default(ctx):
    sd = {"w": torch.arange(18 << 20, dtype=torch.int32).view(-1, 1 << 10), "b": torch.ones(9)}
    metadata = dcp.save(sd, checkpoint_id=ctx.dir)
    assert len(metadata.state_dict_metadata["w"].chunks) == ctx.size
    payloads = gather_all(dcp.last_report()["payload_bytes"])
    assert max(payloads) <= (72 << 20) / ctx.size + 4096, payloads
    target = like(sd)
    torch_dcp.load(target, checkpoint_id=ctx.dir)
    assert_equal(target, sd)


def case_nothing_is_cut_where_torch_asks_for_whole_ones(ctx):
    sd = {"w": value("w", (1024, 128))}
    lowest = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    with splitting(1024):
        dcp.save(sd, checkpoint_id=ctx.dir / "lowest", planner=lowest)
        assert dcp.last_report()["cut_items"] == 0
        assert dcp.last_report()["kept_items"] == (1 if ctx.rank == 0 else 0)
        dcp.save(sd, checkpoint_id=ctx.dir / "alone", use_collectives=False)
        assert dcp.last_report()["cut_items"] == 0
        dcp.save(sd, checkpoint_id=ctx.dir / "cut")
        assert dcp.last_report()["cut_items"] == 1
    with splitting("off"):
        dcp.save(sd, checkpoint_id=ctx.dir / "off")
        assert not dcp.last_report()["fast"], "another setting is another plan"
        assert dcp.last_report()["cut_items"] == 0


def case_replicas_of_another_type_or_size_are_never_cut(ctx):
    last = ctx.rank == ctx.size - 1
    sd = {"w": value("w", (1024, 128), torch.int32 if last else torch.float32)}
    with splitting(1024):
        dcp.save(sd, checkpoint_id=ctx.dir / "type")
        assert dcp.last_report()["cut_items"] == 0
        assert sum(gather_all(dcp.last_report()["kept_items"])) == 1


def case_replicas_that_differ_are_mixed_row_by_row(ctx):
    """[split-replicated] torch keeps one rank's values; parts are each their writer's."""
    with splitting(1024):
        dcp.save({"w": torch.full((256, 16), float(ctx.rank))}, checkpoint_id=ctx.dir)
    target = {"w": torch.full((256, 16), -1.0)}
    dcp.load(target, checkpoint_id=ctx.dir)
    want = torch.arange(ctx.size).repeat_interleave(256 // ctx.size)
    assert_equal(target["w"], want[:, None].expand(256, 16).float())
