"""torch.save files: sharded checkpoints made into one, and one broadcast to all ranks."""

from __future__ import annotations

import torch
import torch.distributed.checkpoint as torch_dcp
from common import assert_equal, like, mesh_of, shard, value
from torch.distributed.checkpoint import format_utils as torch_utils
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import Replicate, Shard

import dcp_native as dcp
from dcp_native import format_utils


def state(ctx):
    mesh = mesh_of(ctx.size)
    return {
        "rows": shard(value("rows", (1 << 10, 300)), mesh, Shard(0)),
        "uneven": shard(value("uneven", (ctx.size + 1, 3)), mesh, Shard(0)),
        "one": shard(value("one", (1, 3)), mesh, Shard(0)),
        "columns": shard(value("columns", (300, 128)), mesh, Shard(1)),
        "whole": shard(value("whole", (50, 3)), mesh, Replicate()),
        "plain": value("plain", (7, 5)),
    }


def case_sharded_checkpoints_become_one_file(ctx):
    objects = {"step": 3, "list": [1, "x"]}
    for saver in (dcp, torch_dcp):
        path = ctx.dir / f"sharded-{saver.__name__}"
        saver.save({"m": state(ctx), "o": objects}, checkpoint_id=path)
        if ctx.rank == 0:
            torch_utils.dcp_to_torch_save(path, ctx.dir / "theirs.pt")
            format_utils.dcp_to_torch_save(path, ctx.dir / "ours.pt")
            ours, theirs = (torch.load(ctx.dir / f"{n}.pt") for n in ("ours", "theirs"))
            assert_equal(ours, theirs)
        ctx.barrier()


def case_one_file_is_broadcast_to_every_sharding(ctx):
    full = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state(ctx).items()}
    if ctx.rank == 0:
        torch.save({"m": full}, ctx.dir / "full.pt")
    ctx.barrier()
    for load in (dcp.load, torch_dcp.load):
        target = {"m": like(state(ctx))}
        load(
            target,
            storage_reader=format_utils.BroadcastingTorchSaveReader(ctx.dir / "full.pt"),
            planner=format_utils.DynamicMetaLoadPlanner(),
        )
        assert_equal(target, {"m": state(ctx)})


def case_lazy_tensors_are_broadcast_with_their_values_and_dtype(ctx):
    """[torch-file-broadcast] Only the coordinator would fail, the others wait for its bytes."""
    z = torch.complex(value("re", (6, 3)), value("im", (6, 3)))
    saved = {"conj": z.conj(), "neg": z.conj().imag, "scalar": z.conj()[0, 0]}
    saved["half"] = value("half", (4,)).half()
    assert saved["conj"].is_conj() and saved["neg"].is_neg()
    if ctx.rank == 0:
        torch.save(saved, ctx.dir / "lazy.pt")
    ctx.barrier()
    target = {name: torch.zeros_like(t).clone() for name, t in saved.items()}
    target["half"] = shard(torch.zeros(4), mesh_of(ctx.size), Shard(0))
    dcp.load(
        target,
        storage_reader=format_utils.BroadcastingTorchSaveReader(ctx.dir / "lazy.pt"),
        planner=format_utils.DynamicMetaLoadPlanner(),
    )
    target["half"] = target["half"].full_tensor().half()
    for name, tensor in saved.items():
        assert torch.equal(target[name], tensor), name


def case_a_broadcast_that_fails_fails_everywhere(ctx):
    if ctx.rank == 0:
        sparse = torch.eye(4).to_sparse()
        torch.save({"w": torch.ones(4), "sparse": sparse}, ctx.dir / "small.pt")
    ctx.barrier()
    for target, text in (
        ({"absent": torch.ones(4)}, "absent"),
        ({"w": torch.ones(5)}, "w: "),
        ({"w": torch.ones(4), "sparse": torch.ones(4, 4)}, "'sparse' is sparse"),
    ):
        try:
            dcp.load(
                target,
                storage_reader=format_utils.BroadcastingTorchSaveReader(ctx.dir / "small.pt"),
                planner=format_utils.DynamicMetaLoadPlanner(),
            )
        except CheckpointException as error:
            assert set(error.failures) == set(range(ctx.size)), error.failures
            assert all(text in str(cause) for cause, _ in error.failures.values()), error.failures
        else:
            raise AssertionError("no CheckpointException")
