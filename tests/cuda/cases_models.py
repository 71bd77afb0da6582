"""Models as trainers have them on CUDA meshes: FSDP2, HSDP, tensor parallel, both, offload, meta.

They are torch's own modules, trained for two steps with torch's own optimizer (host_kernels.py).
What this package saves, torch loads, and the other way round, bit for bit; and a job that is
loaded goes on exactly as the one that was saved.  So it does where training went on meanwhile.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
import torch.distributed.checkpoint.state_dict as torch_state_dict
from cases_ranks import device
from common import sizes
from device_values import same
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import dcp_native as dcp
import dcp_native.state_dict as our_state_dict

if "DCP_FAKE_LIBRARIES" in os.environ:
    import host_kernels  # noqa: F401 (a real device has kernels of its own)

WIDTH, HIDDEN, WORDS = 12, 20, 9  # WORDS: rows that no number of ranks divides


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.up = torch.nn.Linear(WIDTH, HIDDEN)
        self.down = torch.nn.Linear(HIDDEN, WIDTH)
        self.register_buffer("scale", torch.full((3,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x)))) * self.scale[0]


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(WORDS, WIDTH)
        self.blocks = torch.nn.ModuleList([Block() for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.words(x)
        for block in self.blocks:
            x = block(x)
        return x


def shard(model: Model, mesh, **how) -> Model:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **how)
    return fully_shard(model, mesh=mesh, **how)


def split(model: Model, mesh) -> Model:
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def grid(*names: str):
    return init_device_mesh("cuda", (2, dist.get_world_size() // 2), mesh_dim_names=names)


def whole():
    return init_device_mesh("cuda", (dist.get_world_size(),))


def sharded(model: Model) -> Model:
    return shard(model, whole())


def in_half_precision(model: Model) -> Model:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return shard(model, whole(), mp_policy=policy)


def offloaded(model: Model) -> Model:
    return shard(model, whole(), offload_policy=CPUOffloadPolicy())


def partly_offloaded(model: Model) -> Model:
    """One block's parameters and optimizer on the CPU, the rest on the device."""
    mesh = whole()
    fully_shard(model.blocks[0], mesh=mesh, offload_policy=CPUOffloadPolicy())
    fully_shard(model.blocks[1], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def replicated(model: Model) -> Model:
    return shard(model, grid("replica", "shard"))


def tensor_parallel(model: Model) -> Model:
    return split(model.to(device()), whole())


def in_two_dimensions(model: Model) -> Model:
    mesh = grid("data", "model")
    return shard(split(model, mesh["model"]), mesh["data"])


def made(how, seed: int, steps: int = 2) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    device()
    torch.manual_seed(seed)
    model = how(Model())
    for buffer in model.buffers():
        assert buffer.device == device() or how in (offloaded, partly_offloaded)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    for step in range(steps):
        train(model, optimizer, step)
    return model, optimizer


def backward(model: torch.nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    words = torch.randint(0, WORDS, (4, 3), generator=generator).to(device())
    model(words).square().mean().backward()


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    backward(model, step)
    optimizer.step()
    optimizer.zero_grad()


def snapshot(state, at: str = "") -> dict[str, object]:
    """Copies of all that this rank holds, and where each lies."""
    if isinstance(state, dict):
        return {n: v for key in state for n, v in snapshot(state[key], f"{at}.{key}").items()}
    if isinstance(state, list):
        return {n: v for i, x in enumerate(state) for n, v in snapshot(x, f"{at}.{i}").items()}
    if isinstance(state, DTensor):
        state = state.to_local()
    if isinstance(state, torch.Tensor):
        return {f"{at} on {state.device}": state.detach().cpu().clone()}
    return {at: state}


def assert_equal(got: dict[str, object], want: dict[str, object]) -> None:
    assert list(got) == list(want)
    for name, value in want.items():
        if isinstance(value, torch.Tensor):
            assert same(got[name], value), name
        else:
            assert got[name] == value, name


def state_of(model, optimizer, names=our_state_dict) -> dict:
    model_state, optimizer_state = names.get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def layout(directory) -> tuple:
    """What a checkpoint says of its tensors, and which pieces it holds."""
    metadata = FileSystemReader(directory).read_metadata()
    tensors = metadata.state_dict_metadata
    for tensor in tensors.values():
        if hasattr(tensor, "chunks"):  # in the order of the ranks that write them: any will do
            tensor.chunks.sort(key=lambda chunk: tuple(chunk.offsets))
    pieces = {(index.fqn, tuple(index.offset or ())) for index in metadata.storage_data}
    return tensors, pieces


def written_bytes(directory) -> tuple[list[int], int]:
    """Bytes of tensors that each rank wrote, and of the largest piece."""
    metadata = FileSystemReader(directory).read_metadata()
    written, largest = [0] * dist.get_world_size(), 0
    for index, info in metadata.storage_data.items():
        tensor = metadata.state_dict_metadata[index.fqn]
        for chunk in getattr(tensor, "chunks", []):
            if chunk.offsets == index.offset:
                size_bytes = chunk.sizes.numel() * tensor.properties.dtype.itemsize
                written[int(info.relative_path.split("_")[2])] += size_bytes
                largest = max(largest, size_bytes)
    return written, largest


def goes_both_ways(c, how) -> None:
    model, optimizer = made(how, seed=1)
    state = state_of(model, optimizer)
    saved = snapshot(state)
    assert_equal(saved, snapshot(state_of(model, optimizer, torch_state_dict)))
    dcp.save(state, checkpoint_id=c.dir / "ours")
    assert dcp.last_report()["path"] == "native", dcp.last_report()["reason"]
    torch_dcp.save(state_of(model, optimizer, torch_state_dict), checkpoint_id=c.dir / "torch")
    ours, theirs = layout(c.dir / "ours"), layout(c.dir / "torch")
    assert ours[0] == theirs[0] and ours[1] == theirs[1]
    train(model, optimizer, step=2)
    expected = snapshot(state_of(model, optimizer))
    for name, loader in (("ours", torch_dcp), ("torch", dcp), ("ours", dcp)):
        other, other_optimizer = made(how, seed=2)
        target = state_of(other, other_optimizer)
        loader.load(target, checkpoint_id=c.dir / name)
        our_state_dict.set_state_dict(
            other, other_optimizer,
            model_state_dict=target["model"], optim_state_dict=target["optimizer"],
        )  # fmt: skip
        assert_equal(snapshot(state_of(other, other_optimizer)), saved)
        train(other, other_optimizer, step=2)
        assert_equal(snapshot(state_of(other, other_optimizer)), expected)
    c.barrier()


def case_fully_sharded(c):
    goes_both_ways(c, sharded)


def case_fully_sharded_in_half_precision(c):
    goes_both_ways(c, in_half_precision)


def case_fully_sharded_and_offloaded(c):
    goes_both_ways(c, offloaded)


def case_some_blocks_offloaded(c):
    goes_both_ways(c, partly_offloaded)


def trained_while_saved(c, how, mode: dcp.AsyncCheckpointerType) -> None:
    """Forward and backward run beside the copies, the optimizer once they are done, then more."""
    model, optimizer = made(how, seed=5)
    state = state_of(model, optimizer)
    saved = snapshot(state)
    stager = DefaultStager(StagingOptions())  # all of it: pinned, shared, in the background
    response = dcp.async_save(
        state, checkpoint_id=c.dir, async_checkpointer_type=mode, async_stager=stager
    )
    backward(model, step=2)
    response.staging_completion.result(timeout=60)
    optimizer.step()
    optimizer.zero_grad()
    train(model, optimizer, step=3)
    response.upload_completion.result(timeout=60)
    stager.close()
    report = response.upload_completion.report
    assert report["path"] == "native" and report["staging"] == "arena", report
    assert report["devices"] == [str(device())], report
    expected = snapshot(state_of(model, optimizer))
    for name, value in model.named_parameters():
        was = saved[f".model.{name} on {value.device}"]
        assert not was.numel() or not torch.equal(value.to_local().cpu(), was), name
    for loader in (dcp, torch_dcp):
        other, other_optimizer = made(how, seed=6)
        target = state_of(other, other_optimizer)
        loader.load(target, checkpoint_id=c.dir)
        our_state_dict.set_state_dict(
            other, other_optimizer,
            model_state_dict=target["model"], optim_state_dict=target["optimizer"],
        )  # fmt: skip
        assert_equal(snapshot(state_of(other, other_optimizer)), saved)
        for step in (2, 3):
            train(other, other_optimizer, step)
        assert_equal(snapshot(state_of(other, other_optimizer)), expected)
    c.barrier()


def case_training_goes_on_while_a_fully_sharded_model_is_saved(c):
    trained_while_saved(c, sharded, dcp.AsyncCheckpointerType.THREAD)


def case_training_goes_on_while_another_process_saves_it(c):
    trained_while_saved(c, sharded, dcp.AsyncCheckpointerType.PROCESS)


def case_training_goes_on_while_it_is_saved_partly_offloaded(c):
    trained_while_saved(c, partly_offloaded, dcp.AsyncCheckpointerType.THREAD)


def case_tensor_parallel(c):
    goes_both_ways(c, tensor_parallel)


def case_sharded_and_replicated(c):
    goes_both_ways(c, replicated)


@sizes(4)
def case_tensor_parallel_and_fully_sharded(c):
    goes_both_ways(c, in_two_dimensions)


@sizes(4)
def case_replicas_share_what_is_written(c):
    """Ranks i and i + 2 hold the same shards: what they write differs by one piece at most."""
    model, optimizer = made(replicated, seed=3)
    dcp.save(state_of(model, optimizer), checkpoint_id=c.dir)
    written, largest = written_bytes(c.dir)
    for rank in range(2):
        assert abs(written[rank] - written[rank + 2]) <= largest, (written, largest)
    held = sum(t.nbytes for t in snapshot(model.state_dict()).values())
    assert max(written) < 3 * held  # of parameters and two moments, not all of it
    c.barrier()


def case_modules_made_on_meta_are_filled_where_they_are_made_real(c):
    """As large models start: shards of meta tensors, to_empty() on the device, then the load."""
    model, _ = made(sharded, seed=4)
    dcp.save(model.state_dict(), checkpoint_id=c.dir)
    with torch.device("meta"):
        other = sharded(Model())
    assert all(p.is_meta for p in other.parameters())
    other.to_empty(device=device())
    state = other.state_dict()
    dcp.load(state, checkpoint_id=c.dir)
    assert_equal(snapshot(state), snapshot(model.state_dict()))
    assert_equal(snapshot(other.state_dict()), snapshot(model.state_dict()))
    c.barrier()
