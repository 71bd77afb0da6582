"""What the rank cases share: values that follow from names, comparisons, expected failures."""

from __future__ import annotations

import contextlib
import functools
import resource
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor


def sizes(*allowed: int) -> Callable:
    """A case that only makes sense on some numbers of ranks."""

    def mark(case: Callable) -> Callable:
        case.sizes = allowed
        return case

    return mark


def value(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Element i is (hash of name + i) modulo 251, the same on every rank."""
    seed = sum((i + 1) * b for i, b in enumerate(name.encode())) % 251
    count = 1
    for extent in shape:
        count *= extent
    flat = (torch.arange(count) + seed) % 251
    return (
        (flat % 2).bool().reshape(shape) if dtype == torch.bool else flat.to(dtype).reshape(shape)
    )


@functools.cache
def mesh_of(*shape: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    """One mesh of a shape per job: each has process groups, and each group has threads."""
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def shard(tensor: torch.Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    return distribute_tensor(tensor, mesh, list(placements), src_data_rank=None)


def full(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The same structure, filled with something else."""

    def blank(leaf: Any) -> Any:
        if isinstance(leaf, dict):
            return {k: blank(v) for k, v in leaf.items()}
        if isinstance(leaf, list):
            return [blank(v) for v in leaf]
        if isinstance(leaf, torch.Tensor):
            return torch.zeros_like(leaf)
        return None

    return blank(state_dict)


def assert_equal(got: Any, want: Any, where: str = "") -> None:
    if isinstance(want, dict):
        assert set(got) == set(want), (where, set(got) ^ set(want))
        for key in want:
            assert_equal(got[key], want[key], f"{where}.{key}")
    elif isinstance(want, list):
        assert len(got) == len(want), where
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            assert_equal(g, w, f"{where}.{i}")
    elif isinstance(want, DTensor):
        assert_equal(got.to_local(), want.to_local(), where)
    elif isinstance(want, torch.Tensor):
        assert got.dtype == want.dtype and got.shape == want.shape, where
        if want.numel():
            a, b = got.detach().contiguous(), want.detach().contiguous()
            assert torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)), where
    else:
        assert got == want, (where, got, want)


@contextlib.contextmanager
def raises_everywhere(step: str, rank: int, kind: type, text: str = "") -> Iterator[None]:
    """CheckpointException on this (every) rank, blaming exactly `rank` for `kind` with `text`."""
    try:
        yield
    except torch_dcp.CheckpointException as error:
        assert error.args[0] == step, error.args[0]
        assert set(error.failures) == {rank}, error.failures
        cause = error.failures[rank][0]
        assert isinstance(cause, kind), repr(cause)
        assert text in str(cause), str(cause)
    else:
        raise AssertionError("no CheckpointException")


@contextlib.contextmanager
def files_can_not_grow(here: bool, limit_bytes: int = 4096) -> Iterator[None]:
    """Every write beyond `limit_bytes` of a file fails with EFBIG in this process, if `here`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if here:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def gather_all(thing: Any) -> list[Any]:
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, thing)
    return out
