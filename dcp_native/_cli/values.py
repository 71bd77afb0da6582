"""Values of tensors, read from the records that hold them: any box, from any number of chunks.

The bytes are checked on the way (``config.verify``).  Needs torch, but no process group: no target
has to be a tensor of the whole size.

What chunks leave open is an error, never memory that nobody wrote.  Ranks that saved for themselves
may hold the same box, each its own: then all of them are read and have to agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from operator import add, lt, sub
from typing import NamedTuple

import torch

from .. import _native
from .._config import DIRECT_IO, VERIFY, config
from .checkpoint import METADATA, Checkpoint, Chunk, Entry
from .output import CommandError
from .units import box_text, count_text

Numbers = tuple[int, ...]
Span = tuple[Numbers, Numbers]
"""Where a box begins, and where it ends."""


class Box(NamedTuple):
    """A part of a tensor."""

    entry: Entry
    offsets: Numbers
    sizes: Numbers

    @property
    def bytes_count(self) -> int:
        return math.prod(self.sizes) * self.entry.item_bytes


def whole(entry: Entry) -> Box:
    shape = entry.shape or ()
    return Box(entry, (0,) * len(shape), shape)


def windows(box: Box, most_bytes: int) -> Iterator[Box]:
    """Parts of at most so many bytes (but at least an element), in order."""
    long = next((d for d, n in enumerate(box.sizes) if n > 1), None)
    if box.bytes_count <= most_bytes or long is None:
        yield box
        return
    row = box.bytes_count // box.sizes[long]
    step = max(1, most_bytes // row)
    for at in range(0, box.sizes[long], step):
        count = min(step, box.sizes[long] - at)
        offsets = _with(box.offsets, long, box.offsets[long] + at)
        yield from windows(Box(box.entry, offsets, _with(box.sizes, long, count)), most_bytes)


def dtype_of(entry: Entry) -> torch.dtype:
    dtype = getattr(torch, entry.dtype or "", None)
    if not isinstance(dtype, torch.dtype) or not entry.item_bytes:
        raise CommandError(f"{entry.key}: this torch has no element type {entry.dtype}")
    return dtype


class Reader:
    """Reads boxes of a checkpoint's tensors."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        image = checkpoint.images.get(METADATA)
        self._saves = _native.save_ids(image) if image is not None else b""

    def read(self, boxes: Sequence[Box]) -> list[torch.Tensor]:
        """New tensors with the values of some boxes, read together.

        Raises:
            CommandError: chunks are missing or contradict each other, or only a load can undo how
                they are stored.
            NativeError: what is read is damaged.
        """
        tensors = [torch.empty(box.sizes, dtype=dtype_of(box.entry)) for box in boxes]
        self.read_into(boxes, tensors)
        return tensors

    def read_into(self, boxes: Sequence[Box], tensors: Sequence[torch.Tensor]) -> None:
        """The same into memory that is given."""
        items: list[_Item] = []
        again: list[_Again] = []
        for box, tensor in zip(boxes, tensors, strict=True):
            self._plan(box, tensor, items, again)
        self._run(items)
        for one in again:
            self._compare(one)

    def _run(self, items: list[_Item]) -> None:
        if not items:
            return
        files: dict[str, int] = {}
        wanted = [item.described(files) for item in items]
        taken: list[tuple[int, bytes]] = []
        _native.read_records(
            str(self._checkpoint.path), tuple(files), tuple(wanted),
            lambda index, record: taken.append((index, record)),
            saves=self._saves, verify=VERIFY[config().verify], direct=DIRECT_IO[config().direct_io],
        )  # fmt: skip
        for index, record in taken:
            _copy_record(items[index], record)

    def _plan(
        self, box: Box, tensor: torch.Tensor, items: list[_Item], again: list[_Again]
    ) -> None:
        """What fills the box, and what holds parts of it once more."""
        ends = tuple(map(add, box.offsets, box.sizes))
        holes = [(box.offsets, ends)] if math.prod(box.sizes) else []
        for chunk in self._checkpoint.chunks(box.entry):
            span = _common((box.offsets, ends), _span(chunk))
            if span is None:
                continue
            if chunk.file is None or chunk.transformed:
                what = "stored transformed" if chunk.transformed else "listed without a record"
                raise CommandError(f"{box.entry.key}: a chunk is {what}", 1)
            filled, holes = _fill(holes, span)
            item = _Item(box, chunk, span, tensor[_slices(span, box.offsets)])
            if sum(map(_volume, filled)) == _volume(span):
                items.append(item)
            else:
                again.append(_Again(item, filled))
        if holes:
            first, last = holes[0]
            more = f" (and {count_text(len(holes) - 1, 'more hole')})" if len(holes) > 1 else ""
            where = box_text(first, tuple(map(sub, last, first))) if first else "it"
            raise CommandError(f"{box.entry.key}: no chunk holds {where}{more}", 1)

    def _compare(self, one: _Again) -> None:
        item = one.item
        mine = torch.empty_like(item.target, memory_format=torch.contiguous_format)
        self._run([item._replace(target=mine)])
        for part in one.filled:
            at = _slices(part, item.span[0])
            item.target[at] = mine[at]
        if torch.equal(bits(mine), bits(item.target)):
            return
        first, last = item.span
        where = box_text(first, tuple(map(sub, last, first)))
        hint = "" if self._checkpoint.is_whole else ": --rank N takes those of one rank"
        raise CommandError(
            f"{item.box.entry.key}: several chunks hold {where}, with different values (one is in "
            f"{item.chunk.file}){hint}",
            1,
        )


class _Item(NamedTuple):
    """A part of a chunk that is wanted."""

    box: Box
    chunk: Chunk
    span: Span
    """In the tensor."""
    target: torch.Tensor

    def described(self, files: dict[str, int]) -> tuple:
        """What read_records takes."""
        chunk, (first, last) = self.chunk, self.span
        assert chunk.file is not None
        return (
            self.box.entry.key, files.setdefault(chunk.file, len(files)), chunk.offset_bytes,
            chunk.length_bytes, False, dtype_of(self.box.entry), chunk.sizes,
            tuple(map(sub, first, chunk.offsets)), tuple(map(sub, last, first)), self.target,
        )  # fmt: skip


class _Again(NamedTuple):
    """A part of a chunk of which others hold some, too."""

    item: _Item
    filled: list[Span]
    """What it alone holds."""


def _span(chunk: Chunk) -> Span:
    return chunk.offsets, tuple(map(add, chunk.offsets, chunk.sizes))


def _common(a: Span, b: Span) -> Span | None:
    first, last = tuple(map(max, a[0], b[0])), tuple(map(min, a[1], b[1]))
    return (first, last) if all(map(lt, first, last)) else None


def _volume(span: Span) -> int:
    return math.prod(map(sub, span[1], span[0]))


def _slices(span: Span, origin: Numbers) -> tuple[slice, ...]:
    first, last = span
    return tuple(map(slice, map(sub, first, origin), map(sub, last, origin)))


def _fill(holes: list[Span], span: Span) -> tuple[list[Span], list[Span]]:
    """What of the holes lies in a span, and what is left of them."""
    filled, left = [], []
    for hole in holes:
        part = _common(hole, span)
        if part is None:
            left.append(hole)
        else:
            filled.append(part)
            left += _around(hole, part)
    return filled, left


def _around(hole: Span, part: Span) -> Iterator[Span]:
    """The rest of a hole: what lies before and behind a part of it, dimension by dimension."""
    first, last = hole
    for d in range(len(first)):
        if first[d] < part[0][d]:
            yield first, _with(last, d, part[0][d])
        if part[1][d] < last[d]:
            yield _with(first, d, part[1][d]), last
        first, last = _with(first, d, part[0][d]), _with(last, d, part[1][d])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of its elements, in order."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _copy_record(item: _Item, record: bytes) -> None:
    """A record that only torch can read, in part."""
    import io

    saved = torch.load(io.BytesIO(record), map_location="cpu", weights_only=True)
    item.target.copy_(saved[_slices(item.span, item.chunk.offsets)])


def _with(numbers: Numbers, at: int, value: int) -> Numbers:
    return (*numbers[:at], value, *numbers[at + 1 :])
