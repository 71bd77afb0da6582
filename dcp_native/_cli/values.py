"""Values of tensors, read from the records that hold them: any box, from any number of chunks.

The bytes are checked on the way (``config.verify``).  Needs torch, but no process group: no target
has to be a tensor of the whole size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from .. import _native
from .._config import DIRECT_IO, VERIFY, config
from .checkpoint import METADATA, Checkpoint, Entry
from .output import CommandError

Numbers = tuple[int, ...]


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
            CommandError: chunks are missing, or only a load can undo how they are stored.
            NativeError: what is read is damaged.
        """
        tensors = [torch.empty(box.sizes, dtype=dtype_of(box.entry)) for box in boxes]
        self.read_into(boxes, tensors)
        return tensors

    def read_into(self, boxes: Sequence[Box], tensors: Sequence[torch.Tensor]) -> None:
        """The same into memory that is given."""
        items, files = [], {}
        for box, tensor in zip(boxes, tensors, strict=True):
            items += self._items(box, tensor, files)
        if not items:
            return
        taken: list[tuple[int, bytes]] = []
        _native.read_records(
            str(self._checkpoint.path), tuple(files), tuple(items),
            lambda index, record: taken.append((index, record)),
            saves=self._saves, verify=VERIFY[config().verify], direct=DIRECT_IO[config().direct_io],
        )  # fmt: skip
        for index, record in taken:
            _copy_record(items[index], record)

    def _items(self, box: Box, tensor: torch.Tensor, files: dict[str, int]) -> list[tuple]:
        """What read_records takes, for every chunk that has a part of the box."""
        items, covered = [], 0
        for chunk in self._checkpoint.chunks(box.entry):
            starts = tuple(map(max, chunk.offsets, box.offsets))
            ends = tuple(
                min(a + m, b + n)
                for a, m, b, n in zip(
                    chunk.offsets, chunk.sizes, box.offsets, box.sizes, strict=True
                )
            )
            sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
            if min(sizes, default=1) <= 0:
                continue
            if chunk.file is None or chunk.transformed:
                what = "stored transformed" if chunk.transformed else "listed without a record"
                raise CommandError(f"{box.entry.key}: a chunk is {what}", 1)
            part = tensor[tuple(
                slice(s - o, s - o + n)
                for s, o, n in zip(starts, box.offsets, sizes, strict=True)
            )]  # fmt: skip
            covered += math.prod(sizes)
            items.append((
                box.entry.key, files.setdefault(chunk.file, len(files)), chunk.offset_bytes,
                chunk.length_bytes, False, dtype_of(box.entry), chunk.sizes,
                tuple(s - o for s, o in zip(starts, chunk.offsets, strict=True)), sizes, part,
            ))  # fmt: skip
        if covered < math.prod(box.sizes):
            raise CommandError(f"{box.entry.key}: its chunks do not cover it", 1)
        return items


def _copy_record(item: tuple, record: bytes) -> None:
    """A record that only torch can read, in part."""
    import io

    saved = torch.load(io.BytesIO(record), map_location="cpu", weights_only=True)
    box = tuple(slice(at, at + n) for at, n in zip(item[7], item[8], strict=True))
    item[9].copy_(saved[box])


def _with(numbers: Numbers, at: int, value: int) -> Numbers:
    return (*numbers[:at], value, *numbers[at + 1 :])
