"""Tensors that describe their own shards (torch 2.14), cut over several ranks."""

from __future__ import annotations

import torch
import torch.distributed.checkpoint as torch_dcp
from checkpointable import blank, describe
from common import value

import dcp_native as dcp

ROWS = 12
KNOWN = hasattr(torch_dcp, "CheckpointableTensor")
"""Before torch 2.14 there are none, and nothing to check."""


def dealt(ctx, shift: int = 0) -> torch.Tensor:
    """Rows are dealt one by one, behind one row of padding; the last rank's first shard first."""
    rows = [r for r in range(ROWS) if (r + shift) % ctx.size == ctx.rank]
    local = torch.cat([torch.full((1, 3), -1.0), value("w", (ROWS, 3))[rows]])
    return describe(
        local,
        (ROWS, 3),
        tuple((r, 0) for r in rows),
        tuple((i + 1, 0) for i in range(len(rows))),
        tuple((1, 3) for _ in rows),
    )


def state(ctx, shift: int = 0) -> dict[str, torch.Tensor]:
    same = describe(
        value("same", (4, 2)), (4, 2), ((2, 0), (0, 0)), ((0, 0), (2, 0)), ((2, 2), (2, 2))
    )
    nothing = describe(torch.zeros(0, 2), (2, 2), (), (), ())
    whole = describe(value("zero", (2, 2)), (2, 2), ((0, 0),), ((0, 0),), ((2, 2),))
    return {"w": dealt(ctx, shift), "same": same, "zero": whole if ctx.rank == 0 else nothing}


def case_shards_of_all_ranks_make_the_tensor_and_are_dealt_anew(ctx):
    if not KNOWN:
        return
    for writer in (dcp, torch_dcp):
        path = ctx.dir / writer.__name__
        writer.save(state(ctx), checkpoint_id=path)
        if writer is dcp:
            assert dcp.last_report()["planner"] == "native"
        ctx.barrier()
        for module in (dcp, torch_dcp):
            for shift in range(ctx.size):
                want = state(ctx, shift)
                found = {key: blank(tensor) for key, tensor in want.items()}
                module.load(found, checkpoint_id=path)
                for key, tensor in want.items():
                    assert torch.equal(found[key], tensor), (writer, module, shift, key)
            full = {"w": torch.zeros(ROWS, 3), "zero": torch.zeros(2, 2)}
            module.load(full, checkpoint_id=path)
            assert torch.equal(full["w"], value("w", (ROWS, 3)))
            assert torch.equal(full["zero"], value("zero", (2, 2)))


def case_a_shard_that_every_rank_has_is_saved_once(ctx):
    if not KNOWN:
        return
    metadata = [m.save(state(ctx), checkpoint_id=ctx.dir / m.__name__) for m in (dcp, torch_dcp)]
    if ctx.rank == 0:
        ours, theirs = (m.state_dict_metadata for m in metadata)
        assert set(ours) == set(theirs)  # in an order that follows from who saves what
        for key, count in (("w", ROWS), ("same", 2), ("zero", 1)):
            cuts = [sorted((c.offsets, c.sizes) for c in of[key].chunks) for of in (ours, theirs)]
            assert cuts[0] == cuts[1] and len(cuts[0]) == count, (key, cuts)
            assert ours[key].properties == theirs[key].properties
            assert ours[key].size == theirs[key].size


def case_they_may_be_dealt_otherwise_from_save_to_save(ctx):
    """The plan of the save before must not be taken for this one's."""
    if not KNOWN:
        return
    for shift in (0, 1, 1, 0):
        dcp.save({"w": dealt(ctx, shift)}, checkpoint_id=ctx.dir / "again")
        ctx.barrier()
        full = {"w": torch.zeros(ROWS, 3)}
        torch_dcp.load(full, checkpoint_id=ctx.dir / "again")
        assert torch.equal(full["w"], value("w", (ROWS, 3))), shift
        ctx.barrier()


def case_targets_without_memory_stay_described(ctx):
    if not KNOWN:
        return
    dcp.save(state(ctx), checkpoint_id=ctx.dir / "c")
    ctx.barrier()
    want = dealt(ctx, 1)
    for module in (dcp, torch_dcp):
        found = {"w": blank(want, "meta")}
        module.load(found, checkpoint_id=ctx.dir / "c")
        assert torch.equal(found["w"][1:], want[1:])
