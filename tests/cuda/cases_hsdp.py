"""Four ranks on two devices, sharded in pairs and replicated over the pairs (HSDP)."""

from __future__ import annotations

import functools
from collections import Counter

import torch
import torch.distributed as dist
from cases_ranks import device
from device_values import blank, on, raw, same
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import dcp_native as dcp

KEYS = 16


@functools.cache
def mesh():
    device()
    return init_device_mesh("cuda", (2, 2), mesh_dim_names=("replica", "shard"))


def part(full: torch.Tensor) -> torch.Tensor:
    return full.chunk(2)[dist.get_rank() % 2].contiguous()


def tensor(full: torch.Tensor, local: torch.Tensor) -> DTensor:
    return DTensor.from_local(
        local, mesh(), [Replicate(), Shard(0)],
        run_check=False, shape=full.shape, stride=full.stride(),
    )  # fmt: skip


def case_each_shard_is_written_once_and_the_replicas_share_the_work(c):
    fulls = {f"w{i}": raw(torch.float32, 64, 32, seed=i) for i in range(KEYS)}
    dcp.save(
        {name: tensor(full, on(device(), part(full))) for name, full in fulls.items()},
        checkpoint_id=c.dir,
    )
    target = {
        name: tensor(full, blank(device(), {"x": part(full)})["x"]) for name, full in fulls.items()
    }
    dcp.load(target, checkpoint_id=c.dir)
    for name, full in fulls.items():
        assert same(target[name].to_local(), part(full)), name
    if c.rank == 0:
        stored = FileSystemReader(c.dir).read_metadata().storage_data
        assert len(stored) == 2 * KEYS
        writers = Counter(info.relative_path.split("_")[2] for info in stored.values())
        assert len(writers) == 4 and max(writers.values()) == KEYS // 2, writers
    c.barrier()
