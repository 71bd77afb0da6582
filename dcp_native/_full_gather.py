"""Sharded tensors made whole, many in one collective.

All tensors that travel over the same process groups form one stream of bytes (_byte_buckets.py).
Over several mesh dimensions a bucket is gathered one dimension after the other, the last first,
always in place: the buffer is [coordinates of the gathered dimensions..., bytes] and a rank packs
into its own row.  From there every byte is copied once, to its place in the full tensor.  While a
bucket travels the one before it is unpacked; these two are all the memory beside the results.  On
the CPU the pieces of large tensors that are cut by rows travel without buckets and copies.

Before the first byte the ranks agree that nobody failed and that all mean the same tensors.  What
only torch can gather (pending reductions, shards that are not boxes, tensor subclasses, gradients)
it gathers, tensor by tensor, after that agreement.

Not thread-safe, as collectives are not: one gather of a group at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._state_dict_utils import _gather_state_dict as _torch_gather_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from . import _byte_buckets as buckets
from ._byte_buckets import NOBODY, Bucket, Item, Slot
from ._shard_layout import Layout, Region, Shape, ascending, flat_layout, layout_of, narrowed

WHAT = "gathering a full state dict"
PLAIN = (torch.Tensor, torch.nn.Parameter)


@dataclasses.dataclass(frozen=True)
class Step:
    """A gather over one dimension: of `count` ranks of which this is `index`.

    wanted: the ranks of the group that need what is gathered.
    """

    group: dist.ProcessGroup
    count: int
    index: int
    wanted: frozenset[int]

    def start(self, mine: torch.Tensor, rows: Sequence[torch.Tensor]) -> list[dist.Work]:
        """Sends `mine` to where it is wanted; if that is here, fills the rows of all others."""
        works: list[dist.Work] = []
        if not self.wanted:
            return works
        if mine.device.type == "cpu":  # gloo's own gathers allocate and copy as much once more
            ranks = dist.get_process_group_ranks(self.group)
            if len(self.wanted) > 1:
                for at, rank in enumerate(ranks):
                    row = mine if at == self.index else rows[at]
                    works.append(dist.broadcast(row, rank, self.group, async_op=True))
            elif self.index in self.wanted:
                for at, rank in enumerate(ranks):
                    if at != self.index:
                        works.append(dist.irecv(rows[at], rank, self.group))
            else:
                works.append(dist.isend(mine, ranks[next(iter(self.wanted))], self.group))
        elif len(self.wanted) > 1:
            works.append(dist.all_gather_single(rows, mine, self.group, async_op=True))
        else:
            (wanted,) = self.wanted
            into = list(rows) if self.index == wanted else None
            works.append(dist.gather(mine, into, group=self.group, group_dst=wanted, async_op=True))
        return works


@dataclasses.dataclass
class Whole:
    """A tensor to be made whole: its shard here and, where the result is wanted, its memory."""

    shard: torch.Tensor  # as carrier elements, in the number of dimensions of the layout
    layout: Layout
    memory: torch.Tensor | None
    views: list[tuple[Region, torch.Tensor]] | None = None

    def regions(self) -> list[tuple[Region, torch.Tensor]]:
        if self.views is None:
            memory = buckets.carried(self.memory)
            self.views = [(region, region.view(memory)) for region in self.layout.regions]
        return self.views


class Stream:
    """All tensors that are gathered by the same steps.

    device: of the collectives.  wanted: whether this rank needs the results.
    """

    def __init__(self, steps: list[Step], device: str, wanted: bool) -> None:
        self.device = device
        self._steps = steps
        self._wanted = wanted
        self._slots: list[Slot] = []
        self._tokens: list[int] = []

    def expect(self, token: int) -> None:
        """A tensor of which no bytes travel here: the ranks agree on it, nothing else."""
        self._tokens.append(token)

    def add(self, whole: Whole, token: int) -> None:
        self._tokens.append(token)
        self._slots.append(Slot(whole, whole.layout.slot, whole.shard.element_size()))

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        return [step.group for step in self._steps]

    @property
    def digest(self) -> int:
        return hash(tuple(self._tokens)) >> 1

    def gather(self) -> None:
        if not self._slots or not any(step.wanted for step in self._steps):
            return
        rows = math.prod(step.count for step in self._steps)
        memory = buckets.Memory(self.device)

        def send(bucket: Bucket) -> tuple[list[dist.Work], Bucket, torch.Tensor | None]:
            works = self._send_in_place(bucket)
            if works is not None:
                return works, bucket, None
            filled = memory.take(rows * bucket.length_bytes)
            filled = filled.view(*(step.count for step in self._steps), -1)
            return self._send(bucket, filled), bucket, filled

        stream = buckets.fill(self._slots, buckets.BUCKET_BYTES // rows)
        buckets.in_flight(stream, send, self._receive)

    def _send(self, bucket: Bucket, filled: torch.Tensor) -> list[dist.Work]:
        nested = [filled]
        for step in self._steps:
            nested.append(nested[-1][step.index])
        buckets.pack(bucket, _shard_of, nested[-1])
        works: list[dist.Work] = []
        for step, rows in reversed(list(zip(self._steps, nested[:-1], strict=True))):
            for work in works:
                work.wait()
            works = step.start(rows[step.index], rows)
        return works

    def _send_in_place(self, bucket: Bucket) -> list[dist.Work] | None:
        """A bucket of one piece, between the shards and the result without a copy; None: not so.

        Each rank decides for itself, for what is sent does not depend on it.
        """
        item, whole = bucket.items[0], bucket.items[0].slot.tag
        if len(bucket.items) > 1 or len(self._steps) > 1 or self.device != "cpu":
            return None
        mine = _shard_of(item)
        if mine.nbytes != bucket.length_bytes:
            return None
        (step,) = self._steps
        if not self._wanted:
            # Where several ranks want it, it is broadcast, and needs room here too.
            return step.start(mine.view(torch.uint8), ()) if len(step.wanted) == 1 else None
        region, target = whole.regions()[0]
        if target.device.type != "cpu" or region.index != (slice(None),):
            return None
        none, sizes = (0,) * (target.ndim - len(item.sizes)), (step.count, *item.sizes)
        pieces = narrowed(target, (*none, *item.starts), sizes)
        if not pieces[0].is_contiguous():
            return None
        rows = [piece.view(-1).view(torch.uint8) for piece in pieces]
        works = step.start(mine.view(torch.uint8), rows)
        pieces[step.index].copy_(mine.view(item.sizes))
        return works

    def _receive(self, works: list[dist.Work], bucket: Bucket, filled: torch.Tensor | None) -> None:
        for work in works:
            work.wait()
        if not self._wanted or filled is None:
            return
        # Mostly one device; a bucket goes to each of them in one transfer.
        for device in {item.slot.tag.memory.device for item in bucket.items}:
            landed = filled if device.type == filled.device.type else filled.to(device)
            copies = buckets.Copies()
            for item, shards in buckets.unpack(bucket, landed, filled.shape[:-1]):
                if item.slot.tag.memory.device == device:
                    _place(item, shards, copies)
            copies.make()


def _shard_of(item: Item) -> torch.Tensor:
    return buckets.piece_of(item, item.slot.tag.shard)


def _place(item: Item, shards: torch.Tensor, copies: buckets.Copies) -> None:
    """Copies what all ranks sent for `item`, [*coordinates, *item.sizes], into the result."""
    for region, target in item.slot.tag.regions():
        source = shards[region.index]
        lead = target.ndim - len(item.sizes)
        if not item.is_whole or item.sizes != target.shape[lead:]:  # else all of a largest shard
            sizes = tuple(
                min(size, extent - start)
                for start, size, extent in zip(
                    item.starts, item.sizes, target.shape[lead:], strict=True
                )
            )
            if min(sizes) <= 0:
                continue
            sizes, none = (*target.shape[:lead], *sizes), (0,) * lead
            target = narrowed(target, (*none, *item.starts), sizes)
            source = narrowed(source, (0,) * len(sizes), sizes)
        copies.add(target, source)


class Gathering:
    """Collects the tensors of a state dict, then makes them whole in few collectives.

    destinations: global ranks that get results; None: all.
    """

    def __init__(
        self,
        pg: dist.ProcessGroup | None,
        device: torch.device | None,
        destinations: frozenset[int] | None,
        to_cpu: bool,
    ) -> None:
        self._pg = pg
        self._device = device
        self._destinations = destinations
        self._wanted = destinations is None or dist.get_rank() in destinations
        self._to_cpu = to_cpu
        self._streams: dict[tuple, Stream] = {}
        self._of_mesh: dict[tuple[int, Shape], Stream] = {}
        self._results: list[Any] = []
        self._by_torch: list[int] = []

    def add(self, tensor: torch.Tensor) -> None:
        """The next tensor of the state dict."""
        place = len(self._results)
        self._results.append(tensor)
        if isinstance(tensor, ShardedTensor):
            self._results[place] = self._add_sharded(tensor)
        elif isinstance(tensor, DTensor):
            self._results[place] = self._add_dtensor(tensor)
            if self._results[place] is tensor:
                self._by_torch.append(place)

    def run(self, failure: Exception | None) -> list[Any]:
        """The whole tensors in the order they came: the collective part.

        Raises:
            Exception: `failure`, what this rank met before, once the others know of it.
            RuntimeError: on the others.
        """
        failed = self._agree(NOBODY if failure is None else dist.get_rank())
        if failure is not None:
            raise failure
        buckets.raise_if(failed, WHAT)
        for stream in self._streams.values():
            stream.gather()
        for place in self._by_torch:
            whole = {"": self._results[place]}
            self._results[place] = _torch_gather_state_dict(whole, pg=self._pg)[""]
        return self._results

    def _agree(self, failed: int) -> int:
        """Over all groups there and back, so that what one rank has to say reaches every other.

        Each group is asked twice, also the last one, which may be another rank's first; in an order
        that all ranks share, also where they met the tensors in another one.
        """
        meant: dict[tuple[int, str, str], tuple[dist.ProcessGroup, list[int]]] = {}
        for stream in self._streams.values():
            for group in stream.groups:
                key = (len(group.group_name), group.group_name, stream.device)
                meant.setdefault(key, (group, []))[1].append(stream.digest)
        there = sorted(meant)
        for key in (*there, *reversed(there)):
            group, digests = meant[key]
            failed = buckets.agree(group, key[-1], failed, hash(tuple(digests)) >> 1)
        return failed

    def _add_dtensor(self, tensor: DTensor) -> torch.Tensor | None:
        """The result, still empty; the tensor itself if torch has to gather it."""
        spec, shape, local = tensor._spec, tuple(tensor.shape), tensor._local_tensor
        mesh = spec.mesh
        if isinstance(local, AsyncCollectiveTensor):
            local = local.wait()
        coordinate = mesh.get_coordinate()
        simple = (
            type(local) in PLAIN
            and local.layout == torch.strided
            and local.device.type != "meta"
            and not local.is_quantized
            and not (tensor.requires_grad and torch.is_grad_enabled())
        )
        layout = layout_of(spec, shape) if simple and coordinate is not None else None
        token = buckets.token(shape, local.dtype, spec.placements)
        if layout is None:
            if coordinate is not None:
                self._stream(mesh, tuple(range(mesh.ndim)), coordinate).expect(token)
            return tensor
        if not layout.mesh_dims:
            if local.device.type != mesh.device_type:
                local = local.to(mesh.device_type)
            return local.view_as(local) if torch.is_grad_enabled() else local
        stream = self._stream(mesh, layout.mesh_dims, coordinate)
        _, sizes = layout.box(shape, coordinate)
        if tuple(local.shape) != sizes:
            raise ValueError(
                f"{WHAT}: a DTensor of shape {shape} placed {spec.placements} has a local tensor"
                f" of shape {tuple(local.shape)}, not {sizes}"
            )
        result = self._empty(shape, local.dtype, mesh.device_type)
        if 0 not in shape:
            stream.add(Whole(buckets.carried(local.detach()), layout, result), token)
        return result

    def _add_sharded(self, tensor: ShardedTensor) -> torch.Tensor | None:
        """As torch: the first shards of all ranks, in turn, each cut or padded to one length."""
        pg = self._pg or dist.distributed_c10d._get_default_group()
        device = (self._device or buckets.default_device(pg)).type
        shards = tensor.local_shards()
        landing = shards[0].tensor.device if shards else torch.device("cpu")
        count, rank = dist.get_world_size(pg), dist.get_rank(pg)
        key = (pg.group_name, device, True)
        if key not in self._streams:
            wanted = frozenset(
                i
                for i, r in enumerate(dist.get_process_group_ranks(pg))
                if self._destinations is None or r in self._destinations
            )
            steps = [Step(pg, count, rank, wanted)]
            self._streams[key] = Stream(steps, device, self._wanted)
        stream, shape = self._streams[key], tuple(tensor.size())
        if 0 in shape:
            stream.expect(buckets.token(shape, tensor.dtype))
            return self._empty(shape, tensor.dtype, landing)
        slot = math.ceil(shape[0] / count) * math.prod(shape) // shape[0]
        held = shards[0].tensor if shards else torch.zeros(0, dtype=tensor.dtype)
        shard = held.detach().flatten()
        if shard.numel() > slot:
            raise ValueError(f"{WHAT}: a shard of a ShardedTensor has more than {slot} elements")
        result = self._empty(shape, shard.dtype, landing)
        memory = None if result is None else result.view(-1)
        whole = Whole(buckets.carried(shard), flat_layout(math.prod(shape), slot), memory)
        stream.add(whole, buckets.token(shape, shard.dtype))
        return result

    def _empty(
        self, shape: Shape, dtype: torch.dtype, device: str | torch.device
    ) -> torch.Tensor | None:
        if not self._wanted:
            return None
        return torch.empty(shape, dtype=dtype, device="cpu" if self._to_cpu else device)

    def _stream(self, mesh: DeviceMesh, mesh_dims: Shape, coordinate: list[int]) -> Stream:
        stream = self._of_mesh.get((id(mesh), mesh_dims))
        if stream is None:
            steps = list(self._steps(mesh, mesh_dims, coordinate))
            # Steps over other meshes number ranks in another way; nothing is gathered by them.
            names = (step.group.group_name for step in steps)
            key = (*names, mesh.device_type, ascending(mesh))
            if key not in self._streams:  # equal meshes may be many objects
                self._streams[key] = Stream(steps, mesh.device_type, self._wanted)
            stream = self._of_mesh[id(mesh), mesh_dims] = self._streams[key]
        return stream

    def _steps(self, mesh: DeviceMesh, mesh_dims: Shape, here: list[int]) -> Iterator[Step]:
        """The gathers over the mesh dimensions, made from the last to the first.

        Behind the gather over a dimension a rank needs what it has got if it agrees with a
        destination in this dimension and those gathered before it.
        """
        mesh_dims = tuple(d for d in mesh_dims if mesh.size(d) > 1)
        ends: list[list[int]] = []
        if self._destinations is not None:
            ends = [
                end
                for rank in self._destinations
                for end in (mesh.mesh == rank).nonzero().tolist()
                if all(end[d] == here[d] for d in range(mesh.ndim) if d not in mesh_dims)
            ]
        for at, d in enumerate(mesh_dims):
            behind = mesh_dims[at + 1 :]
            wanted = frozenset(end[d] for end in ends if all(end[b] == here[b] for b in behind))
            if self._destinations is None:
                wanted = frozenset(range(mesh.size(d)))
            yield Step(mesh.get_group(d), mesh.size(d), here[d], wanted)
