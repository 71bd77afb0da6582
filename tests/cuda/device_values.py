"""Tensors of a fake device and back, without launching a kernel: the fakes run none of torch's.

A device tensor is made by one copy of a whole storage and seen through set_(), and compared the
same way: what lies between the elements of a strided tensor is compared too, where a case asks.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.uint16,
    torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip
SECOND = "cuda:1" if torch.cuda.device_count() > 1 else "cuda:0"
"""Another device than the first, where there is one."""


def raw(dtype: torch.dtype, *shape: int, seed: int = 1) -> torch.Tensor:
    """Bytes of a dtype that follow from the seed (bool: 0 and 1)."""
    generator = torch.Generator().manual_seed(seed * 1000 + len(shape))
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    size = torch.empty((), dtype=dtype).element_size()
    count = torch.Size(shape).numel() * size
    data = torch.randint(1, 100, (count,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


def layouts(dtype: torch.dtype, seed: int = 1) -> dict[str, torch.Tensor]:
    """CPU tensors of all layouts, no two of which share memory."""

    def base(at: int) -> torch.Tensor:
        return raw(dtype, 40, 30, seed=seed * 100 + at)

    large = raw(dtype, 700, 300, seed=seed)
    images = raw(dtype, 2, 3, 5, 7, seed=seed)
    channels_last = torch.empty_strided((2, 3, 5, 7), (105, 1, 21, 3), dtype=dtype)
    channels_last.copy_(images)
    return {
        "plain": base(1), "scalar": raw(dtype, 1).reshape(()), "empty": raw(dtype, 0, 3),
        "transposed": base(2).t(), "rows": base(3)[3:9], "columns": base(4)[:, 4:11],
        "steps": base(5)[::3, ::2], "flat": base(6).view(-1)[5:77], "large": large,
        "large_columns": raw(dtype, 500, 400, seed=seed)[:, 7:391], "one": raw(dtype, 1, 1, 1),
        "permuted": raw(dtype, 3, 4, 5).permute(2, 0, 1), "channels_last": channels_last,
    }  # fmt: skip


def on(device: str | torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's whole storage, and the tensor in it, on a device."""
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    there = torch.empty(storage.numel(), dtype=torch.uint8, device=device)
    there.copy_(storage)
    return seen(tensor, there)


def seen(like: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """`like`, layout and all, in other memory."""
    return torch.empty(0, dtype=like.dtype, device=memory.device).set_(
        memory.untyped_storage(), like.storage_offset(), like.shape, like.stride()
    )


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of the tensor's whole storage, on the CPU."""
    return (
        torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage()).cpu()
    )


def back(tensor: torch.Tensor) -> torch.Tensor:
    return seen(tensor, memory_of(tensor)) if tensor.is_cuda else tensor


def everywhere(device: str | torch.device, tensors: dict[str, torch.Tensor]) -> dict:
    return {name: on(device, tensor) for name, tensor in tensors.items()}


def blank(device: str | torch.device, tensors: dict[str, torch.Tensor]) -> dict:
    """The same layouts with 0xEE in all of their memory."""
    return {
        name: on(device, seen(tensor, torch.full((tensor.untyped_storage().nbytes(),), 0xEE,
                                                 dtype=torch.uint8)))
        for name, tensor in tensors.items()
    }  # fmt: skip


def overwrite(tensors: dict[str, torch.Tensor]) -> None:
    """Puts other bytes into all of the tensors' memory, behind what the current stream holds."""
    for tensor in tensors.values():
        memory = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(
            tensor.untyped_storage()
        )
        memory.copy_(torch.full((memory.numel(),), 0xA5, dtype=torch.uint8))


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    got, want = back(got).contiguous(), back(want).contiguous()
    return (
        got.shape == want.shape
        and got.dtype == want.dtype
        and torch.equal(got.view(-1).view(torch.uint8), want.view(-1).view(torch.uint8))
    )


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert set(got) == set(want)
    assert [name for name in want if not same(got[name], want[name])] == []


def payload(directory: Path) -> dict[tuple, bytes]:
    """What each item of a checkpoint is stored as, and where: all but the save's id."""
    files = {path.name: path.read_bytes() for path in directory.glob("*.distcp")}
    stored = FileSystemReader(directory).read_metadata().storage_data
    return {
        (index.fqn, tuple(index.offset or ()), info.relative_path, info.offset): files[
            info.relative_path
        ][info.offset : info.offset + info.length]
        for index, info in stored.items()
    }
