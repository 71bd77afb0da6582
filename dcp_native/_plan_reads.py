"""The reads of a final load plan: natively, and put into place through the planner's hooks.

What torch's FileSystemReader.read_data does item by item is done for a window of items at a time:
every target is resolved, everything is read (sorted, coalesced, verified, off the GIL), every item
is copied, if it has to be, and committed.  Hooks are called on the calling thread, in torch's
order; only that up to a window of tensors is resolved before the first of them is committed.
"""

from __future__ import annotations

import bisect
import dataclasses
import io
import math
import os
from collections import Counter
from typing import Any, Literal

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from . import _native
from ._config import DIRECT_IO, VERIFY, config
from ._receive import load_object, naming

WINDOW_BYTES = 256 << 20
"""Most bytes of items that are resolved and not yet committed, but for one item that is larger: a
planner may allocate when it resolves, and free when it commits."""
WINDOW_ITEMS = 1 << 14

_STOCK_RESOLVES = (
    DefaultLoadPlanner.resolve_tensor,
    DefaultLoadPlanner.lookup_tensor,
    DefaultLoadPlanner.transform_tensor,
)

_Numbers = tuple[int, ...]


@dataclasses.dataclass(slots=True)
class _Item:
    """An item whose tensor is resolved, or of which the record is wanted."""

    item: ReadItem
    info: _StorageInfo
    target: torch.Tensor | None = None  # resolved; None: not before its record is here
    source: torch.Tensor | None = None  # what is read, to be copied to the target; None: it is read
    dtype: torch.dtype | None = None  # of the saved chunk, as the next three
    sizes: _Numbers = ()
    offsets: _Numbers = ()
    lengths: _Numbers = ()
    record: bytes | None = None
    more: tuple[Any, ...] = ()  # fields for read_records behind those above


class PlanReads:
    """Reads plans for one reader; what became of which name is known while it does and after.

    Args:
        reader: a stock one that is set up: its path, ``storage_data`` and stream transforms count.
        metadata: what it was set up with; says dtypes and sizes of chunks.  Where it does not, or
            is wrong, the record is read whole and counts.
        saves: save_ids of the checkpoint, where it is known to be of dcp_native.
        verify: as ``load`` takes it; None: as configured.
        raw: files hold row major elements and nothing around them.
    """

    def __init__(
        self,
        reader: FileSystemReader,
        metadata: Metadata | None,
        saves: bytes = b"",
        verify: bool | Literal["strict"] | None = None,
        raw: bool = False,
    ) -> None:
        self.verify = config().verify if verify is None else verify
        self._raw = raw
        self.stats: Counter[str] = Counter()
        self.objects: set[str] = set()  # names that load_bytes got
        self._reader = reader
        self._storage_data = reader.storage_data
        self._chunks = _Chunks(metadata)
        self._saves = saves
        self._window: list[_Item] = []
        self._window_bytes = 0
        self._may_allocate = True  # the planner, when it resolves
        self._memory = _Memory()
        self._late_targets = False  # an item of the window is copied to who knows where
        self._left: Counter[str] = Counter()  # by name, items that are not done
        self._touched: set[str] = set()

    def run(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        """Read ``plan``, file by file in the order in which it names them, as torch does."""
        self._may_allocate = _resolves_itself(planner)
        files: dict[str, list[_Item]] = {}
        for item in plan.items:
            info = self._info(item.storage_index)
            files.setdefault(info.relative_path, []).append(_Item(item, info))
            self._left[item.dest_index.fqn] += 1
        for items in files.values():
            for item in items:
                self._take(item, planner)
        self._flush(planner)

    def outcome(self) -> tuple[tuple[str, ...], ...]:
        """Names that are filled, may be filled partly, and are untouched."""
        filled = [name for name, left in self._left.items() if left == 0]
        partly = [name for name, left in self._left.items() if left and name in self._touched]
        known = {*filled, *partly}
        return tuple(filled), tuple(partly), tuple(n for n in self._left if n not in known)

    def _info(self, index: MetadataIndex) -> _StorageInfo:
        try:
            return self._storage_data[index]
        except KeyError:
            raise KeyError(
                f"{index.fqn}: the plan wants {index}, which is not in the checkpoint"
            ) from None

    def _box(self, item: _Item) -> tuple[_Numbers, _Numbers]:
        return _box(item)

    def _take(self, item: _Item, planner: LoadPlanner) -> None:
        """Put an item into the window; what it would overfill, or spoil, is finished before."""
        saved = None
        if item.item.type is not LoadItemType.BYTE_IO and not item.info.transform_descriptors:
            saved = self._chunks.find(item.item.storage_index)
        bytes_count = max(item.info.length, 0)
        if saved is not None:
            item.dtype, item.sizes = saved
            item.offsets, item.lengths = self._box(item)
            bytes_count = math.prod(item.lengths) * item.dtype.itemsize
        held = bytes_count if self._may_allocate or item.dtype is None else 0
        if self._window_bytes + held > WINDOW_BYTES or len(self._window) == WINDOW_ITEMS:
            self._flush(planner)
        if item.dtype is not None:
            self._resolve(item, planner)
            if item.dtype is None:  # read whole after all
                held = bytes_count = max(item.info.length, 0)
        elif item.item.type is not LoadItemType.BYTE_IO:
            self._late_targets = True
        self._window.append(item)
        self._window_bytes += held if item.source is None else bytes_count

    def _resolve(self, item: _Item, planner: LoadPlanner) -> None:
        """Ask for the target; choose what the reader fills: it, or a tensor to be copied to it.

        An item that is copied must have been before memory of its target is filled for another.
        """
        target = planner.resolve_tensor(item.item).detach()
        item.target = target
        if target.size() != torch.Size(item.lengths):
            if self._raw:
                _check_size(item.item, target, torch.Size(item.lengths))
            item.dtype = None  # the metadata may be wrong: the record decides
            self._copies_to(target)
            return
        if target.numel() == 0:
            return
        memory = _native.tensor_memory(target, item.dtype)
        if memory is not None:
            # Of an item before: that one first.
            if self._late_targets or not self._memory.add(*memory, target):
                self._flush(planner)
                self._memory.add(*memory, target)
            return
        self._copies_to(target)
        source = torch.empty(item.lengths, dtype=item.dtype, device="cpu")
        if _native.tensor_memory(source, item.dtype) is None:  # under a mode that fakes tensors
            item.dtype = None
        else:
            item.source = source

    def _copies_to(self, target: torch.Tensor) -> None:
        if type(target) is not torch.Tensor or target.layout is not torch.strided:
            self._late_targets = True
        elif target.device.type == "cpu":
            self._memory.cover(target)

    def _flush(self, planner: LoadPlanner) -> None:
        window, self._window, self._window_bytes = self._window, [], 0
        self._memory = _Memory()
        self._late_targets = False
        self._read(window)
        for item in window:
            self._touched.add(item.item.dest_index.fqn)
            self._finish(item, planner)
            item.target = item.source = None  # what is committed may be freed
            item.more = ()
            self._left[item.item.dest_index.fqn] -= 1

    def _read(self, window: list[_Item]) -> None:
        files: dict[str, int] = {}
        wanted, reads = [], []
        for item in window:
            if item.dtype is not None and math.prod(item.lengths) == 0:
                continue
            into = self._into(item)
            if into is not None and item.source is None:
                self._touched.add(item.item.dest_index.fqn)
            wanted.append(item)
            reads.append((*_read_of(item, files, into), *item.more))
        if not wanted:
            return

        def take(index: int, record: bytes) -> None:
            wanted[index].record = record

        stats = _native.read_records(
            os.fspath(self._reader.path), tuple(files), tuple(reads), take,
            saves=self._saves, verify=VERIFY[self.verify], direct=DIRECT_IO[config().direct_io],
            raw=self._raw,
        )  # fmt: skip
        self.stats.update(stats)

    def _into(self, item: _Item) -> torch.Tensor | None:
        """The tensor that is filled; None: the record is wanted."""
        if item.dtype is None:
            return None
        return item.target if item.source is None else item.source

    def _finish(self, item: _Item, planner: LoadPlanner) -> None:
        if item.item.type is LoadItemType.BYTE_IO:
            self.objects.add(item.item.dest_index.fqn)
            planner.load_bytes(item.item, self._object(item))
            return
        target = item.target
        if item.record is not None:
            source = self._tensor(item)
            if target is None:
                target = planner.resolve_tensor(item.item).detach()
            _check_size(item.item, target, source.size())
            target.copy_(source)
        elif item.source is not None:
            target.copy_(item.source)
        planner.commit_tensor(item.item, target)

    def _stream(self, item: _Item) -> Any:
        """The record, its transforms undone by the reader's own extensions."""
        stream = io.BytesIO(item.record or b"")
        item.record = None
        descriptors = item.info.transform_descriptors or ()
        if not descriptors:
            return stream
        with naming(item.item.storage_index.fqn):
            return self._reader.transforms.transform_load_stream(item.item, descriptors, stream)

    def _object(self, item: _Item) -> io.BytesIO:
        stream, fqn = self._stream(item), item.item.storage_index.fqn
        if type(stream) is not io.BytesIO:
            with naming(fqn):
                stream = io.BytesIO(stream.read(-1))
        if not config().allow_unsafe_objects:  # the planner unpickles as it pleases
            load_object(stream, fqn)
            stream.seek(0)
        return stream

    def _tensor(self, item: _Item) -> torch.Tensor:
        with naming(item.item.storage_index.fqn):
            stream = self._stream(item)
            if not stream.seekable():
                stream = io.BytesIO(stream.read(-1))
            saved = torch.load(stream, map_location="cpu", weights_only=True)
            return narrow_tensor_by_index(saved, item.item.storage_offsets, item.item.lengths)


def _read_of(item: _Item, files: dict[str, int], into: torch.Tensor | None) -> tuple[Any, ...]:
    """What ``_native.read_records`` takes."""
    index, info = item.item.storage_index, item.info
    if min(info.offset, info.length) < 0:
        raise ValueError(
            f"{index.fqn}: the checkpoint's storage_data puts it at byte {info.offset} of "
            f"{info.relative_path}, {info.length} bytes long"
        )
    return (
        index.fqn, files.setdefault(info.relative_path, len(files)), info.offset, info.length,
        bool(info.transform_descriptors), item.dtype, item.sizes, item.offsets, item.lengths, into,
    )  # fmt: skip


def _resolves_itself(planner: LoadPlanner) -> bool:
    """Whether tensors may be others than those of the state dict that is loaded."""
    hooks = ("resolve_tensor", "lookup_tensor", "transform_tensor")
    return any(
        getattr(getattr(planner, hook, None), "__func__", None) is not function
        for hook, function in zip(hooks, _STOCK_RESOLVES, strict=True)
    )


def _check_size(item: ReadItem, target: torch.Tensor, size: torch.Size) -> None:
    """Torch's check, with its text."""
    if target.size() != size:
        raise AssertionError(f"req {item.storage_index} mismatch sizes {target.size()} vs {size}")


def _inside(offsets: _Numbers, lengths: _Numbers, sizes: _Numbers) -> bool:
    """Whether a box is a part of a tensor of these sizes."""
    return len(offsets) == len(lengths) == len(sizes) and all(
        offset >= 0 and 0 <= length <= size - offset
        for offset, length, size in zip(offsets, lengths, sizes, strict=True)
    )


def _box(item: _Item) -> tuple[_Numbers, _Numbers]:
    """Offsets and lengths of what torch's narrow_tensor_by_index makes of the saved chunk.

    That one leaves a dim alone of which all, or more, is wanted, and counts from the end where an
    offset is negative; what is no part of the chunk is torch's error.
    """
    sizes = item.sizes
    offsets, lengths = tuple(item.item.storage_offsets), tuple(item.item.lengths)
    if _inside(offsets, lengths, sizes):
        return offsets, lengths
    with naming(item.item.storage_index.fqn):
        saved = torch.empty(sizes, device="meta")
        narrowed = tuple(narrow_tensor_by_index(saved, offsets, lengths).shape)
    starts = [0] * len(sizes)
    for dim, (offset, length) in enumerate(zip(offsets, lengths, strict=False)):
        if length < sizes[dim]:
            starts[dim] = offset + sizes[dim] if offset < 0 else offset
    return tuple(starts), narrowed


class _Chunks:
    """What metadata says of saved chunks."""

    def __init__(self, metadata: Metadata | None) -> None:
        self._entries = {} if metadata is None else metadata.state_dict_metadata
        self._by_offset: dict[str, dict[_Numbers, Any]] = {}

    def find(self, index: MetadataIndex) -> tuple[torch.dtype, _Numbers] | None:
        """dtype and sizes of a chunk, or None where it says nothing of it."""
        entry = self._entries.get(index.fqn)
        if not isinstance(entry, TensorStorageMetadata) or index.offset is None:
            return None
        dtype = getattr(entry.properties, "dtype", None)
        chunk = None
        if index.index is not None and 0 <= index.index < len(entry.chunks):
            chunk = entry.chunks[index.index]
        if chunk is None or chunk.offsets != index.offset:
            chunk = self._offsets(index.fqn, entry).get(tuple(index.offset))
        if chunk is None or not isinstance(dtype, torch.dtype):
            return None
        return dtype, tuple(chunk.sizes)

    def _offsets(self, fqn: str, entry: TensorStorageMetadata) -> dict[_Numbers, Any]:
        if fqn not in self._by_offset:
            self._by_offset[fqn] = {tuple(chunk.offsets): chunk for chunk in entry.chunks}
        return self._by_offset[fqn]


class _Memory:
    """Memory of the tensors of a window, to notice one that a planner gives out again.

    Kept as regions, disjoint and ascending.  Views of one tensor may lie in each other's way (the
    columns of a matrix) and share a region when they have the same strides and other starts.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._regions: list[tuple[int, _Numbers | None, set[int]]] = []  # end, strides, starts

    def add(self, start: int, end: int, row_major: bool, tensor: torch.Tensor) -> bool:
        """Whether it is free, and is counted as taken from now on."""
        first, last = self._overlapping(start, end)
        strides = None if row_major else tensor.stride()
        starts = {start}
        for _, others, taken in self._regions[first:last]:
            if strides is None or others != strides or start in taken:
                return False
            starts |= taken
        self._merge(first, last, (start, end), strides, starts)
        return True

    def cover(self, tensor: torch.Tensor) -> None:
        """Nothing between its first and last element is free from now on, whoever has it."""
        if tensor.numel() == 0:
            return
        start = tensor.data_ptr()
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        last_element = sum((extent - 1) * stride for extent, stride in steps)
        end = start + (last_element + 1) * tensor.element_size()
        self._merge(*self._overlapping(start, end), (start, end), None, {start})

    def _overlapping(self, start: int, end: int) -> tuple[int, int]:
        first = bisect.bisect_right(self._starts, start)
        if first > 0 and self._regions[first - 1][0] > start:
            first -= 1
        return first, bisect.bisect_left(self._starts, end)

    def _merge(
        self, first: int, last: int, span: _Numbers, strides: _Numbers | None, starts: set[int]
    ) -> None:
        start, end = span
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._regions[last - 1][0])
        self._starts[first:last] = [start]
        self._regions[first:last] = [(end, strides, starts)]
