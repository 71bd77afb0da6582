"""Full state dicts cut into the shards that each rank holds: from rank 0's memory, or from its own.

From rank 0: one message says what there is, then the tensors follow as one stream of bytes in
buckets (_byte_buckets.py), and every rank copies its own boxes out of each bucket.  No rank but
rank 0 ever holds more of the model than its share and two buckets.  A plain tensor that is larger
than a bucket is received where it will stay.  Before the first byte all ranks agree that nobody
failed to make room, or before.

Where every rank has the full state nothing is sent: a shard is a copy of a box.

Not thread-safe, as collectives are not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._state_dict_utils import _TensorInfo
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from . import _byte_buckets as buckets
from ._byte_buckets import NOBODY, Bucket, Item, Slot
from ._shard_layout import Shape, ascending, layout_of, narrowed

WHAT = "broadcasting a full state dict"


def _broadcast_state_dict(
    full_state_dict: dict[str, Any],
    local_state_dict: dict[str, Any],
    device: torch.device,
    pg: dist.ProcessGroup | None = None,
    strict: bool = False,
    cpu_offload: bool = False,
) -> None:
    """Puts the values of rank 0's full state dict into the local state dict of every rank.

    Both are flat.  Only keys of the local one are set: tensors are replaced by tensors on `device`,
    DTensors are filled, or made where they are on the meta device; 0-d tensors come on the CPU.
    strict: local keys that rank 0 does not have are removed.  cpu_offload: results go to the CPU.
    Mirrors torch.distributed._state_dict_utils._broadcast_state_dict.
    """
    entries, failure = _exchanged(full_state_dict, pg)
    infos = {key: value for key, value in entries.items() if isinstance(value, _TensorInfo)}
    broadcast = _Broadcast(full_state_dict, local_state_dict, device, pg, cpu_offload)
    broadcast.run(infos, failure)
    for key, value in entries.items():
        if key not in infos and key in local_state_dict:
            local_state_dict[key] = value
    if strict:
        for key in local_state_dict.keys() - entries.keys():
            local_state_dict.pop(key)


@contextlib.contextmanager
def before_broadcast(is_broadcast: bool = True) -> Iterator[None]:
    """Around what a rank does before `_broadcast_state_dict` in the default group: if it fails, the
    broadcast fails on the other ranks instead of waiting for this one.
    """
    try:
        yield
    except Exception as failure:
        if is_broadcast and dist.is_initialized():
            pg = dist.distributed_c10d._get_default_group()
            _exchanged({}, pg, failure)
            _agree(pg, failure)
        raise


def _broadcast_tensors(
    full_state_dict: dict[str, Any],
    local_state_dict: dict[str, Any],
    keys: list[str],
    device: torch.device,
    pg: dist.ProcessGroup | None = None,
) -> None:
    """As `_broadcast_state_dict` for the tensors under `keys`, of which every rank knows the shape.

    full_state_dict: the tensors on rank 0, their size and dtype (_TensorInfo) elsewhere.
    Mirrors torch.distributed._state_dict_utils._broadcast_tensors.
    """
    infos = {}
    for key in keys:
        value = full_state_dict[key]
        if dist.get_rank() == 0 and not isinstance(value, torch.Tensor):
            raise AssertionError("full_state must be a torch.Tensor")
        infos[key] = _TensorInfo(
            value.size() if isinstance(value, torch.Tensor) else value.size, value.dtype
        )
    _Broadcast(full_state_dict, local_state_dict, device, pg).run(infos)


def _distribute_tensors(
    local_state_dict: dict[str, Any],
    keys: list[str],
    device: torch.device,
    pg: dist.ProcessGroup | None = None,
) -> None:
    """Replaces every (DTensor, full tensor) under `keys` by the DTensor with its part of the other.

    Mirrors torch.distributed._state_dict_utils._distribute_tensors.
    """
    for key in keys:
        pair = local_state_dict.get(key)
        if pair is None or torch.is_tensor(pair):
            continue
        local, full = pair
        starts, sizes = _box(tuple(full.shape), local)
        part = narrowed(full, starts, sizes).detach()
        if local.is_meta:
            part = part.clone().to(local.device_mesh.device_type)
            local_state_dict[key] = _wrapped(part, local, local.shape, local.stride())
        else:
            local.to_local().copy_(part)
            local_state_dict[key] = local


def _distribute_state_dict(
    full_state_dict: dict[str, Any],
    local_state_dict: dict[str, Any],
    device: torch.device,
    pg: dist.ProcessGroup | None = None,
) -> None:
    """Puts the values of the full state dict, which every rank has, into the local one.

    Nothing is communicated: a rank's shards are of its own full tensors, also where the ranks hold
    different ones. (On meshes whose ranks do not ascend torch scatters those of one rank.)
    Mirrors torch.distributed._state_dict_utils._distribute_state_dict.
    """
    for key, value in full_state_dict.items():
        if not torch.is_tensor(value):
            local_state_dict[key] = value
        elif value.dim() == 0:
            local_state_dict[key] = value.cpu()
        elif (local := local_state_dict.get(key)) is not None:
            full = value.detach()
            local_state_dict[key] = (
                _sharded(full, local, device) if isinstance(local, DTensor) else full.to(device)
            )


def _sharded(full: torch.Tensor, like: DTensor, device: torch.device) -> DTensor:
    """This rank's part of a full tensor, placed as `like`."""
    mesh, shape = like.device_mesh, tuple(full.shape)
    coordinate = mesh.get_coordinate()
    layout = None
    if type(full) is torch.Tensor and coordinate is not None and full.device.type != "meta":
        layout = layout_of(like._spec, shape)
    if layout is None:
        source = None if ascending(mesh) else 0
        return distribute_tensor(full.to(device), mesh, like.placements, src_data_rank=source)
    if device.type != mesh.device_type:
        device = torch.device(mesh.device_type)
    starts, sizes = layout.box(shape, coordinate)
    part = narrowed(full, starts, sizes).to(device)
    replicated = all(isinstance(p, Replicate) for p in like.placements)
    if part.untyped_storage().data_ptr() == full.untyped_storage().data_ptr() and not replicated:
        part = part.clone(memory_format=torch.contiguous_format)
    return _wrapped(part.contiguous(), like, full.shape, full.stride())


def _wrapped(part: torch.Tensor, like: DTensor, shape: torch.Size, stride: Shape) -> DTensor:
    """A DTensor of a local part, placed as `like`."""
    spec = like._spec
    meta = TensorMeta(torch.Size(shape), tuple(stride), part.dtype)
    if spec.tensor_meta != meta:
        spec = DTensorSpec(spec.mesh, spec.placements, tensor_meta=meta)
    return DTensor(part, spec, requires_grad=False)


def _box(shape: Shape, local: DTensor) -> tuple[Shape, Shape]:
    """(starts, sizes) of this rank's part of a full tensor of `shape`."""
    mesh = local.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # nothing of it is here
        return (0,) * len(shape), (0,) * len(shape)
    layout = layout_of(local._spec, shape)
    if layout is not None:
        return layout.box(shape, coordinate)
    sizes, starts = compute_local_shape_and_global_offset(shape, mesh, local.placements)
    return tuple(starts), tuple(sizes)


@dataclasses.dataclass(frozen=True)
class _Failed:
    """What rank 0 sends in place of a description that it could not make."""

    reason: str


def _description(value: Any) -> Any:
    if not torch.is_tensor(value):
        return value
    return value.cpu() if value.dim() == 0 else _TensorInfo(value.size(), value.dtype)


def _exchanged(
    full_state_dict: Mapping[str, Any],
    pg: dist.ProcessGroup | None,
    failure: Exception | None = None,
) -> tuple[dict[str, Any], Exception | None]:
    """(what rank 0 has, tensors as their size and dtype; the error met here), one broadcast.

    failure: what this rank has met before.

    Raises:
        Exception: rank 0 failed, and all ranks know: its own exception there, and on a rank with a
            failure of its own that one.
        RuntimeError: rank 0 failed, on the others.
    """
    entries: Any = {}
    message = [b""]
    is_source = dist.get_rank() == 0
    if is_source:
        try:
            if failure is not None:
                raise failure
            entries = {key: _description(value) for key, value in full_state_dict.items()}
            message = [pickle.dumps(entries)]
        except Exception as error:
            failure = error
            message = [pickle.dumps(_Failed(f"{type(error).__name__}: {error}"))]
    dist.broadcast_object_list(message, src=0, group=pg)
    if not is_source:
        try:
            entries = pickle.loads(message[0])
        except Exception as error:
            return {}, failure or error
        if isinstance(entries, _Failed):
            raise failure or RuntimeError(f"{WHAT}: rank 0 failed: {entries.reason}")
    elif failure is not None:
        raise failure
    return entries, failure


def _agree(pg: dist.ProcessGroup, failure: Exception | None, digest: int = 0) -> None:
    """Goes on if no rank has failed and all mean the same; else raises `failure` or what it was."""
    failed = NOBODY if failure is None else dist.get_rank()
    failed = buckets.agree(pg, buckets.default_device(pg), failed, digest)
    if failure is not None:
        raise failure
    buckets.raise_if(failed, WHAT)


@dataclasses.dataclass
class _Target:
    """Where one tensor comes from, if this is rank 0, and where it goes on this rank.

    memory: is filled with the box (starts, sizes) of the full tensor; None: nothing is.
    like: a DTensor on the meta device that is made anew around `memory`.
    """

    info: _TensorInfo
    starts: Shape
    sizes: Shape
    source: torch.Tensor | None = None
    memory: torch.Tensor | None = None
    result: torch.Tensor | None = None
    like: DTensor | None = None


class _Broadcast:
    """One broadcast of many tensors from rank 0's `full` into `local`."""

    def __init__(
        self,
        full: Mapping[str, Any],
        local: dict[str, Any],
        device: torch.device,
        pg: dist.ProcessGroup | None,
        cpu_offload: bool = False,
    ) -> None:
        self._full = full
        self._local = local
        self._device = device
        self._landing = torch.device("cpu") if cpu_offload else device
        self._cpu_offload = cpu_offload
        self._pg = dist.distributed_c10d._get_default_group() if pg is None else pg
        types = self._pg._device_types
        self._wire = device if device.type in {d.type for d in types} else types[0]
        self._is_source = dist.get_rank() == 0

    def run(self, infos: Mapping[str, _TensorInfo], failure: Exception | None = None) -> None:
        """Collective: `failure` is what this rank has met before, raised when all ranks know."""
        targets: dict[str, _Target] = {}
        digest = 0
        try:
            for key, info in infos.items():
                digest = buckets.token((digest, *info.size), info.dtype)
                targets[key] = self._target(key, info)
        except Exception as error:  # told to all ranks before anyone waits for this one
            failure = failure or error
        _agree(self._pg, failure, digest)
        self._transfer(
            [
                Slot(target, tuple(target.info.size), target.info.dtype.itemsize)
                for target in targets.values()
                if 0 not in target.info.size
            ]
        )
        for key, target in targets.items():
            if target.result is not None:
                self._local[key] = self._finished(target)

    def _target(self, key: str, info: _TensorInfo) -> _Target:
        shape = tuple(info.size)
        target = _Target(info, (0,) * len(shape), shape)
        full = None
        if self._is_source:
            full = self._full[key].detach()
            if type(full) is not torch.Tensor or full.is_meta or full.layout != torch.strided:
                raise ValueError(f"{WHAT}: {key} is not a plain tensor with values: {type(full)}")
            target.source = buckets.carried(full)
        local = self._local.get(key)
        if isinstance(local, DTensor):
            self._target_dtensor(key, target, local)
        elif local is None:
            if self._cpu_offload:
                raise KeyError(key)
        elif full is None:
            target.result = torch.empty(shape, dtype=info.dtype, device=self._landing)
            target.memory = target.result
        else:
            target.result = full.to(self._landing)
            travelled = {self._wire.type, self._device.type} != {self._landing.type}
            if travelled and target.result.data_ptr() == full.data_ptr():
                target.result = full.clone()  # torch's has been on another device and back
        return target

    def _target_dtensor(self, key: str, target: _Target, local: DTensor) -> None:
        shape = tuple(target.info.size)
        target.starts, target.sizes = _box(shape, local)
        if local.is_meta:
            target.like = local
            target.memory = target.result = torch.empty(
                target.sizes, dtype=target.info.dtype, device=self._landing
            )
            return
        target.result = local
        if local.device_mesh.get_coordinate() is not None:
            target.memory = local.to_local().detach()
            if tuple(target.memory.shape) != target.sizes:
                raise ValueError(
                    f"{WHAT}: of {key}, whose shape is {shape}, this rank holds {target.sizes}, but"
                    f" its local tensor is of shape {tuple(target.memory.shape)}"
                )

    def _transfer(self, slots: list[Slot]) -> None:
        memory = buckets.Memory(self._wire)

        def send(bucket: Bucket) -> tuple[dist.Work | None, Bucket, torch.Tensor | None]:
            landed = None if self._is_source else self._in_place(bucket)
            data = memory.take(bucket.length_bytes) if landed is None else landed
            if self._is_source:
                data = buckets.packed(
                    bucket, lambda item: buckets.piece_of(item, item.slot.tag.source), data
                )
            work = dist.broadcast(data, src=0, group=self._pg, async_op=True)
            return work, bucket, data if landed is None else None

        buckets.in_flight(buckets.fill(slots, buckets.BUCKET_BYTES), send, self._receive)

    def _in_place(self, bucket: Bucket) -> torch.Tensor | None:
        """The memory that the only piece of a bucket is for, if the bytes may arrive there."""
        item, target = bucket.items[0], bucket.items[0].slot.tag
        memory = target.memory
        if (
            len(bucket.items) > 1
            or memory is None
            or target.sizes != item.slot.shape
            or memory.dtype != target.info.dtype
            or memory.device.type != self._wire.type
            or not memory.is_contiguous()
        ):
            return None
        piece = narrowed(buckets.carried(memory), item.starts, item.sizes)
        return piece.view(-1).view(torch.uint8) if piece.nbytes == bucket.length_bytes else None

    def _receive(self, work: dist.Work | None, bucket: Bucket, data: torch.Tensor | None) -> None:
        if work is not None:  # None: this rank is not of the group
            work.wait()
        taken = [item for item in bucket.items if item.slot.tag.memory is not None]
        if data is None or not taken:  # None: it arrived in place
            return
        landed = data if self._landing.type == data.device.type else data.to(self._landing)
        copies = buckets.Copies()
        for item, piece in buckets.unpack(bucket, landed):
            if item.slot.tag.memory is not None:
                _place(item, piece, copies)
        copies.make()

    def _finished(self, target: _Target) -> torch.Tensor:
        if target.like is not None:
            like, part = target.like, target.memory
            if not self._cpu_offload and part.device.type != like.device_mesh.device_type:
                part = part.to(like.device_mesh.device_type)
            return _wrapped(part, like, like.shape, like.stride())
        return target.result.cpu() if self._cpu_offload else target.result


def _place(item: Item, piece: torch.Tensor, copies: buckets.Copies) -> None:
    """Copies what of `piece`, the item's box of the full tensor, belongs to this rank."""
    target: _Target = item.slot.tag
    memory = target.memory
    if memory.dtype == target.info.dtype:
        memory = buckets.carried(memory)
    else:
        piece = piece.view(target.info.dtype)
    if item.starts != target.starts or item.sizes != target.sizes:
        low = tuple(map(max, item.starts, target.starts))
        sizes = tuple(
            min(start + size, target_start + target_size) - begin
            for start, size, target_start, target_size, begin in zip(
                item.starts, item.sizes, target.starts, target.sizes, low, strict=True
            )
        )
        if min(sizes) <= 0:
            return
        memory = narrowed(memory, [a - b for a, b in zip(low, target.starts, strict=True)], sizes)
        piece = narrowed(piece, [a - b for a, b in zip(low, item.starts, strict=True)], sizes)
    copies.add(memory, piece)
