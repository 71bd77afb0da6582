"""A SavePlanner of the program's own, around the native writer.

Its hooks run as torch runs them: in torch's order, with torch's arguments, on the calling thread.
What they decide (which rank writes what, the Metadata) is taken as it is; layout, bytes and commit
are the core's.  Ranks exchange pickled plans as torch's do, but as messages of the native group, so
that a hook that fails on any rank is heard of on all of them at one step.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import math
import pickle
import warnings
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import (
    CURRENT_DCP_VERSION,
    FileSystemWriter,
    _StorageInfo,
    _StoragePrefix,
)
from torch.distributed.checkpoint.metadata import (
    STATE_DICT_TYPE,
    Metadata,
    MetadataIndex,
    StorageMeta,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from . import _native

__all__ = ["PythonPlanning", "set_up_planner"]

_Row = tuple[MetadataIndex, _StorageInfo]


class PythonPlanning:
    """The planning of one save by Python hooks.

    Args:
        planner: None where another rank of the group has one; then torch's default plans here.
    """

    def __init__(
        self,
        native: _native.Save,
        writer: FileSystemWriter,
        planner: SavePlanner | None,
        group: _native.Group,
        use_collectives: bool,
    ) -> None:
        self.metadata: Metadata | None = None
        """What the planner made of it, complete, on the rank that commits."""
        self._native = native
        self._writer = writer
        self._planner = DefaultSavePlanner() if planner is None else planner
        self._rank = group.rank
        self._size = group.size
        self._decides = group.rank == group.coordinator_rank
        self._use_collectives = use_collectives
        self._local_plan: SavePlan | None = None
        self._given: STATE_DICT_TYPE = {}

    # ---- hooks, as torch's _save_state_dict calls them ----

    def make_local_plan(self, state_dict: STATE_DICT_TYPE) -> None:
        """``set_up_planner`` and ``create_local_plan``."""
        planner, writer = self._planner, self._writer
        self._given = state_dict
        set_up_planner(planner, state_dict, writer.storage_meta(), self._decides)
        writer.set_up_storage_writer(
            self._decides, rank=self._rank, use_collectives=self._use_collectives
        )
        plan = planner.create_local_plan()
        if not self._use_collectives:
            prefix = _StoragePrefix(f"__{self._rank}_")
            plan = dataclasses.replace(plan, storage_data=prefix)
        self._local_plan = plan

    def _global_step(self, plans: list[SavePlan]) -> list[SavePlan]:
        plans, self.metadata = self._planner.create_global_plan(plans)
        plans = self._writer.prepare_global_plan(plans)
        ranks = self._size if self._use_collectives else 1
        if len(plans) != ranks:
            raise ValueError(f"create_global_plan gave {len(plans)} plans for {ranks} ranks")
        return plans

    def _finish(self, plan: SavePlan) -> list[_Row]:
        """``finish_plan``, ``resolve_data`` of all that is left; where it will lie."""
        items = list(self._planner.finish_plan(plan).items)
        if self._writer.single_file_per_rank:  # torch's writer asks for bytes first
            items.sort(key=lambda item: item.type != WriteItemType.BYTE_IO)
        empty: set[int] = set()
        own = _storages(self._given, getattr(self._planner, "state_dict", None))

        def resolve(item: WriteItem) -> Any:
            data = self._planner.resolve_data(item)
            if item.type != WriteItemType.BYTE_IO:
                return _private(_mistakable(data, item), own.get(item.index.fqn, ()))
            if not isinstance(data, io.BytesIO):
                raise AssertionError("Data must be io.BytesIO for BYTE_IO write items")
            if data.getbuffer().nbytes == 0:
                empty.add(id(item))
            return data

        self._native.add_items(
            items,
            resolve,
            rank=self._rank,
            thread_count=self._writer.thread_count,
            single_file_per_rank=self._writer.single_file_per_rank,
        )
        self._given = {}
        return [
            (items[i].index, _StorageInfo(name, offset, 0 if id(items[i]) in empty else length))
            for i, name, offset, length in self._native.places()
        ]

    def _complete(self, rows: Iterable[list[_Row]]) -> None:
        """What torch's ``FileSystemWriter.finish`` adds to the planner's Metadata."""
        metadata = self.metadata
        assert metadata is not None
        metadata.version = CURRENT_DCP_VERSION
        storage_data: dict[MetadataIndex, _StorageInfo] = {}
        for of_rank in rows:
            storage_data.update(of_rank)
        metadata.storage_data = storage_data
        metadata.storage_meta = self._writer.storage_meta()
        self._native.set_metadata(pickle.dumps(metadata))

    # ---- one rank alone ----

    def decide_alone(self) -> None:
        """Everything behind ``make_local_plan``, of a rank that asks no other."""
        assert self._local_plan is not None
        (plan,) = self._global_step([self._local_plan])
        self._complete([self._finish(plan)])

    # ---- all ranks ----

    def decide(self, state_dict: STATE_DICT_TYPE, fail: Callable[[BaseException], None]) -> str:
        """Collective, after the vote: the same, between the ranks.  ``settle`` has to follow.

        Every rank makes all calls; what fails here goes to ``fail`` and costs the others nothing
        but their part.

        Returns:
            Torch's name of the step that settles it, the same on all ranks.
        """
        if self._size == 1:  # nothing is sent, so nothing has to be pickled
            plans = self._try(fail, lambda: self._global_step([self._own_plan(state_dict)]))
            if plans is not None:
                self._try(fail, lambda: self._complete([self._finish(plans[0])]))
            return "plan" if plans is None else "write"
        ours = self._try(fail, self._send_plan, state_dict)
        sent = self._native.gather(ours or b"")
        parts = None
        if sent is not None and all(sent):
            parts = self._try(fail, self._make_parts, sent)
        part = self._native.scatter(parts)
        rows = self._try(fail, self._send_rows, part) if part else b""
        gathered = self._native.gather(rows or b"")
        if gathered is not None and all(gathered):
            self._try(fail, self._take_rows, gathered)
        return "write" if part else "plan"

    @staticmethod
    def _try(fail: Callable[[BaseException], None], step: Callable, *args: Any) -> Any:
        try:
            return step(*args)
        except BaseException as error:
            fail(error)
            return None

    def _own_plan(self, state_dict: STATE_DICT_TYPE) -> SavePlan:
        self.make_local_plan(state_dict)
        assert self._local_plan is not None
        return self._local_plan

    def _send_plan(self, state_dict: STATE_DICT_TYPE) -> bytes:
        return pickle.dumps(self._own_plan(state_dict))

    def _make_parts(self, plans: list[bytes]) -> tuple[bytes, ...]:
        return tuple(map(pickle.dumps, self._global_step([pickle.loads(plan) for plan in plans])))

    def _send_rows(self, part: bytes) -> bytes:
        return pickle.dumps(self._finish(pickle.loads(part)))

    def _take_rows(self, gathered: list[bytes]) -> None:
        self._complete(pickle.loads(rows) for rows in gathered)


def set_up_planner(
    planner: SavePlanner,
    state_dict: STATE_DICT_TYPE,
    storage_meta: StorageMeta | None,
    is_coordinator: bool,
) -> None:
    """The hook, with the arguments that it takes."""
    if "storage_meta" in inspect.signature(planner.set_up_planner).parameters:
        planner.set_up_planner(
            state_dict=state_dict, storage_meta=storage_meta, is_coordinator=is_coordinator
        )
        return
    warnings.warn(
        "The function definition for SavePlanner.set_up_planner has been updated to "
        "include the storage_meta argument. Please update your implementation to include "
        "this parameter.",
        stacklevel=3,
    )
    planner.set_up_planner(state_dict, is_coordinator)  # type: ignore[arg-type]


def _leaves(value: Any, name: str = "") -> Iterable[tuple[str, torch.Tensor]]:
    """Tensors of a state dict, by the names that torch's flattening gives them."""
    if isinstance(value, DTensor):
        yield name, value._local_tensor
    elif isinstance(value, ShardedTensor):
        yield from ((name, shard.tensor) for shard in value.local_shards())
    elif isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (Mapping, list, tuple)):
        for key, one in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _leaves(one, f"{name}.{key}" if name else str(key))


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether the core may read its memory later; all others it copies or serialises at once."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device.type in ("cpu", "cuda")
        and not tensor.is_quantized
    )


def _storages(*state_dicts: Any) -> dict[str, set[int]]:
    """Where the memory of each name lies."""
    storages: dict[str, set[int]] = {}
    for state_dict in state_dicts:
        for name, tensor in _leaves(state_dict):
            if _is_plain(tensor):
                storages.setdefault(name, set()).add(tensor.untyped_storage().data_ptr())
    return storages


def _mistakable(data: Any, item: WriteItem) -> Any:
    """``data``, by torch.save where a native record of it could be taken for one of the tensor that
    the item promises: readers know ours by its length."""
    promised = item.tensor_data
    if promised is None or not isinstance(data, torch.Tensor):
        return data
    sizes, dtype = promised.chunk.sizes, promised.properties.dtype
    if (data.shape == sizes and data.dtype == dtype) or (
        data.numel() * data.element_size() != math.prod(sizes) * dtype.itemsize
    ):
        return data
    record = io.BytesIO()
    torch.save(data.detach().cpu().clone(), record)
    return record


def _private(data: Any, own: Container[int]) -> Any:
    """``data``, in memory that stays as it is until the next item was asked for and longer: that of
    the leaf of its name, or a copy on the host.  Planners may convert every tensor in one buffer,
    which may be another leaf."""
    if not isinstance(data, torch.Tensor):
        return data
    data = data.detach()  # of a subclass of Parameter: a plain tensor
    if not _is_plain(data) or data.untyped_storage().data_ptr() in own:
        return data
    return data.clone() if data.is_cpu else data.cpu()
