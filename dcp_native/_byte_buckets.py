"""Tensors of all dtypes as one stream of bytes, in buckets of bounded size.

A collective costs as much for 4 bytes as for 100 kB, so what thousands of tensors have to say goes
into few large messages.  A bucket is filled in order with whole tensors and with pieces of those
that are larger than it; nobody ever sees more of a tensor than a bucket.  Tensors travel as
integers of their element size ("carriers"), which keeps every bit of every dtype, and sorted by it
from large to small, which aligns them all without a gap: a run of one element size is packed by
one call and cut by one call.

What a bucket holds follows from shapes and dtypes alone, so all ranks fill the same ones.
"""

from __future__ import annotations

import functools
import math
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor.placement_types import Placement

from ._shard_layout import Shape, narrowed, pieces

# Of one message with what all ranks put into it.  Larger ones are not faster, smaller ones pay
# for their number; two of them are in memory at a time.
BUCKET_BYTES = 32 << 20
ALIGNMENT_BYTES = 16  # of the largest element
CARRIERS = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
    16: torch.complex128,
}


class Slot(NamedTuple):
    """The place of a tensor in the stream: `tag` is whatever the caller knows it by."""

    tag: Any
    shape: Shape
    item_bytes: int


class Item(NamedTuple):
    """The box (starts, sizes) of a slot, in a bucket."""

    slot: Slot
    starts: Shape
    sizes: Shape
    count: int

    @property
    def is_whole(self) -> bool:
        return self.sizes == self.slot.shape


class Bucket(NamedTuple):
    """Items one behind the other; `length_bytes` is a multiple of the largest element's size."""

    items: list[Item]
    length_bytes: int

    def runs(self) -> Iterator[tuple[torch.dtype, int, list[Item]]]:
        """(carrier, first byte, items) of each element size."""
        start, run, at = 0, [], 0
        for item in self.items:
            if run and run[0].slot.item_bytes != item.slot.item_bytes:
                yield CARRIERS[run[0].slot.item_bytes], start, run
                start, run = at, []
            run.append(item)
            at += item.count * item.slot.item_bytes
        yield CARRIERS[run[0].slot.item_bytes], start, run


class Memory:
    """Two buffers in turn: one bucket travels while the one before it is unpacked."""

    def __init__(self, device: str | torch.device) -> None:
        self._device = device
        self._both = [torch.empty(0, dtype=torch.uint8, device=device)] * 2

    def take(self, size_bytes: int) -> torch.Tensor:
        self._both.reverse()
        if self._both[0].numel() < size_bytes:
            self._both[0] = torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
        return self._both[0][:size_bytes]


def in_flight(
    stream: Iterable[Bucket],
    send: Callable[[Bucket], tuple[Any, ...]],
    receive: Callable[..., None],
) -> None:
    """Sends all buckets; each is received, with what `send` gave, when the next one travels.

    So two of :class:`Memory`'s buffers are enough.
    """
    flying = None
    for bucket in stream:
        sent = send(bucket)
        if flying is not None:
            receive(*flying)
        flying = sent
    if flying is not None:
        receive(*flying)


def fill(slots: Iterable[Slot], limit_bytes: int) -> Iterator[Bucket]:
    """The buckets of a stream; only the last one, and those before a large piece, are not full."""
    limit_bytes = max(limit_bytes // ALIGNMENT_BYTES, 1) * ALIGNMENT_BYTES
    items: list[Item] = []
    length = 0
    for slot in sorted(slots, key=lambda s: -s.item_bytes):
        for starts, sizes in pieces(slot.shape, limit_bytes // slot.item_bytes):
            count = math.prod(sizes)
            if items and length + count * slot.item_bytes > limit_bytes:
                yield _closed(items, length)
                items, length = [], 0
            items.append(Item(slot, starts, sizes, count))
            length += count * slot.item_bytes
    if items:
        yield _closed(items, length)


def _closed(items: list[Item], length: int) -> Bucket:
    return Bucket(items, -(-length // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)


def carried(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers of the element size; lazy conjugates and negatives are made."""
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    carrier = CARRIERS[tensor.element_size()]
    return tensor if tensor.dtype == carrier else tensor.view(carrier)


def piece_of(item: Item, tensor: torch.Tensor) -> torch.Tensor:
    """What a rank sends of `tensor` for `item`, flat; zeros where its own shard is shorter."""
    if item.is_whole and tensor.shape == item.slot.shape:
        return tensor.reshape(-1)
    sizes = tuple(
        max(0, min(size, extent - start))
        for start, size, extent in zip(item.starts, item.sizes, tensor.shape, strict=True)
    )
    if sizes == item.sizes:
        return narrowed(tensor, item.starts, sizes).reshape(-1)
    padded = tensor.new_zeros(item.sizes)
    if 0 not in sizes:
        narrowed(padded, (0,) * len(sizes), sizes).copy_(narrowed(tensor, item.starts, sizes))
    return padded.view(-1)


# Gives the flat carrier elements of an item, on any device.
Source = Callable[[Item], torch.Tensor]


def pack(bucket: Bucket, source: Source, memory: torch.Tensor) -> None:
    """Writes the bytes of `bucket` to the beginning of `memory`."""
    flats = [source(item) for item in bucket.items]
    at = 0
    for carrier, start, run in bucket.runs():
        size = sum(item.count for item in run) * run[0].slot.item_bytes
        _join(flats[at : at + len(run)], memory[start : start + size].view(carrier))
        at += len(run)


def packed(bucket: Bucket, source: Source, memory: torch.Tensor) -> torch.Tensor:
    """The bytes of `bucket`: in `memory`, or, if it is a single piece, where they lie anyway."""
    if len(bucket.items) == 1:
        flat = source(bucket.items[0])
        if flat.device == memory.device and flat.nbytes == bucket.length_bytes:
            return flat.view(torch.uint8)
    pack(bucket, source, memory)
    return memory


def _join(flats: list[torch.Tensor], target: torch.Tensor) -> None:
    devices = {flat.device for flat in flats}
    if len(flats) == 1:
        target.copy_(flats[0])
    elif devices == {target.device}:
        torch.cat(flats, out=target)
    elif len(devices) == 1:  # one transfer between devices instead of one for each
        target.copy_(torch.cat(flats))
    else:
        target.copy_(torch.cat([flat.to(target.device) for flat in flats]))


def unpack(
    bucket: Bucket, memory: torch.Tensor, lead: Sequence[int] = ()
) -> Iterator[tuple[Item, torch.Tensor]]:
    """Every item of `bucket` with what `memory` holds of it, shaped [*lead, *item.sizes].

    memory: uint8, [*lead, length_bytes].
    """
    for carrier, start, run in bucket.runs():
        count = sum(item.count for item in run)
        stop = start + count * run[0].slot.item_bytes
        flats = memory[..., start:stop].view(carrier)
        parts = flats.split_with_sizes([item.count for item in run], dim=-1)
        for item, flat in zip(run, parts, strict=True):
            yield item, flat.view((*lead, *item.sizes))


class Copies:
    """Copies that are made together, in one call."""

    def __init__(self) -> None:
        self._targets: list[torch.Tensor] = []
        self._sources: list[torch.Tensor] = []

    def add(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._targets.append(target)
        self._sources.append(source)

    def make(self) -> None:
        if self._targets:
            torch._foreach_copy_(self._targets, self._sources)
        self._targets, self._sources = [], []


@functools.cache
def _number(thing: torch.dtype | type) -> int:
    return zlib.crc32(str(thing).encode())


def token(shape: Shape, dtype: torch.dtype, placements: tuple[Placement, ...] = ()) -> int:
    """The same on every rank that means the same, for `agree`: a hash of numbers only."""
    placed = (
        (_number(type(p)), getattr(p, "dim", 0), getattr(p, "split_factor", 0)) for p in placements
    )
    return hash((shape, _number(dtype), *placed)) >> 1  # agree() negates it


def default_device(pg: dist.ProcessGroup) -> torch.device:
    """The device that torch takes where nothing but the group is known."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is to go some day, and torch itself calls it here
        return dist.distributed_c10d._get_pg_default_device(pg)


NOBODY, EVERYBODY = 1 << 62, -1


def agree(group: dist.ProcessGroup, device: str | torch.device, failed: int, digest: int) -> int:
    """One all-reduce, before collectives that would hang if a rank were missing from them.

    failed: a global rank that is known to have failed, or NOBODY.  digest: of what this rank is
    about to do.  Returns, on all ranks alike, the lowest failed rank, EVERYBODY if the digests
    differ, else NOBODY.
    """
    lanes = torch.tensor([failed, digest, -digest], dtype=torch.int64, device=device)
    dist.all_reduce(lanes, dist.ReduceOp.MIN, group=group)
    failed, low, negated = lanes.tolist()
    return EVERYBODY if failed == NOBODY and low != -negated else failed


def raise_if(failed: int, what: str) -> None:
    """An answer of `agree` as an exception that names it."""
    if failed == EVERYBODY:
        raise RuntimeError(
            f"{what}: the ranks hold different tensors (another order, other shapes, dtypes or"
            " placements); call it with the same state dict on all of them"
        )
    if failed != NOBODY:
        raise RuntimeError(f"{what}: rank {failed} failed, its own exception says why")
