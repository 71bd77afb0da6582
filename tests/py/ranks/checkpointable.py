"""Tensors that describe their own shards (torch 2.14's CheckpointableTensor), for tests."""

from __future__ import annotations

from typing import Any

import torch

FIELDS = ("global_shape", "global_offsets", "local_offsets", "local_sizes")


def describe(tensor: torch.Tensor, *fields: Any) -> torch.Tensor:
    for name, field in zip(FIELDS, fields, strict=True):
        setattr(tensor, name, field)
    return tensor


def blank(tensor: torch.Tensor, device: str = "cpu") -> torch.Tensor:
    """The same shards of something else: whatever is not read stays -1."""
    made = torch.empty_like(tensor, device=device).detach().fill_(-1)
    return describe(made, *(getattr(tensor, name) for name in FIELDS))


def whole(tensors: list[torch.Tensor]) -> torch.Tensor:
    """What the shards of all ``tensors`` are parts of."""
    full = torch.full(tensors[0].global_shape, -1.0)
    for tensor in tensors:
        for start, local, sizes in zip(
            tensor.global_offsets, tensor.local_offsets, tensor.local_sizes, strict=True
        ):
            part = tuple(slice(o, o + n) for o, n in zip(local, sizes, strict=True))
            place = tuple(slice(o, o + n) for o, n in zip(start, sizes, strict=True))
            full[place] = tensor.detach()[part]
    return full
