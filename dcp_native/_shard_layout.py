"""Where the shards of a DTensor lie in the full tensor, and how a tensor is cut into pieces.

A gather that moves bytes needs two answers for a tensor: how large is the largest shard (every rank
sends as much, as torch pads), and which memory of the full tensor do the gathered shards fill.
Where all shards are equal one strided view of the full tensor answers for all ranks, so that
unpacking costs one copy per tensor and not one per rank.  All of it follows from shape, mesh and
placements alone: every rank computes the same.

Layouts are cached; they hold numbers only, never tensors, meshes or groups.  The coordinates of
shards are taken for their places in the process groups, which holds where ranks ascend.
"""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor.placement_types import Placement, _StridedShard

LAYOUTS_MAX = 4096

Shape = tuple[int, ...]
Table = dict[tuple[int, ...], tuple[int, int]]

_ASCENDING: weakref.WeakKeyDictionary[DeviceMesh, bool] = weakref.WeakKeyDictionary()


class Region(NamedTuple):
    """A box of the full tensor, and the gathered shards that fill it.

    index: selects from the leading dimensions of what was gathered, one entry per mesh dimension.
    split, order: view the box as [selected coordinates..., shard...]; None: it is one shard.
    """

    index: tuple[int | slice, ...]
    starts: Shape
    sizes: Shape
    split: Shape | None = None
    order: Shape | None = None

    def view(self, full: torch.Tensor) -> torch.Tensor:
        """The memory of `full` that this region fills."""
        box = narrowed(full, self.starts, self.sizes)
        if self.split is None or self.order is None:
            return box
        return box.view(self.split).permute(self.order)


class Layout(NamedTuple):
    """How a tensor is sharded: over which mesh dimensions, in which shards.

    slot: the shape of the largest shard.  mesh_dims: empty if every rank holds all of the tensor.
    regions: empty if the tensor is.  cuts: of the sharded tensor dimensions, by which mesh
    dimensions they are cut, and (start, size) by the coordinates there.
    """

    mesh_dims: tuple[int, ...]
    slot: Shape
    regions: tuple[Region, ...]
    cuts: dict[int, tuple[list[int], Table]]

    def box(self, shape: Shape, coordinate: Sequence[int]) -> tuple[Shape, Shape]:
        """(starts, sizes) of the shard at a coordinate of the mesh."""
        starts, sizes = [0] * len(shape), list(shape)
        for dim, (by, table) in self.cuts.items():
            starts[dim], sizes[dim] = table[tuple([coordinate[d] for d in by])]
        return tuple(starts), tuple(sizes)


def narrowed(tensor: torch.Tensor, starts: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    """The box of `tensor`; the tensor itself where the box is all of it."""
    for dim, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        if size != tensor.shape[dim]:
            tensor = tensor.narrow(dim, start, size)
    return tensor


def pieces(shape: Shape, limit_items: int) -> Iterator[tuple[Shape, Shape]]:
    """Cuts a tensor into boxes (starts, sizes) of at most `limit_items` elements.

    Each is a contiguous run of the row-major order, and they come in that order.
    """
    total = math.prod(shape)
    if total <= limit_items:
        yield (0,) * len(shape), shape
        return
    inner, cut = total, 0
    for cut, extent in enumerate(shape):  # noqa: B007
        inner //= extent
        if inner <= limit_items:
            break
    rows, behind = max(1, limit_items // inner), shape[cut + 1 :]
    for outer in itertools.product(*map(range, shape[:cut])):
        for start in range(0, shape[cut], rows):
            size = min(rows, shape[cut] - start)
            yield (*outer, start, *(0,) * len(behind)), (*(1,) * cut, size, *behind)


def layout_of(spec: DTensorSpec, shape: Shape) -> Layout | None:
    """The layout of a DTensor, None where only torch knows how to gather it."""
    if not ascending(spec.mesh):
        return None
    sharded = [p.dim for p in spec.placements if isinstance(p, (Shard, _StridedShard))]
    if len(set(sharded)) < len(sharded) and not DTensorSpec.is_default_device_order(
        spec.shard_order
    ):
        return None
    return _layout(shape, tuple(spec.mesh.shape), spec.placements)


def ascending(mesh: DeviceMesh) -> bool:
    """Whether ranks grow along every dimension of the mesh.

    Process groups sort their ranks. Over others torch gathers and scatters in the order of the
    group and cuts in that of the mesh, so what such a tensor means depends on who made it.
    """
    known = _ASCENDING.get(mesh)
    if known is None:
        ranks = mesh.mesh
        known = all(bool((ranks.diff(dim=d) > 0).all()) for d in range(ranks.ndim))
        _ASCENDING[mesh] = known
    return known


def flat_layout(items_count: int, slot_items: int) -> Layout:
    """The layout of a flat tensor of which each rank holds `slot_items` in turn."""
    return Layout((0,), (slot_items,), tuple(_ragged((items_count,), 0, slot_items)), {})


@functools.lru_cache(LAYOUTS_MAX)
def _layout(shape: Shape, mesh_shape: Shape, placements: tuple[Placement, ...]) -> Layout | None:
    by_dim: dict[int, list[int]] = {}
    for mesh_dim, placement in enumerate(placements):
        if isinstance(placement, (Shard, _StridedShard)):
            if mesh_shape[mesh_dim] > 1:
                by_dim.setdefault(placement.dim % len(shape), []).append(mesh_dim)
        elif type(placement) is not Replicate:
            return None
    mesh_dims = tuple(sorted(d for dims in by_dim.values() for d in dims))
    counts = tuple(mesh_shape[d] for d in mesh_dims)
    tables = {}
    for dim, dims in by_dim.items():
        splits = tuple((mesh_shape[d], getattr(placements[d], "split_factor", 1)) for d in dims)
        table = _shards(shape[dim], splits)
        if table is None:
            return None
        tables[dim] = table
    slot = tuple(
        max(size for _, size in tables[dim].values()) if dim in tables else extent
        for dim, extent in enumerate(shape)
    )
    cuts = {dim: (by_dim[dim], table) for dim, table in tables.items()}
    if not mesh_dims or 0 in shape:
        return Layout(mesh_dims, slot, (), cuts)
    regions = _regular(shape, slot, mesh_dims, by_dim, tables)
    if regions is None and len(mesh_dims) == 1:
        (dim,) = by_dim
        regions = list(_ragged(shape, dim, slot[dim]))
    if regions is None:
        regions = list(_single(shape, mesh_dims, counts, by_dim, tables))
    return Layout(mesh_dims, slot, tuple(regions), cuts)


@functools.lru_cache(LAYOUTS_MAX)
def _shards(extent: int, splits: tuple[tuple[int, int], ...]) -> Table | None:
    """(start, size) in a dimension by the coordinates on the mesh dimensions that shard it.

    None for strided shards that are not equal runs: how those lie is torch's to say.
    """
    held: dict[tuple[int, ...], list[tuple[int, int]]] = {(): [(0, extent)]}
    for count, factor in splits:
        held = {
            (*at, i): [
                run for j in range(factor) for run in _chunk(_chunk(runs, factor, j), count, i)
            ]
            for at, runs in held.items()
            for i in range(count)
        }
    table: Table = {}
    for at, runs in held.items():
        joined = _joined(runs)
        if len(joined) > 1:
            return None
        start, stop = joined[0] if joined else (extent, extent)
        table[at] = start, stop - start
    strided = any(factor > 1 for _, factor in splits)
    return None if strided and len({size for _, size in table.values()}) > 1 else table


def _chunk(runs: list[tuple[int, int]], count: int, index: int) -> list[tuple[int, int]]:
    """Chunk `index` of `count`, as torch.chunk cuts, of the positions in `runs` (start, stop)."""
    length = sum(stop - start for start, stop in runs)
    size = -(-length // count)
    begin, end = min(index * size, length), min((index + 1) * size, length)
    cut, at = [], 0
    for start, stop in runs:
        low, high = max(begin - at, 0) + start, min(end - at, stop - start) + start
        if low < high:
            cut.append((low, high))
        at += stop - start
    return cut


def _joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, stop in runs:
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((start, stop))
    return joined


def _regular(
    shape: Shape,
    slot: Shape,
    mesh_dims: tuple[int, ...],
    by_dim: dict[int, list[int]],
    tables: dict[int, Table],
) -> list[Region] | None:
    """One region for all shards, if they are equal and their places are a product of strides."""
    split: list[int] = []
    place: dict[int, int] = {}  # of a mesh dimension in `split`
    inner: list[int] = []
    for dim, extent in enumerate(shape):
        if dim in tables:
            table, size = tables[dim], slot[dim]
            counts = [len({at[i] for at in table}) for i in range(len(by_dim[dim]))]
            strides = _strides(table, counts, size)
            if strides is None or extent != size * math.prod(counts):
                return None
            for i in sorted(range(len(counts)), key=lambda i: -strides[i]):
                place[by_dim[dim][i]] = len(split)
                split.append(counts[i])
        inner.append(len(split))
        split.append(slot[dim])
    order = (*(place[d] for d in mesh_dims), *inner)
    index = (slice(None),) * len(mesh_dims)
    return [Region(index, (0,) * len(shape), shape, tuple(split), order)]


def _strides(table: Table, counts: list[int], size: int) -> list[int] | None:
    """Shards between neighbours on each mesh dimension; None if the table does not follow them."""
    if any(length != size for _, length in table.values()):
        return None
    units = [
        table[tuple(int(i == k) for k in range(len(counts)))][0] // size for i in range(len(counts))
    ]
    follows = all(
        start == size * sum(a * u for a, u in zip(at, units, strict=True))
        for at, (start, _) in table.items()
    )
    return units if follows else None


def _ragged(shape: Shape, dim: int, size: int) -> Iterator[Region]:
    """Regions of a dimension cut over one mesh dimension: the full shards, and a shorter last."""
    full, rest = divmod(shape[dim], size)
    zeros, before, behind = (0,) * len(shape), shape[:dim], shape[dim + 1 :]
    if full:
        split = (*before, full, size, *behind)
        order = (dim, *(d for d in range(len(split)) if d != dim))
        yield Region((slice(0, full),), zeros, (*before, full * size, *behind), split, order)
    if rest:
        starts = (*zeros[:dim], full * size, *zeros[dim + 1 :])
        yield Region((full,), starts, (*before, rest, *behind))


def _single(
    shape: Shape,
    mesh_dims: tuple[int, ...],
    counts: tuple[int, ...],
    by_dim: dict[int, list[int]],
    tables: dict[int, Table],
) -> Iterator[Region]:
    """A region for every shard that is not empty."""
    for at in itertools.product(*map(range, counts)):
        coordinate = dict(zip(mesh_dims, at, strict=True))
        box = [
            tables[dim][tuple(coordinate[d] for d in by_dim[dim])] if dim in tables else (0, extent)
            for dim, extent in enumerate(shape)
        ]
        if all(size for _, size in box):
            yield Region(at, tuple(b[0] for b in box), tuple(b[1] for b in box))
