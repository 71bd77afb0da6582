"""Write items as pieces of an export: memory, and where it belongs in the files.

Most tensors lie in memory already and are written from there.  What has to be made first (copies of
other devices' memory, lazy conjugates, what a planner of the user's computes) is made in batches,
so that a bounded part of the state dict exists twice at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem

from ._hf_layout import DTYPE_NAMES, Place

BATCH_BYTES = 16 << 20
"""Of memory that was made for writing: as much again is on its way to the file."""

_LENDING = {
    name: getattr(DefaultSavePlanner, name)
    for name in ("resolve_data", "lookup_object", "transform_object")
}
"""Hooks that hand out the state dict's own tensors, as they were at the import of this module."""

Piece = tuple[int, int, torch.Tensor, tuple[int, ...]]
"""Index of the file, offset in it, memory, strides in the file; in bytes."""


def batches(
    items: Sequence[WriteItem],
    planner: SavePlanner,
    places: Mapping[str, Place],
    is_shard: bool,
) -> Iterator[list[Piece]]:
    """The pieces of all items, some at a time.

    Args:
        is_shard: the files have this rank's chunks, each as a tensor; else the whole tensors.
    """
    lends = all(
        getattr(getattr(planner, name, None), "__func__", None) is hook
        for name, hook in _LENDING.items()
    )
    batch: list[Piece] = []
    made = 0
    for item in items:
        place = places[item.index.fqn]
        tensor = _resolve(item, planner, place)
        chunk = item.tensor_data.chunk
        at = place.offset if is_shard else place.offset_of(chunk.offsets)
        for piece in _slices(tensor, place.file, at, place.shape.strides):
            is_lent = lends and _is_lent(piece[2])
            if not is_lent and made + piece[2].nbytes > BATCH_BYTES and batch:
                yield batch
                batch, made = [], 0
            batch.append((*piece[:2], _plain(piece[2]), piece[3]))
            made += 0 if is_lent else piece[2].nbytes
    if batch:
        yield batch


def _resolve(item: WriteItem, planner: SavePlanner, place: Place) -> torch.Tensor:
    fqn, tensor = item.index.fqn, planner.resolve_data(item)
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{fqn}: the planner gave a {type(tensor).__name__} for a tensor")
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise ValueError(
            f"{fqn}: a {type(tensor).__qualname__} is not plain memory; convert it before it is "
            "saved"
        )
    if tensor.size() != item.tensor_data.chunk.sizes:
        raise ValueError(
            f"{fqn}: the planner gave {tuple(tensor.size())} for a chunk that was planned as "
            f"{tuple(item.tensor_data.chunk.sizes)}"
        )
    if DTYPE_NAMES.get(tensor.dtype) != place.shape.dtype:
        raise ValueError(
            f"{fqn}: the planner gave {tensor.dtype} for a tensor that was planned as "
            f"{place.shape.dtype}; convert it in the state dict"
        )
    return tensor.detach()


def _slices(tensor: torch.Tensor, file: int, at: int, strides: tuple[int, ...]) -> Iterator[Piece]:
    """One piece where the memory can be lent, else pieces of at most half a batch."""
    dim = next((d for d, n in enumerate(tensor.shape) if n > 1), None)
    if _is_lent(tensor) or dim is None or tensor.nbytes <= BATCH_BYTES // 2:
        yield file, at, tensor, strides
        return
    row = tensor.nbytes // tensor.shape[dim]
    step = max(1, BATCH_BYTES // 2 // row)
    for begin in range(0, tensor.shape[dim], step):
        part = tensor.narrow(dim, begin, min(step, tensor.shape[dim] - begin))
        yield from _slices(part, file, at + begin * strides[dim], strides)


def _is_lent(tensor: torch.Tensor) -> bool:
    """Whether its memory can be read as it is."""
    return (
        tensor.is_cpu
        and tensor.layout == torch.strided
        and not (tensor.is_conj() or tensor.is_neg())
    )


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    if _is_lent(tensor):
        return tensor
    return tensor.cpu().resolve_conj().resolve_neg()
