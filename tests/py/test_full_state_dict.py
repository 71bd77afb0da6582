"""What full state dicts are made of, in one process: layouts, pieces, buckets, names.

The functions themselves are shown beside torch's in ranks/cases_full_state_dict.py.
"""

from __future__ import annotations

import inspect
import itertools
import math
import random

import pytest
import torch
import torch.distributed._state_dict_utils as stock
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from dcp_native import _full_state_dict as ours
from dcp_native._byte_buckets import ALIGNMENT_BYTES, Slot, carried, fill, pack, piece_of, unpack
from dcp_native._shard_layout import _layout, narrowed, pieces

SHAPES = [(1,), (7,), (16,), (3, 5), (8, 4), (1, 9), (2, 3, 4), (5, 0)]


@pytest.mark.parametrize("name", ours.__all__)
def test_signatures_are_torchs(name):
    got, want = (inspect.signature(getattr(module, name)) for module in (ours, stock))
    assert [(p.name, p.kind, p.default) for p in got.parameters.values()] == [
        (p.name, p.kind, p.default) for p in want.parameters.values()
    ]


def combinations():
    for mesh in ((1,), (2,), (3,), (4,), (2, 2), (3, 2), (1, 4), (2, 2, 2)):
        for shape in SHAPES:
            choices = [Replicate(), *map(Shard, range(len(shape)))]
            for placements in itertools.product(choices, repeat=len(mesh)):
                yield mesh, shape, placements
            if len(mesh) == 2 and shape[0] % math.prod(mesh) == 0:
                yield mesh, shape, (_StridedShard(0, split_factor=mesh[1]), Shard(0))


def test_boxes_are_torchs():
    for mesh, shape, placements in combinations():
        layout = _layout(shape, mesh, placements)
        for at in itertools.product(*map(range, mesh)):
            sizes, starts = _compute_local_shape_and_global_offset(
                shape, mesh, list(at), placements
            )
            got_starts, got_sizes = layout.box(shape, at)
            assert got_sizes == sizes, (mesh, shape, placements, at)
            if 0 not in sizes:
                assert got_starts == starts, (mesh, shape, placements, at)


def test_regions_put_every_shard_into_its_place_and_cover_the_tensor():
    for mesh, shape, placements in combinations():
        layout = _layout(shape, mesh, placements)
        if not layout.regions:
            continue
        full = torch.arange(math.prod(shape)).view(shape)
        counts = [mesh[d] for d in layout.mesh_dims]
        gathered = torch.full((*counts, *layout.slot), -1)
        for at in itertools.product(*map(range, counts)):
            coordinate = [0] * len(mesh)
            for d, i in zip(layout.mesh_dims, at, strict=True):
                coordinate[d] = i
            shard = narrowed(full, *layout.box(shape, coordinate))
            narrowed(gathered[at], (0,) * len(shape), shard.shape).copy_(shard)
        result = torch.full(shape, -2)
        for region in layout.regions:
            target = region.view(result)
            source = gathered[region.index]
            target.copy_(narrowed(source, (0,) * source.ndim, target.shape))
        assert torch.equal(result, full), (mesh, shape, placements)


def test_strided_shards_that_are_not_equal_runs_are_left_to_torch():
    assert _layout((9,), (2, 2), (_StridedShard(0, split_factor=2), Shard(0))) is None
    assert _layout((8,), (2,), (_StridedShard(0, split_factor=2),)) is None


def test_pieces_are_runs_of_the_row_major_order():
    for shape in [*SHAPES, (2, 3, 1, 7), (4, 1, 1)]:
        if 0 in shape:
            continue
        flat = torch.arange(math.prod(shape))
        for limit in (1, 2, 5, 12, 1000):
            cut = [
                narrowed(flat.view(shape), starts, sizes).reshape(-1)
                for starts, sizes in pieces(shape, limit)
            ]
            assert torch.equal(torch.cat(cut), flat), (shape, limit)
            assert max(len(c) for c in cut) <= limit


def test_buckets_keep_their_limit_and_every_bit():
    rng = random.Random(5)
    dtypes = (torch.bool, torch.bfloat16, torch.float32, torch.int64, torch.complex128)
    tensors = []
    for dtype in dtypes * 5:
        shape = tuple(rng.randint(1, 6) for _ in range(rng.randint(0, 3)))
        raw = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8)
        tensors.append(raw.view(dtype).view(shape))
    for limit in (16, 50, 1000, 1 << 20):
        got = [torch.zeros_like(t) for t in tensors]
        slots = [Slot(i, tuple(t.shape), t.element_size()) for i, t in enumerate(tensors)]
        for bucket in fill(slots, limit):
            assert bucket.length_bytes <= limit and bucket.length_bytes % ALIGNMENT_BYTES == 0
            memory = torch.full((bucket.length_bytes,), 0xAA, dtype=torch.uint8)
            pack(bucket, lambda item: piece_of(item, carried(tensors[item.slot.tag])), memory)
            for item, part in unpack(bucket, memory):
                narrowed(carried(got[item.slot.tag]), item.starts, item.sizes).copy_(part)
        for a, b in zip(got, tensors, strict=True):
            assert torch.equal(carried(a), carried(b))


def test_pieces_of_shorter_shards_are_padded_with_zeros():
    (bucket,) = fill([Slot(0, (3, 2), 4)], 1 << 10)
    short = torch.ones(1, 2, dtype=torch.int32)
    assert piece_of(bucket.items[0], short).tolist() == [1, 1, 0, 0, 0, 0]
    assert piece_of(bucket.items[0], short[:0]).tolist() == [0] * 6
