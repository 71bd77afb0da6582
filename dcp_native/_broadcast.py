"""BroadcastingTorchSaveReader: one rank reads a torch.save file, all get what they want of it.

Mirrors the reader of torch/distributed/checkpoint/format_utils.py.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from ._stock import format_utils as _torch
from ._torch_file import load_mapped

_PIECE_BYTES = 16 << 20
"""Rows are broadcast up to this much at a time; a row that is longer goes by itself."""


@dataclasses.dataclass
class _Said:
    """What a rank tells the others before the first broadcast."""

    error: str | None
    wanted: list[str]
    held: dict[str, tuple[torch.Size, torch.dtype] | None]
    """By the coordinator: the tensors of the file; None for one that can not be broadcast."""


class BroadcastingTorchSaveReader(_torch.BroadcastingTorchSaveReader):
    """Reads a torch.save file on one rank and broadcasts it, some rows of a tensor at a time.

    The file is mapped by that rank, never loaded as a whole, and no rank holds a whole tensor
    beside its own part.  Ranks may want different parts, or different tensors.  Give it to ``load``
    with :class:`DynamicMetaLoadPlanner`; only tensors can be loaded.

    Args:
        checkpoint_id: the file; ``load``'s ``checkpoint_id`` takes precedence.
        coordinator_rank: global rank that reads; ``load`` has it be 0.
    """

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """As torch's; a process without a group is its own coordinator."""
        if dist.is_available() and dist.is_initialized():
            super().set_up_storage_reader(metadata, is_coordinator)
            return
        if self.checkpoint_id is None:
            raise AssertionError("the reader has no file: give it a checkpoint_id")
        self.is_coordinator = True

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Collective.  What fails on one rank fails on all, before the first broadcast or after
        the last."""
        state_dict: dict[str, Any] = {}
        said = _Said(None, list(dict.fromkeys(item.storage_index.fqn for item in plan.items)), {})
        try:
            _check_items(type(self).__name__, plan)
            if self.is_coordinator:
                state_dict = self._load(planner)
        except Exception as error:
            said.error = f"{type(error).__name__}: {error}"
        said.held = {
            fqn: (value.size(), value.dtype) if _is_plain(value) else None
            for fqn, value in state_dict.items()
            if isinstance(value, torch.Tensor)
        }
        everyone = _exchange(said)
        held = next((each.held for each in everyone if each.held), {})
        wanted = list(dict.fromkeys(fqn for each in everyone for fqn in each.wanted))
        _raise_first(everyone, self.checkpoint_id, wanted, held)
        items: dict[str, list[ReadItem]] = {fqn: [] for fqn in wanted}
        for item in plan.items:
            items[item.storage_index.fqn].append(item)
        failure: Exception | None = None
        for fqn in wanted:
            parts = _Parts(fqn, *held[fqn], items[fqn], planner)
            for rows in parts.pieces():
                piece = self._broadcast(state_dict.get(fqn), parts, rows)
                try:
                    if failure is None:
                        parts.take(piece, rows)
                except Exception as error:  # the others go on: so must the broadcasts
                    failure = error
        if failure is not None:
            raise failure
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _load(self, planner: LoadPlanner) -> dict[str, Any]:
        if self.checkpoint_id is None:
            raise AssertionError("the reader has no file: give it a checkpoint_id")
        loaded, _ = load_mapped(self.checkpoint_id)
        if getattr(planner, "flatten_state_dict", True):
            loaded, _ = flatten_state_dict(loaded)
        return loaded

    def _broadcast(self, source: torch.Tensor | None, parts: _Parts, rows: slice) -> torch.Tensor:
        """Some rows of a tensor of the coordinator, on every rank."""
        size = parts.size_of(rows)
        piece = None
        if self.is_coordinator:
            assert source is not None  # _raise_first has seen it
            piece = source.detach()[rows] if source.ndim > 0 else source.detach()
            piece = piece.resolve_conj().resolve_neg().contiguous()
            if not (dist.is_available() and dist.is_initialized()):
                return piece
        device = dist.distributed_c10d._get_pg_default_device()
        if piece is None:
            piece = torch.empty(size, dtype=parts.dtype, device=device)
        piece = piece.to(device)
        if piece.numel() > 0:
            # As bytes: not every backend knows every dtype.
            dist.broadcast(piece.reshape(-1).view(torch.uint8), src=self.coordinator_rank)
        return piece


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether all ranks can hold it as so many bytes."""
    return (
        tensor.is_cpu
        and tensor.layout == torch.strided
        and not (tensor.is_quantized or tensor.is_nested)
        and type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    )


def _offsets(item: ReadItem) -> tuple[int, ...]:
    """Where in the whole tensor ``item`` begins.

    DynamicMetaLoadPlanner describes the tensors as if each rank's shard had been saved as a chunk,
    and items count from the chunk's own beginning.
    """
    chunk = item.storage_index.offset or (0,) * len(item.storage_offsets)
    return tuple(map(operator.add, chunk, item.storage_offsets))


class _Parts:
    """What this rank wants of one tensor, filled row by row."""

    def __init__(
        self,
        fqn: str,
        size: torch.Size,
        dtype: torch.dtype,
        items: list[ReadItem],
        planner: LoadPlanner,
    ) -> None:
        self.fqn = fqn
        self.size = size
        self.dtype = dtype
        self.planner = planner
        self.targets = [(item, self._resolve(item)) for item in items]

    def _resolve(self, item: ReadItem) -> torch.Tensor | Exception:
        try:
            target = self.planner.resolve_tensor(item).detach()
            inside = len(item.lengths) == len(self.size) and all(
                offset + length <= most
                for offset, length, most in zip(
                    _offsets(item), item.lengths, self.size, strict=True
                )
            )
            if not inside or target.size() != item.lengths:
                raise AssertionError(
                    f"{self.fqn}: the file has {tuple(self.size)}, wanted of it are "
                    f"{tuple(item.lengths)} at {_offsets(item)} for memory of "
                    f"{tuple(target.size())}"
                )
        except Exception as error:
            return error
        return target

    def pieces(self) -> list[slice]:
        """Rows that are broadcast together, in order."""
        rows = self.size[0] if self.size else 1
        row_bytes = self.size[1:].numel() * self.dtype.itemsize
        step = max(1, _PIECE_BYTES // max(row_bytes, 1))
        return [slice(at, min(at + step, rows)) for at in range(0, rows, step)] or [slice(0, 0)]

    def size_of(self, rows: slice) -> tuple[int, ...]:
        return (rows.stop - rows.start, *self.size[1:]) if self.size else ()

    def take(self, piece: torch.Tensor, rows: slice) -> None:
        """Copy what is wanted of ``piece``; after the last one commit."""
        last = rows.stop == (self.size[0] if self.size else 1)
        for item, target in self.targets:
            if isinstance(target, Exception):
                raise target
            if self.size:
                _copy_rows(item, target, piece, rows)
            else:
                target.copy_(piece)
            if last:
                self.planner.commit_tensor(item, target)


def _copy_rows(item: ReadItem, target: torch.Tensor, piece: torch.Tensor, rows: slice) -> None:
    (first, *others), (count, *lengths) = _offsets(item), item.lengths
    start, stop = max(first, rows.start), min(first + count, rows.stop)
    if start >= stop:
        return
    source = narrow_tensor_by_index(
        piece,
        (start - rows.start, *others),
        (stop - start, *lengths),
    )
    target.narrow(0, start - first, stop - start).copy_(source)


def _check_items(reader: str, plan: LoadPlan) -> None:
    for item in plan.items:
        if item.type == LoadItemType.BYTE_IO:
            raise RuntimeError(
                f"{item.storage_index.fqn} is no tensor, and {reader} loads nothing else"
            )


def _exchange(said: _Said) -> list[_Said]:
    if not (dist.is_available() and dist.is_initialized()):
        return [said]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, said)
    return everyone


def _raise_first(
    everyone: list[_Said],
    path: Any,
    wanted: list[str],
    held: dict[str, tuple[torch.Size, torch.dtype] | None],
) -> None:
    """The same on every rank, so that none waits for another."""
    for rank, each in enumerate(everyone):
        if each.error is not None:
            raise RuntimeError(f"rank {rank}: {each.error}")
    if missing := [fqn for fqn in wanted if fqn not in held]:
        raise RuntimeError(f"{path} has no tensor {missing[0]!r} ({len(missing)} are missing)")
    if strange := [fqn for fqn in wanted if held[fqn] is None]:
        raise RuntimeError(
            f"{path}: {strange[0]!r} is sparse, quantised, nested or of a subclass: only plain "
            f"tensors can be broadcast ({len(strange)} are not)"
        )
