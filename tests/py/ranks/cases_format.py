"""Sharded checkpoints through the reader that was written from docs/format.md."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from common import full, mesh_of, shard, value
from runner import Context
from torch.distributed.tensor import Replicate, Shard

import dcp_native as dcp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def state_of(size: int) -> dict:
    mesh = mesh_of(size)
    return {
        "rows": shard(value("rows", (1001, 700)), mesh, Shard(0)),
        "columns": shard(value("columns", (9, 10), torch.bfloat16), mesh, Shard(1)),
        "short": shard(value("short", (1, 5)), mesh, Shard(0)),
        "replicated": shard(value("replicated", (400, 300)), mesh, Replicate()),
        "step": 7,
    }


def read_back(context: Context, state: dict, metadata: str = ".metadata") -> None:
    wanted = {k: full(v) for k, v in state.items() if isinstance(v, torch.Tensor)}
    context.barrier()
    if context.rank == 0:
        import format_reader

        checkpoint = format_reader.Checkpoint(context.dir, metadata)
        for name, tensor in wanted.items():
            flat = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            assert checkpoint.array(name) == flat, name
        assert checkpoint.value("step") == 7
    context.barrier()


def case_shards_are_where_the_document_says(context):
    dcp.save(state := state_of(context.size), checkpoint_id=context.dir)
    read_back(context, state)


def case_shards_of_a_background_save_are_there_too(context):
    state = state_of(context.size)
    dcp.async_save(
        state, checkpoint_id=context.dir, async_checkpointer_type=dcp.AsyncCheckpointerType.PROCESS
    ).result()
    read_back(context, state)


def case_divided_replicas_are_tensors_of_several_chunks(context):
    before = dcp.configure(split_replicated=1 << 16)
    try:
        dcp.save(state := state_of(context.size), checkpoint_id=context.dir)
    finally:
        dcp.configure(**vars(before))
    read_back(context, state)
