"""Which saved chunks a load reads against torch's create_read_items_for_chunk_list."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from itertools import pairwise, product

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from dcp_native import _bridge, _native  # noqa: F401

Box = tuple[tuple[int, ...], tuple[int, ...]]


class Boxes(torch.Tensor):
    """A tensor that wants the boxes it is given, of a saved tensor of its own size."""

    boxes: list[Box]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        sizes = dict(self.boxes)[tuple(index.offset)]
        return torch.empty(sizes)


def boxes_tensor(size: tuple[int, ...], boxes: list[Box]) -> Boxes:
    tensor = torch.empty(size).as_subclass(Boxes)
    tensor.boxes = boxes
    return tensor


def cuts(rng: random.Random, extent: int) -> list[tuple[int, int]]:
    """(start, length) of random pieces of [0, extent); some have no length."""
    at = sorted([0, extent, *(rng.randint(0, extent) for _ in range(rng.randint(0, 6)))])
    return [(a, b - a) for a, b in pairwise(at)]


def grid(rng: random.Random, size: tuple[int, ...]) -> list[Box]:
    cells = product(*(cuts(rng, extent) for extent in size))
    return [(tuple(a for a, _ in cell), tuple(n for _, n in cell)) for cell in cells]


def bricks(rng: random.Random, size: tuple[int, ...]) -> Iterator[Box]:
    """Slabs, each cut in its own way."""
    if not size:
        yield (), ()
        return
    for start, length in cuts(rng, size[0]):
        for offsets, sizes in bricks(rng, size[1:]):
            yield (start, *offsets), (length, *sizes)


def scattered(rng: random.Random, size: tuple[int, ...]) -> list[Box]:
    """Boxes that overlap and leave holes."""
    boxes = []
    for _ in range(rng.randint(0, 30)):
        offsets = tuple(rng.randint(0, extent) for extent in size)
        lengths = (rng.randint(0, n - o) for o, n in zip(offsets, size, strict=True))
        boxes.append((offsets, tuple(lengths)))
    return boxes


def distinct(boxes: list[Box]) -> list[Box]:
    """One box for each offset: that is the name by which torch finds a chunk."""
    return [(offsets, sizes) for offsets, sizes in dict(boxes).items()]


def metadata_of(size: tuple[int, ...], chunks: list[Box]) -> Metadata:
    stored = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in chunks]
    entry = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(size), stored)
    where = {
        MetadataIndex("t", chunk.offsets, i): _StorageInfo("__0_0.distcp", 64 * i, 64)
        for i, chunk in enumerate(stored)
    }
    return Metadata({"t": entry}, planner_data={"t": ("t",)}, storage_data=where)


def covered(box: Box, items: list[tuple]) -> int:
    """Elements of a box that items fill, counted one by one."""
    cells: set[tuple[int, ...]] = set()
    for *_, into, lengths in items:
        cells.update(product(*(range(o, o + n) for o, n in zip(into, lengths, strict=True))))
    return len(cells)


@pytest.mark.parametrize("make", [grid, bricks, scattered], ids=lambda make: make.__name__)
def test_items_are_torchs_and_holes_are_what_they_leave(make) -> None:
    rng = random.Random(make.__name__)
    holes = 0
    for _ in range(60):
        size = tuple(rng.randint(1, 14) for _ in range(rng.randint(0, 3)))
        chunks = distinct(list(make(rng, size)))
        rng.shuffle(chunks)
        del chunks[len(chunks) - (rng.random() < 0.3) :]
        wanted = distinct(grid(rng, size))
        metadata = metadata_of(size, chunks)
        target = boxes_tensor(size, wanted)
        ours = _native._debug_targets(pickle.dumps(metadata), {"t": target}, items=True)
        boxes = [(offsets, sizes) for _, offsets, sizes, *_ in ours["targets"]]
        got = [(*boxes[target], *rest) for target, *rest in ours["items"]]
        sizes_of = dict(wanted)
        expected = [
            (
                tuple(item.dest_index.offset),
                sizes_of[tuple(item.dest_index.offset)],
                item.storage_index.index,
                tuple(item.storage_offsets),
                tuple(item.dest_offsets),
                tuple(item.lengths),
            )
            for item in create_read_items_for_chunk_list(
                "t", metadata.state_dict_metadata["t"], target.__create_chunk_list__()
            )
            if 0 not in item.lengths  # torch reads the record and copies nothing of it
        ]
        assert sorted(got) == sorted(expected)
        missing = 0
        for box in boxes:
            volume = torch.Size(box[1]).numel()
            missing += volume - covered(box, [item for item in got if item[:2] == box])
        assert ours["hole_bytes"] == 4 * missing
        holes += missing > 0
    assert 0 < holes < 60
