"""Ranks of torchrun, a fake device each: DTensors of a CUDA mesh, votes and plans over NCCL."""

from __future__ import annotations

import functools

import fake
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from common import files_can_not_grow, raises_everywhere, value
from device_values import assert_same, back, blank, everywhere, layouts, on, overwrite, raw, same
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import dcp_native as dcp

THREAD, PROCESS = dcp.AsyncCheckpointerType.THREAD, dcp.AsyncCheckpointerType.PROCESS


def device() -> torch.device:
    index = dist.get_rank() % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def has_cpu_backend() -> bool:
    return "cpu" in str(dist.get_backend_config())


@functools.cache
def mesh():
    device()
    return init_device_mesh("cuda", (dist.get_world_size(),))


def sharded(full: torch.Tensor, dim: int = 0) -> DTensor:
    """As FSDP2 has it: this rank's rows (or columns) in a tensor of their own."""
    size, rank = dist.get_world_size(), dist.get_rank()
    chunks = full.chunk(size, dim)
    mine = chunks[rank] if rank < len(chunks) else full.narrow(dim, 0, 0)
    return DTensor.from_local(
        on(device(), mine.contiguous()), mesh(), [Shard(dim)],
        run_check=False, shape=full.shape, stride=full.stride(),
    )  # fmt: skip


def replicated(full: torch.Tensor) -> DTensor:
    return DTensor.from_local(on(device(), full), mesh(), [Replicate()], run_check=False)


def state_of(seed: int) -> dict:
    """A model's worth: shards by rows and columns, replicas, tensors of one rank, objects."""
    rank = dist.get_rank()
    return {
        "rows": sharded(raw(torch.float32, 10, 6, seed=seed)),
        "uneven": sharded(raw(torch.float32, 7, 3, seed=seed)),
        "columns": sharded(raw(torch.bfloat16, 5, 8, seed=seed), 1),
        "whole": replicated(raw(torch.float32, 6, 6, seed=seed)),
        f"only.{rank}": on(device(), raw(torch.float32, 9, 4, seed=seed + rank)),
        "strided": on(device(), raw(torch.float32, 8, 4, seed=seed).t()),
        "on_cpu": raw(torch.float32, 5, 5, seed=seed),
        "step": seed,
    }


def blank_of(state: dict) -> dict:
    """The same with other bytes."""
    made = {}
    for name, leaf in state.items():
        if isinstance(leaf, DTensor):
            local = blank(device(), {"x": back(leaf.to_local())})["x"]
            made[name] = DTensor.from_local(
                local, leaf.device_mesh, leaf.placements,
                run_check=False, shape=leaf.shape, stride=leaf.stride(),
            )  # fmt: skip
        elif isinstance(leaf, torch.Tensor):
            made[name] = blank(leaf.device, {"x": back(leaf)})["x"]
        else:
            made[name] = 0
    return made


def assert_state(got: dict, want: dict) -> None:
    assert set(got) == set(want)
    for name, leaf in want.items():
        if isinstance(leaf, DTensor):
            assert same(got[name].to_local(), leaf.to_local()), name
        elif isinstance(leaf, torch.Tensor):
            assert same(got[name], leaf), name
        else:
            assert got[name] == leaf, name


def assert_loads(path, state) -> None:
    target = blank_of(state)
    dcp.load(target, checkpoint_id=path)
    assert_state(target, state)


def case_sharded_and_replicated_tensors_come_back(c):
    state = state_of(1)
    dcp.save(state, checkpoint_id=c.dir)
    assert_loads(c.dir, state)


def case_stock_torch_reads_what_ranks_saved_from_their_devices(c):
    state = state_of(2)
    dcp.save(state, checkpoint_id=c.dir)
    if c.rank == 0:
        target = {
            "rows": torch.zeros(10, 6), "uneven": torch.zeros(7, 3), "whole": torch.zeros(6, 6),
            "columns": torch.zeros(5, 8, dtype=torch.bfloat16), "strided": torch.zeros(4, 8),
        }  # fmt: skip
        torch_dcp.load(target, checkpoint_id=c.dir, no_dist=True)
        want = {
            "rows": raw(torch.float32, 10, 6, seed=2), "uneven": raw(torch.float32, 7, 3, seed=2),
            "whole": raw(torch.float32, 6, 6, seed=2),
            "columns": raw(torch.bfloat16, 5, 8, seed=2),
            "strided": raw(torch.float32, 8, 4, seed=2).t(),
        }  # fmt: skip
        assert_same(target, want)
    c.barrier()


def case_plans_are_kept_from_one_save_to_the_next(c):
    for seed in (3, 4, 5):
        state = state_of(seed)
        dcp.save(state, checkpoint_id=c.dir)
        assert_loads(c.dir, state)


def case_background_saves_hold_the_values_of_the_call(c):
    if not has_cpu_backend():
        return  # async_save asks for one, as torch's does
    for mode in (THREAD, PROCESS):
        state = state_of(6)
        future = dcp.async_save(
            state, checkpoint_id=c.dir / mode.value, async_checkpointer_type=mode
        )
        overwrite({n: t for n, t in state.items() if type(t) is torch.Tensor})
        overwrite({n: t.to_local() for n, t in state.items() if isinstance(t, DTensor)})
        future.result(timeout=60)
        assert_loads(c.dir / mode.value, state_of(6))


def case_the_offload_of_some_tensors_to_the_cpu(c):
    """FSDP2 with CPU offload of a part: DTensors of the CUDA mesh whose shards are on the CPU."""
    full = raw(torch.float32, 12, 4, seed=8)
    local = full.chunk(c.size)[c.rank].clone()
    offloaded = DTensor.from_local(
        on(device(), local), mesh(), [Shard(0)], run_check=False,
        shape=full.shape, stride=full.stride(),
    )  # fmt: skip
    offloaded._local_tensor = local
    state = {"offloaded": offloaded, "on_device": sharded(full)}
    dcp.save(state, checkpoint_id=c.dir)
    target = blank_of({"x": sharded(full)})
    dcp.load({"offloaded": target["x"]}, checkpoint_id=c.dir)
    assert same(target["x"].to_local(), full.chunk(c.size)[c.rank])


def case_a_load_onto_other_shards(c):
    full = raw(torch.float32, 12, 8, seed=9)
    dcp.save({"x": sharded(full)}, checkpoint_id=c.dir)
    target = blank_of({"x": sharded(full, 1)})
    dcp.load(target, checkpoint_id=c.dir)
    assert same(target["x"].to_local(), full.chunk(c.size, 1)[c.rank])


def case_meta_tensors_are_made_on_the_device_of_the_rank(c):
    full = raw(torch.float32, 12, 8, seed=10)
    dcp.save({"x": sharded(full), "y": on(device(), full)}, checkpoint_id=c.dir)
    like = sharded(full)
    target = {
        "x": DTensor.from_local(
            torch.empty(like.to_local().shape, device="meta"), mesh(), [Shard(0)],
            run_check=False, shape=full.shape, stride=full.stride(),
        ),
        "y": torch.empty(12, 8, device="meta"),
    }  # fmt: skip
    dcp.load(target, checkpoint_id=c.dir)
    assert target["x"].to_local().device == device()
    assert same(target["x"].to_local(), full.chunk(c.size)[c.rank])
    assert same(target["y"], full)


def case_a_failure_of_one_rank_is_known_to_all(c):
    state = state_of(11)
    dcp.save(state, checkpoint_id=c.dir)
    large = {"large": sharded(value("large", (4000, 100)))}
    with raises_everywhere("write", 1, OSError), files_can_not_grow(c.rank == 1):
        dcp.save(large, checkpoint_id=c.dir)
    assert_loads(c.dir, state)


def case_an_error_of_one_ranks_device_is_known_to_all(c):
    """On a device that the group's communicator has no part of."""
    other = torch.device("cuda", (device().index + 1) % 2)
    state = everywhere(other, layouts(torch.float32))
    dcp.save(state, checkpoint_id=c.dir)
    torch.cuda.synchronize(other)
    c.barrier()
    if c.rank == 1:
        with (
            fake.dying(other.index, 1),
            pytest.raises(dcp.CheckpointException, match="illegal memory") as caught,
        ):
            dcp.save(state, checkpoint_id=c.dir)
    else:
        with pytest.raises(dcp.CheckpointException, match="illegal memory") as caught:
            dcp.save(state, checkpoint_id=c.dir)
    assert set(caught.value.failures) == {1}
    target = blank("cpu", layouts(torch.float32))
    dcp.load(target, checkpoint_id=c.dir)
    assert_same(target, layouts(torch.float32))


def connected_group() -> dist.ProcessGroup:
    """A group of its own, for a group's first save decides over what its ranks agree."""
    group = dist.new_group()
    dist.all_reduce(torch.zeros(1, device=device()), group=group)
    torch.cuda.current_stream().synchronize()
    return group


def saved_over(group, path, comm: str) -> dict:
    dcp.configure(comm=comm)
    try:
        dcp.save({"x": sharded(raw(torch.float32, 10, 6))}, checkpoint_id=path, process_group=group)
    finally:
        dcp.configure(comm="auto")
    return dcp.last_report()


def case_the_report_says_over_what_the_ranks_agreed(c):
    assert saved_over(connected_group(), c.dir / "auto", "auto")["comm"] == "nccl"
    assert saved_over(connected_group(), c.dir / "nccl", "nccl")["comm"] == "nccl"
    if has_cpu_backend():
        assert saved_over(connected_group(), c.dir / "cpu", "cpu")["comm"] == "gloo"
    c.barrier()


def case_a_communicator_that_fails_is_an_error_of_the_save_within_its_deadline(c):
    """On all ranks: ncclRemoteError, found asynchronously by the first operation of the save."""
    group = connected_group()
    state = {"x": sharded(raw(torch.float32, 10, 6))}
    dcp.save(state, checkpoint_id=c.dir, process_group=group)
    assert dcp.last_report()["comm"] == "nccl"
    fake.set_nccl_faults("async=6@1")
    with pytest.raises((dcp.CheckpointException, dcp.NativeError, RuntimeError), match=r"(?i)nccl"):
        dcp.save(state, checkpoint_id=c.dir, process_group=group)
    fake.set_nccl_faults("")
    assert_loads(c.dir, state)
